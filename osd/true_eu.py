"""The reference EU* that estimators are measured against: many draws of the posterior, very slow.

    EU* = (1/M) sum_m KL(p_theta_m || p_T) * M / (M - 1),    p_T = (1/M) sum_m p_theta_m

Each draw of the weights is held for whole texts. M draws see (M - 1) / M of the uncertainty, hence
the correction. The draws' halves give two estimates that share no draw: their difference is the
reference's own noise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from osd.corpus import Text
from osd.schedule import derived_seed
from osd.teacher import Teacher, collate

Floats = NDArray[np.float64]

_TEXTS = 8
_TOKENS = 4  # whose logits at all draws are held at once: [4 * 64, 49k] float32 are 50 MB
_TINY = 1e-38


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
            partial = file.with_suffix(f".{os.getpid()}.partial")
            save_file(values, partial)
            partial.rename(file)
        for i, value in zip(indices, _split(load_file(file)), strict=True):
            found[i] = value
    return [found[i] for i in range(len(texts))]


def _batch(
    teacher: Teacher, texts: list[Text], draws: int, max_tokens: int, seed: int
) -> dict[str, Tensor]:
    batch = collate(texts, max_tokens, teacher.head_Vd.device)
    final, _ = teacher.states(batch)
    h_Td = batch.rows(final).float()
    members_TMd = torch.stack([teacher.draw(batch, seed + m) for m in range(draws)], dim=1)
    parts = [
        _rows(teacher, members_nMd, h_nd)
        for members_nMd, h_nd in zip(
            torch.split(members_TMd, _TOKENS), torch.split(h_Td, _TOKENS), strict=True
        )
    ]
    return {"eu": torch.cat(parts, dim=1).cpu(), "text": batch.text_T.cpu()}


def _rows(teacher: Teacher, members_nMd: Tensor, h_nd: Tensor) -> Tensor:
    """Of n tokens: EU* by all draws, by the first and by the second half; KL(p_T || p). [4, n]."""
    draws = members_nMd.shape[1]
    half = draws // 2
    (sum_a, entropy_a), (sum_b, entropy_b) = (
        _sums(teacher, part) for part in (members_nMd[:, :half], members_nMd[:, half:])
    )
    whole = _corrected(sum_a + sum_b, entropy_a + entropy_b, draws)
    first = _corrected(sum_a, entropy_a, half)
    second = _corrected(sum_b, entropy_b, draws - half)
    mean_nV = (sum_a + sum_b) / draws
    logp_nV = torch.log_softmax(teacher.logits(h_nd), -1)
    shift = (mean_nV * (mean_nV.clamp_min(_TINY).log() - logp_nV)).sum(-1)
    return torch.stack([whole, first, second, shift])


def _sums(teacher: Teacher, members_nMd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over draws of their distributions [n, V], and of their entropies [n]."""
    n_tokens, draws, _ = members_nMd.shape
    logits = teacher.logits(members_nMd.flatten(0, 1))
    logits -= logits.amax(-1, keepdim=True)
    p = torch.softmax(logits, -1)
    # H = log Z - E[logit]; of logits whose greatest is 0, log Z = -log max p.
    entropy = -p.amax(-1).log() - torch.linalg.vecdot(p, logits)
    return p.view(n_tokens, draws, -1).sum(1), entropy.view(n_tokens, draws).sum(1)


def _corrected(sum_nV: Tensor, entropy_n: Tensor, draws: int) -> Tensor:
    """H(mean) - mean H, corrected for the number of draws."""
    mean_nV = sum_nV / draws
    jsd = -(mean_nV * mean_nV.clamp_min(_TINY).log()).sum(-1) - entropy_n / draws
    return jsd * draws / (draws - 1)


def _split(values: dict[str, Tensor]) -> list[TrueEU]:
    eu, text = values["eu"].double(), values["text"]
    parts = [eu[:, text == i].numpy() for i in range(int(text.max()) + 1)]
    return [TrueEU(*part) for part in parts]
