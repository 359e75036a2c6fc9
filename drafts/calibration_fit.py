"""Fits a calibration to answers whose being right or wrong is known (scikit-learn).

Everything is chosen and measured by cross-validation in which answers of one group (one question,
one country) are never on both sides; nothing but the given answers is looked at.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from drafts.calibration import Calibration
from drafts.calibration_parts import Domain, HeldOut, Isotonic, Kind, Logistic, Origin, Standard
from drafts.features import Claim, features
from drafts.scores import FloatArray, TokenScores

LEAST_TEXTS = 50
FOLDS = 5
# Penalties that are tried, the strongest first: of equals it is taken.
L2 = tuple(10.0**power for power in range(3, -3, -1))

_BINS = 10
# How far the correlations are drawn towards none: a direction in which the fitted texts happen not
# to differ (total = aleatoric + jsd is one) keeps a hundredth of the variance.
_SHRINK = 0.01
_WITHIN = 0.99

_Bools = NDArray[np.bool_]
_Split = tuple[NDArray[np.intp], NDArray[np.intp]]
_Groups = NDArray[np.object_]


def fit(
    scores: Sequence[TokenScores],
    claims: Sequence[Claim],
    wrong: Sequence[bool],
    groups: Sequence[str],
    names: Sequence[str],
    kind: Kind,
    origin: Origin,
) -> Calibration:
    """A calibration fitted to N answers.

    Args:
        claims: which tokens make each answer's claim (`drafts.features.claim_of`).
        wrong: of each answer, whether it is wrong.
        groups: answers of one group are never on both sides of a cross-validation.
        names: features (`drafts.features`); one for an isotonic calibration.
        origin: what is said of the answers, and the seed of the cross-validation.

    Raises:
        ValueError: if there are under 50 answers, only right or only wrong ones, too few groups to
            cross-validate, a measure that is not finite, or several features for an isotonic one.
    """
    if not len(scores) == len(claims) == len(wrong) == len(groups):
        raise ValueError("scores, claims, wrong and groups differ in length")
    if kind == "isotonic" and len(names) != 1:
        raise ValueError(f"an isotonic calibration has one feature, not {len(names)}; name one")
    if len(scores) < LEAST_TEXTS:
        raise ValueError(f"{len(scores)} answers are too few to calibrate; {LEAST_TEXTS} are least")
    if not all(map(_finite, scores)):
        raise ValueError("a measure of an answer is NaN or infinite; leave that answer out")
    x_NF = np.array(
        [features(one, claim, names) for one, claim in zip(scores, claims, strict=True)]
    )
    y_N, groups_N = np.array(wrong, dtype=bool), np.array(groups, dtype=object)
    if y_N.all() or not y_N.any():
        raise ValueError(
            f"all {len(y_N)} answers are {'wrong' if y_N.all() else 'right'}; a calibration needs "
            "both: add runs"
        )
    standard = _standard(x_NF)
    z_NF = standard.z(x_NF)
    return Calibration(
        format=1,
        features=list(names),
        standard=standard,
        estimator=_estimator(x_NF, y_N, groups_N, kind, origin.seed)[1],
        domain=_domain(z_NF),
        origin=origin,
        held_out=_held_out(x_NF, y_N, groups_N, kind, origin.seed),
    )


def folds(wrong_N: _Bools, groups_N: _Groups, seed: int) -> list[_Split]:
    """Train and test indices, of about the same share wrong; each group is in one test part.

    Raises:
        ValueError: if there are too few groups, or a part for training has one class only.
    """
    n_groups = len(set(groups_N))
    if n_groups < FOLDS:
        raise ValueError(
            f"the answers are of {n_groups} groups; cross-validation needs at least {FOLDS}"
        )
    split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with few members; see below
        parts = list(split(np.zeros(len(wrong_N)), wrong_N, groups_N))
    for train, _ in parts:
        if wrong_N[train].all() or not wrong_N[train].any():
            lacking = "right" if wrong_N[train].all() else "wrong"
            raise ValueError(
                f"the {lacking} answers are of too few groups to cross-validate; add runs"
            )
    return parts


def calibration_error(probability_N: FloatArray, wrong_N: _Bools) -> float:
    """Expected calibration error: Σ_b n_b/N |mean probability - share wrong| over ten bins.

    Guo et al. 2017 (arXiv 1706.04599), with bins of equal count (Nixon et al. 2019, arXiv
    1904.01685); equal probabilities are in one bin.
    """
    edges = np.quantile(probability_N, np.linspace(0, 1, _BINS + 1)[1:-1])
    bin_N = np.searchsorted(edges, probability_N, side="right")
    gap_N = probability_N - wrong_N
    return float(np.abs(np.bincount(bin_N, weights=gap_N)).sum() / len(gap_N))


def _held_out(x_NF: FloatArray, y_N: _Bools, groups_N: _Groups, kind: Kind, seed: int) -> HeldOut:
    """Quality on each fold of what was fitted, penalty included, to the others."""
    p_N = np.zeros(len(y_N))
    for train, test in folds(y_N, groups_N, seed):
        standard, estimator = _estimator(x_NF[train], y_N[train], groups_N[train], kind, seed)
        p_N[test] = estimator.probability(standard.z(x_NF[test]))
    return HeldOut(
        folds=FOLDS,
        groups=len(set(groups_N)),
        ece=calibration_error(p_N, y_N),
        brier=float(((p_N - y_N) ** 2).mean()),
        auroc=float(roc_auc_score(y_N, p_N)),
    )


def _estimator(
    x_NF: FloatArray, y_N: _Bools, groups_N: _Groups, kind: Kind, seed: int
) -> tuple[Standard, Logistic | Isotonic]:
    standard = _standard(x_NF)
    z_NF = standard.z(x_NF)
    if kind == "isotonic":
        return standard, _isotonic(z_NF, y_N)
    return standard, _logistic(z_NF, y_N, _best_l2(x_NF, y_N, groups_N, seed))


def _best_l2(x_NF: FloatArray, y_N: _Bools, groups_N: _Groups, seed: int) -> float:
    """The penalty with the least log loss on held-out groups."""
    losses = dict.fromkeys(L2, 0.0)
    for train, test in folds(y_N, groups_N, seed):
        standard = _standard(x_NF[train])
        z_NF, held_out_NF = standard.z(x_NF[train]), standard.z(x_NF[test])
        for l2 in L2:
            p_N = _logistic(z_NF, y_N[train], l2).probability(held_out_NF)
            losses[l2] -= float(np.log(np.where(y_N[test], p_N, 1 - p_N)).sum())
    return min(L2, key=lambda l2: losses[l2])


def _logistic(z_NF: FloatArray, y_N: _Bools, l2: float) -> Logistic:
    model = LogisticRegression(C=1 / l2, max_iter=1000).fit(z_NF, y_N)
    return Logistic(
        kind="logistic",
        coefficients=model.coef_[0].tolist(),
        intercept=float(model.intercept_[0]),
        l2=l2,
    )


def _isotonic(z_NF: FloatArray, y_N: _Bools) -> Isotonic:
    # N answers cannot show a probability of 0 or 1: one more of either kind might come.
    least = 1 / (len(y_N) + 2)
    model = IsotonicRegression(y_min=least, y_max=1 - least, increasing=True)
    model.fit(z_NF[:, 0], y_N)
    return Isotonic(
        kind="isotonic",
        thresholds=model.X_thresholds_.tolist(),
        probabilities=model.y_thresholds_.tolist(),
    )


def _standard(x_NF: FloatArray) -> Standard:
    scale_F = x_NF.std(axis=0)
    # A feature that does not vary: as it is, less its mean.
    scale_F[scale_F < 1e-6] = 1.0
    return Standard(mean=x_NF.mean(axis=0).tolist(), scale=scale_F.tolist())


def _domain(z_NF: FloatArray) -> Domain:
    covariance = z_NF.T @ z_NF / len(z_NF)  # their mean is 0
    covariance = (1 - _SHRINK) * (covariance + covariance.T) / 2 + _SHRINK * np.eye(len(covariance))
    domain = Domain(covariance=covariance.tolist(), limit=1.0)
    limit = float(np.quantile(domain.distance(z_NF), _WITHIN, method="higher"))
    return Domain(covariance=domain.covariance, limit=max(limit, 1e-6))


def _finite(scores: TokenScores) -> bool:
    columns = (scores.logprob, scores.entropy, scores.total, scores.jsd, scores.kl)
    return all(bool(np.isfinite(column).all()) for column in columns)
