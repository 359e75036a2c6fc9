"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems with a number as answer.

Its 1,319 test questions are answered by the target, or the 5,276 labelled solutions that OpenAI
published with them (four models' answers to each) are scored. Data: a hub id, a folder or a file;
the solutions come as `example_model_solutions.jsonl`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from demur.evals._files import fields_of, json_lines, rows
from demur.evals.localise import ANNOTATION
from demur.evals.numbers import grade_number, parse_number
from demur.evals.sets import EvalSet, Question, SetError, half_of

HUB_ID = "openai/gsm8k"
SOLUTIONS_FILE = "example_model_solutions.jsonl"
WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
INSTRUCTION = 'Think step by step. End with "#### " and the number.'


def questions(data: str | None) -> list[Question]:
    """The test split. The target is told of `####`, which the strict filter looks for."""
    source = data or HUB_ID
    found = rows(source, "main", "test")
    with fields_of(source):
        return [_question(i, row) for i, row in enumerate(found)]


def solutions(data: str | None) -> list[Question]:
    """The labelled solutions, their calculator annotations taken out: readers never saw them."""
    if data is None:
        raise SetError(f"give --data, a folder with {SOLUTIONS_FILE} of openai/grade-school-math")
    path = Path(data).expanduser()
    found = json_lines(path / SOLUTIONS_FILE if path.is_dir() else path)
    with fields_of(path):
        return [
            _question(i, row, plain=True).model_copy(
                update={
                    "id": f"gsm8k-solutions/{i}/{writer}",
                    "task": "gsm8k-solutions",
                    "response": ANNOTATION.sub("", row[writer]["solution"]),
                    "source": writer,
                    "correct": bool(row[writer]["is_correct"]),
                    "annotated": row[writer]["solution"],
                }
            )
            for i, row in enumerate(found)
            for writer in WRITERS
        ]


def _question(i: int, row: dict[str, Any], plain: bool = False) -> Question:
    solution = row.get("answer") or row["ground_truth"]
    final = re.split(r"####|\nA:", solution)[-1].strip()
    parse_number(final)  # else no answer could be graded
    group = f"gsm8k/{i}"
    question = str(row["question"])
    return Question(
        id=group,
        task="gsm8k",
        group=group,
        half=half_of(group),
        prompt=question if plain else f"{question}\n\n{INSTRUCTION}",
        question=None if plain else question,
        accepted=[final],
        gold=solution,
    )


GSM8K = EvalSet("gsm8k", questions, grade_number, max_tokens=256, given=solutions)
