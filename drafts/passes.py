"""Passes over rows of logits, which are most of what drafts cost beside their matmuls.

On a CPU in C (`passes.c`), built when this package is installed; where it was not, and on other
devices, by torch. Logits are read in the dtype that they have, float32 or bfloat16, a row at a
time, so nothing of the size of [T, V] is ever made of them.

    python -m pytest tests/test_passes.py
"""

from __future__ import annotations

import ctypes
import logging
import math
from functools import cache
from importlib import util
from typing import NamedTuple

import torch
from torch import Tensor

from drafts.divergence import block_rows, measure_block
from drafts.residual import LOCAL_STEPS, LOG_SCALES, SMALL_SCALE, TINY, local_scale

logger = logging.getLogger(__name__)

_IN_C = (torch.float32, torch.bfloat16)
MAX_DRAFTS = 64  # of passes.c
_LEAST_CONFIDENCE = -10.0


class TargetRows(NamedTuple):
    """What is read of T rows of a target's logits [T, V]; float32, nats.

    A row with NaN or infinity has NaN everywhere.
    """

    top: Tensor  # the greatest logit, [T]
    log_z: Tensor  # ln sum_v exp(logit_v - top), [T]
    entropy: Tensor  # H(p), [T]
    spread: Tensor  # the standard deviation of ln p(y) over y ~ p, [T]
    runner_up: Tensor  # the second greatest logit, [T]
    wanted: Tensor  # the logit of the row's token, [T]
    rank: Tensor  # how many tokens are as likely as it, itself included, [T] int64
    likeliest: Tensor  # the logits of the c likeliest tokens, in no order, [T, c]
    ids: Tensor  # and which those are, [T, c] int64

    @property
    def logprob(self) -> Tensor:
        """Of the row's token, [T]."""
        return self.wanted - self.top - self.log_z

    def confidence(self) -> Tensor:
        """As `drafts.residual.confidence` of the logits, [T, 4]."""
        second = self.runner_up - self.top - self.log_z
        pair = torch.stack([-self.log_z, second], -1).clamp_min(_LEAST_CONFIDENCE)
        return torch.cat([torch.stack([self.entropy, self.spread], -1), pair], -1)

    def rows(self, part: slice) -> TargetRows:
        return TargetRows(*(column[part] for column in self))


def target_rows(logits_TV: Tensor, tokens_T: Tensor, c: int) -> TargetRows:
    """Read each row once for all that is asked of the target.

    Args:
        logits_TV: the last dimension must be dense.
        tokens_T: the token of each row whose log-prob and rank are wanted, int64.
        c: how many of the likeliest tokens to find; at most V of them are.
    """
    c = min(c, logits_TV.shape[-1])
    library = _library()
    if library is None or logits_TV.device.type != "cpu" or logits_TV.dtype not in _IN_C:
        return _target_rows_by_torch(logits_TV, tokens_T, c)
    if logits_TV.stride(-1) != 1:
        raise ValueError("the logits of a row must lie side by side")
    if not bool(((tokens_T >= 0) & (tokens_T < logits_TV.shape[-1])).all()):
        raise ValueError(f"token ids must lie in 0..{logits_TV.shape[-1] - 1}")
    rows, vocab = logits_TV.shape
    tokens_T = tokens_T.to(torch.int64).contiguous()
    stats = torch.empty(6, rows)
    rank = torch.empty(rows, dtype=torch.int64)
    values = torch.empty(rows, c)
    ids = torch.empty(rows, c, dtype=torch.int64)
    failed = library.demur_target_rows(
        *_pointer(logits_TV),
        ctypes.c_int64(logits_TV.stride(0)),
        ctypes.c_int64(rows),
        vocab,
        _address(tokens_T),
        c,
        *(_address(out) for out in (stats, rank, values, ids)),
    )
    if failed:
        raise MemoryError("no memory to read logits with")
    return TargetRows._make([*stats.unbind(), rank, values, ids])


def measure_rows(
    target_TV: Tensor, rows: TargetRows, drafts_KTV: Tensor, scale_KT: Tensor
) -> Tensor:
    """total, jsd and kl of K drafts, [3, T] float32, as `drafts.divergence` has them.

    Args:
        target_TV: the target's logits.
        rows: what `target_rows` has read of them.
        drafts_KTV: what each draft adds to them, before it is scaled, or its own logits.
        scale_KT: its factor; NaN where the draft has logits of its own. float32.
    """
    library = _library()
    in_c = {target_TV.dtype, drafts_KTV.dtype} <= set(_IN_C) and len(drafts_KTV) <= MAX_DRAFTS
    if library is None or target_TV.device.type != "cpu" or not in_c:
        return _measure_rows_by_torch(target_TV, drafts_KTV, scale_KT)
    if target_TV.stride(-1) != 1 or drafts_KTV.stride(-1) != 1:
        raise ValueError("the logits of a row must lie side by side")
    if drafts_KTV.shape[1:] != target_TV.shape or scale_KT.shape != drafts_KTV.shape[:2]:
        raise ValueError(
            f"drafts {list(drafts_KTV.shape)}, scales {list(scale_KT.shape)} and a target "
            f"{list(target_TV.shape)} do not fit each other"
        )
    scale_KT = scale_KT.to(torch.float32).contiguous()
    target_z = (rows.top + rows.log_z).contiguous()
    out = torch.empty(3, len(target_TV))
    failed = library.demur_measure_rows(
        *_pointer(target_TV),
        ctypes.c_int64(target_TV.stride(0)),
        _address(target_z),
        *_pointer(drafts_KTV),
        ctypes.c_int64(drafts_KTV.stride(0)),
        ctypes.c_int64(drafts_KTV.stride(1)),
        len(drafts_KTV),
        _address(scale_KT),
        ctypes.c_int64(len(target_TV)),
        target_TV.shape[-1],
        _address(out),
    )
    if failed:
        raise ValueError(f"{len(drafts_KTV)} drafts, at least 1 and at most {MAX_DRAFTS} can be")
    return out


