"""From runs to what a report says of them: accuracy, tables, paired differences, goals.

Every table holds all detectors that all of its answers have, whether they win or lose. Pairs
"within" share a question where there are several answers to one, else a task.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demur.evals.bootstrap import Estimate, difference
from demur.evals.detectors import Answer, Detector, Floats, all_detectors
from demur.evals.metrics import Judge
from demur.evals.records import Record, Run, RunError

RIVALS = "rivals.jsonl"
_NO_RIVALS: dict[str, Any] = {"columns": {}, "text": []}
CALIBRATED = "calibrated.jsonl"
METRICS = ("auroc", "auroc_within", "auroc_length_matched", "auprc", "acc_star", "prr", "aurac")

_HARD, _EASY = 0.1, 0.9  # beyond these accuracies few wrong or right answers are left
_FEW = 20  # of right or wrong ones: an AUROC's interval is then about 0.25 wide

Json = dict[str, Any]


@dataclass(frozen=True)
class LoadedRun:
    """A run: its settings, the answers that have tokens, and how many questions have none.

    `calibration` is the id of what made its `hallucination_score`.
    """

    folder: Path
    settings: Json
    answers: list[Answer]
    refused: int
    calibration: str | None = None


class Table:
    """Some answers, each detector's doubt of them, and the judge of both.

    Attributes:
        doubts: by detector, [N]; only detectors that all these answers have.
        note: which detectors are left out, since only some of them have those.
    """

    def __init__(
        self,
        title: str,
        answers: Sequence[Answer],
        *,
        half: str,
        n_boot: int = 1000,
    ) -> None:
        self.title, self.half = title, half
        self.answers = list(answers)
        self.detectors: dict[str, Detector] = {}
        self.doubts: dict[str, Floats] = {}
        lacking: Counter[tuple[str, int]] = Counter()
        for detector in all_detectors():
            values = np.array([detector.doubt(answer) for answer in answers])
            n_lacking = int((~np.isfinite(values)).sum())
            if not n_lacking:
                self.detectors[detector.name] = detector
                self.doubts[detector.name] = values
            elif n_lacking < len(answers):
                lacking[detector.family, n_lacking] += 1
        self.note = " ".join(
            f"Left out: {count} of {family}, which {n} of these answers lack."
            for (family, n), count in lacking.items()
        )
        self.wrong = np.array([not answer.record.correct for answer in answers])
        several = len({answer.record.group for answer in answers}) < len(
            {answer.record.id for answer in answers}
        ) and all(answer.record.source is not None for answer in answers)
        self.judge = Judge(
            self.wrong,
            groups=[answer.record.group for answer in answers],
            strata=[answer.record.group if several else answer.record.task for answer in answers],
            lengths=[answer.n_tokens for answer in answers],
            n_boot=n_boot,
        )

    @property
    def can_be_judged(self) -> bool:
        """Are there right and wrong answers at all?"""
        return bool(self.wrong.any() and not self.wrong.all())

    @property
    def has_enough(self) -> bool:
        """Are there so many of both that one detector can be preferred to another?"""
        return few(len(self.wrong), int(self.wrong.sum())) is None

    def metric(self, name: str, detector: str) -> Estimate:
        """One of `METRICS` of a detector."""
        found: Estimate = getattr(self.judge, name)(self.doubts[detector])
        return found

    def difference(self, metric: str, detector: str, rival: str) -> Estimate:
        """How much better a detector is than a rival, over the same resamples."""
        return difference(self.metric(metric, detector), self.metric(metric, rival))

    def rows(self, ensemble_cost: float | None) -> list[Json]:
        """The table's rows, as a report has them."""
        return [
            {
                "detector": name,
                "family": detector.family,
                "cost": _cost(detector, ensemble_cost, self.answers[0].record),
                **{metric: as_json(self.metric(metric, name)) for metric in METRICS},
            }
            for name, detector in self.detectors.items()
        ]

    def best(self, metric: str, names: Iterable[str]) -> str:
        """The detector, of those named, with the greatest value."""
        return max(names, key=lambda name: self.metric(metric, name).value)


