"""Bodies of /v1/chat/completions and /v1/completions: OpenAI's, and what demur adds to them.

Added are `uncertainty` and `uncertainty_stop` in requests, and `uncertainty` in choices and in
the entries of their log-probs. A null means what leaving a parameter out means, and parameters
that demur has not are taken where they change nothing; all others are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from server.schemas import Estimator, Message, ScoreWarning, SpanOut, StrictBody, Usage, plain

Measure = Literal["entropy", "total", "aleatoric", "jsd", "kl", "epistemic"]
MEASURES: tuple[str, ...] = get_args(Measure)
FinishReason = Literal["stop", "length", "uncertainty"]

_StopString = Annotated[str, Field(min_length=1, max_length=1000)]
# A long list that is wrong from end to end fails at its first element: an error for each would
# hold up everybody.
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def _kind_of_prompt(prompt: Any) -> str:
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if not isinstance(prompt, list):
        return "text"
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


_Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[_TokenIds, Tag("ids")]
    | Annotated[list[_TokenIds], Field(min_length=1, fail_fast=True), Tag("lists")],
    Discriminator(_kind_of_prompt),
]

# Parameters of OpenAI's that demur has not, and what they may say without changing anything.
_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}


def _changes_nothing(name: str, value: Any) -> bool:
    # By type, too: 0 is not False here.
    return any(
        type(value) is type(idle) and value == idle for idle in _CHANGES_NOTHING.get(name, ())
    )


class StreamOptions(StrictBody):
    """Options of a stream."""

    include_usage: bool | None = Field(
        default=None, description="a last chunk without choices has the usage"
    )
    include_obfuscation: bool | None = Field(default=None, description="taken, and not used")


class UncertaintyStop(StrictBody):
    """Ends a generation once the mean of a measure over the last `window` tokens is too high."""

    measure: Measure = "epistemic"
    threshold: float = Field(ge=0, allow_inf_nan=False, description="nats")
    window: int = Field(default=8, ge=1, le=4096, description="tokens; no end before so many")


class GenerationBody(StrictBody):
    """What both routes take."""

    model: str | None = Field(
        default=None, description="id of the ensemble; default: the one served"
    )
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(
        default=None, ge=0, le=2, allow_inf_nan=False, description="default 1; 0 is greedy"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, allow_inf_nan=False, description="default 1"
    )
    n: int | None = Field(default=None, ge=1, le=128, description="choices for each prompt")
    stop: _StopString | Annotated[list[_StopString], Field(max_length=16)] | None = Field(
        default=None, description="the text ends before the first of these"
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="refused where the engine cannot sample by a seed",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(default=None, description="0 is the one value taken")
    frequency_penalty: float | None = Field(default=None, description="0 is the one value taken")
    user: str | None = Field(default=None, description="taken, and not used")
    store: bool | None = Field(
        default=None, description="default true; false keeps the text out of distillation"
    )
    uncertainty: bool | None = Field(
        default=None,
        description="adds the measures of each token to its log-probs, and a block to the choice",
    )
    uncertainty_stop: UncertaintyStop | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if not _changes_nothing(name, value)}

    @field_validator("model", "user")
    @classmethod
    def _no_control_characters(cls, text: str | None) -> str | None:
        return text if text is None else plain(text)

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("not supported; leave it out or send 0")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatRequest(GenerationBody):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, description="rendered with the target's chat template"
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="what OpenAI now calls max_tokens; default: all the room"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self


class CompletionRequest(GenerationBody):
    """Text to go on with."""

    prompt: _Prompt = Field(
        description="one or several, as text or as token ids; max_tokens defaults to 16"
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @field_validator("prompt")
    @classmethod
    def _plain_prompts(
        cls, prompt: str | list[str] | list[int] | list[list[int]]
    ) -> str | list[str] | list[int] | list[list[int]]:
        for text in [prompt] if isinstance(prompt, str) else prompt:
            if isinstance(text, str):
                plain(text)
        return prompt


class Uncertainty(BaseModel):
    """Measures of the distribution that a token was drawn from, in nats."""

    entropy: float = Field(description="H(p) of the target")
    total: float = Field(description="H of the drafts' mixture = aleatoric + jsd")
    aleatoric: float = Field(description="mean entropy of the drafts")
    jsd: float = Field(description="drafts against their mixture, in [0, ln K]")
    kl: float = Field(description="mixture against target, >= 0")
    epistemic: float = Field(description="jsd + kl; high = the model does not know")


class ChoiceUncertainty(BaseModel):
    """The uncertainty of a whole choice."""

    estimator: Estimator
    hallucination_score: float | None = Field(
        description="calibrated probability that the text is wrong, high = bad; "
        "null where no calibration is loaded"
    )
    warnings: list[ScoreWarning] = Field(
        default=[], description="why the hallucination_score should be doubted"
    )
    sequence: dict[str, float | int] = Field(description="n_tokens, and mean, max, sum of measures")
    spans: list[SpanOut] = Field(description="doubtful stretches of the text")


def _absent(value: object) -> bool:
    return value is None


class TopLogprob(BaseModel):
    """One of the likeliest tokens."""

    token: str
    bytes: list[int] | None
    logprob: float


class LogprobEntry(TopLogprob):
    """A generated token. Joining `token` over a choice gives its text."""

    top_logprobs: list[TopLogprob]
    uncertainty: Uncertainty | None = Field(default=None, exclude_if=_absent)


class ChatLogprobs(BaseModel):
    """Log-probabilities of the target, before temperature and top_p."""

    content: list[LogprobEntry]
    refusal: None = None


class AssistantMessage(BaseModel):
    """What the target said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    uncertainty: ChoiceUncertainty | None = Field(default=None, exclude_if=_absent)


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="version of the drafts' weights")
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_absent)
    content: str | None = Field(default=None, exclude_if=_absent)


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer; the last has `finish_reason` and the choice's block."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    uncertainty: ChoiceUncertainty | None = Field(default=None, exclude_if=_absent)


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """Parallel lists, one entry a token, as OpenAI's completions have them."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int] = Field(description="characters of the choice's text")
    uncertainty: list[Uncertainty] | None = Field(default=None, exclude_if=_absent)


class TextChoice(BaseModel):
    """One continuation; in a stream, what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    uncertainty: ChoiceUncertainty | None = Field(default=None, exclude_if=_absent)


class TextCompletion(BaseModel):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None
