"""What the service answers when it generates: OpenAI's objects, and the uncertainty in them.

Measures are in nats. Fields that a newer service adds are kept.
"""

from __future__ import annotations

from pydantic import Field

from demur._measures import DISTRIBUTION_MEASURES, Measure
from demur.errors import DemurError
from demur.heatmap import HeatMap, HeatToken
from demur.types import Answer, Estimator, ScoreWarning, Span, Usage, source


class Uncertainty(Answer):
    """Measures of the distribution that a token was drawn from."""

    entropy: float
    total: float
    aleatoric: float
    jsd: float
    kl: float
    epistemic: float


class ChoiceUncertainty(Answer):
    """The uncertainty of a whole choice; its fields are those of a `Score`."""

    estimator: Estimator
    hallucination_score: float | None
    warnings: list[ScoreWarning] = Field(default_factory=list)
    sequence: dict[str, int | float]
    spans: list[Span]


class TopLogprob(Answer):
    """One of the likeliest tokens."""

    token: str
    bytes: list[int] | None
    logprob: float


class LogprobEntry(TopLogprob):
    """A generated token. Joining `token` over a choice gives its text."""

    top_logprobs: list[TopLogprob] = Field(default_factory=list)
    uncertainty: Uncertainty | None = None


class ChatLogprobs(Answer):
    """The tokens of a choice."""

    content: list[LogprobEntry]


class ChatMessage(Answer):
    """What the target said."""

    role: str = "assistant"
    content: str


class ChatChoice(Answer):
    """One answer. `finish_reason` is stop, length or uncertainty (`uncertainty_stop` ended it)."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    uncertainty: ChoiceUncertainty | None = None

    @property
    def text(self) -> str:
        """What the target said."""
        return self.message.content

    @property
    def tokens(self) -> list[LogprobEntry]:
        """Its tokens; none if neither uncertainty nor logprobs were asked for."""
        return [] if self.logprobs is None else self.logprobs.content

    def heatmap(self, *, measure: Measure = "epistemic", top: float | None = None) -> HeatMap:
        """The text with each token shaded by a measure; see `Score.heatmap`.

        Raises:
            DemurError: if the answer came without uncertainty.
        """
        if self.uncertainty is None:
            raise DemurError("the answer has no uncertainty; ask with uncertainty=True")
        return HeatMap(
            [heat_token(token) for token in self.tokens],
            spans=[(span.start, span.end) for span in self.uncertainty.spans],
            sequence=self.uncertainty.sequence,
            source=source(self.uncertainty.estimator),
            measure=measure,
            top=top,
        )

    def to_html(self, *, measure: Measure = "epistemic", top: float | None = None) -> str:
        """The heat map as a page that needs nothing but itself."""
        return self.heatmap(measure=measure, top=top).to_html()

    def _repr_html_(self) -> str | None:
        return None if self.uncertainty is None else self.heatmap()._repr_html_()


class ChatCompletion(Answer):
    """An answer, or with `n` several."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What the target said: the first choice's text."""
        return self.choices[0].text

    def heatmap(self, *, measure: Measure = "epistemic", top: float | None = None) -> HeatMap:
        """The heat map of the first choice."""
        return self.choices[0].heatmap(measure=measure, top=top)

    def to_html(self, *, measure: Measure = "epistemic", top: float | None = None) -> str:
        """The first choice's heat map as a page that needs nothing but itself."""
        return self.choices[0].to_html(measure=measure, top=top)

    def _repr_html_(self) -> str | None:
        return self.choices[0]._repr_html_()


class Delta(Answer):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    """What a chunk adds to one answer; the last has `finish_reason` and the whole `uncertainty`."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    uncertainty: ChoiceUncertainty | None = None

    @property
    def text(self) -> str:
        """The text it adds, which may be none."""
        return self.delta.content or ""

    @property
    def tokens(self) -> list[LogprobEntry]:
        """The tokens it adds."""
        return [] if self.logprobs is None else self.logprobs.content


class ChatChunk(Answer):
    """One event of a stream. The last has no choices, and the usage."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """The text that it adds to the first answer, which may be none."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


def heat_token(token: LogprobEntry) -> HeatToken:
    """A generated token as a heat map shows it."""
    if token.uncertainty is None:
        raise DemurError("a token has no uncertainty; ask with uncertainty=True")
    values = {name: getattr(token.uncertainty, name) for name in DISTRIBUTION_MEASURES}
    return HeatToken(token.token, token.logprob, None, values)
