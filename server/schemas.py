"""Bodies of requests and answers; field descriptions end up in docs/openapi.json."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from osd.control import TrainerStatus
from osd.shards import conversation_key

# White space passes. Control characters, which a terminal would obey and no answer holds, do not,
# and neither do surrogates, which JSON can name but UTF-8 cannot.
_UNUSABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class StrictBody(BaseModel):
    """Base of what clients send: unknown fields are refused."""

    # Strict: "0.5" is no number and 1 is no truth value.
    model_config = ConfigDict(extra="forbid", strict=True)


_OF_ANSWERS = {"refusal", "annotations", "audio", "function_call", "tool_calls"}


def plain(text: str) -> str:
    """The text itself; a ValueError if it holds what no text should."""
    if match := _UNUSABLE.search(text):
        kind = "unpaired surrogate" if match[0] >= "\ud800" else "control character"
        raise ValueError(f"holds the {kind} U+{ord(match[0]):04X} at position {match.start()}")
    return text


class TextPart(StrictBody):
    """A part of a message's content, as OpenAI has it."""

    type: Literal["text"]
    text: str


class Message(StrictBody):
    """A turn of the conversation that the response answers."""

    role: Literal["system", "developer", "user", "assistant"]
    name: str | None = Field(default=None, description="taken, and not used")
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "text"),
    ]

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    @model_validator(mode="before")
    @classmethod
    def _without_what_answers_add(cls, message: Any) -> Any:
        # So that an answer can be sent back as a turn, as OpenAI's clients keep it.
        if not isinstance(message, dict):
            return message
        return {k: v for k, v in message.items() if k not in _OF_ANSWERS or v not in (None, [])}

    @property
    def turn(self) -> dict[str, str]:
        """What chat templates know: `developer` is what OpenAI now calls `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}

    @model_validator(mode="after")
    def _no_control_characters(self) -> Message:
        plain(self.text)
        return self


def said(messages: Sequence[Message]) -> str:
    """The words of a conversation."""
    return "\n".join(message.text for message in messages)


class ScoreRequest(StrictBody):
    """A response to score, with what it answers: either messages or a prompt."""

    model: str | None = Field(
        default=None, description="id of the ensemble; default: the one served"
    )
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, description="rendered with the target's chat template"
    )
    prompt: str | None = Field(default=None, description="raw text that the response continues")
    response: str = Field(min_length=1, description="the answer to score")
    threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="flag the response if its hallucination_score is above this",
    )
    store: bool = Field(default=True, description="false keeps the text out of distillation")

    @field_validator("model", "prompt", "response")
    @classmethod
    def _no_control_characters(cls, text: str | None) -> str | None:
        return text if text is None else plain(text)

    @model_validator(mode="after")
    def _one_context(self) -> ScoreRequest:
        if self.messages is not None and self.prompt is not None:
            raise ValueError("send messages or prompt, not both")
        if self.messages is None and self.prompt is None:
            raise ValueError("messages or prompt is missing")
        return self

    @property
    def conversation(self) -> int:
        """The key by which its draft is found (`osd.shards`)."""
        turns = [message.turn for message in self.messages or []]
        return conversation_key(messages=turns, prompt=self.prompt or "")

    @property
    def asked(self) -> str:
        """What was said before the response."""
        return self.prompt or said(self.messages or [])


# Items of a list are validated one by one, so that a bad one fails alone.
_AnyItem = Annotated[Any, WithJsonSchema({"$ref": "#/components/schemas/ScoreRequest"})]
ScoreBody = Annotated[
    Annotated[ScoreRequest, Tag("item")]
    | Annotated[list[_AnyItem], Tag("list"), Field(min_length=1)],
    Discriminator(lambda body: "list" if isinstance(body, list) else "item"),
]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer other than 2xx."""

    error: ErrorBody


class Estimator(BaseModel):
    """What produced the numbers."""

    name: Literal["epistemic"] = "epistemic"
    drafts: int = Field(description="K, number of drafts")
    weights_version: str
    support: Literal["full"] = Field(default="full", description="the whole vocabulary, no top-k")


class Token(BaseModel):
    """One token of the response; measures are of the distribution that predicts it, in nats."""

    token: str = Field(description="its text; empty if its character ends in a later token")
    token_id: int
    bytes: list[int]
    text_offset: tuple[int, int] = Field(description="characters of the response, [start, end)")
    logprob: float = Field(description="target's log-probability of the token")
    rank: int = Field(
        description="tokens that the target holds at least as likely, itself included"
    )
    entropy: float = Field(description="H(p) of the target")
    total: float = Field(description="H of the drafts' mixture = aleatoric + jsd")
    aleatoric: float = Field(description="mean entropy of the drafts")
    jsd: float = Field(
        description="drafts against their mixture, in [0, ln K]; high = they disagree"
    )
    kl: float = Field(description="mixture against target, >= 0; high = they miss the target")
    epistemic: float = Field(description="jsd + kl; high = the model does not know")


