"""How well a detector's doubt tells wrong answers from right ones, with intervals.

The positive class is the WRONG answer, and higher doubt says "more likely wrong".

    judge = Judge(wrong, groups=questions, strata=relations, lengths=token_counts)
    ours, theirs = judge.auroc(jsd), judge.auroc(entropy)
    ours.value, ours.interval(), difference(ours, theirs).interval()
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from demur.evals import calibration_metrics, rank_metrics
from demur.evals.bootstrap import Estimate, Floats, codes, resamples
from demur.evals.matched_pairs import MatchedPairs
from demur.evals.rank_metrics import Curve, Ranking

_BLOCK_ELEMENTS = 300_000  # a working set that stays in the cache


class Judge:
    """Answers with their labels, against which any number of detectors are held.

    All methods take one doubt for each answer, shape [N]. Estimates of one judge are over the same
    resamples, so that `difference` pairs them.

    Args:
        wrong: is the answer wrong? Shape [N].
        groups: the cluster of each answer, such as its question; clusters are resampled whole.
        strata: the part of the data within which `within` compares, such as the relation asked for.
        lengths: tokens of each answer, shape [N].
        n_boot: resamples B.
        seed: of the resamples.

    Raises:
        ValueError: if the lengths of these differ, or there is no answer.
    """

    def __init__(
        self,
        wrong: ArrayLike,
        groups: Sequence[Hashable],
        strata: Sequence[Hashable],
        lengths: ArrayLike,
        n_boot: int = 1000,
        seed: int = 0,
    ) -> None:
        self._wrong = np.asarray(wrong, dtype=bool)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._strata = codes(strata)
        group_codes = codes(groups)
        for name, given in [
            ("groups", group_codes),
            ("strata", self._strata),
            ("lengths", self._lengths),
        ]:
            if given.shape != self._wrong.shape:
                raise ValueError(
                    f"{name} has shape {given.shape}, and wrong has {self._wrong.shape}"
                )
        if not self._wrong.size:
            raise ValueError("there is no answer to judge by")
        self._weights = resamples(group_codes, n_boot, seed)
        self._matched: dict[bool, MatchedPairs] = {}

    def auroc(self, doubt: ArrayLike) -> Estimate:
        """AUROC over all pairs; see `rank_metrics.auroc`."""
        return self._ranked(rank_metrics.auroc, Ranking(self._checked(doubt)))

    def auroc_within(self, doubt: ArrayLike) -> Estimate:
        """AUROC over the pairs that share a stratum; NaN if there is none."""
        return self._ranked(rank_metrics.auroc, Ranking(self._checked(doubt), self._strata))

    def auroc_length_matched(self, doubt: ArrayLike, within: bool = False) -> Estimate:
        """AUROC over the pairs whose token counts differ by at most 10% of the larger.

        Args:
            within: take only the pairs that share a stratum, too.
        """
        doubt_N = self._checked(doubt)
        if within not in self._matched:
            strata = self._strata if within else np.zeros_like(self._strata)
            self._matched[within] = MatchedPairs(self._wrong, self._lengths, strata, self._weights)
        return _estimate(self._matched[within].auroc(doubt_N))

    def auprc(self, doubt: ArrayLike) -> Estimate:
        """Average precision; see `rank_metrics.auprc`."""
        return self._ranked(rank_metrics.auprc, Ranking(self._checked(doubt)))

    def acc_star(self, doubt: ArrayLike) -> Estimate:
        """Accuracy of the most certain half; see `rank_metrics.acc_star`."""
        return self._ranked(rank_metrics.acc_star, Ranking(self._checked(doubt)))

    def prr(self, doubt: ArrayLike) -> Estimate:
        """Prediction rejection ratio; see `rank_metrics.prr`."""
        return self._ranked(rank_metrics.prr, Ranking(self._checked(doubt)))

    def aurac(self, doubt: ArrayLike) -> Estimate:
        """Area under the rejection-accuracy curve; see `rank_metrics.aurac`."""
        return self._ranked(rank_metrics.aurac, Ranking(self._checked(doubt)))

    def brier(self, probability: ArrayLike) -> Estimate:
        """Brier score; see `calibration_metrics.brier`."""
        return self._mean(calibration_metrics.squared_errors, probability)

    def nll(self, probability: ArrayLike) -> Estimate:
        """Negative log-likelihood in nats; see `calibration_metrics.nll`."""
        return self._mean(calibration_metrics.log_losses, probability)

    def ece(self, probability: ArrayLike, bins: int = 10) -> Estimate:
        """Expected calibration error; see `calibration_metrics.ece`.

        Its interval lies high, and may miss the value: a resample adds noise to each bin.
        """
        p_N = self._checked_probability(probability)
        wrong_N = self._wrong.astype(float)
        return self._blockwise(
            lambda weights_BN: calibration_metrics.calibration_errors(
                p_N, wrong_N, weights_BN, bins
            )
        )

    def mean(self, values: ArrayLike) -> Estimate:
        """Mean of any number that the answers have."""
        return self._mean_of(self._checked(values))

    def risk_coverage(self, doubt: ArrayLike) -> tuple[Floats, Floats]:
        """Curve to plot, of the data as they are.

        Returns:
            (coverage, risk): the share of answers taken, from the most certain on, and the share
            of wrong ones among them. A point for each value of the doubt.
        """
        taken, wrong = self._whole_curve(doubt)
        return taken[1:] / taken[-1], wrong[1:] / taken[1:]

    def roc(self, doubt: ArrayLike) -> tuple[Floats, Floats]:
        """Curve to plot, of the data as they are, from (0, 0) to (1, 1).

        Returns:
            (fpr, tpr): the shares of right and of wrong answers whose doubt is at or above a
            threshold; NaN where there are none at all.
        """
        taken, wrong = self._whole_curve(doubt)
        right = taken - wrong
        return _from_the_top(right), _from_the_top(wrong)

    def _ranked(self, metric: Callable[[Curve], Floats], ranking: Ranking) -> Estimate:
        wrong_N = self._wrong.astype(float)
        return self._blockwise(lambda weights_BN: metric(ranking.curve(weights_BN, wrong_N)))

    def _blockwise(self, metric: Callable[[Floats], Floats]) -> Estimate:
        rows = max(1, _BLOCK_ELEMENTS // len(self._wrong))
        starts = range(0, len(self._weights), rows)
        return _estimate(np.concatenate([metric(self._weights[i : i + rows]) for i in starts]))

    def _mean(self, losses: Callable[[Floats, Floats], Floats], probability: ArrayLike) -> Estimate:
        return self._mean_of(
            losses(self._checked_probability(probability), self._wrong.astype(float))
        )

    def _mean_of(self, values_N: Floats) -> Estimate:
        return _estimate(self._weights @ values_N / self._weights.sum(axis=1))

    def _whole_curve(self, doubt: ArrayLike) -> tuple[Floats, Floats]:
        curve = Ranking(self._checked(doubt)).curve(self._weights[:1], self._wrong.astype(float))
        return curve.taken[0], curve.wrong[0]

    def _checked(self, doubt: ArrayLike) -> Floats:
        doubt_N = np.asarray(doubt, dtype=np.float64)
        if doubt_N.shape != self._wrong.shape:
            raise ValueError(
                f"doubt has shape {doubt_N.shape}, and there are {len(self._wrong)} answers"
            )
        (bad,) = np.nonzero(~np.isfinite(doubt_N))
        if bad.size:
            raise ValueError(
                f"{bad.size} of {doubt_N.size} values are no finite numbers, the first of them "
                f"at {bad[0]}: judge only answers that have a value"
            )
        return doubt_N

    def _checked_probability(self, probability: ArrayLike) -> Floats:
        p_N = self._checked(probability)
        calibration_metrics.check_probability(p_N)
        return p_N


def _estimate(values: Floats) -> Estimate:
    """From the value of the data as they are and of each resample, shape [1 + B]."""
    return Estimate(float(values[0]), values[1:])


def _from_the_top(sums: Floats) -> Floats:
    """Shares at or above each threshold, from sums at or below it."""
    with np.errstate(invalid="ignore"):
        shares: Floats = (1 - sums / sums[-1])[::-1]
    return shares
