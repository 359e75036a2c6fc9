"""What a report shows of some runs, as one JSON object.

One statistic is chosen on the dev half for all sets together, and the test half is what is
reported.
"""

from __future__ import annotations

import platform
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from demur.evals import localise
from demur.evals.analysis import (
    Json,
    LoadedRun,
    Table,
    as_json,
    disagreements,
    tasks,
)
from demur.evals.calibration_metrics import reliability
from demur.evals.detectors import Answer
from demur.evals.metrics import Judge

# What a detector is held against, if no better rival is known: free for every service.
RIVALS = ("surprisal mean", "entropy mean", "length")
CALIBRATED = "hallucination_score"
_EXAMPLES = 10
_CURVE_POINTS = 200


def find(
    runs: Sequence[LoadedRun],
    *,
    commands: Sequence[str],
    n_boot: int = 1000,
    on_step: Callable[[str], None] = lambda title: None,
) -> Json:
    """Everything that `report.write_report` shows.

    Args:
        n_boot: resamples of each interval.
        on_step: called with the title of each table before it is made.
    """
    tables = []
    for table in _tables(runs, n_boot):
        on_step(table.title)
        if table.can_be_judged:
            tables.append(_as_json(table, added_passes(runs)))
    answers = [answer for run in runs for answer in run.answers]
    chosen = choose(answers, n_boot=2)
    return {
        "format": 1,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "demur": metadata.version("demur"),
        "commit": _commit(),
        "commands": list(commands),
        "environment": {"python": platform.python_version(), "platform": platform.platform()},
        "runs": [_run(run) for run in runs],
        "tasks": tasks(runs),
        "disagreements": disagreements(runs),
        "tables": tables,
        "chosen": chosen and {"statistic": chosen, "how": "greatest AUROC on the dev half"},
        **_of_test_half(runs, chosen, n_boot, on_step),
        "localisation": localisation(runs, n_boot),
        "goals": [],
    }


def _of_test_half(
    runs: Sequence[LoadedRun],
    chosen: str | None,
    n_boot: int,
    on_step: Callable[[str], None],
) -> Json:
    """What a report shows of all sets' test half together: nothing if there is none."""
    nothing: list[Json] = []
    found: Json = {"paired": nothing, "calibration": None, "curves": nothing}
    found["examples"] = {"doubted_right": nothing, "undoubted_wrong": nothing}
    answers = _half([answer for run in runs for answer in run.answers], "test")
    if not answers:
        return found
    test = Table(_title(runs, "test"), answers, half="test", n_boot=n_boot)
    on_step(test.title)
    found["calibration"] = _calibration(test, runs)
    if chosen is not None and test.can_be_judged:
        found["paired"] = _paired(test, chosen)
        found["curves"] = [_curves(test, chosen)]
        found["examples"] = _examples(test, chosen)
    return found


def added_passes(runs: Sequence[LoadedRun]) -> float | None:
    """What the drafts cost, in forward passes of the target; None if the runs differ in it."""
    costs = {run.settings.get("added_passes") for run in runs}
    return costs.pop() if len(costs) == 1 else None


def choose(answers: Sequence[Answer], *, family: str = "demur", n_boot: int = 2) -> str | None:
    """The statistic of a family that does best on the dev half; None if that is too small."""
    dev = _half(answers, "dev")
    if not dev:
        return None
    table = Table("dev", dev, half="dev", n_boot=n_boot)
    names = [name for name, detector in table.detectors.items() if detector.family == family]
    if not names or not table.has_enough:
        return None
    return table.best("auroc", names)


def localisation(runs: Sequence[LoadedRun], n_boot: int) -> list[Json]:
    """Whether a measure is greatest at the first wrong number of labelled wrong solutions."""
    found = []
    for run in runs:
        for slips in (True, False):
            rows, n = _localised(run, slips, n_boot)
            if n:
                kind = "slips of arithmetic" if slips else "results that the reference has not"
                found.append(
                    {
                        "title": f"{run.settings['set']}: {kind}",
                        "n": n,
                        "note": "hit: the first wrong number has the greatest mean over its tokens "
                        "of all results in the solution; AUROC: of it against the others",
                        "rows": rows,
                    }
                )
    return found


