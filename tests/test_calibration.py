"""Calibrations: what they learn, what they refuse, and what no file can make them do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafts.calibration import (
    CALIBRATION_NAME,
    Calibration,
    load_calibration,
    save_calibration,
)
from drafts.calibration_fit import calibration_error, fit, folds
from drafts.calibration_parts import Kind
from drafts.errors import CalibrationError
from drafts.features import FEATURES, claim_of, features
from drafts.scores import TokenScores
from tests.calibrations import NAMES, answers, calibration, origin, scores_of, whole, wholes

KINDS: tuple[Kind, ...] = ("logistic", "isotonic")


def test_features_by_hand() -> None:
    total = np.array([1.0, 2.0, 6.0] + [1.0] * 8)  # 11 tokens: a tenth, rounded up, is 2
    scores = scores_of(total)
    names = ["total_mean", "total_max", "total_top10", "total_sum", "surprisal_max", "log_tokens"]
    names += ["epistemic_sum", "aleatoric_max", "entropy_top10", "jsd_mean", "kl_sum"]
    got = features(scores, whole(scores), names)
    want = [17 / 11, 6, 4, 17, 6, np.log(11), 17 * 3 / 8, 6 * 3 / 4, 2, 17 / 44, 17 / 8]
    np.testing.assert_allclose(got, want)
    assert (
        features(scores_of(np.array([3.0])), whole(scores_of(np.array([3.0]))), ["jsd_top10"])
        == 0.75
    )
    assert len(FEATURES) == 44


def test_features_of_the_claim() -> None:
    pieces = ["It", " is", " To", "kyo", ".", " Not", " Kyo", "to", "."]
    scores = scores_of(np.arange(1.0, 10.0))
    claim = claim_of(pieces, "Where is Japan's capital?")
    got = features(scores, claim, ["total_sentence", "total_name", "log_sentence", "log_tokens"])
    np.testing.assert_allclose(got, [3, 3.5, np.log(5), np.log(9)])
    # A name that was asked for is not the answer's own; one that names nothing is all of it.
    asked = features(scores, claim_of(pieces, "Is it Tokyo?"), ["total_name"])
    assert asked == 6  # `Not`
    nothing = claim_of(["it", " is"], "")
    assert features(scores_of(np.array([1.0, 2.0])), nothing, ["total_name"]) == 1.5
    with pytest.raises(ValueError, match="2 tokens have marks and 9 have scores"):
        features(scores, nothing, ["total_mean"])


@given(st.lists(st.text(max_size=6), min_size=1, max_size=12), st.text())
def test_any_text_has_a_claim(pieces: list[str], asked: str) -> None:
    claim = claim_of(pieces, asked)
    for marks in (claim.sentence, claim.name):
        assert marks.shape == (len(pieces),)
        assert marks.any()


def test_features_that_are_none() -> None:
    scores = scores_of(np.ones(3))
    for names in (["total"], ["total_median"], ["fear_mean"], [""]):
        with pytest.raises(ValueError, match="no feature; these are: surprisal_mean"):
            features(scores, whole(scores), names)
    with pytest.raises(ValueError, match="twice"):
        features(scores, whole(scores), ["jsd_mean", "jsd_mean"])
    with pytest.raises(ValueError, match="without tokens"):
        features(scores_of(np.array([])), whole(scores_of(np.array([]))), NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_a_probability_that_is_known(kind: Kind) -> None:
    fitted = calibration(kind)
    fresh = answers(3000, seed=7)
    probability = np.array([fitted.probability(one, whole(one)) for one in fresh.scores])
    # Steps through answers stray farther from a smooth curve than one of its own family.
    within = 0.03 if kind == "logistic" else 0.06
    assert np.abs(probability - fresh.probability_N).mean() < within
    assert calibration_error(probability, np.array(fresh.wrong)) < 0.04
    # What it says of itself, from cross-validation, holds of answers that it has never seen.
    quality = fitted.held_out
    assert quality.groups == 500
    brier = np.mean((probability - np.array(fresh.wrong)) ** 2)
    assert quality.brier == pytest.approx(brier, abs=0.02)
    assert quality.ece < 0.06
    assert 0.65 < quality.auroc < 0.85


def test_a_prediction_that_knows_nothing_is_told_from_one_that_does() -> None:
    made = answers(300, seed=3)
    shuffled = np.random.default_rng(0).permutation(made.wrong).tolist()
    quality = fit(
        made.scores, wholes(made.scores), shuffled, made.groups, NAMES, "logistic", origin()
    ).held_out
    assert 0.35 < quality.auroc < 0.62
    share = np.mean(shuffled)
    assert quality.brier == pytest.approx(share * (1 - share), abs=0.01)


def test_an_isotonic_one_grows_with_doubt_and_promises_nothing() -> None:
    fitted = calibration("isotonic")
    totals = np.linspace(0, 8, 400)
    probability = [
        fitted.probability(scores_of(np.full(10, total)), whole(scores_of(np.full(10, total))))
        for total in totals
    ]
    assert probability == sorted(probability)
    assert len(set(probability)) > 5
    assert 1 / 1502 <= probability[0] < 0.3
    assert 0.7 < probability[-1] <= 1501 / 1502


def test_calibration_error_by_hand() -> None:
    wrong = np.array([False] * 70 + [True] * 30)
    assert calibration_error(np.full(100, 0.3), wrong) == pytest.approx(0)
    assert calibration_error(np.full(100, 0.5), wrong) == pytest.approx(0.2)
    assert calibration_error(wrong.astype(float), wrong) == 0
    assert calibration_error(1.0 - wrong, wrong) == 1
    # Errors of unlike sign in unlike places do not cancel.
    probability = np.repeat([0.2, 0.8], 50)
    half = np.tile([True, False], 50)
    assert calibration_error(probability, half) == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_never_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.array([f"g{i}" for i in rng.integers(0, 60, 400)], dtype=object)
    wrong = rng.random(400) < 0.2
    parts = folds(wrong, groups, seed)
    assert sorted(np.concatenate([test for _, test in parts])) == list(range(400))
    for train, test in parts:
        assert not set(groups[train]) & set(groups[test])
        assert sorted([*train, *test]) == list(range(400))
        assert 0.1 < wrong[test].mean() < 0.3


def test_a_fit_can_be_made_again() -> None:
    made = answers(60, seed=5)
    texts = {
        fit(
            made.scores, wholes(made.scores), made.wrong, made.groups, NAMES, "logistic", origin()
        ).text()
        for _ in range(2)
    }
    assert len(texts) == 1


def test_what_is_not_fitted() -> None:
    made = answers(60, seed=4)
    wrong = [i % 2 == 0 for i in range(60)]

    def refused(says: str, n: int = 60, **changes: Any) -> None:
        given: dict[str, Any] = {"groups": made.groups, "names": NAMES, "kind": "logistic"}
        given |= {"scores": made.scores, "wrong": wrong, "origin": origin()} | changes
        given["claims"] = wholes(given["scores"])
        for name in ("scores", "claims", "wrong", "groups"):
            given[name] = given[name][:n]
        with pytest.raises(ValueError, match=says):
            fit(**given)

    refused("49 answers are too few", n=49)
    refused("0 answers are too few", n=0)
    refused("all 60 answers are wrong", wrong=[True] * 60)
    refused("all 60 answers are right", wrong=[False] * 60)
    refused("differ in length", wrong=wrong[:-1])
    refused("4 groups", groups=[str(i % 4) for i in range(60)])
    # All that are wrong are in one group: whatever fold it is in, the others have none.
    of_one = ["one" if is_wrong else f"g{i}" for i, is_wrong in enumerate(wrong)]
    refused("the wrong answers are of too few groups", groups=of_one)
    refused("no feature", names=["total_median"])
    refused("has one feature, not 5", kind="isotonic")
    for bad in (np.nan, np.inf):
        scores = [*made.scores[:-1], scores_of(np.array([1.0, bad]))]
        refused("NaN or infinite", scores=scores)


def test_a_feature_that_does_not_vary_is_no_accident() -> None:
    rng = np.random.default_rng(0)
    scores = [scores_of(rng.gamma(2, 1, 7)) for _ in range(100)]
    wrong = [bool(one.total.mean() > 2) for one in scores]
    groups = [str(i) for i in range(100)]
    fitted = fit(
        scores, wholes(scores), wrong, groups, ["total_mean", "log_tokens"], "logistic", origin()
    )
    assert fitted.standard.scale[1] == 1
    assert fitted.distance(scores[0], whole(scores[0])) < fitted.domain.limit * 1.5


def test_a_far_text_is_told_from_a_near_one() -> None:
    for kind in KINDS:
        fitted = calibration(kind)
        fresh = answers(1000, seed=9)
        far = [bool(fitted.warnings(one, whole(one), "tiny")) for one in fresh.scores]
        assert 0 < np.mean(far) < 0.04  # one in a hundred by design
        odd = scores_of(np.full(10, 20.0))
        (warning,) = fitted.warnings(odd, whole(odd), "tiny")
        assert warning.code == "far_from_calibration"
        assert f"{fitted.distance(odd, whole(odd)):.3g}" in warning.message
        assert f"{fitted.domain.limit:.3g}" in warning.message
        assert "facts/capital" in warning.message


def test_a_text_can_be_far_though_each_feature_is_usual() -> None:
    """Here total and surprisal are always alike; a text where they are not is something else."""
    fitted = calibration("logistic")
    usual = scores_of(np.full(20, 1.0))
    assert not fitted.warnings(usual, whole(usual), "tiny")
    columns = vars(usual) | {"logprob": np.full(20, -2.0)}
    strange = TokenScores(**columns)
    assert fitted.distance(strange, whole(strange)) > fitted.domain.limit


def test_other_weights_or_another_model_are_told() -> None:
    fitted = calibration()
    scores = scores_of(np.full(20, 1.0))
    other = scores_of(np.full(20, 1.0), "fake-2")
    assert fitted.warnings(scores, whole(scores), "tiny") == []
    for warned in (
        fitted.warnings(other, whole(other), "tiny"),
        fitted.warnings(scores, whole(scores), "large"),
    ):
        (warning,) = warned
        assert warning.code == "calibrated_on_other_weights"
        assert "demur calibrate" in warning.message
    assert "fake-2" in fitted.warnings(other, whole(other), "tiny")[0].message


def test_the_message_of_many_tasks_stays_short() -> None:
    tasks = [{"task": f"task {i}", "mode": "score", "n": 1, "wrong": 0.5} for i in range(900)]
    document = json.loads(calibration().text())
    document["origin"]["tasks"] = tasks
    fitted = Calibration.model_validate_json(json.dumps(document))
    message = fitted.warnings(
        scores_of(np.full(10, 20.0)), whole(scores_of(np.full(10, 20.0))), "tiny"
    )[0].message
    assert "and 895 more" in message
    assert len(message) < 500


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_exactly(tmp_path: Path, kind: Kind) -> None:
    fitted = calibration(kind)
    path = tmp_path / CALIBRATION_NAME
    path.write_text("what was there before")
    save_calibration(fitted, path)
    assert [file.name for file in tmp_path.iterdir()] == [CALIBRATION_NAME]
    read = load_calibration(tmp_path)
    assert read == fitted
    assert read is not None
    assert (read.id, read.kind) == (fitted.id, kind)
    for one in answers(50, seed=11).scores:
        assert read.probability(one, whole(one)) == fitted.probability(one, whole(one))
        assert read.distance(one, whole(one)) == fitted.distance(one, whole(one))


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_NAME).mkdir()
    with pytest.raises(OSError, match="directory"):
        save_calibration(calibration(), tmp_path / CALIBRATION_NAME)
    assert len(list(tmp_path.iterdir())) == 1


def test_no_calibration_is_no_error(tmp_path: Path) -> None:
    assert load_calibration(tmp_path) is None
    assert load_calibration(tmp_path / "nowhere") is None


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Damage: another value at a place of the document."""

    def change(document: dict[str, Any]) -> None:
        at: Any = document
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = value

    return change


