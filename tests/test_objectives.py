"""Distillation's objectives: unbiased, differentiated rightly, and able to find what is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from drafts.residual import Moves
from osd.objectives import (
    Student,
    eu_mismatch,
    fisher_metric,
    forward_kl,
    gamma_deviance,
    latent_factor_nll,
    move_basis,
    sampled_eu,
)
from osd.shards import conversation_key, shard_of
from osd.students import places_of, quadrature


def plain_kl(
    h: torch.Tensor, head: torch.Tensor, t: torch.Tensor, t_head: torch.Tensor
) -> torch.Tensor:
    logp = torch.log_softmax(t @ t_head.T, -1)
    logq = torch.log_softmax(h @ head.T, -1)
    return (logp.exp() * (logp - logq)).sum(-1).mean()


@given(n=st.integers(1, 300), own_head=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_forward_kl_in_blocks_is_the_plain_one(n: int, own_head: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    t_head, teacher = random(50, 8), random(n, 8)
    h, head = random(n, 6).requires_grad_(), random(50, 6).requires_grad_(own_head)
    loss = forward_kl(Student(h, head), teacher, t_head)
    expected = plain_kl(h, head, teacher, t_head)
    assert torch.allclose(loss, expected, atol=1e-5)
    wanted = (h, head) if own_head else (h,)
    for got, want in zip(
        torch.autograd.grad(3 * loss, wanted),
        torch.autograd.grad(3 * expected, wanted),
        strict=True,
    ):
        assert torch.allclose(got, want, atol=1e-5)


def test_the_expected_gradient_is_that_of_the_posterior_mean_for_the_forward_kl_only() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(20, 5, generator=generator)
    student = torch.randn(1, 5, generator=generator).requires_grad_()
    thetas = torch.randn(1, 5, generator=generator) + 1.5 * torch.randn(
        3000, 1, 5, generator=generator
    )
    p_mean = torch.softmax(thetas @ head.T, -1).mean(0)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, student)[0]

    def errors(one_draw: Any, of_mean: torch.Tensor) -> float:
        mean = torch.stack([gradient(one_draw(theta)) for theta in thetas]).mean(0)
        return float((mean - of_mean).norm() / of_mean.norm())

    def logq() -> torch.Tensor:
        return torch.log_softmax(student @ head.T, -1)

    forward = gradient((p_mean * (p_mean.log() - logq())).sum())
    reverse = gradient((logq().exp() * (logq() - p_mean.log())).sum())
    student_of = Student(student, head)
    # The same draws on both sides: linear in the teacher, so exact but for rounding.
    assert errors(lambda theta: forward_kl(student_of, theta, head), forward) < 1e-4
    assert errors(lambda theta: plain_kl(theta, head, student, head), reverse) > 0.1


def test_one_draw_a_step_is_unbiased_within_its_noise() -> None:
    """Draws on one side only, and the posterior mean from others."""
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(20, 5, generator=generator)
    student = torch.randn(1, 5, generator=generator).requires_grad_()
    thetas = torch.randn(200_000, 5, generator=generator)
    p_mean = torch.softmax(thetas @ head.T, -1).mean(0, keepdim=True)
    logq = torch.log_softmax(student @ head.T, -1)
    (expected,) = torch.autograd.grad(-(p_mean * logq).sum(), student)
    grads = []
    for theta in torch.randn(5000, 1, 5, generator=generator):
        (grad,) = torch.autograd.grad(forward_kl(Student(student, head), theta, head), student)
        grads.append(grad[0])
    stacked = torch.stack(grads)
    error = stacked.std(0) / len(grads) ** 0.5
    assert bool(((stacked.mean(0) - expected[0]).abs() < 4.5 * error).all())


def test_eu_from_few_draws_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(20, 5, generator=generator)
    draws = 0.3 * torch.randn(4000, 7, 5, generator=generator)
    many = sampled_eu(draws, head)
    few = torch.stack([sampled_eu(part, head) for part in torch.split(draws, 4)])
    error = few.std(0) / len(few) ** 0.5
    # The correction is of the first order, hence two hundredths.
    assert bool(((few.mean(0) - many).abs() < 4.5 * error + 0.02 * many).all())
    uncorrected = few.mean(0) * 3 / 4
    assert bool((uncorrected < 0.8 * many).all())


def test_the_mismatch_is_least_at_the_expectation() -> None:
    """In batches as small as a step's, of values as noisy and as unequal as those of few draws."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    scale = torch.zeros((), requires_grad=True)
    gradient = torch.zeros(())
    for _ in range(3000):
        mean = torch.randn(64, generator=generator).mul(1.2).exp() * 0.05
        noise = torch.distributions.Gamma(0.7, 0.7).sample((64,))
        loss = eu_mismatch(mean * scale.exp(), mean * noise)
        (found,) = torch.autograd.grad(loss, scale)
        gradient += found / 3000
    # Divided by the noisy values' mean square it would be 0.7.
    assert abs(float(gradient)) < 0.1


