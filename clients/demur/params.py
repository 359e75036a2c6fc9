"""What calls take, typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

# A conversation as OpenAI has it ({"role", "content"} each), or the text of one user's message.
Messages = str | Sequence[Mapping[str, Any]]


class _Response(TypedDict):
    response: str


class ScoreItem(_Response, total=False):
    """What `score` takes, for `score_many` and `score_iter`: `response`, and messages or prompt."""

    messages: Messages | None
    prompt: str | None
    model: str | None
    threshold: float | None
    store: bool | None


class _Threshold(TypedDict):
    threshold: float


class UncertaintyStop(_Threshold, total=False):
    """Ends a generation once the mean of a measure over the last tokens is above `threshold` nats.

    `measure` is epistemic if it is not given, `window` (tokens) 8.
    """

    measure: Literal["epistemic", "jsd", "kl", "total", "aleatoric", "entropy"]
    window: int


class ChatOptions(TypedDict, total=False):
    """What `chat` takes besides messages and `stream`; None is the service's default."""

    model: str | None
    uncertainty: bool
    temperature: float | None
    top_p: float | None
    max_tokens: int | None
    n: int | None
    stop: str | Sequence[str] | None
    seed: int | None
    logprobs: bool | None
    top_logprobs: int | None
    uncertainty_stop: UncertaintyStop | None
    store: bool | None