DAMAGE: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("format", put("format", value=2), "format"),
    ("unknown field", put("pickle", value="cos"), "pickle"),
    ("no features", put("features", value=[]), "features"),
    ("unknown feature", put("features", 0, value="total_median"), "no feature"),
    ("feature twice", put("features", 1, value="total_mean"), "twice"),
    ("long feature", put("features", 0, value="x" * 10**6), "features"),
    ("feature as number", put("features", 0, value=3), "features"),
    ("a feature less", lambda d: d["features"].pop(), "5 entries for 4 features"),
    ("a coefficient less", lambda d: d["estimator"]["coefficients"].pop(), "4 entries"),
    ("a mean more", lambda d: d["standard"]["mean"].append(0), "6 entries"),
    ("a scale less", lambda d: d["standard"]["scale"].pop(), "4 entries"),
    ("a row less", lambda d: d["domain"]["covariance"].pop(), "square"),
    ("a ragged row", lambda d: d["domain"]["covariance"][2].pop(), "square"),
    ("not symmetric", put("domain", "covariance", 0, 1, value=0.5), "symmetric"),
    ("not definite", put("domain", "covariance", 0, 0, value=-1.0), "positive definite"),
    ("scale of zero", put("standard", "scale", 0, value=0), "scale.0"),
    ("limit of zero", put("domain", "limit", value=0), "limit"),
    ("NaN", put("estimator", "intercept", value=float("nan")), "intercept"),
    ("infinity", put("estimator", "coefficients", 0, value=float("inf")), "coefficients"),
    ("huge number", put("standard", "mean", 0, value=1e300), "mean"),
    ("number as text", put("estimator", "intercept", value="0.5"), "intercept"),
    ("truth as number", put("estimator", "intercept", value=True), "intercept"),
    ("unknown kind", put("estimator", "kind", value="forest"), "estimator"),
    ("no origin", lambda d: d.pop("origin"), "origin"),
    ("no tasks", put("origin", "tasks", value=[]), "tasks"),
    ("share over one", put("origin", "tasks", 0, "wrong", value=1.5), "wrong"),
    ("probability as quality", put("held_out", "ece", value=-0.1), "ece"),
    (
        "isotonic of several",
        put("estimator", value={"kind": "isotonic", "thresholds": [0], "probabilities": [0.5]}),
        "one feature",
    ),
]
OF_ISOTONIC: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("descending", lambda d: d["estimator"]["probabilities"].reverse(), "probabilities descend"),
    ("not ascending", lambda d: d["estimator"]["thresholds"].reverse(), "do not ascend"),
    ("unlike lengths", lambda d: d["estimator"]["thresholds"].pop(), "differ in length"),
    ("no thresholds", put("estimator", "thresholds", value=[]), "thresholds"),
    ("over one", put("estimator", "probabilities", -1, value=1.1), "probabilities"),
]
RAW = [
    ("empty", b""),
    ("half a file", calibration().text().encode()[:700]),
    ("no JSON", b"\x80\x04\x95pickle"),
    ("a list", b"[]"),
    ("null", b"null"),
    ("a number", b"7"),
    ("brackets no end", b"[" * 10**6),
    ("huge", b" " * (5 * 2**20)),
    ("surrogate", calibration().text().encode().replace(b"facts/capital", b"\\ud800")),
]


