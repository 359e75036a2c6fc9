"""Rows of a data set: from a file or folder of JSON lines, or by a hub id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demur.evals.sets import SetError


def rows(source: str, config: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split.

    Args:
        source: a file of JSON lines, a folder with `{split}.jsonl`, or what `datasets` can load: a
            hub id or a folder of its own.

    Raises:
        SetError: if there is nothing to read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return json_lines(path)
    if (path / f"{split}.jsonl").is_file():
        return json_lines(path / f"{split}.jsonl")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise SetError(
            f"{source} is no file or folder here, and a hub id needs the package `datasets`: "
            "pip install 'demur[eval]'"
        ) from error
    try:
        return list(load_dataset(str(path) if path.exists() else source, config, split=split))
    except (DatasetsError, OSError, ValueError) as error:  # the hub's own errors are such
        raise SetError(
            f"{source} cannot be loaded ({error}); give --data a folder with {split}.jsonl"
        ) from error


@contextmanager
def fields_of(source: str | Path) -> Iterator[None]:
    """What reads the fields of a source's rows.

    Raises:
        SetError: if a row lacks one, or it is not what it should be.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise SetError(
            f"{source} has a row without what the set needs ({type(error).__name__}: {error}); "
            "is it another data set?"
        ) from error


def json_lines(file: Path) -> list[dict[str, Any]]:
    """A file with an object a line.

    Raises:
        SetError: if it is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SetError(f"{file} cannot be read ({error}); --data takes its folder") from error
    found = []
    # Not splitlines: a JSON string may hold U+2028 as it is.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SetError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise SetError(f"{file}, line {number} is no object")
            found.append(row)
    return found
