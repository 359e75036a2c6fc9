"""The answers that a calibration was fitted to: `calibration_texts.jsonl` beside it.

When the drafts' weights change, they are measured again: does the calibration still hold?
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from drafts.calibration_parts import Name, Strict
from drafts.errors import CalibrationError

TEXTS_NAME = "calibration_texts.jsonl"


class LabelledText(Strict):
    """A question, an answer to it, and whether the answer is wrong."""

    prompt: str
    response: str
    wrong: bool
    group: str
    task: Name
    mode: Name


def write_texts(texts: Iterable[LabelledText], folder: Path) -> None:
    """Write them in one piece."""
    path = folder / TEXTS_NAME
    partial = path.with_name(f"{TEXTS_NAME}.{os.getpid()}.partial")
    try:
        lines = (text.model_dump_json() + "\n" for text in texts)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_texts(folder: Path) -> list[LabelledText]:
    """Those of an ensemble's folder; none if it has none.

    Raises:
        CalibrationError: naming the line that cannot be read.
    """
    path = folder / TEXTS_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read ({error})") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                texts.append(LabelledText.model_validate_json(line))
            except ValidationError as error:
                found = error.errors()[0]["msg"]
                raise CalibrationError(f"{path}, line {number}: {found}") from error
    return texts