def test_the_gamma_deviance_is_least_at_the_expectation() -> None:
    torch.manual_seed(4)
    mean = torch.tensor([0.02, 0.3, 2.0])
    noisy = mean * torch.distributions.Gamma(1.5, 1.5).sample((40_000, 1))
    scale = torch.zeros(3, requires_grad=True)
    gamma_deviance((mean * scale.exp()).expand_as(noisy), noisy).backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    assert scale.grad.abs().max() < 0.01
    at = gamma_deviance(mean.expand_as(noisy), noisy)
    for factor in (0.8, 1.25):
        assert gamma_deviance((mean * factor).expand_as(noisy), noisy) > at + 0.005


def dense_nll(moves: Moves, m: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    for mu, phi, sigma, row in zip(*moves[:3], m, strict=True):
        covariance = phi @ phi.T + torch.diag(sigma**2)
        total = total - torch.distributions.MultivariateNormal(mu, covariance).log_prob(row)
    return total / len(m)


def random_moves(n: int, r: int, q: int, seed: int) -> tuple[Moves, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(n, r, generator=generator)
    phi = torch.randn(n, r, q, generator=generator)
    sigma = torch.rand(n, r, generator=generator) + 0.3
    return Moves(mu, phi, sigma), torch.randn(n, r, generator=generator)


@given(n=st.integers(1, 6), r=st.integers(1, 7), q=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_marginal_is_the_dense_gaussian(n: int, r: int, q: int, seed: int) -> None:
    moves, m = random_moves(n, r, q, seed)
    expected = dense_nll(moves, m)
    assert torch.allclose(latent_factor_nll(moves, m[None]), expected, rtol=1e-3, atol=1e-3)
    # One group a token is no group at all; one group for all couples the tokens.
    alone = latent_factor_nll(moves, m[None], torch.arange(n))
    assert torch.allclose(alone, expected, rtol=1e-3, atol=1e-3)


def test_a_shared_z_is_one_gaussian_over_all_tokens() -> None:
    moves, m = random_moves(4, 3, 2, seed=1)
    phi = moves.phi_Trq.flatten(0, 1)
    covariance = phi @ phi.T + torch.diag(moves.sigma_Tr.flatten() ** 2)
    joint = torch.distributions.MultivariateNormal(moves.mu_Tr.flatten(), covariance)
    got = latent_factor_nll(moves, m[None], torch.zeros(4, dtype=torch.long))
    assert torch.allclose(got, -joint.log_prob(m.flatten()) / 4, rtol=1e-3)


def test_planted_factors_are_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    r, q = 6, 2
    phi = torch.randn(r, q, generator=generator)
    mu = torch.randn(r, generator=generator)
    sigma = torch.rand(r, generator=generator) * 0.3 + 0.1
    n = 4000
    m = mu + torch.randn(n, q, generator=generator) @ phi.T
    m = m + sigma * torch.randn(n, r, generator=generator)
    free = [torch.zeros(r), 0.1 * torch.randn(r, q, generator=generator), torch.zeros(r)]
    free = [value.requires_grad_() for value in free]
    optimiser = torch.optim.Adam(free, lr=0.05)
    for _ in range(400):
        moves = Moves(
            free[0].expand(n, r), free[1].expand(n, r, q), F.softplus(free[2]).expand(n, r)
        )
        loss = latent_factor_nll(moves, m[None])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    covariance = phi @ phi.T + torch.diag(sigma**2)
    found = (free[1] @ free[1].T + torch.diag(F.softplus(free[2]) ** 2)).detach()
    assert float((found - covariance).norm() / covariance.norm()) < 0.1
    assert float((free[0].detach() - mu).norm()) < 0.15


def test_the_fisher_metric_measures_small_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    head, h = torch.randn(30, 6, generator=generator), torch.randn(200, 6, generator=generator)
    metric = fisher_metric(h, head)
    delta = 0.01 * torch.randn(6, generator=generator)
    logp = torch.log_softmax(h @ head.T, -1)
    moved = torch.log_softmax((h + delta) @ head.T, -1)
    kl = (logp.exp() * (logp - moved)).sum(-1).mean()
    assert float(0.5 * delta @ metric @ delta) == pytest.approx(float(kl), rel=0.02)


def test_moves_are_uncorrelated_in_their_basis_and_what_matters_most_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    metric = torch.randn(6, 6, generator=generator)
    metric = metric @ metric.T
    deltas = torch.randn(5000, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    basis = move_basis(metric, deltas, rank=6)
    m = deltas @ basis.into_dr
    assert torch.allclose(m.T @ m / len(m), torch.eye(6), atol=1e-3)
    assert torch.allclose(m @ basis.basis_dr.T, deltas, atol=1e-3)
    assert basis.kept == pytest.approx(1)
    # Half the squared length in the metric, of what two directions keep and of the moves.
    few = move_basis(metric, deltas, rank=2)
    back = deltas @ few.into_dr @ few.basis_dr.T
    kept = (back @ metric * back).sum() / (deltas @ metric * deltas).sum()
    assert few.kept == pytest.approx(float(kept), rel=1e-3)
    assert 0.3 < few.kept < 1


def test_few_drafts_are_placed_with_exact_moments() -> None:
    z, eps = quadrature(8, 4, 10, torch.Generator().manual_seed(0))
    assert torch.allclose(z.mean(0), torch.zeros(4), atol=1e-6)
    assert torch.allclose(eps.mean(0), torch.zeros(10))
    assert torch.allclose(eps.square().mean(0), torch.ones(10))
    assert torch.allclose(z.T @ z / 8, torch.eye(4), atol=1e-5)
    for draws in (1, 3, 20):
        z, eps = quadrature(draws, 4, 10, torch.Generator().manual_seed(0))
        assert z.shape == (draws, 4)
        assert eps.shape == (draws, 10)


def test_drafts_of_several_students_are_placed_together() -> None:
    places = places_of(4, 2, 4, 10, torch.Generator().manual_seed(0))
    assert [tuple(z.shape) for z, _ in places] == [(2, 4)] * 4
    for draws in (1, 2):  # of each student
        z = torch.cat([z[:draws] for z, _ in places])
        eps = torch.cat([eps[:draws] for _, eps in places])
        assert torch.allclose(z.mean(0), torch.zeros(4), atol=1e-6)
        assert torch.allclose(eps.mean(0), torch.zeros(10))
        assert int(torch.linalg.matrix_rank(z)) == 2 * draws


def test_shards_are_stable_disjoint_and_balanced() -> None:
    keys = [conversation_key(prompt=f"question {n}") for n in range(20_000)]
    for count in (3, 4, 7):
        sizes = torch.bincount(torch.tensor([shard_of(key, count) for key in keys]))
        expected = len(keys) / count
        # Chi-square with count - 1 degrees of freedom: far beyond what chance gives at 30.
        assert float(((sizes - expected) ** 2 / expected).sum()) < 30
    # What a release may not change: live traffic and training data are cut by the same numbers.
    assert conversation_key(prompt="What is the capital of Japan?") == 1633981860694568422


def test_a_conversation_keeps_its_shard() -> None:
    ask = {"role": "user", "content": "What is 2 + 2?"}
    more = [ask, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Why?"}]
    system = {"role": "system", "content": "Be brief."}
    key = conversation_key(messages=[ask])
    assert conversation_key(messages=more) == key
    assert conversation_key(messages=[system, *more]) == key
    assert conversation_key(messages=[more[2]]) != key
    with pytest.raises(ValueError, match="at least 1"):
        shard_of(key, 0)
