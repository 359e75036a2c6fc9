"""What the service answers about given text and about itself, typed. Measures are in nats.

Fields that a newer service adds are kept.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from demur._measures import DISTRIBUTION_MEASURES, Measure
from demur.heatmap import HeatMap, HeatToken


class Answer(BaseModel):
    """Base of all of them."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Estimator(Answer):
    """What produced the numbers."""

    name: str
    drafts: int
    weights_version: str
    support: str


class Token(Answer):
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


class Span(Answer):
    """A doubtful stretch of the response, characters [start, end)."""

    start: int
    end: int
    text: str
    epistemic_mean: float
    epistemic_max: float


class Usage(Answer):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ScoreWarning(Answer):
    """Why a `hallucination_score` should be doubted.

    `code` is far_from_calibration (the text is unlike those that it was fitted to) or
    calibrated_on_other_weights (the drafts have changed since).
    """

    code: str
    message: str


class Calibration(Answer):
    """What makes a `hallucination_score`: fitted to n answers to the tasks of `fitted_on`."""

    id: str
    kind: str
    fitted_on: list[str]
    n: int


class Score(Answer):
    """The uncertainty of a response.

    `hallucination_score` is a calibrated probability that the response is wrong (high = bad), and
    None where the service has no calibration; `warnings` say why it should be doubted. `sequence`
    has the number of tokens, and of each measure its mean, max and sum, in nats.
    """

    id: str
    created: int
    model: str
    estimator: Estimator
    hallucination_score: float | None
    flagged: bool | None
    threshold: float | None
    warnings: list[ScoreWarning] = Field(default_factory=list)
    calibration: Calibration | None = None
    sequence: dict[str, int | float]
    tokens: list[Token]
    spans: list[Span]
    usage: Usage

    @property
    def text(self) -> str:
        """The response."""
        return "".join(token.token for token in self.tokens)

    def heatmap(self, *, measure: Measure = "epistemic", top: float | None = None) -> HeatMap:
        """The response with each token shaded by a measure.

        Args:
            measure: what to shade by.
            top: the value, in nats, at the end of the scale of shades; default: the response's
                own maximum. Give the same to compare responses.
        """
        return HeatMap(
            [_heat_token(token) for token in self.tokens],
            spans=[(span.start, span.end) for span in self.spans],
            sequence=self.sequence,
            source=f"{self.model}, {source(self.estimator)}",
            measure=measure,
            top=top,
        )

    def to_html(self, *, measure: Measure = "epistemic", top: float | None = None) -> str:
        """The heat map as a page that needs nothing but itself."""
        return self.heatmap(measure=measure, top=top).to_html()

    def _repr_html_(self) -> str:
        return self.heatmap()._repr_html_()


class Model(Answer):
    """A served ensemble: a target with its drafts.

    `added_passes` is what the drafts cost for a token, in forward passes of the target;
    `calibration` the id of what makes `hallucination_score`, None without.
    """

    id: str
    created: int
    owned_by: str
    max_model_len: int
    drafts: int
    weights_version: str
    added_passes: float | None = None
    calibration: str | None = None


class Draft(Answer):
    """One draft: its kind (residual, exit or model), and the layer or the draw it starts from."""

    name: str
    kind: str
    layer: int | None = None
    draw: int | None = None


class Drafts(Answer):
    """The drafts of the served ensemble."""

    weights_version: str
    target: str
    data: list[Draft]


class ModelList(Answer):
    """What GET /v1/models answers."""

    data: list[Model]


def source(estimator: Estimator) -> str:
    """Where numbers come from, in a few words."""
    return f"{estimator.drafts} drafts, weights {estimator.weights_version}"


def _heat_token(token: Token) -> HeatToken:
    values = {name: getattr(token, name) for name in DISTRIBUTION_MEASURES}
    return HeatToken(token.token, token.logprob, token.rank, values)
