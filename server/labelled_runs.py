"""Runs of `demur eval` as a calibration needs them: measures of answers, and which are wrong.

A run is a folder with `run.json` and `answers.jsonl`. It is read as it is written, by the form of
its lines: the harness is the SDK's, and the server imports nothing of the SDK's insides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from drafts.calibration_parts import FittedTask, Name
from drafts.errors import CalibrationError
from drafts.features import Claim, claim_of
from drafts.labelled import LabelledText
from drafts.scores import TokenScores

Half = Literal["dev", "all"]

_Nats = Annotated[float, Field(allow_inf_nan=False)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Run(_Read):
    model: Name
    mode: Name


class _Columns(_Read):
    """Measures of T tokens, a list for each, in nats."""

    text: list[str]
    logprob: list[_Nats]
    entropy: list[_Nats]
    total: list[_Nats]
    jsd: list[_Nats]
    kl: list[_Nats]

    @model_validator(mode="after")
    def _of_one_length(self) -> _Columns:
        if len({len(values) for _, values in self}) > 1:
            raise ValueError("the lists of tokens differ in length")
        return self

    def scores(self, weights_version: str) -> TokenScores:
        columns = {
            name: np.array(values, dtype=np.float64) for name, values in self if name != "text"
        }
        # A run does not keep ranks, and no feature is made of them.
        return TokenScores(
            **columns, rank=np.ones(len(self.logprob), np.int64), weights_version=weights_version
        )


class _Line(_Read):
    id: str
    prompt: str
    task: Name
    group: str
    half: Literal["dev", "test"]
    correct: bool
    weights_version: Name | None = None
    tokens: _Columns | None = None


@dataclass(frozen=True)
class Unseen:
    """An answer of a run that is not fitted."""

    run: Path
    id: str
    scores: TokenScores
    claim: Claim


@dataclass
class Labelled:
    """Answers of runs that one ensemble has measured; entry i of each list is of answer i."""

    model: str
    weights_version: str
    scores: list[TokenScores] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    wrong: list[bool] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    tasks: list[tuple[str, str]] = field(default_factory=list)  # with the mode of the run
    texts: list[LabelledText] = field(default_factory=list)
    n_without: int = 0  # lines without an answer's tokens
    unseen: list[Unseen] = field(default_factory=list)  # answers of the other half

    def by_task(self) -> list[FittedTask]:
        """What each task gave, by name."""
        counted: dict[tuple[str, str], list[bool]] = {}
        for task, wrong in zip(self.tasks, self.wrong, strict=True):
            counted.setdefault(task, []).append(wrong)
        return [
            FittedTask(task=task, mode=mode, n=len(wrong), wrong=sum(wrong) / len(wrong))
            for (task, mode), wrong in sorted(counted.items())
        ]


def read_runs(folders: Sequence[Path], half: Half) -> Labelled:
    """The answers of one half of the data, or of all of it.

    Raises:
        CalibrationError: if a folder is no run or is damaged, or answers were measured by several
            models or weights.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise CalibrationError("a run is named twice; its answers would count twice")
    found: Labelled | None = None
    n_without = 0
    for folder in folders:
        run = _run(folder)
        for number, line in _lines(folder / "answers.jsonl"):
            if line.tokens is None or not line.tokens.logprob or line.weights_version is None:
                n_without += 1
                continue
            if found is None:
                found = Labelled(run.model, line.weights_version)
            if (run.model, line.weights_version) != (found.model, found.weights_version):
                raise CalibrationError(
                    f"{folder}, line {number} was measured with {run.model}, weights "
                    f"{line.weights_version}, and what came before with {found.model}, weights "
                    f"{found.weights_version}; a calibration is of one: give runs of one"
                )
            scores = line.tokens.scores(line.weights_version)
            claim = claim_of(line.tokens.text, line.prompt)
            if half == "dev" and line.half != "dev":
                found.unseen.append(Unseen(folder, line.id, scores, claim))
                continue
            found.scores.append(scores)
            found.claims.append(claim)
            found.wrong.append(not line.correct)
            found.groups.append(line.group)
            found.tasks.append((line.task, run.mode))
            found.texts.append(
                LabelledText(
                    prompt=line.prompt,
                    response="".join(line.tokens.text),
                    wrong=not line.correct,
                    group=line.group,
                    task=line.task,
                    mode=run.mode,
                )
            )
    if found is None:
        raise CalibrationError(f"{', '.join(map(str, folders))}: no answers; let demur eval finish")
    if not found.scores:
        raise CalibrationError(
            f"none of {len(found.unseen)} answers is of the dev half; --half all takes "
            "the others, too"
        )
    found.n_without = n_without
    return found


def _run(folder: Path) -> _Run:
    file = folder / "run.json"
    try:
        return _Run.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CalibrationError(
            f"{folder} is no run: it has no {file.name}. `demur eval` makes one"
        ) from None
    except ValidationError as error:
        raise CalibrationError(f"{file}: {_first(error)}") from error


def _lines(file: Path) -> Iterable[tuple[int, _Line]]:
    try:
        with file.open("rb") as lines:
            yield from _parsed(file, lines)
    except FileNotFoundError:
        raise CalibrationError(f"{file} is missing; let demur eval finish") from None


def _parsed(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, _Line]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield number, _Line.model_validate_json(line)
        except ValidationError as error:
            raise CalibrationError(
                f"{file}, line {number}: {_first(error)}. If the run still goes on, wait for it"
            ) from error


def _first(error: ValidationError) -> str:
    """The first of pydantic's findings as a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the document"
    return f"{where}: {str(first['msg']).removeprefix('Value error, ')}"
