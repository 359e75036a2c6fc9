"""How well a probability that an answer is wrong is one.

`probability` is that of the answer being WRONG, in [0, 1], shape [N]; `wrong` says whether it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from demur.evals.bootstrap import Floats
from demur.evals.rank_metrics import Ranking, interpolate


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: bins of about as many answers each, from low to high.

    Attributes:
        probability: mean probability of a bin, shape [bins].
        wrong: share of wrong answers in it, shape [bins].
        count: answers in it, shape [bins].
    """

    probability: Floats
    wrong: Floats
    count: NDArray[np.int64]


def brier(probability: ArrayLike, wrong: ArrayLike) -> float:
    """Mean squared error, mean of (p - wrong)^2 (Brier 1950)."""
    return float(squared_errors(*_checked(probability, wrong)).mean())


def nll(probability: ArrayLike, wrong: ArrayLike) -> float:
    """Mean negative log-likelihood in nats, p kept 2.2e-16 away from 0 and 1."""
    return float(log_losses(*_checked(probability, wrong)).mean())


def ece(probability: ArrayLike, wrong: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: mean over answers of |mean p - share wrong| of their bin.

    Bins hold the same number of answers, within one (Nixon et al. 2019, arXiv 1904.01685); answers
    of equal probability that a bound divides are divided in proportion. Naeini et al. 2015 have
    bins of the same width, which are mostly empty where probabilities are alike.
    """
    p_N, wrong_N = _checked(probability, wrong)
    return float(calibration_errors(p_N, wrong_N, np.ones((1, len(p_N))), bins)[0])


def reliability(probability: ArrayLike, wrong: ArrayLike, bins: int = 10) -> Reliability:
    """The bins of `ece`; fewer where there are fewer answers than bins."""
    p_N, wrong_N = _checked(probability, wrong)
    count, p_sum, wrong_sum = (
        sums[0] for sums in _bin_sums(p_N, wrong_N, np.ones((1, len(p_N))), bins)
    )
    full = count > 0
    count = count[full]
    return Reliability(p_sum[full] / count, wrong_sum[full] / count, count.astype(np.int64))


def squared_errors(p_N: Floats, wrong_N: Floats) -> Floats:
    """What `brier` is the mean of, shape [N]."""
    return (p_N - wrong_N) ** 2


def log_losses(p_N: Floats, wrong_N: Floats) -> Floats:
    """What `nll` is the mean of, shape [N]."""
    tiny = np.finfo(np.float64).eps
    p_N = np.clip(p_N, tiny, 1 - tiny)
    return -np.where(wrong_N > 0, np.log(p_N), np.log1p(-p_N))


def calibration_errors(p_N: Floats, wrong_N: Floats, weights_BN: Floats, bins: int) -> Floats:
    """`ece` of each resample, shape [B], whose bins are its own."""
    _, p_sum, wrong_sum = _bin_sums(p_N, wrong_N, weights_BN, bins)
    errors: Floats = np.abs(p_sum - wrong_sum).sum(axis=1) / weights_BN.sum(axis=1)
    return errors


def check_probability(probability: Floats) -> None:
    """See that it is one.

    Raises:
        ValueError: if it is not.
    """
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("a probability lies in [0, 1]; fit one from the doubt first")


def _bin_sums(
    p_N: Floats, wrong_N: Floats, weights_BN: Floats, bins: int
) -> tuple[Floats, Floats, Floats]:
    """Answers, and sums of probability and of wrong answers, in each bin; shape [B, bins] each."""
    ranking = Ranking(p_N)
    taken, wrong, _ = ranking.curve(weights_BN, wrong_N)
    bounds = np.floor(taken[:, -1:] * np.arange(bins + 1) / bins)
    p_sum = interpolate(bounds, taken, ranking.cumulative(weights_BN * p_N))
    return np.diff(bounds), np.diff(p_sum), np.diff(interpolate(bounds, taken, wrong))


def _checked(probability: ArrayLike, wrong: ArrayLike) -> tuple[Floats, Floats]:
    p_N, wrong_N = np.asarray(probability, dtype=float), np.asarray(wrong, dtype=float)
    if p_N.shape != wrong_N.shape or p_N.ndim != 1 or not p_N.size:
        raise ValueError("give one probability for each answer, and at least one")
    check_probability(p_N)
    return p_N, wrong_N
