"""A heat map without colours: the text, and its doubtful tokens in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demur._visible import visible

if TYPE_CHECKING:
    from demur.heatmap import HeatMap

_EXTREMES = 3
COLUMNS = (
    "epistemic_mean",
    "epistemic_max",
    "jsd_mean",
    "kl_mean",
    "entropy_mean",
    "logprob_mean",
)


def in_words(heatmap: HeatMap) -> str:
    """The text, and below it the numbers."""
    text = visible("".join(cell.text for cell in heatmap.cells))
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {heatmap.sequence[name]:.3f}"
        for name in COLUMNS
        if name in heatmap.sequence
    )
    summary = f"{len(heatmap.tokens)} tokens, in nats: {numbers}"
    return "\n".join([text, "", *extremes(heatmap), *doubtful(heatmap), summary])


def extremes(heatmap: HeatMap) -> list[str]:
    """The tokens with the highest values of the measure, and those with the lowest logprob."""
    measure, cells = heatmap.measure, heatmap.cells
    highest = sorted(cells, key=lambda cell: -cell.value(measure))[:_EXTREMES]
    unlikely = sorted(cells, key=lambda cell: -cell.value("surprisal"))[:_EXTREMES]
    named = ", ".join(f"{cell.text!r} {cell.value(measure):.2f}" for cell in highest)
    least = ", ".join(f"{cell.text!r} {-cell.value('surprisal'):.2f}" for cell in unlikely)
    return [f"highest {measure}: {named}", f"least likely (logprob): {least}"]


def doubtful(heatmap: HeatMap) -> list[str]:
    """The doubtful stretches in one line; no line if there are none."""
    text = "".join(token.text for token in heatmap.tokens)
    stretches = ", ".join(repr(text[start:end]) for start, end in heatmap.spans)
    return [f"doubtful: {stretches}"] if stretches else []
