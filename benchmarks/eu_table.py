"""The tables of benchmarks/eu_rmse.py as a page of docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_HEAD = """# Estimators of epistemic uncertainty against EU*

Written by `python benchmarks/eu_rmse.py` from `benchmarks/results/eu_rmse.json`; what the columns
and rows mean is said in [benchmarks.md](benchmarks.md). All in nats, on response tokens; intervals
of 95% by bootstrap over texts. *Scaled*: after the best single factor, fitted on other texts.
*Cost*: operations beyond the target's own pass, in units of it, without LM heads + those of LM
heads. *Time*: measured, in the same units, on {cores} cores.
"""

_TIMED_TEXTS = 100


def write_tables(result: dict[str, Any], file: Path) -> None:
    """Write the page."""
    lines = [_HEAD.format(cores=result["machine"]["cores"])]
    lines += ["## Goals", "", "| goal | measured | bound | met |", "|---|---|---|---|"]
    for goal in result["goals"]:
        met = "yes" if goal["holds"] else "**no**"
        lines.append(f"| {goal['name']} | {interval(goal['value'])} | {goal['bound']} | {met} |")
    for name, table in result["tables"].items():
        about = table["reference"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{about['texts']} texts, {about['tokens']} tokens. EU* of M = {about['draws']} draws: "
            f"mean {about['mean']:.3f}, standard deviation {about['standard_deviation']:.3f}, "
            f"own noise {about['noise_rms']:.3f} (root mean square, from its halves). "
            f"KL(p_T ‖ p) {about['kl_posterior_mean_target']:.3f}.",
            "",
            "| estimator | RMSE | scaled | bias | Pearson | Spearman | cost | time |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in table["rows"]:
            numbers = [interval(row[key]) for key in ("rmse", "rmse_scaled")]
            numbers += [f"{row['bias'][0]:+.3f}"]
            numbers += [interval(row[key]) for key in ("pearson", "spearman")]
            cost = f"{row['flops']:.3f} + {row['head_flops']:.2f}"
            # Of few texts, too few were timed.
            timed = row["time"] is not None and about["texts"] >= _TIMED_TEXTS
            time = f"{row['time']:.2f}" if timed else ""
            cells = [row["name"], *numbers, cost, time]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Training", "", "![held-out KL and JSD](eu_training.png)", ""]
    lines += [
        "On held-out texts: KL(p_T ‖ q_k), mean over drafts, and the drafts' JSD.",
        "",
        "| run | KL before | KL after | JSD before | JSD after |",
        "|---|---|---|---|---|",
    ]
    for name, run in result["training"].items():
        values = [run[when][key] for key in ("kl_drafts", "jsd") for when in ("before", "after")]
        lines.append(f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} |")
    file.write_text("\n".join(lines) + "\n")


def interval(value: list[float]) -> str:
    """value (low–high)."""
    if len(value) == 1:
        return f"{value[0]:.3f}"
    return f"{value[0]:.3f} ({value[1]:.3f}–{value[2]:.3f})"


def line(values: dict[str, Any]) -> str:
    """A row of the table for the terminal."""
    names = ("rmse", "rmse_scaled", "bias", "pearson", "spearman")
    numbers = "  ".join(f"{name} {values[name][0]:+.4f}" for name in names)
    cost = f"{values['flops']:.3f} + {values['head_flops']:.3f}"
    return f"{values['name']:44} {numbers}  cost {cost}"
