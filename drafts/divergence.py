"""Epistemic uncertainty of next-token distributions: pure tensors, no I/O, no configuration.

At each position, p is the target's distribution, q_1..q_K the drafts', and
q_bar = (1/K) sum_k q_k their mixture. All values are in nats (arXiv 2602.01956):

    jsd       = (1/K) sum_k KL(q_k || q_bar)       drafts against their mixture, in [0, ln K]
    kl        = KL(q_bar || p)                     mixture first, target second, >= 0
    epistemic = jsd + kl = (1/K) sum_k KL(q_k || p)
    total     = H(q_bar) = aleatoric + jsd
    aleatoric = (1/K) sum_k H(q_k)
    entropy   = H(p)

Shapes carry the suffixes K (draft), T (token), V (vocabulary). Inputs are log-probs; a constant
added to a row is removed, so logits do as well. Half-precision inputs are widened to float32,
float64 stays float64. A log-prob below that of the smallest normal float (about -87 nats in
float32) counts as that, so mass that a draft has where the target has none costs 87 nats a unit
and not infinity.

    python -m pytest tests/test_divergence.py
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the [K, block, V] working set. On a CPU it should stay in the last-level cache, on a
# GPU it should be large enough to fill the device.
_CPU_BLOCK_ELEMENTS = 800_000
_GPU_BLOCK_ELEMENTS = 64_000_000


class Measures(NamedTuple):
    """Token measures, each a tensor of shape [T], in nats."""

    entropy: Tensor
    total: Tensor
    jsd: Tensor
    kl: Tensor

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the drafts, (1/K) sum_k H(q_k) = total - jsd."""
        return (self.total - self.jsd).clamp_min(0)

    @property
    def epistemic(self) -> Tensor:
        """jsd + kl = (1/K) sum_k KL(q_k || p)."""
        return self.jsd + self.kl


def measures(logp_KTV: Tensor, logp_TV: Tensor) -> Measures:
    """All token measures of K drafts against a target.

    Args:
        logp_KTV: the drafts' log-probs (or logits), shape [K, T, V].
        logp_TV: the target's log-probs (or logits), shape [T, V].

    Returns:
        `Measures` of shape [T] each, float32 (float64 if an input is).

    Raises:
        ValueError: if the shapes do not fit each other, or K or V is zero.
    """
    _check(logp_KTV, logp_TV)
    dtype = _wide(torch.promote_types(logp_KTV.dtype, logp_TV.dtype))
    n_drafts, n_tokens, vocab = logp_KTV.shape
    out_5T = torch.empty(5, n_tokens, dtype=dtype, device=logp_TV.device)
    size = block_rows(n_drafts * vocab, logp_TV.device)
    for start in range(0, n_tokens, size):
        rows = slice(start, start + size)
        measure_block(logp_KTV[:, rows].to(dtype), logp_TV[rows].to(dtype), out_5T[:, rows])
    return Measures(*out_5T[1:].unbind())


def measure_block(logp_KBV: Tensor, logp_BV: Tensor, out_5B: Tensor) -> None:
    """The measures of one block of rows, which is not split further.

    Args:
        logp_KBV: the drafts' log-probs or logits, float32 or float64, shape [K, B, V].
        logp_BV: the target's, shape [B, V].
        out_5B: filled with -ln max_v p(v) (which is log Z of logits whose greatest is 0), entropy,
            total, jsd and kl, shape [5, B].
    """
    logq_KBV, q_KBV = _normalise(logp_KBV)
    logp_BV, p_BV = _normalise(logp_BV)
    logmix_BV, mix_BV = _mixture(logq_KBV, q_KBV)
    out_5B[0] = -logp_BV.amax(-1)
    out_5B[1] = _entropy(logp_BV, p_BV)
    out_5B[2] = _entropy(logmix_BV, mix_BV)
    out_5B[3] = _jsd(logq_KBV, q_KBV, logmix_BV)
    out_5B[4] = _kl(logmix_BV, mix_BV, logp_BV)