def _localised(run: LoadedRun, slips: bool, n_boot: int) -> tuple[list[Json], int]:
    seen: dict[str, list[tuple[bool, float, int]]] = defaultdict(list)
    groups: list[str] = []
    for answer in run.answers:
        record = answer.record
        if record.annotated is None or record.gold is None or record.correct:
            continue
        wrong = localise.first_wrong(record.annotated, record.gold)
        if wrong is None or wrong[1] != slips:
            continue
        peaks = {
            measure: localise.peak(column[0], list(column[1]), record.annotated, wrong[0])
            for measure in _LOCALISED
            if (column := answer.column(measure)) is not None
        }
        if any(peak is None for peak in peaks.values()):
            continue
        groups.append(record.group)
        for measure, peak in peaks.items():
            assert peak is not None
            seen[measure].append(peak)
    if not groups:
        return [], 0
    judge = Judge(np.zeros(len(groups)), groups, groups, np.ones(len(groups)), n_boot)
    rows = [
        {
            "measure": measure,
            "hit": as_json(judge.mean([peak[0] for peak in peaks])),
            "auroc": as_json(judge.mean([peak[1] for peak in peaks])),
            "chance": float(np.mean([1 / peak[2] for peak in peaks])),
        }
        for measure, peaks in seen.items()
    ]
    return rows, len(groups)


_LOCALISED = ("total", "epistemic", "jsd", "kl", "aleatoric", "surprisal", "entropy")


def _tables(runs: Sequence[LoadedRun], n_boot: int) -> list[Table]:
    found = []
    answers = [answer for run in runs for answer in run.answers]
    if len(runs) > 1:
        for half in ("test", "dev"):
            if part := _half(answers, half):
                found.append(Table(_title(runs, half), part, half=half, n_boot=n_boot))
    for run in runs:
        name = f"{run.settings['set']}, {run.settings['mode']}"
        parts: dict[str, list[Answer]] = {f"{name}: all": run.answers}
        for half in ("test", "dev"):
            parts[f"{name}: {half} half"] = _half(run.answers, half)
        by: dict[str, list[Answer]] = defaultdict(list)
        for answer in run.answers:
            by[answer.record.source or answer.record.task].append(answer)
        if len(by) > 1:
            parts |= by
        measured = [answer for answer in run.answers if "tokur_eu_2" in answer.rivals]
        if 0 < len(measured) < len(run.answers):
            parts[f"{name}: those with TokUR"] = measured
        for title, part in parts.items():
            if part:
                half = next((half for half in ("test", "dev") if f"{half} half" in title), "all")
                found.append(Table(title, part, half=half, n_boot=n_boot))
    return found


def _title(runs: Sequence[LoadedRun], half: str) -> str:
    return f"{' + '.join(run.settings['set'] for run in runs)}: {half} half"


def _half(answers: Sequence[Answer], half: str) -> list[Answer]:
    return [answer for answer in answers if answer.record.half == half]


def _as_json(table: Table, ensemble_cost: float | None) -> Json:
    return {
        "title": table.title,
        "note": table.note,
        "n": len(table.answers),
        "wrong": int(table.wrong.sum()),
        "half": table.half,
        "rows": table.rows(ensemble_cost),
    }


def _paired(table: Table, chosen: str) -> list[Json]:
    """The chosen statistic, and the calibrated score, against rivals."""
    found = []
    for metric, words in (("auroc", "all pairs"), ("auroc_within", "pairs within a task")):
        for detector in (chosen, CALIBRATED):
            for rival in dict.fromkeys((*RIVALS, *_bests(table))):
                own = table.detectors.get(rival)
                if own is None or detector not in table.doubts or detector == rival:
                    continue
                if own.family == "demur" and detector == chosen:
                    continue  # chosen from its own family: no rival
                found.append(
                    {
                        "title": f"{table.title}, {words}",
                        "detector": detector,
                        "rival": rival,
                        "difference": as_json(table.difference(metric, detector, rival)),
                    }
                )
    return found


