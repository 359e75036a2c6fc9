"""The reference EU* that estimators are measured against: many draws of the posterior, very slow.

    EU* = (1/M) sum_m KL(p_theta_m || p_T) * M / (M - 1),    p_T = (1/M) sum_m p_theta_m

Each draw of the weights is held for whole texts. M draws see (M - 1) / M of the uncertainty, hence
the correction. The draws' halves give two estimates that share no draw: their difference is the
reference's own noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from osd.corpus import Text
from osd.schedule import derived_seed
from osd.teacher import Teacher, collate

Floats = NDArray[np.float64]

_TEXTS = 8
_ROWS = 8  # [64, 8, 49k] float32 are 100 MB


@dataclass(frozen=True)
class TrueEU:
    """Of the response tokens of one text, in nats, shape [T] each.

    `first` and `second` are of one half of the draws each; `shift` is KL(p_T || p), how far the
    posterior mean is from the target as it is.
    """

    whole: Floats
    first: Floats
    second: Floats
    shift: Floats


def true_eu(
    teacher: Teacher,
    texts: Sequence[Text],
    *,
    draws: int,
    max_tokens: int,
    seed: int,
    cache: Path,
) -> list[TrueEU]:
    """EU* of each text. What was computed is kept in `cache`, a file a batch, and not done again.

    The cache is for one target, posterior, list of texts, `draws` and `seed`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i].token_ids), i))
    found: dict[int, TrueEU] = {}
    starts = range(0, len(order), _TEXTS)
    for start in tqdm(starts, desc=f"EU* with M = {draws}", unit="batch"):
        indices = order[start : start + _TEXTS]
        file = cache / f"batch-{start:05d}.safetensors"
        if not file.exists():
            chosen = [texts[i] for i in indices]
            values = _batch(teacher, chosen, draws, max_tokens, derived_seed(seed, start))
            save_file(values, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)
        for i, value in zip(indices, _split(load_file(file)), strict=True):
            found[i] = value
    return [found[i] for i in range(len(texts))]


def _batch(
    teacher: Teacher, texts: list[Text], draws: int, max_tokens: int, seed: int
) -> dict[str, Tensor]:
    batch = collate(texts, max_tokens, teacher.head_Vd.device)
    final, _ = teacher.states(batch)
    h = batch.rows(final).float()
    members = torch.stack([teacher.draw(batch, seed + m) for m in range(draws)])
    out = torch.empty(4, len(h))
    for start in range(0, len(h), _ROWS):
        rows = slice(start, start + _ROWS)
        logits = F.linear(members[:, rows], teacher.head_Vd)
        out[:, rows] = _eu(logits, F.linear(h[rows], teacher.head_Vd)).cpu()
    return {"eu": out, "text": batch.text_T.cpu()}


def _eu(logits_MTV: Tensor, target_TV: Tensor) -> Tensor:
    """Whole, halves and shift, [4, T]."""
    logp = torch.log_softmax(logits_MTV, -1)
    p = logp.exp()
    entropy_MT = -(p * logp).sum(-1)
    half = p.shape[0] // 2
    sums = p[:half].sum(0), p[half:].sum(0)
    whole = _jsd(sums[0] + sums[1], entropy_MT)
    first, second = _jsd(sums[0], entropy_MT[:half]), _jsd(sums[1], entropy_MT[half:])
    mean = (sums[0] + sums[1]) / p.shape[0]
    logt = torch.log_softmax(target_TV, -1)
    shift = (mean * (mean.clamp_min(1e-38).log() - logt)).sum(-1)
    return torch.stack([whole, first, second, shift])


def _jsd(sum_TV: Tensor, entropy_MT: Tensor) -> Tensor:
    """H(mean) - mean H, corrected for the number of draws."""
    m = entropy_MT.shape[0]
    mean = sum_TV / m
    entropy = -(mean * mean.clamp_min(1e-38).log()).sum(-1)
    return (entropy - entropy_MT.mean(0)) * m / (m - 1)


def _split(values: dict[str, Tensor]) -> list[TrueEU]:
    eu, text = values["eu"].double(), values["text"]
    parts = [eu[:, text == i].numpy() for i in range(int(text.max()) + 1)]
    return [TrueEU(*part) for part in parts]
