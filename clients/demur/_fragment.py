"""A heat map in a notebook: inline styles, no script, nothing that reaches beyond the fragment."""

from __future__ import annotations

from demur._markup import described, number, safe
from demur._shades import LIGHT, N_SHADES, shade_of
from demur._words import COLUMNS, doubtful
from demur.heatmap import HeatMap

# The classes keep MathJax from reading dollars as formulas. Colours other than the shades' are the
# notebook's own, so that it reads well in light and dark ones.
_FRAME = '<div class="tex2jax_ignore mathjax_ignore" style="max-width:60em">{}</div>'
_TEXT = (
    '<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;'
    'line-height:1.7;font-family:monospace">{}</div>'
)
_SMALL = '<div style="font-size:85%;margin-top:.5em">{}</div>'


def fragment(heatmap: HeatMap) -> str:
    """The shaded text, its legend and its numbers."""
    text = "".join(
        _span(safe(cell.text), shade_of(cell.value(heatmap.measure), heatmap.top), title, marked)
        for cell, marked in zip(heatmap.cells, heatmap.in_span(), strict=True)
        for title in [safe(described(cell))]
    )
    lines = [_legend(heatmap), *(safe(line) for line in doubtful(heatmap)), _numbers(heatmap)]
    return _FRAME.format(_TEXT.format(text) + "".join(_SMALL.format(line) for line in lines))


def _span(text: str, shade: int, title: str = "", underlined: bool = False) -> str:
    background, foreground = LIGHT[shade]
    style = f"background:{background};color:{foreground}"
    if underlined:
        style += ";text-decoration:underline"
    attribute = f' title="{title}"' if title else ""
    return f'<span style="{style}"{attribute}>{text}</span>'


def _legend(heatmap: HeatMap) -> str:
    bounds = (heatmap.top * level / N_SHADES for level in range(N_SHADES))
    swatches = "".join(
        _span(f"&nbsp;{number(bound)}&nbsp;", level) for level, bound in enumerate(bounds)
    )
    return f"{heatmap.measure}, nats: {swatches}"


def _numbers(heatmap: HeatMap) -> str:
    named = [
        f"{name.replace('_', ' ')} {number(heatmap.sequence[name])}"
        for name in COLUMNS
        if name in heatmap.sequence
    ]
    return safe(f"{len(heatmap.tokens)} tokens; " + ", ".join(named) + f"; {heatmap.source}")