def _bests(table: Table) -> list[str]:
    """The best of each family that costs something, by the table itself: the strictest rivals."""
    found = []
    for family in ("demur", "target", "rival", "tokur", "samples"):
        names = [name for name, one in table.detectors.items() if one.family == family]
        if names:
            found.append(table.best("auroc", names))
    return [name for name in found if name not in RIVALS]


def _calibration(table: Table, runs: Sequence[LoadedRun]) -> Json | None:
    probability = table.doubts.get(CALIBRATED)
    if probability is None:
        return None
    bins = reliability(probability, table.wrong)
    return {
        "title": table.title,
        "ids": sorted({run.calibration for run in runs if run.calibration is not None}),
        "ece": as_json(table.judge.ece(probability)),
        "brier": as_json(table.judge.brier(probability)),
        "auroc": as_json(table.judge.auroc(probability)),
        "reliability": [
            {"probability": float(p), "wrong": float(w), "count": int(n)}
            for p, w, n in zip(bins.probability, bins.wrong, bins.count, strict=True)
        ],
    }


def _curves(table: Table, chosen: str) -> Json:
    names = [chosen, CALIBRATED, *RIVALS, *_bests(table), "random"]
    detectors = []
    for name in dict.fromkeys(names):
        if name in table.doubts:
            doubt = table.doubts[name]
            (fpr, tpr), (coverage, risk) = table.judge.roc(doubt), table.judge.risk_coverage(doubt)
            detectors.append(
                {
                    "detector": name,
                    "family": table.detectors[name].family,
                    "roc": {"fpr": _thin(fpr), "tpr": _thin(tpr)},
                    "risk_coverage": {"coverage": _thin(coverage), "risk": _thin(risk)},
                }
            )
    return {"title": table.title, "n": len(table.answers), "detectors": detectors}


def _thin(values: Any) -> list[float]:
    """At most so many points of a curve, its ends included."""
    places = np.linspace(0, len(values) - 1, min(len(values), _CURVE_POINTS)).round().astype(int)
    return [round(float(values[i]), 4) for i in places]


def _examples(table: Table, chosen: str) -> dict[str, list[Json]]:
    score = CALIBRATED if CALIBRATED in table.doubts else chosen
    doubts = table.doubts[score]
    order = np.argsort(doubts, kind="stable")
    most = [i for i in order[::-1] if not table.wrong[i]][:_EXAMPLES]
    least = [i for i in order if table.wrong[i]][:_EXAMPLES]
    measure = chosen.split(" ")[0]

    def one(i: int) -> Json:
        record = table.answers[i].record
        assert record.tokens is not None
        return {
            "id": record.id,
            "task": record.task,
            "prompt": record.prompt,
            "accepted": record.accepted,
            "extracted": record.extracted,
            "score": float(doubts[i]),
            "measure": measure,
            "tokens": record.tokens.model_dump(exclude={"top_logprob_mean"}),
        }

    return {"doubted_right": [one(i) for i in most], "undoubted_wrong": [one(i) for i in least]}


def _run(run: LoadedRun) -> Json:
    keys = ("set", "mode", "model", "weights_version", "drafts", "asking")
    return {
        "folder": run.folder.name,
        **{key: run.settings[key] for key in keys},
        "questions": len(run.answers) + run.refused,
        "refused": run.refused,
        "seconds": sum(session["seconds"] for session in run.settings["sessions"]),
        "tokens": sum(answer.n_tokens for answer in run.answers),
    }


def _commit() -> str | None:
    """Of the repository that this file is in; None if it is installed without one."""
    here = Path(__file__)
    try:
        for command in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty"],
        ):
            found = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
