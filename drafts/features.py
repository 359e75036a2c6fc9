"""Features of an answer: named statistics of its token measures, `total_mean` or `jsd_top10`.

A calibration (`drafts.calibration`) makes a probability of a few of them. Some are of the tokens
that make the answer's claim (`drafts.claims`): `total_sentence`, the mean over its first sentence,
and `total_name`, the mean over the first name or number in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from drafts.claims import first_name, first_sentence
from drafts.scores import FloatArray, TokenScores

MEASURES = ("surprisal", "entropy", "total", "aleatoric", "jsd", "kl", "epistemic")

Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Claim:
    """The tokens of an answer's first sentence, and of the first name in it. Each [T], bool.

    Where an answer names nothing, all of its tokens are marked.
    """

    sentence: Marks
    name: Marks


def claim_of(pieces: Sequence[str], asked: str) -> Claim:
    """The claim of an answer.

    Args:
        pieces: the texts of its tokens, which join to the answer.
        asked: what was said before it: a name that stands there is not the answer's own.
    """
    text = "".join(pieces)
    ends = np.array(list(accumulate(map(len, pieces))), dtype=np.int64)
    starts = ends - [len(piece) for piece in pieces]
    # An empty token has the first bytes of the character that comes next.
    ends = np.maximum(ends, starts + 1)

    def marks(span: tuple[int, int] | None) -> Marks:
        touched = np.zeros(len(pieces), dtype=bool)
        if span is not None:
            touched = (starts < span[1]) & (span[0] < ends)
        return touched if touched.any() else np.ones(len(pieces), dtype=bool)

    return Claim(sentence=marks((0, first_sentence(text))), name=marks(first_name(text, asked)))


def top_tenth(values_T: FloatArray) -> float:
    """Mean of the greatest tenth of the tokens, at least one."""
    return float(np.sort(values_T)[-math.ceil(len(values_T) / 10) :].mean())


STATISTICS: dict[str, Callable[[FloatArray, Claim], float]] = {
    "mean": lambda values_T, claim: float(values_T.mean()),
    "max": lambda values_T, claim: float(values_T.max()),
    "top10": lambda values_T, claim: top_tenth(values_T),
    "sum": lambda values_T, claim: float(values_T.sum()),
    "sentence": lambda values_T, claim: float(values_T[claim.sentence].mean()),
    "name": lambda values_T, claim: float(values_T[claim.name].mean()),
}
COUNTS: dict[str, Callable[[Claim], float]] = {
    "log_tokens": lambda claim: math.log(len(claim.sentence)),
    "log_sentence": lambda claim: math.log(int(claim.sentence.sum())),
}
FEATURES = (*(f"{measure}_{name}" for measure in MEASURES for name in STATISTICS), *COUNTS)

# Nats; no measure of a real text comes near. With it every feature of finite scores is finite.
_BOUND = 1e6


def check_names(names: Sequence[str]) -> None:
    """ValueError if a name is none of `FEATURES`, or is there twice."""
    for i, name in enumerate(names):
        if name not in FEATURES:
            raise ValueError(f"{name!r} is no feature; these are: {', '.join(FEATURES)}")
        if name in names[:i]:
            raise ValueError(f"{name!r} is named twice")


def features(scores: TokenScores, claim: Claim, names: Sequence[str]) -> FloatArray:
    """Features of one text, shape [F], in nats; `log_tokens` is ln T.

    Surprisal is minus the log-prob of a token, the other measures are those of `TokenScores`.

    Raises:
        ValueError: if the text has no tokens or its claim is of another text, or for names as
            `check_names`.
    """
    check_names(names)
    if not len(scores):
        raise ValueError("a text without tokens has no features")
    if len(claim.sentence) != len(scores):
        raise ValueError(f"{len(claim.sentence)} tokens have marks and {len(scores)} have scores")
    return np.array([_feature(scores, claim, name) for name in names], dtype=np.float64)


def _feature(scores: TokenScores, claim: Claim, name: str) -> float:
    if name in COUNTS:
        return COUNTS[name](claim)
    measure, _, statistic = name.rpartition("_")
    with np.errstate(over="ignore"):  # of a sum or difference of measures; bounded next
        values_T = -scores.logprob if measure == "surprisal" else getattr(scores, measure)
    return STATISTICS[statistic](np.clip(values_T, -_BOUND, _BOUND), claim)
