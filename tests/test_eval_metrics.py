"""Metrics of detectors against scikit-learn, double loops and their definitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from demur.evals.bootstrap import Estimate, codes, difference, resamples
from demur.evals.calibration_metrics import brier, ece, nll, reliability
from demur.evals.metrics import Judge
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sklearn_metrics

N_BOOT = 12
Data = dict[str, NDArray[np.int64]]

PAIR_METRICS: dict[str, Callable[[Judge, ArrayLike], Estimate]] = {
    "auroc": Judge.auroc,
    "auroc_within": Judge.auroc_within,
    "length_matched": Judge.auroc_length_matched,
    "length_matched_within": lambda judge, doubt: judge.auroc_length_matched(doubt, within=True),
}
RANK_METRICS = PAIR_METRICS | {
    "auprc": Judge.auprc,
    "acc_star": Judge.acc_star,
    "prr": Judge.prr,
    "aurac": Judge.aurac,
}
ALL_METRICS = RANK_METRICS | {"brier": Judge.brier, "nll": Judge.nll, "ece": Judge.ece}


def _column(n: int, low: int, high: int) -> st.SearchStrategy[NDArray[np.int64]]:
    return st.lists(st.integers(low, high), min_size=n, max_size=n).map(np.array)


@st.composite
def data(draw: st.DrawFn, largest: int = 40) -> Data:
    """Answers, some wrong and some right, with few or many ties of the doubt (0 to 64)."""
    n = draw(st.integers(2, largest))
    wrong = draw(_column(n, 0, 1))
    assume(0 < wrong.sum() < n)
    return {
        "wrong": wrong,
        "doubt": draw(_column(n, 0, draw(st.sampled_from([1, 4, 64])))),
        "groups": draw(_column(n, 0, draw(st.sampled_from([3, 1000])))),
        "strata": draw(_column(n, 0, draw(st.sampled_from([0, 3])))),
        "lengths": draw(_column(n, 0, draw(st.sampled_from([12, 200])))),
    }


def _judge(found: Data, n_boot: int = N_BOOT) -> Judge:
    return Judge(
        found["wrong"],
        found["groups"].tolist(),
        found["strata"].tolist(),
        found["lengths"],
        n_boot=n_boot,
    )


def _weights(found: Data) -> NDArray[np.float64]:
    return resamples(codes(found["groups"].tolist()), N_BOOT, seed=0)


def _all(estimate: Estimate) -> NDArray[np.float64]:
    return np.append(estimate.value, estimate.draws)


def _simple(wrong: list[int], n_boot: int = 0) -> Judge:
    n = len(wrong)
    return Judge(wrong, range(n), [0] * n, [1] * n, n_boot=n_boot)


@given(data())
@settings(max_examples=100, deadline=None)
def test_auroc_and_auprc_are_scikit_learns_in_each_resample(found: Data) -> None:
    judge, doubt, wrong = _judge(found), found["doubt"], found["wrong"]
    auroc, auprc = _all(judge.auroc(doubt)), _all(judge.auprc(doubt))
    for b, weights in enumerate(_weights(found)):
        n_wrong = weights[wrong == 1].sum()
        if n_wrong == 0:
            assert math.isnan(auprc[b])
        else:
            expected = sklearn_metrics.average_precision_score(wrong, doubt, sample_weight=weights)
            assert auprc[b] == pytest.approx(expected, abs=1e-12)
        if n_wrong in (0, weights.sum()):
            assert math.isnan(auroc[b])
        else:
            expected = sklearn_metrics.roc_auc_score(wrong, doubt, sample_weight=weights)
            assert auroc[b] == pytest.approx(expected, abs=1e-12)


@given(data())
@settings(max_examples=100, deadline=None)
def test_each_auroc_is_a_count_over_pairs(found: Data) -> None:
    judge, weights = _judge(found), _weights(found)
    doubt, lengths, strata = found["doubt"], found["lengths"], found["strata"]
    won = {name: np.zeros(1 + N_BOOT) for name in PAIR_METRICS}
    pairs = {name: np.zeros(1 + N_BOOT) for name in PAIR_METRICS}
    for i in np.flatnonzero(found["wrong"] == 1):
        for j in np.flatnonzero(found["wrong"] == 0):
            same = strata[i] == strata[j]
            longer, shorter = max(lengths[i], lengths[j]), min(lengths[i], lengths[j])
            near = longer - shorter <= longer / 10
            allowed = dict(zip(PAIR_METRICS, [True, same, near, near and same], strict=True))
            for name in [name for name in PAIR_METRICS if allowed[name]]:
                pairs[name] += weights[:, i] * weights[:, j]
                credit = 1.0 if doubt[i] > doubt[j] else 0.5 if doubt[i] == doubt[j] else 0.0
                won[name] += credit * weights[:, i] * weights[:, j]
    for name, metric in PAIR_METRICS.items():
        with np.errstate(invalid="ignore"):
            expected = won[name] / pairs[name]
        np.testing.assert_allclose(_all(metric(judge, doubt)), expected, atol=1e-12, err_msg=name)


def test_length_matched_over_many_blocks() -> None:
    rng = np.random.default_rng(3)
    n = 1500  # so that there are several blocks of wrong answers
    found = {
        "wrong": (rng.random(n) < 0.6).astype(int),
        "doubt": rng.integers(0, 30, n),
        "groups": rng.integers(0, 400, n),
        "strata": rng.integers(0, 9, n),
        "lengths": rng.integers(5, 300, n),
    }
    judge, weights = _judge(found), _weights(found)
    bad, good = np.flatnonzero(found["wrong"] == 1), np.flatnonzero(found["wrong"] == 0)
    one, other = found["lengths"][bad, None], found["lengths"][good]
    near = np.maximum(one, other) - np.minimum(one, other) <= np.maximum(one, other) / 10
    same = found["strata"][bad, None] == found["strata"][good]
    credit = (np.sign(found["doubt"][bad, None] - found["doubt"][good]) + 1) / 2
    for within, allowed in [(False, near), (True, near & same)]:
        got = _all(judge.auroc_length_matched(found["doubt"], within=within))
        for b, row in enumerate(weights):
            pairs = allowed * np.outer(row[bad], row[good])
            assert got[b] == pytest.approx((credit * pairs).sum() / pairs.sum(), abs=1e-12)


@given(data(largest=20))
@settings(max_examples=60, deadline=None)
def test_an_answer_that_counts_twice_is_as_two_answers(found: Data) -> None:
    judge = _judge(found)
    values = {
        name: _all(metric(judge, found["doubt"] / 64)) for name, metric in ALL_METRICS.items()
    }
    for b, weights in enumerate(_weights(found)):
        repeated = {name: np.repeat(of, weights.astype(int)) for name, of in found.items()}
        alone = _judge(repeated, n_boot=0)
        for name, metric in ALL_METRICS.items():
            expected = metric(alone, repeated["doubt"] / 64).value
            np.testing.assert_allclose(values[name][b], expected, atol=1e-9, err_msg=name)


@given(data())
@settings(max_examples=60, deadline=None)
def test_only_the_order_of_the_doubt_matters(found: Data) -> None:
    judge, doubt = _judge(found), found["doubt"]
    for metric in RANK_METRICS.values():
        np.testing.assert_array_equal(
            _all(metric(judge, doubt)), _all(metric(judge, np.exp(doubt / 4) - 9))
        )


@given(data())
@settings(max_examples=60, deadline=None)
def test_auroc_of_the_negated_doubt_is_the_rest_to_1(found: Data) -> None:
    judge, doubt = _judge(found), found["doubt"]
    for metric in PAIR_METRICS.values():
        np.testing.assert_allclose(
            _all(metric(judge, -doubt)), 1 - _all(metric(judge, doubt)), atol=1e-12
        )


@given(data(largest=6))
@settings(max_examples=40, deadline=None)
def test_ties_get_the_mean_over_their_orders(found: Data) -> None:
    judge, doubt, right = _judge(found, n_boot=0), found["doubt"], 1 - found["wrong"]
    n = len(right)
    taken = np.arange(1, n + 1)
    halves, areas = [], []
    for shuffled in itertools.permutations(range(n)):
        order = sorted(shuffled, key=lambda i: doubt[i])  # stable: ties stay shuffled
        correct = right[order]
        halves.append((correct[: n // 2].sum() + (n % 2) * correct[n // 2] / 2) / (n / 2))
        areas.append((np.cumsum(correct) / taken).mean())
    best = (np.cumsum(np.sort(right)[::-1]) / taken).mean()
    assert judge.acc_star(doubt).value == pytest.approx(np.mean(halves), abs=1e-12)
    assert judge.aurac(doubt).value == pytest.approx(np.mean(areas), abs=1e-12)
    expected = (np.mean(areas) - right.mean()) / (best - right.mean())
    assert judge.prr(doubt).value == pytest.approx(expected, abs=1e-9)


@given(data())
@settings(max_examples=60, deadline=None)
def test_a_constant_knows_nothing_and_an_oracle_everything(found: Data) -> None:
    judge, weights = _judge(found), _weights(found)
    constant, oracle = np.full(len(found["wrong"]), 0.3), found["wrong"]
    accuracy = weights @ (1 - found["wrong"]) / weights.sum(axis=1)
    mixed = (accuracy > 0) & (accuracy < 1)
    np.testing.assert_allclose(_all(judge.acc_star(constant)), accuracy, atol=1e-12)
    np.testing.assert_allclose(_all(judge.aurac(constant)), accuracy, atol=1e-12)
    for metric, by_chance in [(judge.prr, 0.0), (judge.auroc, 0.5)]:
        values, best = _all(metric(constant)), _all(metric(oracle))
        np.testing.assert_allclose(values[mixed], by_chance, atol=1e-9)
        np.testing.assert_allclose(best[mixed], 1, atol=1e-9)
        assert np.isnan(values[~mixed]).all()
        assert np.isnan(best[~mixed]).all()


def test_acc_star_and_aurac_by_hand() -> None:
    judge, doubt = _simple([0, 1, 0, 1]), [0.1, 0.2, 0.3, 0.4]
    assert judge.acc_star(doubt).value == 0.5
    assert judge.acc_star([0.1, 0.3, 0.2, 0.4]).value == 1.0
    assert judge.aurac(doubt).value == pytest.approx((1 + 1 / 2 + 2 / 3 + 1 / 2) / 4)
    by_chance, best = 1 / 2, (1 + 1 + 2 / 3 + 1 / 2) / 4
    expected = (judge.aurac(doubt).value - by_chance) / (best - by_chance)
    assert judge.prr(doubt).value == pytest.approx(expected)


def test_clusters_are_drawn_whole() -> None:
    groups = ["fr", ("de", 1), "fr", 7, ("de", 1), "fr"]
    weights = resamples(codes(groups), 2000, seed=1)
    assert weights.shape == (2001, 6)
    assert (weights[0] == 1).all()
    for same in [(0, 2), (0, 5), (1, 4)]:
        np.testing.assert_array_equal(weights[:, same[0]], weights[:, same[1]])
    per_cluster = weights[:, [0, 1, 3]]
    assert (per_cluster.sum(axis=1) == 3).all()
    # A binomial of 3 draws at 1/3 each: mean 1, variance 2/3.
    np.testing.assert_allclose(per_cluster[1:].mean(axis=0), 1, atol=0.08)
    np.testing.assert_allclose(per_cluster[1:].var(axis=0), 2 / 3, atol=0.08)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    truth = NormalDist().cdf(1 / math.sqrt(2))  # two unit normals, one apart
    hits, widths = 0, []
    for seed in range(200):
        wrong = np.arange(120) % 2
        doubt = rng.normal(size=120) + wrong
        judge = Judge(wrong, range(120), [0] * 120, [1] * 120, n_boot=300, seed=seed)
        low, high = judge.auroc(doubt).interval()
        hits += low <= truth <= high
        widths.append(high - low)
    assert 0.90 <= hits / 200 <= 0.985
    # Hanley & McNeil's standard error for 60 against 60 at 0.76 is 0.043.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.043, rel=0.1)


def test_copies_in_a_cluster_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(6)
    wrong = np.arange(150) % 2
    doubt = rng.normal(size=150) + wrong

    def width(copies: int, clustered: bool) -> float:
        n = 150 * copies
        groups = np.repeat(np.arange(150), copies).tolist() if clustered else range(n)
        judge = Judge(np.repeat(wrong, copies), groups, [0] * n, [1] * n)
        low, high = judge.auroc(np.repeat(doubt, copies)).interval()
        return high - low

    assert width(4, clustered=True) == pytest.approx(width(1, clustered=True), abs=1e-12)
    assert width(4, clustered=False) == pytest.approx(width(1, clustered=True) / 2, rel=0.1)


def test_the_level_is_the_share_of_resamples_within() -> None:
    draws = np.append(np.arange(101.0), [np.nan] * 50)
    assert Estimate(3.0, draws).interval(0.9) == pytest.approx((5, 95))
    assert Estimate(3.0, draws).interval() == pytest.approx((2.5, 97.5))


@given(data())
@settings(max_examples=20, deadline=None)
def test_a_detector_does_not_differ_from_itself(found: Data) -> None:
    judge, doubt = _judge(found), found["doubt"] / 64
    for metric in ALL_METRICS.values():
        gap = difference(metric(judge, doubt), metric(judge, doubt.copy()))
        assert gap.value == 0 or math.isnan(gap.value)
        assert (gap.draws[~np.isnan(gap.draws)] == 0).all()


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(7)
    wrong = np.arange(300) % 2
    one = rng.normal(size=300) + wrong
    other = one + rng.normal(size=300) * 0.1
    judge = Judge(wrong, range(300), [0] * 300, [1] * 300)
    a, b = judge.auroc(one), judge.auroc(other)
    gap = difference(a, b)
    assert gap.value == a.value - b.value
    np.testing.assert_array_equal(gap.draws, a.draws - b.draws)
    assert gap.draws.std() < 0.3 * a.draws.std()
    with pytest.raises(ValueError, match="1000 resamples and the other 5"):
        difference(a, _simple([0, 1], n_boot=5).auroc([0, 1]))


def test_what_is_undefined_is_nan_and_left_out_of_the_interval() -> None:
    nothing_wrong = _simple([0, 0, 0], n_boot=10)
    for metric in [*PAIR_METRICS.values(), Judge.auprc, Judge.prr]:
        estimate = metric(nothing_wrong, np.array([1.0, 2.0, 3.0]))
        assert math.isnan(estimate.value)
        assert all(math.isnan(end) for end in estimate.interval())
    assert nothing_wrong.acc_star([1, 2, 3]).value == 1

    rare = _simple([1] + [0] * 9, n_boot=500).auroc([0.5, *range(9)])
    undefined = np.isnan(rare.draws).mean()
    assert undefined == pytest.approx((1 - 1 / 10) ** 10, abs=0.06)  # the wrong one is not drawn
    low, high = rare.interval()
    assert 0 <= low <= rare.value == pytest.approx(1 / 9)
    assert rare.value <= high < 1

    one_each = Judge([0, 1, 0, 1], range(4), ["a", "b", "c", "d"], [9, 9, 9, 9], n_boot=10)
    assert math.isnan(one_each.auroc_within([1, 2, 3, 4]).value)
    assert math.isnan(one_each.auroc_length_matched([1, 2, 3, 4], within=True).value)
    assert one_each.auroc_length_matched([1, 2, 3, 4]).value == 0.75


def test_resamples_depend_on_the_seed_only() -> None:
    def draws(seed: int) -> NDArray[np.float64]:
        judge = Judge([0, 1] * 20, range(40), [0] * 40, [1] * 40, n_boot=50, seed=seed)
        return judge.aurac(np.arange(40) % 7).draws

    np.testing.assert_array_equal(draws(1), draws(1))
    assert (draws(1) != draws(2)).any()


def test_wrong_arguments_are_refused_in_words() -> None:
    judge = _simple([0, 1, 1])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"1 of 3 values are no finite numbers.* at 1"):
            judge.auroc([0.1, bad, 0.3])
    with pytest.raises(ValueError, match="there are 3 answers"):
        judge.auprc([0.1, 0.2])
    with pytest.raises(ValueError, match="strata has shape"):
        Judge([0, 1], ["a", "b"], ["a"], [1, 1])
    with pytest.raises(ValueError, match="no answer"):
        Judge([], [], [], [])
    for call in (judge.brier, judge.nll, judge.ece, lambda p: ece(p, [0, 1, 1])):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
            call([0.1, 0.2, 1.3])
    with pytest.raises(ValueError, match="one probability for each"):
        brier([0.1], [0, 1])


@given(data())
@settings(max_examples=60, deadline=None)
def test_roc_and_risk_coverage(found: Data) -> None:
    judge, doubt, wrong = _judge(found), found["doubt"], found["wrong"]
    fpr, tpr = judge.roc(doubt)
    expected = sklearn_metrics.roc_curve(wrong, doubt, drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0], atol=1e-12)
    np.testing.assert_allclose(tpr, expected[1], atol=1e-12)
    assert np.trapezoid(tpr, fpr) == pytest.approx(judge.auroc(doubt).value)

    coverage, risk = judge.risk_coverage(doubt)
    thresholds = np.unique(doubt)
    np.testing.assert_allclose(coverage, [(doubt <= t).mean() for t in thresholds])
    np.testing.assert_allclose(risk, [wrong[doubt <= t].mean() for t in thresholds], atol=1e-12)


@given(data())
@settings(max_examples=60, deadline=None)
def test_brier_and_nll_are_scikit_learns(found: Data) -> None:
    judge, wrong, probability = _judge(found), found["wrong"], found["doubt"] / 64
    assert brier(probability, wrong) == pytest.approx(judge.brier(probability).value)
    assert nll(probability, wrong) == pytest.approx(judge.nll(probability).value)
    for b, weights in enumerate(_weights(found)):
        expected = sklearn_metrics.brier_score_loss(
            wrong, probability, sample_weight=weights, pos_label=1
        )
        assert _all(judge.brier(probability))[b] == pytest.approx(expected)
        expected = sklearn_metrics.log_loss(
            wrong, probability, sample_weight=weights, labels=[0, 1]
        )
        assert _all(judge.nll(probability))[b] == pytest.approx(expected)


@given(data())
@settings(max_examples=60, deadline=None)
def test_ece_is_the_distance_in_the_reliability_diagram(found: Data) -> None:
    probability, wrong = found["doubt"] / 64, found["wrong"]
    diagram = reliability(probability, wrong, bins=7)
    assert diagram.count.sum() == len(wrong)
    assert diagram.count.max() - diagram.count.min() <= 1
    assert (np.diff(diagram.probability) >= -1e-12).all()
    expected = (diagram.count * abs(diagram.probability - diagram.wrong)).sum() / len(wrong)
    assert ece(probability, wrong, bins=7) == pytest.approx(expected, abs=1e-12)
    assert _judge(found).ece(probability, bins=7).value == pytest.approx(expected, abs=1e-12)
    assert ece(probability, wrong, bins=1) == pytest.approx(abs(probability.mean() - wrong.mean()))


def test_ece_by_hand() -> None:
    probability, wrong = [0.9, 0.1, 0.2, 0.6], [1, 0, 1, 0]
    diagram = reliability(probability, wrong, bins=2)
    np.testing.assert_allclose(diagram.probability, [0.15, 0.75])
    np.testing.assert_allclose(diagram.wrong, [0.5, 0.5])
    assert diagram.count.tolist() == [2, 2]
    assert ece(probability, wrong, bins=2) == pytest.approx((0.35 + 0.25) / 2)
    # One value in all bins: no order within the tie makes it look worse than it is.
    assert ece([0.4] * 10, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bins=5) == pytest.approx(0, abs=1e-12)
    assert ece([0.5] * 10, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bins=5) == pytest.approx(0.1)
    assert reliability([0.1, 0.9], [0, 1], bins=10).count.tolist() == [1, 1]


def test_a_mean_has_the_interval_of_its_clusters() -> None:
    groups = [i // 4 for i in range(400)]
    values = [float(group % 2) for group in groups]
    judge = Judge([True, False] * 200, groups, groups, [1] * 400, n_boot=500)
    found = judge.mean(values)
    assert found.value == 0.5
    low, high = found.interval()
    # A hundred clusters: 1.96 * 0.5 / 10, and not the half of it that 400 answers would have.
    assert 0.07 < (high - low) / 2 < 0.13
