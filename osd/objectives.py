"""What drafts are trained to minimise. Pure tensors; T is tokens, d hidden size, V vocabulary.

Online stochastic distillation (OSD, arXiv 2602.01956): each step draws one theta ~ pi_T and
minimises the forward KL(p_theta || q), teacher first. Cross-entropy is linear in the teacher, so
the expected gradient is that of KL(p_T || q), and the posterior mean is distilled without ever
being held. It holds for the forward KL only.

Teachers are given by their final hidden states (d floats a token), from which the LM head makes
the full distribution again.

`residual` drafts learn the distribution of the teacher's moves of the final hidden state, as a
latent factor model (Gaussian distillation, arXiv 2510.19290):

    m = mu + Phi z + sigma * eps,    z ~ N(0, I_q), eps ~ N(0, I_r)

in coordinates m made from the target's average Fisher metric, pulled back through its LM head, in
which half the squared length of a small move is the KL that it costs on average.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drafts.divergence import measures
from drafts.residual import Moves

# Rows whose logits are held at once; 128 x 152k x float32 are 78 MB.
_ROWS = 128
_NEGLIGIBLE = 1e-3


class Student(NamedTuple):
    """A row's loss needs these: hidden states [T, d'] and the LM head [V, d'] above them."""

    h_Td: Tensor
    head_Vd: Tensor


def forward_kl(student: Student, teacher_h_Td: Tensor, teacher_head_Vd: Tensor) -> Tensor:
    """Mean over tokens of KL(p_teacher || q_student), in nats; differentiable in the student.

    Logits exist for a block of rows at a time, and gradients are taken with the loss, so memory
    does not grow with T.
    """
    loss: Tensor = _ForwardKL.apply(*student, teacher_h_Td, teacher_head_Vd)  # type: ignore[no-untyped-call]
    return loss


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_Td: Tensor, head_Vd: Tensor, teacher_h_Td: Tensor, teacher_head_Vd: Tensor
    ) -> Tensor:
        n_tokens = h_Td.shape[0]
        grad_h = torch.zeros_like(h_Td)
        grad_head = (
            torch.zeros_like(head_Vd, dtype=torch.float32) if head_Vd.requires_grad else None
        )
        loss = torch.zeros((), dtype=torch.float64, device=h_Td.device)
        for start in range(0, n_tokens, _ROWS):
            rows = slice(start, start + _ROWS)
            logp = torch.log_softmax(F.linear(teacher_h_Td[rows], teacher_head_Vd).float(), -1)
            logq = torch.log_softmax(F.linear(h_Td[rows], head_Vd).float(), -1)
            p = logp.exp()
            loss += (p * (logp - logq)).sum().double()
            # d KL / d logits = q - p
            grad_logits = logq.exp_().sub_(p).div_(n_tokens)
            grad_h[rows] = (grad_logits.to(head_Vd.dtype) @ head_Vd).to(h_Td.dtype)
            if grad_head is not None:
                grad_head += grad_logits.T @ h_Td[rows].float()
        ctx.save_for_backward(grad_h, grad_head)
        return (loss / n_tokens).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_h, grad_head = ctx.saved_tensors
        return grad * grad_h, None if grad_head is None else grad * grad_head, None, None


