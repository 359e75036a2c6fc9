"""Made-up answers whose probability of being wrong is known, and calibrations fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from drafts.calibration import Calibration
from drafts.calibration_fit import fit
from drafts.calibration_parts import FittedTask, Kind, Origin
from drafts.features import Claim
from drafts.scores import FloatArray, TokenScores
from tests.fake_engine import FakeEngine

NAMES = ("total_mean", "surprisal_mean", "epistemic_mean", "total_top10", "log_tokens")


@dataclass(frozen=True)
class Answers:
    """N answers, three to a group, and the probability that each was wrong with."""

    scores: list[TokenScores]
    wrong: list[bool]
    groups: list[str]
    probability_N: FloatArray


def scores_of(total_T: FloatArray, weights_version: str = "fake-1") -> TokenScores:
    """Tokens whose measures all follow from their `total`."""
    shape = np.ones(len(total_T), np.int64)
    return TokenScores(
        -total_T, shape, total_T / 2, total_T, total_T / 4, total_T / 8, weights_version
    )


def whole(scores: TokenScores) -> Claim:
    """All tokens marked: for features that are not of the claim."""
    marks = np.ones(len(scores), dtype=bool)
    return Claim(marks, marks)


def wholes(scores: Sequence[TokenScores]) -> list[Claim]:
    """`whole` of each."""
    return [whole(one) for one in scores]


def answers(n: int, seed: int) -> Answers:
    """Answers that are wrong with probability 1 / (1 + exp(1.5 - 1.5 mean total))."""
    rng = np.random.default_rng(seed)
    doubt_N = rng.gamma(4, 0.25, n)
    scores = [scores_of(rng.gamma(20, doubt / 20, rng.integers(5, 40))) for doubt in doubt_N]
    mean_N = np.array([one.total.mean() for one in scores])
    probability_N = 1 / (1 + np.exp(1.5 - 1.5 * mean_N))
    wrong = (rng.random(n) < probability_N).tolist()
    return Answers(scores, wrong, [f"group {i // 3}" for i in range(n)], probability_N)


def origin(n: int = 3, wrong: float = 0.5) -> Origin:
    """What a made-up calibration was fitted to: by default what the fake engine serves."""
    fields: dict[str, Any] = {
        "tasks": [FittedTask(task="facts/capital", mode="generate", n=n, wrong=wrong)],
        "half": "dev",
        "model": "tiny",
        "weights_version": "fake-1",
        "date": "2026-11-23T00:00:00+00:00",
        "seed": 0,
        "demur": "0.1.0",
        "command": "demur calibrate run",
    }
    return Origin(**fields)


@cache
def calibration(kind: Kind = "logistic") -> Calibration:
    """One fitted to 1,500 answers."""
    made = answers(1500, seed=1)
    names = NAMES if kind == "logistic" else NAMES[:1]
    return fit(made.scores, wholes(made.scores), made.wrong, made.groups, names, kind, origin(1500))


@cache
def fake_calibration() -> Calibration:
    """One fitted to what the fake engine measures of texts of 3 to 20 tokens."""
    rng = np.random.default_rng(2)
    engine = FakeEngine()
    scores = [
        engine._scores(rng.integers(2, 300, rng.integers(3, 20)).tolist()) for _ in range(300)
    ]
    wrong = [bool(one.total.mean() + rng.normal() > 4) for one in scores]
    groups = [str(i) for i in range(300)]
    # One of the claim, too: it shows whether the service has the text and what was asked.
    names = (*NAMES, "total_name")
    marks = [np.arange(len(one)) >= rng.integers(len(one)) for one in scores]
    claims = [Claim(each, each) for each in marks]
    return fit(scores, claims, wrong, groups, names, "logistic", origin(300))
