"""What a training step sees: its texts, its seeds, its learning rate.

All are pure functions of the step, so that a run that was cut off and goes on takes the same steps
as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

from osd.corpus import Text

# Texts of like length go together, to waste little on padding: sorted within this many batches.
_WINDOW = 16


def derived_seed(*parts: int | str) -> int:
    """A seed from a seed and a purpose, independent of others so derived."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak. `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def batches_per_epoch(texts: Sequence[Text], size: int) -> int:
    """Batches in which `batch_at` visits each of `texts` once."""
    return len(texts) // min(size, len(texts))


def batch_at(texts: Sequence[Text], index: int, size: int, seed: int) -> list[Text]:
    """Batch number `index` of an endless run over `texts`, in a new order each time round."""
    size = min(size, len(texts))
    per_epoch = batches_per_epoch(texts, size)
    epoch, place = divmod(index, per_epoch)
    rng = random.Random(derived_seed(seed, "epoch", epoch))
    order = rng.sample(range(len(texts)), len(texts))
    window = size * _WINDOW
    batches = []
    for start in range(0, per_epoch * size, window):
        part = sorted(
            order[start : min(start + window, per_epoch * size)],
            key=lambda i: (len(texts[i].token_ids), i),
        )
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(batches)
    return [texts[i] for i in batches[place]]
