"""Prompts that a target answers to make its own training texts.

Files are JSON lines, one object a prompt: `messages`, or one of `prompt`, `question`, `input`,
which becomes a user's message. `general_prompts` adds questions of everyday kinds, so that drafts
hold beyond the domain of a file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from osd.errors import ConfigError

Messages = list[dict[str, str]]

_GENERAL = Path(__file__).with_name("general_prompts.yaml")
_FIELDS = ("prompt", "question", "input")


def general_prompts() -> list[Messages]:
    """Several hundred everyday and factual questions, always the same, kinds taking turns."""
    rows = yaml.safe_load(_GENERAL.read_text())["templates"]
    kinds = [[row["ask"].format(filler) for filler in row["of"]] for row in rows]
    turns = itertools.zip_longest(*kinds)
    return [_ask(text) for turn in turns for text in turn if text is not None]


def read_prompts(file: Path) -> Iterator[Messages]:
    """The prompts of a JSON-lines file.

    Raises:
        ConfigError: naming the line that holds none.
    """
    try:
        # Not `splitlines`, which also cuts at separators that JSON's strings may hold.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}:{number}: not JSON ({error})") from error
        yield _messages(row, f"{file}:{number}")


def _messages(row: Any, where: str) -> Messages:
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            try:
                return [
                    {"role": str(turn["role"]), "content": str(turn["content"])}
                    for turn in row["messages"]
                ]
            except (KeyError, TypeError) as error:
                raise ConfigError(f"{where}: a message needs a role and a content") from error
        for field in _FIELDS:
            if isinstance(row.get(field), str) and row[field]:
                return _ask(row[field])
    raise ConfigError(f"{where}: no `messages` and none of {', '.join(_FIELDS)}")


def _ask(text: str) -> Messages:
    return [{"role": "user", "content": text}]
