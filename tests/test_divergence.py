"""Identities and bounds of the measures, against float64 sums written from their definitions."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drafts import divergence

NEG_INF = float("-inf")


def _kl64(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) in float64, by definition."""
    q, p = q.double().softmax(-1), p.double().softmax(-1)
    return torch.where(q > 0, q * (q.log() - p.log()), 0.0).sum(-1)


@st.composite
def logits(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Drafts [K, T, V] and a target [T, V], from flat to nearly one-hot, above the -87 floor."""
    shape = tuple(draw(st.integers(1, n)) for n in (6, 5, 40))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 7.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drafts = torch.randn(shape, generator=generator) * scale
    target = torch.randn(shape[1:], generator=generator) * scale
    return drafts, target


@given(logits())
@settings(max_examples=200, deadline=None)
def test_identities_and_bounds(pair: tuple[Tensor, Tensor]) -> None:
    drafts, target = pair
    got = divergence.measures(drafts, target)
    mean_kl = _kl64(drafts, target.expand_as(drafts)).mean(0)
    torch.testing.assert_close(got.epistemic.double(), mean_kl, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.total, got.aleatoric + got.jsd, atol=1e-5, rtol=1e-5)
    assert (got.jsd >= 0).all()
    assert (got.jsd <= math.log(drafts.shape[0])).all()
    assert (got.kl >= 0).all()
    assert (got.entropy <= math.log(drafts.shape[-1]) + 1e-5).all()


@given(logits())
@settings(max_examples=100, deadline=None)
def test_each_function_is_its_definition(pair: tuple[Tensor, Tensor]) -> None:
    drafts, target = pair
    q = drafts.double().softmax(-1)
    mix, p = q.mean(0), target.double().softmax(-1)
    expected = {
        "jsd": _kl64(drafts, mix.log().expand_as(drafts)).mean(0),
        "kl": _kl64(mix.log(), target),
        "total": -(mix * mix.log()).sum(-1),
        "aleatoric": -(q * q.log()).sum(-1).mean(0),
        "entropy": -(p * p.log()).sum(-1),
    }
    got = {
        "jsd": divergence.jsd(drafts),
        "kl": divergence.kl(drafts, target),
        "total": divergence.total(drafts),
        "aleatoric": divergence.aleatoric(drafts),
        "entropy": divergence.entropy(target),
    }
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value, atol=2e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(
        divergence.epistemic(drafts, target).double(),
        expected["jsd"] + expected["kl"],
        atol=2e-5,
        rtol=1e-5,
    )


@given(logits(), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_blocks_do_not_change_the_answer(pair: tuple[Tensor, Tensor], elements: int) -> None:
    drafts, target = pair
    whole = divergence.measures(drafts, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "_CPU_BLOCK_ELEMENTS", elements)
        blocked = divergence.measures(drafts, target)
    for one, other in zip(whole, blocked, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n_drafts", [1, 2, 3, 4, 5, 7, 16])
def test_identical_members_give_exactly_zero(n_drafts: int) -> None:
    target = torch.randn(11, 5000, generator=torch.Generator().manual_seed(n_drafts)) * 4
    got = divergence.measures(target.expand(n_drafts, -1, -1), target)
    assert (got.jsd == 0).all()
    assert (got.kl == 0).all()
    assert (got.entropy == got.total).all()


def test_disjoint_drafts_reach_ln_k() -> None:
    drafts = torch.full((4, 1, 8), NEG_INF)
    for k in range(4):
        drafts[k, 0, 2 * k : 2 * k + 2] = 0.0
    assert divergence.jsd(drafts).item() == pytest.approx(math.log(4), abs=1e-6)
    assert divergence.total(drafts).item() == pytest.approx(math.log(8), abs=1e-6)


def test_minus_infinity_stays_finite() -> None:
    drafts, target = torch.randn(3, 2, 6), torch.randn(2, 6)
    drafts[:, :, 4:], target[:, 4:] = NEG_INF, NEG_INF  # padding of the vocabulary: no cost
    padded = divergence.measures(drafts, target)
    plain = divergence.measures(drafts[..., :4], target[..., :4])
    for one, other in zip(padded, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    # Mass where the target has none: large, not infinite.
    cost = divergence.kl(torch.zeros(1, 1, 2), torch.tensor([[0.0, NEG_INF]])).item()
    assert 40 < cost < 45


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    drafts, target = torch.randn(4, 3, 50), torch.randn(3, 50)
    one = divergence.measures(drafts, target)
    other = divergence.measures(drafts + 37.0, target - 12.0)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_half_precision_is_widened_and_float64_kept() -> None:
    drafts, target = torch.randn(2, 3, 50).bfloat16(), torch.randn(3, 50).bfloat16()
    half = divergence.measures(drafts, target)
    assert half.jsd.dtype == torch.float32
    torch.testing.assert_close(half.jsd, divergence.jsd(drafts.float()))
    assert divergence.entropy(target.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("drafts", "target"),
    [((2, 3, 4), (3, 5)), ((2, 3, 4), (4, 4)), ((0, 3, 4), (3, 4)), ((3, 4), (3, 4))],
)
def test_shapes_that_do_not_fit_are_refused(drafts: tuple[int], target: tuple[int]) -> None:
    with pytest.raises(ValueError, match=r"expected drafts|at least 1"):
        divergence.measures(torch.zeros(drafts), torch.zeros(target))


_BIG = """
import resource, torch
from drafts import divergence
K, T, V = 2, 8192, 152_000
drafts = torch.randn(K, 1, V).expand(K, T, V)  # 10 GB if it were real
target = torch.randn(1, V).expand(T, V)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
got = divergence.measures(drafts, target)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, got.jsd.shape[0])
"""


def test_memory_stays_bounded_at_large_vocabulary() -> None:
    out = subprocess.run(
        [sys.executable, "-c", _BIG], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    grown_kib, rows = map(int, out.split())
    assert rows == 8192
    # One [2, 8192, 152k] float32 tensor would be 10 GB; a block of rows and its copies are not.
    assert grown_kib < 150_000, f"{grown_kib} KiB"
