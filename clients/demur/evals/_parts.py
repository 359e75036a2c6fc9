"""The report's parts as its template wants them: rows in order, with the figures drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from demur.evals import _figures, _reading
from demur.evals._figures import Dot
from demur.evals._reading import Row
from demur.evals._svg import drawn

Found = dict[str, Any]


class Part(NamedTuple):
    """Rows in order, and a figure of them; None where there is nothing to draw."""

    rows: Sequence[Row]
    figure: Markup | None


class TablePart(NamedTuple):
    """A table: what is in view, and what can be unfolded."""

    table: Found
    shown: Part
    rest: Part


class CurvesPart(NamedTuple):
    """Curves of some detectors, drawn twice, with the dashes of each detector's line."""

    curves: Found
    dashes: Sequence[str]
    roc: Markup
    risk: Markup


def tables(found: Found) -> Iterator[TablePart]:
    """Each table by AUROC."""
    for i, table in enumerate(found["tables"]):
        shown, rest = _reading.in_view(_reading.by_auroc(table["rows"]))
        yield TablePart(table, _aurocs(f"table-{i}", shown), _aurocs(f"rest-{i}", rest))


def _aurocs(name: str, rows: Sequence[Row]) -> Part:
    rows_drawn = [Dot(row["detector"], row["family"], row["auroc"]) for row in rows]
    says = "AUROC of each detector, with its interval, in the order of the table below."
    return Part(rows, _dots(name, says, rows_drawn, 0.5, "AUROC"))


def differences(found: Found) -> Iterator[tuple[str, Part]]:
    """The paired differences of each table, by its title."""
    groups = groupby(found["paired"], key=lambda pair: str(pair["title"]))
    for i, (title, pairs) in enumerate(groups):
        rows = list(pairs)
        rows_drawn = [
            Dot(f"{row['detector']} against {row['rival']}", None, row["difference"])
            for row in rows
        ]
        says = "Differences of AUROC, with their intervals, in the order of the table below."
        figure = _dots(f"paired-{i}", says, rows_drawn, 0.0, "difference of AUROC")
        yield title, Part(rows, figure)


def _dots(name: str, says: str, rows: Sequence[Dot], reference: float, label: str) -> Markup | None:
    if all(row.estimate["value"] is None for row in rows):
        return None
    return drawn(name, says, partial(_figures.dots, rows, reference, label))


def curves(found: Found) -> Iterator[CurvesPart]:
    """Each set of curves, drawn twice: ROC, and risk against coverage."""
    for i, each in enumerate(found["curves"]):
        detectors = each["detectors"]
        names = ", ".join(detector["detector"] for detector in detectors)
        yield CurvesPart(
            each,
            [" ".join(map(str, dashes)) for dashes in _figures.dashes_of(detectors)],
            drawn(f"roc-{i}", f"ROC curves of {names}.", partial(_figures.roc, detectors)),
            drawn(
                f"risk-{i}",
                f"Risk against coverage of {names}.",
                partial(_figures.risk_coverage, detectors),
            ),
        )


def reliability(found: Found) -> Part:
    """The calibrated probability's bins."""
    calibration = found["calibration"]
    bins = calibration["reliability"] if calibration else []
    if not bins:
        return Part([], None)
    says = "Share of wrong answers against the probability that was said; the table has it too."
    return Part(bins, drawn("reliability", says, partial(_figures.reliability, bins)))


def costs(found: Found) -> Iterator[tuple[Found, Part]]:
    """Each table's best at each cost, where costs are known."""
    for i, table in enumerate(found["tables"]):
        rows = _reading.best_at_each_cost(table["rows"])
        if rows:
            says = "AUROC against added forward passes, in the order of the list below."
            yield table, Part(rows, drawn(f"cost-{i}", says, partial(_figures.costs, rows)))
