"""Plots of benchmarks/eu_rmse.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from eu_compare import Estimate, Floats

from osd.evaluate import Agreement

mpl.use("Agg")
from matplotlib import pyplot


def plot_scatter(
    names: list[str], estimates: list[Estimate], truth: list[Floats], file: Path
) -> None:
    """Some estimators against EU*, a dot a token."""
    chosen = [estimate for name in names for estimate in estimates if estimate.name == name]
    y = np.concatenate(truth)
    limit = float(np.quantile(y, 0.995))
    figure, axes = pyplot.subplots(
        1, len(chosen), figsize=(3.4 * len(chosen), 3.6), layout="constrained", sharey=True
    )
    for axis, estimate in zip(np.atleast_1d(axes), chosen, strict=True):
        x = np.concatenate(estimate.values)
        axis.plot([0, limit], [0, limit], color="0.6", linewidth=0.8)
        axis.plot(y, x, ",", alpha=0.4, rasterized=True)
        axis.set(xlim=(0, limit), ylim=(0, limit), title=estimate.name, xlabel="EU*, nats")
    np.atleast_1d(axes)[0].set_ylabel("estimate, nats")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def plot_cost(rows: list[dict[str, Any]], file: Path) -> None:
    """RMSE of each estimator against what it costs beyond the target's own pass."""
    shown = [row for row in rows if not row["name"].endswith(("jsd only", "kl only"))]
    figure, axis = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    for number, values in enumerate(shown):
        value, low, high = values["rmse"]
        cost = values["flops"] + values["head_flops"]
        axis.errorbar(
            max(cost, 1e-3),
            value,
            yerr=[[value - low], [high - value]],
            # Ten colours, and a marker for each ten rows.
            fmt="os^Dv"[number // 10 % 5],
            color=f"C{number % 10}",
            markersize=5,
            label=values["name"].removesuffix(": jsd + kl"),
        )
    figure.legend(loc="outside right upper", fontsize=7)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations beyond the target's pass, in units of it (LM heads included)",
        ylabel="RMSE against EU*, nats",
    )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def plot_training(runs: dict[str, list[tuple[int, Agreement]]], file: Path) -> None:
    """Held-out KL to the posterior mean, and the drafts' JSD, as training goes on."""
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4), layout="constrained")
    shown = ("kl_drafts", "KL(p_T ‖ q_k), nats"), ("jsd", "JSD of the drafts, nats")
    for axis, (field, label) in zip(axes, shown, strict=True):
        for name, measured in runs.items():
            values = [getattr(agreement, field) for _, agreement in measured]
            shares = [step / measured[-1][0] for step, _ in measured]
            axis.plot(shares, np.maximum(values, 1e-5), "o-", markersize=3, label=name)
        axis.set(xlabel="share of the steps", ylabel=label, yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
