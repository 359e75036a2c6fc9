"""What the service answers, typed. Measures are in nats.

Fields that a newer service adds are kept.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Estimator(_Model):
    """What produced the numbers."""

    name: str
    drafts: int
    weights_version: str
    support: str


class Token(_Model):
    """One token of the response; measures are of the distribution that predicts it."""

    token: str
    token_id: int
    bytes: list[int]
    text_offset: tuple[int, int]
    logprob: float
    rank: int
    entropy: float
    total: float
    aleatoric: float
    jsd: float
    kl: float
    epistemic: float


class Span(_Model):
    """A doubtful stretch of the response, characters [start, end)."""

    start: int
    end: int
    text: str
    epistemic_mean: float
    epistemic_max: float


class Usage(_Model):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Score(_Model):
    """The uncertainty of a response.

    `hallucination_score` is a calibrated probability that the response is wrong (high = bad), and
    None where the service has no calibrator.
    """

    id: str
    created: int
    model: str
    estimator: Estimator
    hallucination_score: float | None
    flagged: bool | None
    threshold: float | None
    sequence: dict[str, float]
    tokens: list[Token]
    spans: list[Span]
    usage: Usage