def load_run(folder: Path) -> LoadedRun:
    """Read a run, with what `demur rivals` and `demur calibrate` have put beside its answers.

    Raises:
        RunError: if a file is damaged.
    """
    run = Run(folder)
    settings = run.settings()
    if settings is None:
        raise RunError(f"{folder} holds no run; `demur eval` makes one")
    rivals = _beside(folder / RIVALS)
    calibrated = _beside(folder / CALIBRATED)
    answers, refused = [], 0
    for record in run.records():
        if record.tokens is None or not record.tokens.text:
            refused += 1
            continue
        if calibrated:  # and then none from elsewhere, lest two calibrations be mixed
            score = calibrated.get(record.id, {}).get("hallucination_score")
            record = record.model_copy(update={"hallucination_score": score})
        beside = rivals.get(record.id, _NO_RIVALS)
        if "".join(beside["text"]) != record.response:
            beside = _NO_RIVALS  # of an earlier answer to the question
        columns = {name: np.array(values) for name, values in beside["columns"].items()}
        answers.append(Answer(record, columns, beside["text"]))
    first = next(iter(calibrated.values()), settings)
    return LoadedRun(folder, settings, answers, refused, first.get("calibration"))


def _beside(file: Path) -> dict[str, Json]:
    """A file of lines with an id each, by id; a torn last line is left out."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return {found["id"]: found for found in map(json.loads, lines)}
    except (ValueError, KeyError) as error:
        raise RunError(f"{file} is damaged ({error}); delete it and make it again") from error


def tasks(runs: Sequence[LoadedRun]) -> list[Json]:
    """How often the target is right on each task, and whether a detector can be judged there."""
    found = []
    for run in runs:
        by_task: dict[str, list[Answer]] = defaultdict(list)
        for answer in run.answers:
            by_task[answer.record.task].append(answer)
        for task, answers in by_task.items():
            right = np.array([answer.record.correct for answer in answers])
            strict = [answer.record.strict for answer in answers]
            found.append(
                {
                    "task": task,
                    "mode": run.settings.get("mode", "generate"),
                    "n": len(answers),
                    "wrong": int((~right).sum()),
                    "accuracy": _accuracy(right),
                    "verdict": verdict(right),
                    "mean_tokens": float(np.mean([answer.n_tokens for answer in answers])),
                    "strict": None if None in strict else float(np.mean([*map(bool, strict)])),
                    "flexible": float(np.mean([answer.record.flexible for answer in answers])),
                    "label_disagreements": sum(map(_disagrees, answers)),
                }
            )
    return found


def verdict(right: Iterable[bool]) -> str:
    """Can a detector be judged by answers of which these are right?"""
    labels = list(right)
    accuracy = sum(labels) / len(labels)
    if accuracy < _HARD:
        return "too hard"
    if accuracy > _EASY:
        return "too easy"
    return "can be judged" if few(len(labels), sum(labels)) is None else "too few"


def few(n: int, wrong: int) -> str | None:
    """Of which kind, right or wrong, there are too few for an AUROC's interval to mean much."""
    if min(wrong, n - wrong) >= _FEW:
        return None
    return "wrong" if wrong < n - wrong else "right"


def disagreements(runs: Sequence[LoadedRun], limit: int = 50) -> list[Json]:
    """Answers that the strict filter, the flexible one and the given label do not agree on."""
    found = []
    for run in runs:
        for answer in run.answers:
            record = answer.record
            if _disagrees(answer) or record.strict not in (None, record.flexible):
                found.append(
                    {
                        "id": record.id,
                        "prompt": record.prompt,
                        "response": record.response,
                        "accepted": record.accepted,
                        "strict": record.strict,
                        "flexible": record.flexible,
                        "label": record.correct,
                    }
                )
    step = max(1, len(found) // limit)
    return found[::step][:limit]


def as_json(estimate: Estimate) -> Json:
    """An estimate with its 95% interval; what is not defined is null."""
    low, high = estimate.interval()
    return {
        name: None if math.isnan(value) else round(float(value), 4)
        for name, value in (("value", estimate.value), ("low", low), ("high", high))
    }


def _accuracy(right: Floats) -> Json:
    """A share with its Wilson interval."""
    n, share, z = len(right), float(np.mean(right)), 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    values = {"value": share, "low": centre - half, "high": centre + half}
    return {name: round(value, 4) for name, value in values.items()}


def _disagrees(answer: Answer) -> bool:
    return answer.record.flexible != answer.record.correct


def _cost(detector: Detector, ensemble_cost: float | None, record: Record) -> float | None:
    if detector.cost is not None:
        return detector.cost
    if detector.family == "samples":
        return float(len(record.samples or ()))
    return ensemble_cost
