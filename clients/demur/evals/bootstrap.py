"""Estimates with their uncertainty, from resamples of whole clusters.

Answers to one question, or questions about one country, are right or wrong together; resampling
answers one by one would make intervals too narrow (Cameron, Gelbach & Miller 2008). So clusters are
drawn with replacement, and an answer counts as often as its cluster was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number and what it came to in each resample.

    Attributes:
        value: on the data as they are; NaN where it is undefined.
        draws: shape [B], the same of each resample; NaN where it is undefined.
    """

    value: float
    draws: Floats

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval over the resamples in which the number is defined.

        Args:
            level: share of the resamples that lies within.

        Returns:
            (low, high), NaN both where there is no such resample.
        """
        defined = self.draws[~np.isnan(self.draws)]
        if not defined.size:
            return math.nan, math.nan
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b, paired: resample by resample, which must be the same ones.

    Raises:
        ValueError: if they differ in the number of resamples.
    """
    if a.draws.shape != b.draws.shape:
        raise ValueError(
            f"one estimate has {a.draws.size} resamples and the other {b.draws.size}; "
            "take both from one Judge"
        )
    return Estimate(a.value - b.value, a.draws - b.draws)


def codes(labels: Iterable[Hashable]) -> Ints:
    """Labels as numbers 0, 1, … in the order in which they first come."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.int64)


def resamples(groups: Ints, n_boot: int, seed: int) -> Floats:
    """How often each answer counts in each resample.

    Args:
        groups: each answer's cluster, as `codes` numbers them, shape [N].
        n_boot: resamples B.

    Returns:
        Whole numbers, shape [1 + B, N]: first a row of ones, for the data as they are.
    """
    rng = np.random.default_rng(seed)
    n_groups = int(groups.max()) + 1
    counts = np.ones((1 + n_boot, n_groups))
    for row in counts[1:]:
        row[:] = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
    return counts[:, groups]


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, and NaN where whole is 0."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole != 0)