def jsd(logp_KTV: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the drafts, (1/K) sum_k KL(q_k || q_bar), shape [T]."""
    return measures(logp_KTV, logp_KTV[0]).jsd


def kl(logp_KTV: Tensor, logp_TV: Tensor) -> Tensor:
    """KL(q_bar || p): the drafts' mixture first, the target second, shape [T]."""
    return measures(logp_KTV, logp_TV).kl


def epistemic(logp_KTV: Tensor, logp_TV: Tensor) -> Tensor:
    """jsd + kl, which equals (1/K) sum_k KL(q_k || p), shape [T]."""
    return measures(logp_KTV, logp_TV).epistemic


def total(logp_KTV: Tensor) -> Tensor:
    """Entropy of the drafts' mixture, H(q_bar) = aleatoric + jsd, shape [T]."""
    return measures(logp_KTV, logp_KTV[0]).total


def aleatoric(logp_KTV: Tensor) -> Tensor:
    """Mean entropy of the drafts, (1/K) sum_k H(q_k), shape [T]."""
    return measures(logp_KTV, logp_KTV[0]).aleatoric


def entropy(logp_TV: Tensor) -> Tensor:
    """Entropy of the target's distribution, H(p), shape [T]."""
    return measures(logp_TV.unsqueeze(0), logp_TV).entropy


def _normalise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs, floored so that 0 * log 0 is 0, and probabilities."""
    # One softmax and no exp or log of a whole row: torch's softmax kernel is several times faster
    # than either. The greatest probability, at least 1 / V, has log Z; the greatest logit goes
    # first, so that nothing is rounded at the size of the logits.
    p = torch.softmax(logits, -1)
    logp = (logits - logits.amax(-1, keepdim=True)).add_(p.amax(-1, keepdim=True).log())
    return logp.clamp_min_(math.log(torch.finfo(logits.dtype).tiny)), p


def _mixture(logq_KBV: Tensor, q_KBV: Tensor) -> tuple[Tensor, Tensor]:
    """log q_bar and q_bar. Equal drafts give exactly the first draft's values, for every K."""
    first_BV = q_KBV[0]
    if q_KBV.shape[0] == 1:
        return logq_KBV[0].clone(), first_BV
    # The first draft plus the mean difference from it, and not the mean, which would round.
    mix_BV = (q_KBV[1:] - first_BV).sum(0).div_(q_KBV.shape[0]).add_(first_BV)
    mix_BV.clamp_min_(torch.finfo(mix_BV.dtype).tiny)
    return torch.where(mix_BV == first_BV, logq_KBV[0], mix_BV.log()), mix_BV


def _entropy(logp: Tensor, p: Tensor) -> Tensor:
    return (logp * p).sum(-1).neg_().clamp_min_(0)


def _jsd(logq_KBV: Tensor, q_KBV: Tensor, logmix_BV: Tensor) -> Tensor:
    # In place: the drafts' log-probs are not needed afterwards.
    kl_KB = logq_KBV.sub_(logmix_BV).mul_(q_KBV).sum(-1)
    return kl_KB.mean(0).clamp_(0, math.log(q_KBV.shape[0]))


def _kl(logmix_BV: Tensor, mix_BV: Tensor, logp_BV: Tensor) -> Tensor:
    return (logmix_BV - logp_BV).mul_(mix_BV).sum(-1).clamp_min_(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def block_rows(row_elements: int, device: torch.device) -> int:
    """Rows of `row_elements` values each that `measures` works on at once."""
    budget = _CPU_BLOCK_ELEMENTS if device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    return max(1, budget // max(1, row_elements))


def _check(logp_KTV: Tensor, logp_TV: Tensor) -> None:
    if logp_KTV.ndim != 3 or logp_TV.ndim != 2 or logp_KTV.shape[1:] != logp_TV.shape:
        raise ValueError(
            "expected drafts [K, T, V] and a target [T, V] of the same T and V, "
            f"got {list(logp_KTV.shape)} and {list(logp_TV.shape)}"
        )
    if logp_KTV.shape[0] == 0 or logp_KTV.shape[2] == 0:
        raise ValueError(f"K and V must be at least 1, got shape {list(logp_KTV.shape)}")
