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
    return Group(text, _legend(top, measure), _numbers(score))


def _legend(top: float, measure: str) -> Text:
    legend = Text(f"{measure}, nats: ", style="dim")
    for level, (background, foreground) in enumerate(_SCALE):
        legend.append(f" {top * level / len(_SCALE):.2f} ", style=f"{foreground} on {background}")
    return legend


def _numbers(score: Score) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ("epistemic_mean", "epistemic_max", "jsd_mean", "kl_mean", "entropy_mean", "logprob_mean")
    table.add_column("tokens", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row(str(len(score.tokens)), *(f"{score.sequence[name]:.3f}" for name in names))
    return table
