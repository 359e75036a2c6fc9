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
    ensemble_cost: float | None = None,
    n_boot: int = 1000,
    on_step: Callable[[str], None] = lambda title: None,
) -> Json:
    """Everything that `report.write_report` shows.

    Args:
        ensemble_cost: forward passes of the target that the drafts add.
        n_boot: resamples of each interval.
        on_step: called with the title of each table before it is made.
    """
    tables = []
    for table in _tables(runs, n_boot):
        on_step(table.title)
        if table.can_be_judged:
            tables.append(_as_json(table, ensemble_cost))
    answers = [answer for run in runs for answer in run.answers]
    test = Table(_title(runs, "test"), _half(answers, "test"), half="test", n_boot=n_boot)
    on_step(test.title)
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
        "paired": _paired(test, chosen) if chosen and test.can_be_judged else [],
        "chosen": chosen and {"statistic": chosen, "how": "greatest AUROC on the dev half"},
        "calibration": _calibration(test),
        "curves": [_curves(test, chosen)] if chosen and test.can_be_judged else [],
        "localisation": localisation(runs, n_boot),
        "goals": [],
        "examples": _examples(test, chosen) if chosen else {k: [] for k in _NO_EXAMPLES},
    }


_NO_EXAMPLES = ("doubted_right", "undoubted_wrong")


def choose(answers: Sequence[Answer], *, family: str = "demur", n_boot: int = 2) -> str | None:
    """The statistic of a family that does best on the dev half."""
    dev = _half(answers, "dev")
    if not dev:
        return None
    table = Table("dev", dev, half="dev", n_boot=n_boot)
    names = [name for name, detector in table.detectors.items() if detector.family == family]
    if not names or not table.can_be_judged:
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
            found.append(Table(_title(runs, half), _half(answers, half), half=half, n_boot=n_boot))
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
        "note": "",
        "n": len(table.answers),
        "wrong": int(table.wrong.sum()),
        "half": table.half,
        "rows": table.rows(ensemble_cost),
    }


def _paired(table: Table, chosen: str) -> list[Json]:
    """The chosen statistic, and the calibrated score, against rivals."""
    found = []
    for detector in (chosen, CALIBRATED):
        for rival in (*RIVALS, *(_bests(table) if detector == CALIBRATED else ())):
            if detector in table.doubts and rival in table.doubts and detector != rival:
                for metric in ("auroc", "auroc_within"):
                    found.append(
                        {
                            "title": f"{table.title}, {metric}",
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


def _calibration(table: Table) -> Json | None:
    probability = table.doubts.get(CALIBRATED)
    if probability is None:
        return None
    bins = reliability(probability, table.wrong)
    return {
        "title": table.title,
        "features": [],
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
    """Of the working folder's repository, where there is one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
