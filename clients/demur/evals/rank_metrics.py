"""Metrics of a ranking by doubt, each for many resamples at once.

Answers are taken from the most certain on. With m answers taken, E(m) of them are wrong. Answers
whose doubt is equal come in random order, and E is its expected value: a straight line between the
ends of the tie. K answers are wrong and R right, M = K + R. Shapes carry the suffixes B (resample),
N (answer), G (set of tied answers).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from demur.evals.bootstrap import Floats, Ints, ratio


class Ranking:
    """An order of answers, its ties and its strata.

    Args:
        doubt: shape [N].
        strata: numbers, shape [N]; answers are sorted by stratum first. None is one stratum.

    Attributes:
        bounds: where in the G + 1 places of `cumulative` each stratum begins, and the last place.
    """

    def __init__(self, doubt: Floats, strata: Ints | None = None) -> None:
        if strata is None:
            strata = np.zeros(len(doubt), dtype=np.int64)
        self._order = np.lexsort((doubt, strata))
        doubt, strata = doubt[self._order], strata[self._order]
        new_stratum = strata[1:] != strata[:-1]
        (ends,) = np.nonzero(new_stratum | (doubt[1:] != doubt[:-1]))
        self._ends = np.append(ends, len(doubt) - 1)
        (last,) = np.nonzero(np.append(new_stratum[self._ends[:-1]], True))
        self.bounds = np.append(0, last + 1)

    def cumulative(self, amounts_BN: Floats) -> Floats:
        """Sums over the answers up to each set of ties, shape [B, G + 1] with 0 first."""
        sums = np.cumsum(amounts_BN[:, self._order], axis=1)
        out = np.zeros((len(sums), len(self._ends) + 1))
        out[:, 1:] = sums[:, self._ends]
        return out

    def curve(self, weights_BN: Floats, wrong_N: Floats) -> Curve:
        """The curve of each resample, from how often each answer counts and whether it is wrong."""
        return Curve(
            self.cumulative(weights_BN), self.cumulative(weights_BN * wrong_N), self.bounds
        )


class Curve(NamedTuple):
    """m and E(m) at the ends of the ties, shape [B, G + 1] each, with the ranking's bounds."""

    taken: Floats
    wrong: Floats
    bounds: Ints


def auroc(curve: Curve) -> Floats:
    """Share of the pairs (wrong, right) of one stratum whose wrong answer has the higher doubt.

    Ties count half. All strata's pairs are pooled (Hanley & McNeil 1982 for a single stratum).

    Returns:
        Shape [B], NaN where there is no pair.
    """
    right = curve.taken - curve.wrong
    won = (np.diff(curve.wrong) * (right[:, 1:] + right[:, :-1]) / 2).sum(axis=1)
    # What is right in earlier strata was counted as below; it is no pair.
    wrong_at, right_at = curve.wrong[:, curve.bounds], right[:, curve.bounds]
    won -= (np.diff(wrong_at) * right_at[:, :-1]).sum(axis=1)
    return ratio(won, (np.diff(wrong_at) * np.diff(right_at)).sum(axis=1))


def auprc(curve: Curve) -> Floats:
    """Average precision in finding the wrong answers, from the highest doubt down.

    sum over thresholds of (recall gained) * (precision there), ties sharing a threshold, as
    scikit-learn's `average_precision_score`. By chance it is about K / M.

    Returns:
        Shape [B], NaN where nothing is wrong.
    """
    found = curve.wrong[:, -1:] - curve.wrong[:, :-1]
    flagged = curve.taken[:, -1:] - curve.taken[:, :-1]
    # A tie that is not in the resample may flag nothing; it gains no recall either.
    gains = np.diff(curve.wrong) * found / np.maximum(flagged, 1)
    return ratio(gains.sum(axis=1), curve.wrong[:, -1])


def acc_star(curve: Curve) -> Floats:
    """Accuracy of the most certain half, 1 - E(M/2) / (M/2).

    TokUR's ACC* (Zhang et al. 2025, arXiv 2505.11737). Where M is odd, the answer in the middle
    counts half.

    Returns:
        Shape [B].
    """
    half_B = curve.taken[:, -1:] / 2
    return 1 - (interpolate(half_B, curve.taken, curve.wrong) / half_B)[:, 0]


def aurac(curve: Curve) -> Floats:
    """Area under the rejection-accuracy curve: mean over m = 1..M of 1 - E(m) / m.

    Farquhar et al. 2024 (doi 10.1038/s41586-024-07421-0); their code sums 20 steps of coverage from
    0.1 to 1, this is every step, so values differ a little from theirs.

    Returns:
        Shape [B].
    """
    size = curve.taken[:, -1]
    harmonic = _harmonic(size)
    before, wrong_before = curve.taken[:, :-1], curve.wrong[:, :-1]
    count, wrong = np.diff(curve.taken), np.diff(curve.wrong)
    slope = np.divide(wrong, count, out=np.zeros_like(wrong), where=count > 0)
    # In a tie E(m)/m = slope + (E(before) - slope * before) / m, which harmonic numbers sum up.
    inverse = np.diff(harmonic[curve.taken.astype(np.int64)])
    risk = wrong.sum(axis=1) + ((wrong_before - slope * before) * inverse).sum(axis=1)
    area: Floats = 1 - risk / size
    return area


def prr(curve: Curve) -> Floats:
    """Prediction rejection ratio: (A - A_random) / (A_oracle - A_random), 1 at best, 0 by chance.

    A is the area under the accuracy of the answers that are kept, `aurac`, as in LM-Polygraph
    (Vashurin et al. 2025, arXiv 2406.15627) with all rejected in the end; A_random = R / M, and the
    oracle rejects what is wrong first. Malinin & Gales (2021, arXiv 2002.07650) draw their curve
    with what is rejected put right; with right and wrong only, that ratio is 2 AUROC - 1 and would
    tell nothing new.

    Returns:
        Shape [B], NaN where nothing is wrong or nothing is right.
    """
    size = curve.taken[:, -1]
    right = size - curve.wrong[:, -1]
    harmonic = _harmonic(size)
    whole, part = harmonic[size.astype(np.int64)], harmonic[right.astype(np.int64)]
    oracle = right * (1 + whole - part) / size
    by_chance = right / size
    # Where nothing is wrong or nothing right these are equal but for rounding: no divisor.
    span = np.where((right > 0) & (right < size), oracle - by_chance, 0)
    return ratio(aurac(curve) - by_chance, span)


def interpolate(x_BP: Floats, taken_BG: Floats, sums_BG: Floats) -> Floats:
    """Sums after x answers, shape [B, P], from those at the ends of the ties."""
    rows = zip(x_BP, taken_BG, sums_BG, strict=True)
    return np.array([np.interp(x, taken, sums) for x, taken, sums in rows])


def _harmonic(size_B: Floats) -> Floats:
    """1 + 1/2 + … + 1/m for m = 0 up to the largest size."""
    return np.append(0, np.cumsum(1 / np.arange(1, int(size_B.max()) + 1)))
