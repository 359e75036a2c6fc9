"""SVAMP (Patel et al. 2021, arXiv 2103.07191): one-step word problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demur.evals._files import fields_of, rows
from demur.evals.gsm8k import INSTRUCTION
from demur.evals.numbers import grade_number, parse_number
from demur.evals.sets import EvalSet, Question, SetError, half_of

HUB_ID = "ChilleD/SVAMP"
FILE = "SVAMP.json"


def questions(data: str | None) -> list[Question]:
    """All of it, from the folder or file of its authors (`SVAMP.json`), or its hub test split."""
    path = Path(data).expanduser() if data else None
    if path is not None and (file := path / FILE if path.is_dir() else path).suffix == ".json":
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SetError(f"{file} cannot be read ({error}); --data takes its folder") from error
    else:
        found = rows(data or HUB_ID, "default", "test")
    with fields_of(data or HUB_ID):
        return [_question(i, row) for i, row in enumerate(found)]


def _question(i: int, row: dict[str, Any]) -> Question:
    final = str(row["Answer"])
    parse_number(final)  # else no answer could be graded
    question = f"{row['Body'].rstrip('. ')}. {row['Question']}"
    return Question(
        id=f"svamp/{i}",
        task="svamp",
        group=f"svamp/{i}",
        half=half_of(f"svamp/{i}"),
        prompt=f"{question}\n\n{INSTRUCTION}",
        question=question,
        accepted=[final],
    )


SVAMP = EvalSet("svamp", questions, grade_number, max_tokens=256)