def latent_factor_nll(moves: Moves, m_MTr: Tensor, group_T: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of moves, in nats a token, with z integrated out.

    The closed marginal N(mu, Phi Phi^T + diag sigma^2), by Woodbury and the determinant lemma: what
    EM climbs to, without its two steps.

    Args:
        moves: the model.
        m_MTr: what the teacher did at M draws; each draw has a z of its own.
        group_T: tokens with the same number (0 to G - 1) share one z, as those of one draw of the
            weights do in the model of arXiv 2510.19290; None gives each token its own.
    """
    mu, phi, sigma, _ = moves
    n_tokens, rank, n_factors = phi.shape
    scaled_TMr = ((m_MTr - mu) / sigma).transpose(0, 1)
    n_draws = scaled_TMr.shape[1]
    phi_s = phi / sigma.unsqueeze(-1)
    inner = phi_s.transpose(1, 2) @ phi_s  # [T, q, q]
    cross = scaled_TMr @ phi_s  # [T, M, q]
    if group_T is not None:
        n_groups = int(group_T.max()) + 1
        inner = inner.new_zeros(n_groups, n_factors, n_factors).index_add(0, group_T, inner)
        cross = cross.new_zeros(n_groups, n_draws, n_factors).index_add(0, group_T, cross)
    precision = inner + torch.eye(n_factors, dtype=inner.dtype, device=inner.device)
    factor = torch.linalg.cholesky(precision)
    white = torch.linalg.solve_triangular(factor, cross.transpose(1, 2), upper=False)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum()
    squares = (scaled_TMr.square().sum() - white.square().sum()) / n_draws
    total: Tensor = squares + log_det + 2 * sigma.log().sum()
    return 0.5 * (total / n_tokens + rank * math.log(2 * math.pi))


@torch.no_grad()
def sampled_eu(teacher_MTd: Tensor, head_Vd: Tensor) -> Tensor:
    """EU* of each token [T] as M draws of the posterior show it: noisy, and corrected for M."""
    n_draws = len(teacher_MTd)
    values = []
    for block_MBd in torch.split(teacher_MTd, max(1, _ROWS // n_draws), dim=1):
        # Flat: of a strided block, torch would copy the LM head for each draw.
        logits = (
            F.linear(block_MBd.flatten(0, 1), head_Vd).float().reshape(n_draws, -1, len(head_Vd))
        )
        values.append(measures(logits, logits[0]).jsd * n_draws / (n_draws - 1))
    return torch.cat(values)


def eu_mismatch(estimate_T: Tensor, noisy_T: Tensor) -> Tensor:
    """How far an estimate of EU* is from what few draws show: the gamma deviance, which weighs
    small values as it does large ones, and the squared error, which sees an estimate that is now
    and then far too large. Both are least at the expectation of what draws show.

    The error's unit is the estimate's own mean square: divided by that of the noisy values, large
    ones would count for less, and the minimum would lie lower.
    """
    unit = estimate_T.detach().square().mean() + _NEGLIGIBLE**2
    error = (estimate_T - noisy_T).square().mean() / unit
    return gamma_deviance(estimate_T, noisy_T) + error


def gamma_deviance(estimate_T: Tensor, noisy_T: Tensor) -> Tensor:
    """Mean of y / x + log x: least where x is the expectation of y, for noise that grows with it.

    Half the deviance of a gamma distribution, up to a constant of the data. The squared error has
    the same minimum, but with EU* from few draws it hears little but its largest values. A
    thousandth of a nat is added to both, below which no one needs to tell values apart.
    """
    estimate = estimate_T + _NEGLIGIBLE
    return ((noisy_T + _NEGLIGIBLE) / estimate + estimate.log()).mean()


class MoveBasis(NamedTuple):
    """Coordinates of moves: m = delta @ into_dr; m @ basis_dr.T is what r keeps of delta."""

    basis_dr: Tensor
    into_dr: Tensor
    kept: float  # share of the moves' mean squared length, in the metric, that r directions hold


def fisher_metric(h_Td: Tensor, head_Vd: Tensor) -> Tensor:
    """The average Fisher metric of softmax(W h), on h: E[W^T (diag p - p p^T) W], [d, d].

    A small move delta of h changes the distribution by KL = 1/2 delta^T G delta.
    """
    d = h_Td.shape[1]
    metric = torch.zeros(d, d, dtype=torch.float64, device=h_Td.device)
    p_sum = torch.zeros(head_Vd.shape[0], device=h_Td.device)
    head = head_Vd.float()
    for start in range(0, h_Td.shape[0], _ROWS):
        p = torch.softmax(h_Td[start : start + _ROWS].float() @ head.T, -1)
        p_sum += p.sum(0)
        mean = p @ head
        metric -= (mean.T @ mean).double()
    metric += (head.T @ (head * p_sum.unsqueeze(-1))).double()
    return (metric / h_Td.shape[0]).float()


def move_basis(metric_dd: Tensor, delta_Td: Tensor, rank: int) -> MoveBasis:
    """The `rank` directions in which observed moves change probabilities most, uncorrelated.

    Principal components of the moves in the coordinates of the metric, each scaled to variance 1,
    so that a model with independent noise per coordinate starts near the moves' covariance. The
    scale matters: unscaled, m is about 0.03, factors start far too large, and the likelihood hardly
    notices. On SmolLM2-135M drafts then stayed 2.4 nats from a target whose EU* is 0.16.
    """
    values, vectors = torch.linalg.eigh(metric_dd.double())
    root = values.clamp_min(float(values[-1]) * 1e-10).sqrt()
    into, out = vectors * root, vectors / root
    m_Td = delta_Td.double() @ into
    variances, rotation = torch.linalg.eigh(m_Td.T @ m_Td / len(m_Td))
    variances, rotation = variances.flip(0), rotation.flip(1)[:, :rank]
    scale = variances[:rank].clamp_min(float(variances[0]) * 1e-10).sqrt()
    kept = float(variances[:rank].sum() / variances.sum())
    return MoveBasis((out @ rotation * scale).float(), (into @ rotation / scale).float(), kept)
