"""Which shape of draft is worth its cost? One student of each shape, trained alike.

    python benchmarks/eu_frontier.py

Starts from benchmarks/drafts/residual.yaml and changes one thing at a time: layers tapped, rank,
factors, the number of texts; takes K = 1 to 8 drafts of one student; and from
benchmarks/drafts/exit.yaml, with 1 and 3 own layers. Measured against EU* on `gsm8k-dev`
(benchmarks/eu_texts.py), answers to training questions that no draft was trained on, so that
nothing is chosen by the texts that benchmarks/eu_rmse.py reports.

Writes benchmarks/results/eu_frontier.json and docs/eu_frontier.md. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import eu_estimators
from eu_compare import row
from eu_kept import kept
from eu_reference import described, load, machine, reference_of
from eu_rmse import ESTIMATES
from eu_table import interval, line

from drafts.manifest import Ensemble, load_ensemble
from drafts.shipped import TRAINING_NAME
from osd.config import DistillConfig, read_config
from osd.ensemble import training_config
from osd.trainer import train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "benchmarks/drafts"
RESULT = ROOT / "benchmarks/results/eu_frontier.json"
STEPS, TEXTS = 200, 40
BASE = "residual"
RESIDUAL: dict[str, dict[str, Any]] = {
    BASE: {},
    "no taps": {"taps": []},
    "one tap, layer 27": {"taps": [27]},
    "rank 64": {"rank": 64},
    "1 factor": {"factors": 1},
}
EXIT: dict[str, dict[str, Any]] = {
    f"exit, {own} own layers": {"own_layers": own, "layer": 30 - own} for own in (1, 3)
}
QUARTER = "a quarter of the texts"
DRAWS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each student")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.out == RESULT and arguments.steps != STEPS:
        parser.error("give --out too: docs/ and benchmarks/results/ hold the whole comparison")
    pages = ROOT / "docs" if arguments.out == RESULT else arguments.out.parent
    logging.getLogger("transformers").setLevel(logging.ERROR)
    teacher, root = load()
    reference, texts, label = reference_of(teacher, root, "gsm8k-dev", 64, TEXTS, 0)
    truth = [eu.whole for eu in reference]
    values = root / "eu_estimates" / f"{label}-v{ESTIMATES}"
    rows = [row(eu_estimators.constant(truth), truth)]
    shapes = RESIDUAL | {QUARTER: {}} | EXIT
    for name, changes in shapes.items():
        steps = arguments.steps // 4 if name == QUARTER else arguments.steps
        config = shaped(name, changes, steps)
        ensemble = trained(config)
        counts = (1,) if name in EXIT else DRAWS if name == BASE else (4,)
        for count in counts:
            chosen = eu_estimators.first_drafts(ensemble, count)
            file = values / f"{ensemble.manifest.weights_version}-{count}"
            found = kept(file, partial(eu_estimators.of_ensemble, teacher, chosen, texts))
            (whole, *_) = eu_estimators.named(name, chosen, found)
            rows.append(row(whole, truth))
            print(line(rows[-1]), flush=True)
    result = {
        "benchmark": "eu_frontier",
        "command": "python benchmarks/eu_frontier.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **machine(),
        "steps": arguments.steps,
        "reference": described(reference, 64),
        "goals": [],
        "rows": rows,
    }
    pages.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    write_table(result, pages / "eu_frontier.md")


def shaped(name: str, changes: dict[str, Any], steps: int) -> DistillConfig:
    """One student of a shape, on all texts."""
    base = read_config(CONFIGS / ("exit.yaml" if name in EXIT else "residual.yaml"))
    drafts = base.drafts.model_dump() | {"students": 1} | changes
    if name == BASE:
        drafts["draws"] = max(DRAWS)
    slug = name.replace(",", "").replace(" ", "-")
    values = base.model_dump() | {
        "name": f"frontier-{slug}",
        "run": base.run.parent / f"frontier-{slug}-{steps}",
        "drafts": drafts,
        "steps": steps,
        "evaluate_every": steps,
    }
    return DistillConfig.model_validate(values)


def trained(config: DistillConfig) -> Ensemble:
    """The drafts of a configuration; those of an earlier run of it are taken as they are."""
    folder = config.run / "ensemble"
    if (folder / TRAINING_NAME).exists():
        of = json.loads((folder / TRAINING_NAME).read_text())["config"]
        if of == training_config(config):
            return load_ensemble(folder)
    train(config)  # goes on, or says that the run is of another configuration
    return load_ensemble(folder)


def write_table(result: dict[str, Any], file: Path) -> None:
    """The rows as a page of docs/."""
    about = result["reference"]
    lines = [
        "# Shapes of drafts",
        "",
        "Written by `python benchmarks/eu_frontier.py` from `benchmarks/results/eu_frontier.json`. "
        f"One student of each shape, {result['steps']} steps (residual: of 4 texts, exit: of 3; "
        f"none is seen twice; *{QUARTER}*: a quarter of the steps), measured on "
        f"{about['tokens']} tokens of answers to training questions that no draft saw, against EU* "
        f"of M = {about['draws']} draws (mean {about['mean']:.3f}, own noise "
        f"{about['noise_rms']:.3f}). Columns as in [eu_rmse.md](eu_rmse.md).",
        "",
        "| shape | RMSE | bias | Spearman | cost |",
        "|---|---|---|---|---|",
    ]
    for values in result["rows"]:
        numbers = [interval(values["rmse"]), f"{values['bias'][0]:+.3f}"]
        numbers.append(interval(values["spearman"]))
        cost = f"{values['flops']:.3f} + {values['head_flops']:.2f}"
        lines.append(f"| {values['name']} | {' | '.join(numbers)} | {cost} |")
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
