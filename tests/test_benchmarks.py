"""What benchmarks/eu_rmse.py says of an estimator whose errors are known."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from eu_compare import Estimate, best_scale, rmse_ratio, row, scaled
from eu_estimators import first_drafts
from eu_kept import kept
from eu_rmse import checked
from eu_table import write_tables

from drafts.cost import head_cost, layers_cost, student_cost
from drafts.manifest import load_ensemble
from drafts.residual import ResidualConfig
from tests.tiny import edit_manifest, mixed_ensemble

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
    every = np.concatenate(TRUTH)
    assert values["rmse"][0] == pytest.approx(np.sqrt(np.mean(every**2)))
    assert values["bias"][0] == pytest.approx(every.mean())
    assert values["spearman"][0] == pytest.approx(1)
    for key in ("rmse", "bias"):
        value, low, high = values[key]
        assert low < value < high


def test_the_scale_is_not_fitted_on_what_is_measured() -> None:
    # One half has three times the other's scale: fitted on the whole, it would lie between.
    halves = Estimate("halves", [v * (3 if i % 2 else 1) for i, v in enumerate(TRUTH)])
    after = scaled(halves, TRUTH)
    np.testing.assert_allclose(after.values[0], TRUTH[0] / 3)
    np.testing.assert_allclose(after.values[1], TRUTH[1] * 3)
    error = np.sqrt(
        np.mean(np.concatenate([a - t for a, t in zip(after.values, TRUTH, strict=True)]) ** 2)
    )
    assert row(halves, TRUTH)["rmse_scaled"][0] == pytest.approx(error)


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


def test_what_was_estimated_is_kept_and_not_done_again(tmp_path: Path) -> None:
    first = noisy(1.0, 0.1, 5)
    first.values = [values[: 3 + i] for i, values in enumerate(first.values)]  # unlike lengths
    first.flops, first.time = 0.5, 2.0
    calls = []

    def make() -> list[Estimate]:
        calls.append(1)
        return [first, Estimate("other", [2 * values for values in first.values])]

    kept(tmp_path / "a/exit-240.1", make)
    again, other = kept(tmp_path / "a/exit-240.1", make)
    assert len(calls) == 1
    assert (again.name, again.flops, again.head_flops, again.time) == (first.name, 0.5, 0.0, 2.0)
    assert [len(values) for values in again.values] == [len(values) for values in first.values]
    for ours, theirs, double in zip(again.values, first.values, other.values, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(double, 2 * theirs)


def test_costs_are_those_of_the_weights() -> None:
    smollm2 = SimpleNamespace(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152,
    )  # fmt: skip
    # q, k, v, o and the three matrices of the MLP
    assert layers_cost(smollm2) == 30 * (576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536)
    assert head_cost(smollm2) == 576 * 49152
    config = ResidualConfig(hidden_size=8, taps=[2, 3], rank=3, factors=2, width=5, draws=4)
    network = (3 * 8 + 4) * 5 + 5 * (3 + 3 + 3 * 2 + 1)
    per_draw = 3 * 2 + 3 * 8
    scale = 256 * (3 + 5 * 4)  # of each draw
    assert student_cost(config, 4) == network + 4 * (per_draw + scale)
    plain = config.model_copy(update={"scaled": False})
    assert student_cost(plain, 4) == network + 4 * per_draw


def test_the_page_says_what_the_result_says(tmp_path: Path) -> None:
    result = {
        "machine": {"cores": 2},
        "goals": [{"name": "low RMSE", "value": [0.7, 0.6, 0.8], "bound": 0.63, "holds": False}],
        "tables": {
            "some-texts": {
                "reference": {
                    "texts": 60, "tokens": 1800, "draws": 64, "mean": 0.2,
                    "standard_deviation": 0.1, "noise_rms": 0.01, "kl_posterior_mean_target": 0.05,
                },
                "rows": [row(noisy(1.0, 0.1, 1), TRUTH)],
            }
        },
        "training": {
            "exit": {
                "before": {"kl_drafts": 0.5, "jsd": 0.0},
                "after": {"kl_drafts": 0.25, "jsd": 0.125},
            }
        },
    }  # fmt: skip
    write_tables(result, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| low RMSE | 0.700 (0.600–0.800) | 0.63 | **no** |" in page
    assert "60 texts, 1800 tokens" in page
    assert "| exit | 0.5000 | 0.2500 | 0.0000 | 0.1250 |" in page
    assert "| 1.0 0.1 | 0.1" in page


def test_goals_are_checked_against_what_was_measured() -> None:
    good, bad = noisy(1.0, 0.05, 3), noisy(0.5, 0.01, 4)
    estimates = [good, bad]
    rows = [row(estimate, TRUTH) for estimate in estimates]
    goals: list[dict[str, Any]] = [
        {"name": "ratio", "row": good.name, "over": bad.name, "at_most": 0.5},
        # At its best scale the rival has hardly an error left.
        {"name": "scaled", "row": good.name, "over": bad.name, "scaled": True, "at_most": 1.0},
        {"name": "rank", "row": good.name, "number": "spearman", "at_least": 0.999},
        {"name": "cost", "row": good.name, "number": "flops", "at_most": 0.1},
    ]
    found = checked(goals, estimates, rows, TRUTH)
    assert [goal["holds"] for goal in found] == [True, False, False, True]
    assert [goal["bound"] for goal in found] == [0.5, 1.0, 0.999, 0.1]
    error = np.sqrt(np.mean(np.concatenate(TRUTH) ** 2))  # of a rival that says twice EU*
    assert found[0]["value"][0] == pytest.approx(0.05 / error, rel=0.1)
    assert found[3]["value"] == [0.0]


def test_the_first_drafts_are_one_of_each_student(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "ensemble")
    entries = [
        {"name": f"draft_{a}{b}", "kind": "residual", "source": f"student_{a}", "draw": draw}
        for a in "ab"
        for b, draw in (("a", 0), ("b", 1), ("c", 2))
    ]
    for letter in "ab":
        shutil.copytree(folder / "student", folder / f"student_{letter}")
    edit_manifest(folder, drafts=entries)
    ensemble = load_ensemble(folder)
    for count, names in ((2, "aa ba"), (4, "aa ba ab bb"), (6, "aa ba ab bb ac bc")):
        chosen = first_drafts(ensemble, count)
        expected = [f"draft_{name}" for name in names.split()]
        assert [member.draft.name for member in chosen.members] == expected
        assert [draws for _, draws in chosen.students().values()] == [list(range(count // 2))] * 2
