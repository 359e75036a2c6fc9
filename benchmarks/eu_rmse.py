"""How well do estimators estimate epistemic uncertainty? Against EU* of many posterior draws.

    python benchmarks/eu_texts.py --data ../shared/data
    python benchmarks/eu_rmse.py

Every estimator is compared with EU* on the same tokens of texts that no draft was trained on: root
mean squared error, the same after the best single scale (fitted on the other half of the texts),
bias, Pearson and Spearman correlation, with bootstrap intervals over texts. Trivial estimators
stand in the table too: a constant, the target's entropy.

Which texts and ensembles are compared is said by benchmarks/eu_rmse.yaml; `demur distill` trains
them, from the configurations in benchmarks/drafts/. EU* and every estimator's values are kept
beside the default ensemble, so that a run that was cut short goes on.

Writes benchmarks/results/eu_rmse.json, and its tables and plots into docs/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import eu_estimators
import eu_served
import yaml
from eu_compare import Estimate, Floats, rmse_ratio, row, scaled
from eu_kept import kept
from eu_plots import plot_cost, plot_scatter, plot_training
from eu_reference import described, load, machine, reference_of
from eu_table import line, write_tables

from drafts.init import default_folder
from drafts.manifest import load_ensemble
from osd.corpus import Corpus, Text
from osd.log import read_measured
from osd.teacher import Teacher

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/eu_rmse.json"
PLAN = ROOT / "benchmarks/eu_rmse.yaml"
SAMPLES = (2, 5, 10)
ESTIMATES = 1  # to be raised when the same drafts give other numbers: kept ones are not used then


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=64, help="M of the reference")
    parser.add_argument("--limit", type=int, help="texts of each corpus, if not as planned")
    parser.add_argument("--plan", type=Path, default=PLAN, help="which texts and ensembles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    whole = parser.parse_args([])
    if arguments.out == RESULT and arguments != whole:
        parser.error("give --out too: docs/ and benchmarks/results/ hold the whole comparison")
    pages = ROOT / "docs" if arguments.out == RESULT else arguments.out.parent
    pages.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    plan = yaml.safe_load(arguments.plan.read_text())
    if absent := missing(plan):
        parser.error(f"not there: {', '.join(absent)}; docs/benchmarks.md has the commands")
    runs = {name: read_measured(Path(run).expanduser()) for name, run in plan["training"].items()}
    if partial_logs := [name for name, measured in runs.items() if measured[0][0] != 0]:
        parser.error(f"no measurement of the first step: {', '.join(partial_logs)}")
    teacher, root = load()
    tables, goals = {}, []
    for name, planned in plan["texts"].items():
        limit = arguments.limit or planned
        reference, texts, label = reference_of(
            teacher, root, name, arguments.draws, limit, arguments.seed
        )
        truth = [eu.whole for eu in reference]
        values = root / "eu_estimates" / f"{label}-v{ESTIMATES}"
        estimates = estimated(teacher, texts, plan, arguments.seed, values)
        trivial = [eu_estimators.constant(truth), eu_estimators.perfect(reference)]
        estimates = [*trivial, *estimates]
        rows = [row(estimate, truth) for estimate in estimates]
        about = described(reference, arguments.draws) | {"corpus": Corpus(root / name).about}
        tables[name] = {"reference": about, "rows": rows}
        for found in rows:
            print(line(found), flush=True)
        if name == "gsm8k-test":
            goals = checked(plan["goals"], estimates, rows, truth)
            plot_scatter(plan["scatter"], estimates, truth, pages / "eu_scatter.png")
            plot_cost(rows, pages / "eu_cost.png")
    plot_training(runs, pages / "eu_training.png")
    result = {
        "benchmark": "eu_rmse",
        "command": "python benchmarks/eu_rmse.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **machine(),
        "posterior": teacher.posterior.config.model_dump(),
        "goals": goals,
        "tables": tables,
        "training": {
            name: {"before": measured[0][1]._asdict(), "after": measured[-1][1]._asdict()}
            for name, measured in runs.items()
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    write_tables(result, pages / "eu_rmse.md")


def estimated(
    teacher: Teacher, texts: list[Text], plan: dict[str, Any], seed: int, folder: Path
) -> list[Estimate]:
    """All estimators on one set of texts."""
    found = kept(folder / "entropy", lambda: eu_estimators.entropy(teacher, texts))
    rivals = (("tokur", eu_estimators.tokur), ("posterior", eu_estimators.posterior_samples))
    for name, rival in rivals:
        file = folder / "-".join([name, *map(str, SAMPLES)])
        found += kept(file, partial(rival, teacher, texts, SAMPLES, seed))
    for entry in plan["ensembles"]:
        whole = load_ensemble(Path(entry["folder"]).expanduser())
        for count in entry.get("counts", [len(whole.members)]):
            ensemble = eu_estimators.first_drafts(whole, count)
            file = folder / f"{whole.manifest.weights_version}-{count}"
            values = kept(file, partial(eu_estimators.of_ensemble, teacher, ensemble, texts))
            found += eu_estimators.named(entry["name"], ensemble, values)
    default = load_ensemble(default_folder())
    values = kept(
        folder / f"served-{default.manifest.weights_version}",
        lambda: eu_served.served(default_folder(), texts),
    )
    found += eu_estimators.named("the default as served", default, values)
    for name, paths in plan["probes"].items():
        files = [Path(path).expanduser() for path in paths]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
        make = partial(eu_estimators.probe, name, teacher, texts, files)
        found += kept(folder / f"probe-{digest}", make)
    return found


def missing(plan: dict[str, Any]) -> list[str]:
    """What the plan names and is not there: known before the hours, not after."""
    paths = [entry["folder"] for entry in plan["ensembles"]] + list(plan["training"].values())
    paths += [path for files in plan["probes"].values() for path in files]
    return [path for path in paths if not Path(path).expanduser().exists()]


def checked(
    goals: list[dict[str, Any]],
    estimates: list[Estimate],
    rows: list[dict[str, Any]],
    truth: list[Floats],
) -> list[dict[str, Any]]:
    """Goals of the plan with what was measured: a row's number, or the ratio of two rows' RMSE."""
    by_name = {estimate.name: estimate for estimate in estimates}
    row_of = {values["name"]: values for values in rows}
    found = []
    for goal in goals:
        if "over" in goal:
            rival = by_name[goal["over"]]
            if goal.get("scaled"):
                rival = scaled(rival, truth)
            value = rmse_ratio(by_name[goal["row"]], rival, truth)
        else:
            number = row_of[goal["row"]][goal["number"]]
            value = number if isinstance(number, list) else [number]
        if "at_least" in goal:
            bound, holds = goal["at_least"], value[0] >= goal["at_least"]
        else:
            bound, holds = goal["at_most"], value[0] <= goal["at_most"]
        found.append({"name": goal["name"], "value": value, "bound": bound, "holds": holds})
    return found


if __name__ == "__main__":
    main()
