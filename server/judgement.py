"""What the ensemble's calibration, where there is one, says of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from drafts.features import claim_of
from drafts.scores import TokenScores
from server import metrics, schemas
from server.served import Served


@dataclass(frozen=True)
class Judgement:
    """The probability that a text is wrong, and why it should be doubted; None without one."""

    hallucination_score: float | None = None
    warnings: list[schemas.ScoreWarning] = field(default_factory=list)

    def flagged(self, threshold: float | None) -> bool | None:
        """Whether the probability is over a threshold; None without either."""
        if self.hallucination_score is None or threshold is None:
            return None
        return self.hallucination_score > threshold


def judge(served: Served, scores: TokenScores, pieces: Sequence[str], asked: str) -> Judgement:
    """Judge a text of at least one token, and count it.

    Args:
        pieces: the texts of its tokens.
        asked: what was said before it.
    """
    calibration = served.calibration_of(scores.weights_version)
    if calibration is None:
        return Judgement()
    claim = claim_of(pieces, asked)
    probability = calibration.probability(scores, claim)
    metrics.HALLUCINATION.observe(probability)
    warnings = [
        schemas.ScoreWarning(code=code, message=message)
        for code, message in calibration.warnings(scores, claim, served.name)
    ]
    for warning in warnings:
        metrics.DOUBTED.labels(warning.code).inc()
    return Judgement(probability, warnings)
