"""A run's log: one CSV row a step, and a plot of it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from osd.errors import OsdError
from osd.evaluate import Agreement

_STEP = ("step", "loss", "rate", "tokens_per_second")
_COLUMNS = (*_STEP, *Agreement._fields)


class RunLog:
    """`log.csv` in a run's folder.

    Args:
        keep_until: rows of later steps, which a killed run left behind its checkpoint, are dropped.
        write: whether this process writes it.
    """

    def __init__(self, run: Path, keep_until: int, write: bool = True) -> None:
        self.file = run / "log.csv"
        self.rows: list[dict[str, str]] = []
        if self.file.exists() and keep_until > 0:
            self.rows = [row for row in _read(self.file) if int(row["step"]) <= keep_until]
        self.write = write
        if not write:
            return
        partial = self.file.with_suffix(".partial")
        with partial.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.file)

    def add(
        self,
        step: int,
        *,
        loss: float | None = None,
        rate: float | None = None,
        tokens_per_second: float | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        """Append a row; what was not measured stays empty."""
        values = {"loss": loss, "rate": rate, "tokens_per_second": tokens_per_second}
        if agreement is not None:
            values |= agreement._asdict()
        row = dict.fromkeys(_COLUMNS, "") | {"step": str(step)}
        row |= {name: f"{value:.6g}" for name, value in values.items() if value is not None}
        self.rows.append(row)
        if not self.write:
            return
        with self.file.open("a", newline="") as lines:
            csv.DictWriter(lines, _COLUMNS).writerow(row)

    def measured(self) -> list[tuple[int, Agreement]]:
        """Steps at which the drafts were measured on held-out texts."""
        return _measured(self.rows)

    def state(self) -> dict[str, str]:
        """For a progress bar: the last held-out values."""
        if not self.measured():
            return {}
        last = self.measured()[-1][1]
        return {"kl": f"{last.kl_drafts:.4f}", "jsd": f"{last.jsd:.4f}"}

    def plot(self) -> None:
        """`log.png`: the loss, and what was measured on held-out texts."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        steps = [(int(row["step"]), float(row["loss"])) for row in self.rows if row["loss"]]
        left.plot(*zip(*steps, strict=True), linewidth=0.8)
        left.set(xlabel="step", ylabel="loss")
        measured = self.measured()
        for name in Agreement._fields:
            values = [getattr(agreement, name) for _, agreement in measured]
            right.plot([step for step, _ in measured], values, label=name)
        right.set(xlabel="step", ylabel="held out, nats", ylim=(0, None))
        right.legend()
        figure.savefig(self.file.with_suffix(".png"), dpi=120)
        pyplot.close(figure)


def read_measured(run: Path) -> list[tuple[int, Agreement]]:
    """What the log in a run's folder says of held-out texts, by step."""
    return _measured(_read(run / "log.csv"))


def _read(file: Path) -> list[dict[str, str]]:
    """The rows of a log, every field a number or empty."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            columns, *rows = csv.reader(lines)
            if tuple(columns) != _COLUMNS:
                raise ValueError("other columns")
            found = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
            for row in found:
                int(row["step"])
                _ = [float(value) for value in row.values() if value]
    except (ValueError, csv.Error) as error:
        raise OsdError(f"{file} is no log of a run ({error}); remove it") from error
    return found


def _measured(rows: Iterable[dict[str, str]]) -> list[tuple[int, Agreement]]:
    return [
        (int(row["step"]), Agreement(*(float(row[name]) for name in Agreement._fields)))
        for row in rows
        if row["jsd"]
    ]