class SpanOut(BaseModel):
    """A doubtful stretch of the response."""

    start: int
    end: int
    text: str
    epistemic_mean: float
    epistemic_max: float


class Usage(BaseModel):
    """Tokens counted as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ScoreWarning(BaseModel):
    """Why a hallucination_score should be doubted."""

    code: Literal["far_from_calibration", "calibrated_on_other_weights"]
    message: str


class Calibration(BaseModel):
    """What makes a hallucination_score of an answer's measures."""

    id: str = Field(description="short hash of the ensemble's calibration.json")
    kind: Literal["logistic", "isotonic"]
    fitted_on: list[str] = Field(description="tasks whose answers it was fitted to")
    n: int = Field(description="fitted answers")


class ScoreResponse(BaseModel):
    """The uncertainty of a response."""

    id: str
    object: Literal["uncertainty.score"] = "uncertainty.score"
    created: int
    model: str
    estimator: Estimator
    hallucination_score: float | None = Field(
        description="calibrated probability that the response is wrong, high = bad; "
        "null where no calibration is loaded"
    )
    flagged: bool | None = Field(description="hallucination_score > threshold; null without either")
    threshold: float | None
    warnings: list[ScoreWarning] = Field(
        default=[], description="why the hallucination_score should be doubted"
    )
    calibration: Calibration | None = None
    sequence: dict[str, float | int] = Field(description="n_tokens, and mean, max, sum of measures")
    tokens: list[Token]
    spans: list[SpanOut]
    usage: Usage


class ScoreListItem(BaseModel):
    """One item's score, or why it has none."""

    index: int
    score: ScoreResponse | None = None
    error: ErrorBody | None = None


class ScoreList(BaseModel):
    """The answer to a list, in its order."""

    object: Literal["list"] = "list"
    data: list[ScoreListItem]
    usage: Usage


class Model(BaseModel):
    """A served ensemble."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "demur"
    max_model_len: int
    drafts: int
    weights_version: str
    added_passes: float = Field(
        description="what the drafts cost for a token, in forward passes of the target "
        "(multiply-adds, attention scores left out)"
    )
    calibration: str | None = Field(
        default=None, description="id of what makes its hallucination_score; null without"
    )


class ModelList(BaseModel):
    """Served ensembles."""

    object: Literal["list"] = "list"
    data: list[Model]


class Draft(BaseModel):
    """A draft beside the target."""

    name: str
    kind: Literal["model", "exit", "residual"]
    layer: int | None = Field(description="of the target, that an `exit` reads")
    draw: int | None = Field(description="of a `residual` student's draws, which one it is")


class DraftVersion(BaseModel):
    """A version of the drafts' weights in the store."""

    name: str
    parent: str | None = Field(description="the version that it was trained from or replaced")
    created: int
    current: bool = Field(description="the one that services of this store are to serve with")
    refused: list[str] = Field(description="why it did not go live")
    withdrawn: str | None = Field(description="why it was taken back, if it was")
    calibration: str | None = Field(description="what became of it; null if nothing was checked")
    measured: dict[str, dict[str, float]] = Field(
        description="nats, on the reference set and on held-out traffic, when it was made"
    )


class DraftList(BaseModel):
    """The drafts that serve."""

    object: Literal["list"] = "list"
    weights_version: str
    target: str
    data: list[Draft]
    versions: list[DraftVersion] | None = Field(
        description="of the store, oldest first; null without a store"
    )


class RollbackRequest(StrictBody):
    """Which version is to serve."""

    version: str | None = Field(default=None, description="default: the current one's parent")


class SpoolStatus(BaseModel):
    """The traffic spool."""

    texts: int
    bytes: int
    oldest_age_s: float
    queued: int = Field(description="conversations of this service on their way into it")
    error: str | None = Field(description="why it does not take conversations now")


class OsdStatus(BaseModel):
    """Online distillation."""

    object: Literal["osd"] = "osd"
    mode: Literal["off", "capture", "train"] = Field(description="of this service")
    paused: str | None = Field(description="why the trainer rests, if it does")
    spool: SpoolStatus | None = Field(description="null if this service keeps no conversations")
    store_error: str | None = Field(
        description="why the drafts store, and what the trainer tells there, cannot be read"
    )
    trainer_alive: bool = Field(description="has it reported lately?")
    trainer: TrainerStatus | None = Field(description="its last report; null if there was none")


class Deleted(BaseModel):
    """What was deleted."""

    object: Literal["spool.deleted"] = "spool.deleted"
    deleted: int = Field(description="conversations")


class Status(BaseModel):
    """State of the service."""

    status: Literal["ok", "ready"]


class Version(BaseModel):
    """Versions of the parts."""

    version: str
    vllm: str | None
    torch: str | None
    transformers: str | None