def refused(folder: Path, says: str | None = None) -> None:
    with pytest.raises(CalibrationError, match=says) as caught:
        load_calibration(folder)
    message = str(caught.value)
    assert str(folder / CALIBRATION_NAME) in message
    assert "demur calibrate" in message  # what to do next
    assert len(message) < 2000


@pytest.mark.parametrize(("change", "says"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_told(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    document = json.loads(calibration("logistic").text())
    change(document)
    (tmp_path / CALIBRATION_NAME).write_text(json.dumps(document))
    refused(tmp_path, says)


@pytest.mark.parametrize(
    ("change", "says"), [d[1:] for d in OF_ISOTONIC], ids=[d[0] for d in OF_ISOTONIC]
)
def test_damage_of_an_isotonic_one(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    document = json.loads(calibration("isotonic").text())
    change(document)
    (tmp_path / CALIBRATION_NAME).write_text(json.dumps(document))
    refused(tmp_path, says)


@pytest.mark.parametrize("content", [row[1] for row in RAW], ids=[row[0] for row in RAW])
def test_damage_of_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CALIBRATION_NAME).write_bytes(content)
    refused(tmp_path)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_NAME).mkdir()
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_calibration(tmp_path)


def extreme() -> Calibration:
    """A file that is accepted, with numbers as large as they may be."""
    document = json.loads(calibration().text())
    document["features"] = ["total_sum", "jsd_sum", "aleatoric_max", "epistemic_sum", "log_tokens"]
    document["estimator"] |= {"coefficients": [1e9, -1e9, 1e9, 1e9, 1e9], "intercept": -1e9}
    document["standard"] = {"mean": [-1e9] * 5, "scale": [1e-6] * 5}
    document["domain"]["covariance"] = (np.eye(5) * 1e-6).tolist()
    return Calibration.model_validate_json(json.dumps(document))


_FLOAT = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(*[_FLOAT] * 5), min_size=1, max_size=30))
def test_any_finite_measures_give_a_probability(rows: list[tuple[float, ...]]) -> None:
    logprob, entropy, total, jsd, kl = np.array(rows).T
    rank = np.ones(len(rows), np.int64)
    scores = TokenScores(logprob, rank, entropy, total, jsd, kl, "fake-1")
    for fitted in (calibration("logistic"), calibration("isotonic"), extreme()):
        probability = fitted.probability(scores, whole(scores))
        assert 0 <= probability <= 1  # which NaN is not
        assert np.isfinite(fitted.distance(scores, whole(scores)))
        for warning in fitted.warnings(scores, whole(scores), "tiny"):
            assert "nan" not in warning.message
