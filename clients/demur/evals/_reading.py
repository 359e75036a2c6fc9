"""What a report says in words: what comes first, what is kept in view, what a difference means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from demur._measures import MEASURES, Measure
from demur.evals.analysis import few
from demur.heatmap import HeatMap, HeatToken

Row = dict[str, Any]

_IN_VIEW = 15
_OWN = ("demur", "calibrated")
# Shades are for most of the tokens; a few outliers are as dark as what reaches the top.
_TOP_QUANTILE = 0.95


class Headline(NamedTuple):
    """What the report says first, of one of its tables.

    Attributes:
        table: the first of the test half, or the first.
        best: its row with the highest AUROC.
        own: the same of demur's own.
        chosen: the row of the statistic that was chosen beforehand.
        verdict: one sentence, on `chosen` if there is one, else on `own`.
    """

    table: dict[str, Any] | None
    best: Row | None
    own: Row | None
    chosen: Row | None
    verdict: str


def headline(found: dict[str, Any]) -> Headline:
    """What the report says first."""
    tables = sorted(found["tables"], key=lambda table: table["half"] != "test")
    table = tables[0] if tables else None
    rows = [] if table is None else by_auroc(table["rows"])
    ranked = [row for row in rows if row["auroc"]["value"] is not None]
    best = ranked[0] if ranked else None
    own = next((row for row in ranked if row["family"] in _OWN), None)
    name = found["chosen"] and found["chosen"]["statistic"]
    chosen = next((row for row in ranked if row["detector"] == name), None)
    lacking = None if table is None else few(table["n"], table["wrong"])
    verdict = (
        f"There are too few {lacking} answers to judge the detectors by."
        if lacking
        else _verdict(ranked, chosen or own)
    )
    return Headline(table, best, own, chosen, verdict)


def _verdict(ranked: Sequence[Row], own: Row | None) -> str:
    if not ranked:
        return "There is nothing yet to judge the detectors by."
    if not any(map(_beats_a_coin, ranked)):
        return "No detector is shown to find wrong answers better than a coin would."
    if own is None:
        return "demur has no detector in this table; others find wrong answers better than a coin."
    shown = "finds" if _beats_a_coin(own) else "is not shown to find"
    others = [row for row in ranked if row["family"] not in _OWN]
    place = "no detector of another kind comes before it"
    if others and ranked.index(others[0]) < ranked.index(own):
        place = f"{others[0]['detector']} comes before it"
    return f"demur's doubt {shown} wrong answers better than a coin would; {place}."


def _beats_a_coin(row: Row) -> bool:
    low: float | None = row["auroc"]["low"]
    return low is not None and low > 0.5


def by_auroc(rows: Iterable[Row]) -> list[Row]:
    """The highest first, and last what has no value."""
    return sorted(rows, key=_from_the_highest)


def _from_the_highest(row: Row) -> float:
    value: float | None = row["auroc"]["value"]
    return math.inf if value is None else -value


def in_view(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows by AUROC: the first, each family's best and all baselines; and the rest."""
    best: dict[str, Row] = {}
    for row in rows:
        best.setdefault(row["family"], row)
    seen = [
        i < _IN_VIEW or row["family"] == "baseline" or row is best[row["family"]]
        for i, row in enumerate(rows)
    ]
    pairs = list(zip(rows, seen, strict=True))
    return [row for row, shown in pairs if shown], [row for row, shown in pairs if not shown]


def best_at_each_cost(rows: Iterable[Row]) -> list[Row]:
    """Of each family the best at each cost, the cheapest first."""
    best: dict[tuple[float, str], Row] = {}
    for row in by_auroc(rows):
        if row["cost"] is not None and row["auroc"]["value"] is not None:
            best.setdefault((row["cost"], row["family"]), row)
    return sorted(best.values(), key=lambda row: float(row["cost"]))


def told_apart(difference: dict[str, Any]) -> str:
    """What an interval of a difference says."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return "no interval"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not told apart"


def heat_maps(examples: dict[str, list[dict[str, Any]]]) -> dict[str, list[HeatMap]]:
    """The answers of all kinds of examples, all on one scale."""
    maps = {
        kind: [
            HeatMap(
                _tokens(example["tokens"]),
                spans=[],
                sequence={},
                source="",
                measure=_measure(example["measure"]),
            )
            for example in each
        ]
        for kind, each in examples.items()
    }
    all_maps = [heatmap for each in maps.values() for heatmap in each]
    values = sorted(cell.value(each.measure) for each in all_maps for cell in each.cells)
    if values:
        top = values[math.ceil(_TOP_QUANTILE * (len(values) - 1))] or values[-1]
        for heatmap in all_maps:
            heatmap.fixed_top = top
    return maps


def _measure(name: str) -> Measure:
    """What an answer is shaded by: what it was ranked by, if tokens have that."""
    return next((measure for measure in MEASURES if measure == name), "epistemic")


def _tokens(columns: dict[str, list[Any]]) -> list[HeatToken]:
    found = []
    for i, text in enumerate(columns["text"]):
        entropy, total, jsd, kl = (columns[name][i] for name in ("entropy", "total", "jsd", "kl"))
        values: dict[Measure, float] = {"entropy": entropy, "total": total, "jsd": jsd, "kl": kl}
        values |= {"aleatoric": total - jsd, "epistemic": jsd + kl}
        found.append(HeatToken(text, columns["logprob"][i], None, values))
    return found
