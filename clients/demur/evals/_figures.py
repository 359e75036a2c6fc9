"""The report's figures, narrow enough for a phone. Names stand beside them, in the page's keys."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from demur.evals._families import DASHES, FAMILIES
from demur.evals._svg import PAINTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 3.6  # inches: 346 pixels
_LINE = 0.15  # height of a line of a name
_NAME = 27  # characters in such a line


class Dot(NamedTuple):
    """A row of a chart of dots with whiskers; `estimate` has value, low and high."""

    name: str
    family: str | None
    estimate: dict[str, Any]


def dots(rows: Sequence[Dot], reference: float, label: str) -> Figure:
    """Values with their intervals, in rows from the top; what has no value leaves its row empty."""
    names = [textwrap.wrap(row.name, _NAME) or [""] for row in rows]
    heights = [len(name) + 0.5 for name in names]
    figure, axes = _blank(0.6 + _LINE * sum(heights))
    axes.axvline(reference, color=PAINTS["ink"], linewidth=0.8, linestyle="--")
    places = [-(sum(heights[:i]) + height / 2) for i, height in enumerate(heights)]
    for row, place in zip(rows, places, strict=True):
        if row.estimate["value"] is not None:
            _point(axes, row.estimate["value"], place, row.family, across=_whisker(row.estimate))
    axes.set_yticks(places, ["\n".join(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(-sum(heights), 0), xlabel=label)
    axes.spines["left"].set_visible(False)
    return figure


def roc(detectors: Sequence[dict[str, Any]]) -> Figure:
    """ROC curves, and what a coin would do."""
    figure, axes = _blank(_WIDTH * 0.92)
    axes.plot([0, 1], [0, 1], color=PAINTS["ink"], linewidth=0.8, linestyle="--")
    axes.set(xlabel="share of right answers flagged", ylabel="share of wrong answers flagged")
    _lines(axes, detectors, "roc", "fpr", "tpr")
    return figure


def risk_coverage(detectors: Sequence[dict[str, Any]]) -> Figure:
    """Risk against coverage."""
    figure, axes = _blank(_WIDTH * 0.92)
    axes.set_xlabel("share of answers kept, least doubted first")
    axes.set_ylabel("share of these that is wrong")
    _lines(axes, detectors, "risk_coverage", "coverage", "risk")
    return figure


def _lines(
    axes: Axes, detectors: Sequence[dict[str, Any]], curve: str, across: str, up: str
) -> None:
    for detector, dashes in zip(detectors, dashes_of(detectors), strict=True):
        x, y = (
            [math.nan if value is None else value for value in detector[curve][key]]
            for key in (across, up)
        )
        (line,) = axes.plot(x, y, color=PAINTS[detector["family"]], clip_on=False)
        line.set_dashes(dashes)
    axes.set(xlim=(0, 1))


def dashes_of(detectors: Sequence[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Of each detector's line, its dashes: those of a family differ."""
    families = [detector["family"] for detector in detectors]
    return [DASHES[families[:i].count(family) % len(DASHES)] for i, family in enumerate(families)]


def reliability(bins: Sequence[dict[str, Any]]) -> Figure:
    """What was said against what came; a dot's area goes with its number of answers."""
    figure, axes = _blank(_WIDTH * 0.92)
    axes.plot([0, 1], [0, 1], color=PAINTS["ink"], linewidth=0.8, linestyle="--")
    said, came = ([each[key] for each in bins] for key in ("probability", "wrong"))
    most = max(each["count"] for each in bins)
    color = PAINTS["calibrated"]
    axes.plot(said, came, color=color, linewidth=0.8)
    areas = [10 + 150 * each["count"] / max(1, most) for each in bins]
    axes.scatter(said, came, s=areas, color=color, alpha=0.7, linewidths=0, clip_on=False)
    axes.set(xlabel="probability of being wrong, as said", ylabel="share that was wrong")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return figure


def costs(rows: Sequence[dict[str, Any]]) -> Figure:
    """AUROC against added forward passes; what costs the same stands side by side."""
    figure, axes = _blank(_WIDTH * 0.8)
    axes.axhline(0.5, color=PAINTS["ink"], linewidth=0.8, linestyle="--")
    most = max(row["cost"] for row in rows)
    axes.set_xscale("symlog", linthresh=1)
    for i, row in enumerate(rows):
        same = [other["cost"] for other in rows].count(row["cost"])
        before = [other["cost"] for other in rows[:i]].count(row["cost"])
        # A part of a decade is as wide everywhere; next to 0 the scale is linear.
        aside = 0.06 * (before - (same - 1) / 2)
        place = row["cost"] + aside if row["cost"] < 1 else row["cost"] * 10**aside
        whisker = _whisker(row["auroc"])
        _point(axes, place, row["auroc"]["value"], row["family"], along=whisker)
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= 2 * most + 1]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlim=(-0.25, max(1.3, most * 1.4)), xlabel="added forward passes", ylabel="AUROC")
    return figure


def _point(
    axes: Axes,
    x: float,
    y: float,
    family: str | None,
    *,
    across: tuple[list[float], list[float]] | None = None,
    along: tuple[list[float], list[float]] | None = None,
) -> None:
    axes.errorbar(
        [x],
        [y],
        xerr=across,
        yerr=along,
        color=PAINTS[family or "ink"],
        marker=FAMILIES[family].marker if family else "o",
        elinewidth=1.1,
        markeredgewidth=0,
    )


def _whisker(estimate: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """The arms of a whisker, as matplotlib wants them; None without an interval."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None or high is None:
        return None
    return [max(0.0, value - low)], [max(0.0, high - value)]


def _blank(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()
