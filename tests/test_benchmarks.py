"""What benchmarks/eu_rmse.py says of an estimator whose errors are known."""

from __future__ import annotations

import numpy as np
import pytest
from eu_compare import Estimate, best_scale, rmse_ratio, row

RNG = np.random.default_rng(0)
TRUTH = [RNG.gamma(1.0, 0.2, size=30) for _ in range(60)]


def noisy(scale: float, noise: float, seed: int) -> Estimate:
    rng = np.random.default_rng(seed)
    values = [eu / scale + rng.normal(0, noise, len(eu)) for eu in TRUTH]
    return Estimate(f"{scale} {noise}", values)


def test_a_scaled_estimate_is_found_out_and_put_right() -> None:
    values = row(noisy(scale=0.5, noise=0.0, seed=1), TRUTH)
    assert values["scale"] == pytest.approx(0.5)
    assert values["rmse_scaled"][0] == pytest.approx(0, abs=1e-12)
    even = np.concatenate(TRUTH[0::2])
    assert values["rmse"][0] == pytest.approx(np.sqrt(np.mean(even**2)))
    assert values["bias"][0] == pytest.approx(even.mean())
    assert values["spearman"][0] == pytest.approx(1)
    for key in ("rmse", "bias"):
        value, low, high = values[key]
        assert low < value < high


def test_the_scale_is_not_fitted_on_what_is_measured() -> None:
    estimate = noisy(scale=1.0, noise=0.1, seed=2)
    # Spoil the calibration half only: the measured half's plain error stays what it was.
    spoiled = Estimate("spoiled", [v * (3 if i % 2 else 1) for i, v in enumerate(estimate.values)])
    plain, other = row(estimate, TRUTH), row(spoiled, TRUTH)
    assert other["rmse"] == plain["rmse"]
    assert other["rmse_scaled"][0] > 2 * plain["rmse_scaled"][0]


def test_the_interval_of_a_ratio_holds_the_ratio() -> None:
    value, low, high = rmse_ratio(noisy(1.0, 0.05, 3), noisy(1.0, 0.1, 4), TRUTH)
    assert value == pytest.approx(0.5, abs=0.05)
    assert low < value < high
    assert high - low < 0.2


def test_a_constant_has_no_rank() -> None:
    values = row(Estimate("constant", [np.full(30, 0.2) for _ in TRUTH]), TRUTH)
    assert values["spearman"] == values["pearson"] == [0.0, 0.0, 0.0]


def test_the_best_scale_is_least_squares() -> None:
    x, y = RNG.normal(size=50), RNG.normal(size=50)
    scale = best_scale([x], [y])
    errors = [np.mean((s * x - y) ** 2) for s in (scale - 0.01, scale, scale + 0.01)]
    assert errors[1] == min(errors)
