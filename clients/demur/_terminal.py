"""Heat maps in a terminal (extra `cli`: rich)."""

from __future__ import annotations

from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from demur._measures import Measure
from demur._shades import LIGHT, N_SHADES, shade_of
from demur._visible import visible
from demur._words import COLUMNS, doubtful, extremes
from demur.heatmap import Cell, HeatMap


def render(heatmap: HeatMap) -> Group:
    """The shaded text, and below it the legend and the numbers."""
    text = Text()
    for cell, marked in zip(heatmap.cells, heatmap.in_span(), strict=True):
        text.append_text(shaded(cell, heatmap.measure, heatmap.top, underline=marked))
    words = [Text(line, style="dim") for line in [*extremes(heatmap), *doubtful(heatmap)]]
    return Group(text, _legend(heatmap), *words, _numbers(heatmap))


def shaded(cell: Cell, measure: Measure, top: float, *, underline: bool = False) -> Text:
    """One cell on its shade; `top` in nats."""
    background, foreground = LIGHT[shade_of(cell.value(measure), top)]
    style = Style(color=foreground, bgcolor=background, underline=underline)
    return Text(visible(cell.text), style=style)


def _legend(heatmap: HeatMap) -> Text:
    legend = Text(f"{heatmap.measure}, nats: ", style="dim")
    for level, (background, foreground) in enumerate(LIGHT):
        bound = f" {heatmap.top * level / N_SHADES:.2f} "
        legend.append(bound, style=f"{foreground} on {background}")
    if heatmap.spans:
        legend.append("  ").append("doubtful stretch", style="underline")
    return legend


def _numbers(heatmap: HeatMap) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = [name for name in COLUMNS if name in heatmap.sequence]
    for name in ("tokens", *names):
        table.add_column(name.replace("epistemic", "EU").replace("_", " "), justify="right")
    table.add_row(str(len(heatmap.tokens)), *(f"{heatmap.sequence[name]:.3f}" for name in names))
    return table
