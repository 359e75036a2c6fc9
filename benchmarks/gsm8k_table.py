"""The tables and figures of benchmarks/gsm8k.py as a page of docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demur.evals import _figures
from demur.evals._families import FAMILIES
from demur.evals._reading import best_at_each_cost, by_auroc, in_view
from demur.evals.detectors import OURS, STATISTICS, TARGETS

Json = dict[str, Any]

_HEAD = """# Detectors of wrong answers

Written by `python benchmarks/gsm8k.py` from `benchmarks/results/gsm8k.json`, which has every row,
and the dev half; sets, detectors and metrics are explained in [evaluation.md](evaluation.md). The
positive class is the wrong answer; intervals of 95% by bootstrap over groups, of {tables} resamples
in tables and of {goals} in goals. {machine}

```sh
{commands}
```
"""
_MATRIX = (*OURS, *TARGETS, "tokur_tu_10", "tokur_eu_10")
_COLUMNS = ("auroc", "auroc_within", "auroc_length_matched", "auprc", "acc_star", "prr", "aurac")
_TITLES = ("AUROC", "within", "like lengths", "AUPRC", "ACC\\*", "PRR", "AURAC")


def write_page(result: Json, file: Path) -> None:
    """Write the page, and its figures beside it."""
    about = result["machine"]
    machine = f"{about['cpu']}, {about['cores']} cores."
    commands = "\n".join(result["commands"])
    lines = [_HEAD.format(machine=machine, commands=commands, **result["resamples"])]
    lines += ["## Goals", "", *_rows("goal", "measured", "bound", "met")]
    for goal in result["goals"]:
        met = "yes" if goal["holds"] else "**no**"
        lines.append(_row(goal["name"], goal["value"], goal["bound"], met))
    lines += ["", "## Runs", "", *_rows("run", "answers", "tokens", "refused", "wall time")]
    for run in result["runs"]:
        name = f"{run['folder']} {_asked(run['asking'])}"
        minutes = f"{run['seconds'] / 60:.0f} min"
        lines.append(_row(name, run["questions"], run["tokens"], run["refused"], minutes))
    lines += ["", *_rows("task", "answers", "right", "mean tokens", "strict", "flexible", "")]
    for task in result["tasks"]:
        numbers = [_percent(task["accuracy"]["value"]), f"{task['mean_tokens']:.0f}"]
        numbers += [_percent(task[key]) for key in ("strict", "flexible")]
        lines.append(_row(f"{task['task']}, {task['mode']}", task["n"], *numbers, task["verdict"]))
    lines += _paired(result["paired"])
    for i, table in enumerate(result["tables"]):
        if table["half"] != "dev":
            lines += _table(table, whole=i == 0)
    lines += _matrix(result["tables"][0])
    lines += _drafts(result["other_drafts"])
    for each in result["localisation"]:
        lines += ["", f"## {each['title']}", "", f"{each['n']} solutions; {each['note']}.", ""]
        lines += _rows("measure", "hit", "AUROC", "hit by chance")
        for row in each["rows"]:
            chance = f"{row['chance']:.3f}"
            lines.append(_row(row["measure"], _with(row["hit"]), _with(row["auroc"]), chance))
    lines += _pictures(result, file)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(table: Json, *, whole: bool) -> list[str]:
    rows = by_auroc(table["rows"])
    shown, rest = (rows, []) if whole else in_view(rows)
    lines = ["", f"## {table['title']}", ""]
    lines += [f"{table['n']} answers, {table['wrong']} wrong. {table['note']}".strip(), ""]
    lines += _rows("detector", *_TITLES, "added passes")
    for row in shown:
        cost = "" if row["cost"] is None else f"{row['cost']:.2f}"
        first = _with(row["auroc"])
        others = [_plain(row[name]["value"]) for name in _COLUMNS[1:]]
        lines.append(_row(row["detector"], first, *others, cost))
    if rest:
        lines += ["", f"{len(rest)} more rows, all below the best 15, are in the result file."]
    return lines


def _paired(pairs: list[Json]) -> list[str]:
    lines = ["", "## Paired differences", "", *_rows("", "detector", "rival", "difference")]
    return lines + [
        _row(pair["title"], pair["detector"], pair["rival"], _with(pair["difference"]))
        for pair in pairs
    ]


def _matrix(table: Json) -> list[str]:
    """Which tokens carry the signal: AUROC of each measure by each statistic."""
    found = {row["detector"]: row["auroc"]["value"] for row in table["rows"]}
    lines = ["", "## Which tokens carry the signal", "", f"AUROC, {table['title']}.", ""]
    lines += _rows("", *STATISTICS)
    for measure in _MATRIX:
        values = [found.get(f"{measure} {statistic}") for statistic in STATISTICS]
        lines.append(_row(measure, *map(_plain, values)))
    return lines


def _drafts(others: list[Json]) -> list[str]:
    if not others:
        return []
    lines = ["", "## Other drafts, on the same answers", ""]
    lines += ["AUROC on the test half; *best on dev* is each one's own choice.", ""]
    lines += _rows("drafts", "K", "added passes", "statistic", "AUROC", "best on dev", "AUROC")
    for one in others:
        k, cost = one["drafts"], f"{one['added_passes']:.2f}"
        first, own = _with(one["auroc"]), _with(one["own_auroc"])
        lines.append(_row(one["name"], k, cost, one["statistic"], first, one["own"], own))
    return lines


def _pictures(result: Json, file: Path) -> list[str]:
    table = result["tables"][0]
    figures = {"cost": _figures.costs(best_at_each_cost(table["rows"]))}
    says = {"cost": "The best detector of each family at each cost, in added forward passes"}
    if result["calibration"]:
        figures["reliability"] = _figures.reliability(result["calibration"]["reliability"])
        says["reliability"] = "Share of wrong answers against the calibrated probability"
    key = ", ".join(f"{family.sign} {name}" for name, family in FAMILIES.items())
    lines = ["", "## Figures", "", f"{table['title']}. {key}."]
    for name, figure in figures.items():
        picture = file.with_name(f"{file.stem}_{name}.png")
        figure.savefig(picture, dpi=150, facecolor="white")
        lines += ["", f"{says[name]}:", "", f"![{says[name]}]({picture.name})"]
    return lines


def _asked(asking: Json) -> str:
    parts = [f"{asking['samples']} samples"] if asking["samples"] else []
    parts += ["P(True)"] if asking["p_true"] else []
    return f"(+ {', '.join(parts)})" if parts else ""


def _rows(*titles: str) -> list[str]:
    return [_row(*titles), _row(*["---"] * len(titles))]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _with(estimate: Json) -> str:
    """value (low–high)."""
    value, low, high = (_plain(estimate[name]) for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
