"""Heat map of a scored response in the terminal (extra `cli`: rich)."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from demur.types import Score

# Light to dark of one hue family (ColorBrewer YlOrRd), readable by the colour-blind as lightness,
# with the text dark on light and light on dark.
_SCALE = [
    ("#ffffcc", "#000000"),
    ("#fed976", "#000000"),
    ("#feb24c", "#000000"),
    ("#fd8d3c", "#000000"),
    ("#e31a1c", "#ffffff"),
    ("#800026", "#ffffff"),
]

_EXTREMES = 3
_STATISTICS = (
    "epistemic_mean",
    "epistemic_max",
    "jsd_mean",
    "kl_mean",
    "entropy_mean",
    "logprob_mean",
)


def render(score: Score, *, top: float | None = None, measure: str = "epistemic") -> Group:
    """The response with each token shaded by a measure, and the numbers below.

    Args:
        top: the measure's value, in nats, at which the darkest shade begins; default: the
            response's own maximum. Give the same to compare responses.
        measure: the name of a token measure.
    """
    values = [float(getattr(token, measure)) for token in score.tokens]
    top = max(values) if top is None else top
    text = Text()
    for token, value in zip(score.tokens, values, strict=True):
        level = 0 if top <= 0 else min(int(value / top * len(_SCALE)), len(_SCALE) - 1)
        background, foreground = _SCALE[level]
        text.append(token.token, style=f"{foreground} on {background}")
    logprobs = [token.logprob for token in score.tokens]
    doubtful = _extremes("most doubtful", score, values, sign=-1)
    unlikely = _extremes("least likely (logprob)", score, logprobs, sign=1)
    return Group(text, _legend(top, measure), doubtful, unlikely, _numbers(score))


def _legend(top: float, measure: str) -> Text:
    legend = Text(f"{measure}, nats: ", style="dim")
    for level, (background, foreground) in enumerate(_SCALE):
        legend.append(f" {top * level / len(_SCALE):.2f} ", style=f"{foreground} on {background}")
    return legend


def _extremes(label: str, score: Score, values: list[float], *, sign: int) -> Text:
    """In words, for terminals without colour: the lowest values, or with sign -1 the highest."""
    order = sorted(range(len(values)), key=lambda i: sign * values[i])[:_EXTREMES]
    named = (f"{score.tokens[i].token!r} {values[i]:.2f}" for i in order)
    return Text(f"{label}: " + ", ".join(named), style="dim")


def _numbers(score: Score) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tokens", justify="right")
    for name in _STATISTICS:
        table.add_column(name.replace("epistemic", "EU").replace("_", " "), justify="right")
    table.add_row(str(len(score.tokens)), *(f"{score.sequence[name]:.3f}" for name in _STATISTICS))
    return table
