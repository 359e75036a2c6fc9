"""How near an estimate of epistemic uncertainty comes to EU*, with intervals over texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

Floats = NDArray[np.float64]
_RESAMPLES = 500

Item = TypeVar("Item")


@dataclass
class Estimate:
    """An estimator's values on the response tokens of each text, and what they cost.

    Costs are beyond the target's own pass, in units of it: `flops` without LM-head products,
    `head_flops` those, `time` what was measured (None: it was not).
    """

    name: str
    values: list[Floats]
    flops: float = 0.0
    head_flops: float = 0.0
    time: float | None = 0.0
    fitted: bool = False  # to the other half of the texts, so that no scale is left to fit


def row(estimate: Estimate, truth: list[Floats]) -> dict[str, Any]:
    """One line of the table. Numbers are [value, low, high], the latter a 95% interval."""
    triples = list(zip(estimate.values, scaled(estimate, truth).values, truth, strict=True))
    resampled = [compared(chosen) for chosen in resamples(triples)]
    values: dict[str, Any] = {"name": estimate.name}
    for key, value in compared(triples).items():
        low, high = np.quantile([one[key] for one in resampled], [0.025, 0.975])
        values[key] = [value, float(low), float(high)]
    return values | {
        "scale": best_scale(estimate.values, truth),
        "flops": estimate.flops,
        "head_flops": estimate.head_flops,
        "time": estimate.time,
    }


def scaled(estimate: Estimate, truth: list[Floats]) -> Estimate:
    """An estimate after the best single scale, that of each half of the texts fitted on the other:
    texts 0, 2, 4, ... and 1, 3, 5, ..."""
    if estimate.fitted:
        return estimate
    scales = [best_scale(estimate.values[i::2], truth[i::2]) for i in (1, 0)]
    values = [scales[place % 2] * values for place, values in enumerate(estimate.values)]
    return replace(estimate, values=values)


def rmse_ratio(first: Estimate, second: Estimate, truth: list[Floats]) -> list[float]:
    """RMSE of the first over that of the second, on the same texts: [value, low, high]."""
    triples = list(zip(first.values, second.values, truth, strict=True))

    def ratio(chosen: list[tuple[Floats, Floats, Floats]]) -> float:
        a, b, t = (np.concatenate(part) for part in zip(*chosen, strict=True))
        return float(np.sqrt(np.mean((a - t) ** 2) / np.mean((b - t) ** 2)))

    low, high = np.quantile([ratio(chosen) for chosen in resamples(triples)], [0.025, 0.975])
    return [ratio(triples), float(low), float(high)]


def resamples(items: list[Item]) -> list[list[Item]]:
    """Bootstrap resamples, the same ones for every list of one length."""
    rng = np.random.default_rng(0)
    return [[items[i] for i in rng.integers(0, len(items), len(items))] for _ in range(_RESAMPLES)]


def best_scale(values: list[Floats], truth: list[Floats]) -> float:
    """The factor that minimises the squared error."""
    x, y = np.concatenate(values), np.concatenate(truth)
    return float(x @ y / (x @ x))


def compared(triples: list[tuple[Floats, Floats, Floats]]) -> dict[str, float]:
    """Errors and correlations over all tokens of some texts: estimates, scaled ones, EU*."""
    x, after_scale, y = (np.concatenate(part) for part in zip(*triples, strict=True))
    constant = len(np.unique(x)) <= 2  # one value, or one for each half of the texts
    return {
        "rmse": float(np.sqrt(np.mean((x - y) ** 2))),
        "rmse_scaled": float(np.sqrt(np.mean((after_scale - y) ** 2))),
        "bias": float(np.mean(x - y)),
        "pearson": 0.0 if constant else float(pearsonr(x, y).statistic),
        "spearman": 0.0 if constant else float(spearmanr(x, y).statistic),
    }