def local_scales(rows: TargetRows, drafts_KTV: Tensor, share_SK: Tensor, kl_ST: Tensor) -> Tensor:
    """`drafts.residual.local_scale` of S students over the likeliest tokens, [S, T].

    Args:
        rows: what `target_rows` has read of the target's logits.
        drafts_KTV: what each draw adds to them, before it is scaled.
        share_SK: row s takes the mean over the draws of student s. float32.
        kl_ST: what each student wants the mean KL(q_k || p) of its draws to be, nats. float32.
    """
    library = _library()
    in_c = drafts_KTV.dtype in _IN_C and len(drafts_KTV) <= MAX_DRAFTS
    if library is None or drafts_KTV.device.type != "cpu" or not in_c:
        change_KTn = drafts_KTV.gather(-1, rows.ids.expand(len(drafts_KTV), -1, -1)).float()
        return local_scale(change_KTn, rows.likeliest, kl_ST, share_SK)
    likeliest, ids = rows.likeliest.contiguous(), rows.ids.contiguous()
    share_SK, kl_ST = share_SK.contiguous(), kl_ST.contiguous()
    out = torch.empty_like(kl_ST)
    failed = library.demur_local_scales(
        _address(likeliest),
        _address(ids),
        ids.shape[-1],
        *_pointer(drafts_KTV),
        ctypes.c_int64(drafts_KTV.stride(0)),
        ctypes.c_int64(drafts_KTV.stride(1)),
        len(drafts_KTV),
        _address(share_SK),
        len(share_SK),
        _address(kl_ST),
        ctypes.c_int64(len(ids)),
        LOCAL_STEPS,
        *(ctypes.c_float(value) for value in (SMALL_SCALE, *LOG_SCALES, TINY)),
        _address(out),
    )
    if failed:
        raise ValueError(f"{ids.shape[-1]} tokens of {len(drafts_KTV)} drafts are too many")
    return out


def is_compiled() -> bool:
    """Was the C part built, and can it be loaded?"""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    spec = util.find_spec("drafts._passes")
    if spec is None or spec.origin is None:
        logger.warning("drafts._passes was not built (it takes a C compiler); torch is slower")
        return None
    try:
        # Its threads are those of the OpenMP that torch has brought.
        return ctypes.CDLL(spec.origin)
    except OSError as error:
        logger.warning("drafts._passes cannot be loaded (%s); torch is slower", error)
        return None


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointer(logits: Tensor) -> tuple[ctypes.c_void_p, int]:
    return _address(logits), int(logits.dtype == torch.bfloat16)


def _target_rows_by_torch(logits_TV: Tensor, tokens_T: Tensor, c: int) -> TargetRows:
    """In blocks, so that on a CPU a block of rows stays in the cache."""
    size = block_rows(3 * logits_TV.shape[-1], logits_TV.device)
    parts = [
        _target_block(logits_TV[start : start + size].float(), tokens_T[start : start + size], c)
        for start in range(0, len(logits_TV), size)
    ]
    return TargetRows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _target_block(logits_BV: Tensor, tokens_B: Tensor, c: int) -> TargetRows:
    values_Bc, ids_Bc = logits_BV.topk(max(2, c) if logits_BV.shape[-1] > 1 else 1, -1)
    top_B = values_Bc[:, 0]
    # Of a broken row all is NaN, and nothing else of it is looked at.
    is_broken = ~torch.isfinite(top_B) | torch.isnan(logits_BV).any(-1)
    floor = math.log(torch.finfo(torch.float32).tiny)  # so that 0 * log 0 is 0
    moved_BV = logits_BV - top_B.unsqueeze(-1)
    log_z_B = torch.logsumexp(moved_BV, -1)
    logp_BV = (moved_BV - log_z_B.unsqueeze(-1)).clamp_min(floor)
    p_BV = logp_BV.exp()
    mean_B = torch.linalg.vecdot(p_BV, logp_BV)
    variance_B = torch.linalg.vecdot(p_BV, logp_BV.square()) - mean_B.square()
    wanted_B = logits_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1)
    rank_B = (logits_BV >= wanted_B.unsqueeze(-1)).sum(-1)
    floats = (
        top_B,
        log_z_B,
        (-mean_B).clamp_min(0),
        variance_B.clamp_min(0).sqrt(),
        values_Bc[:, min(1, values_Bc.shape[-1] - 1)],
        wanted_B,
    )
    nan = torch.full_like(top_B, math.nan)
    told = [torch.where(is_broken, nan, column) for column in floats]
    return TargetRows._make([*told, rank_B, values_Bc[:, :c], ids_Bc[:, :c]])


def _measure_rows_by_torch(target_TV: Tensor, drafts_KTV: Tensor, scale_KT: Tensor) -> Tensor:
    out_5T = target_TV.new_empty(5, len(target_TV), dtype=torch.float32)
    size = block_rows(len(drafts_KTV) * target_TV.shape[-1], target_TV.device)
    for start in range(0, len(target_TV), size):
        part = slice(start, start + size)
        target_BV = target_TV[part].float()
        scale_KB1 = scale_KT[:, part].unsqueeze(-1)
        logits_KBV = drafts_KTV[:, part].float()
        own = torch.isnan(scale_KB1)
        changed_KBV = target_BV + torch.where(own, 0.0, scale_KB1) * logits_KBV
        measure_block(torch.where(own, logits_KBV, changed_KBV), target_BV, out_5T[:, part])
    return out_5T[2:]
