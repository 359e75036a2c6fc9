"""Prompts for synthesis: files of several forms, and the built-in ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from osd.errors import ConfigError
from osd.prompts import general_prompts, read_prompts


def test_files_of_several_forms(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"question": "How many?", "answer": "3"}\n'
        '{"input": "How few?", "target": 1.0}\n'
        '{"messages": [{"role": "system", "content": "Be brief."}, '
        '{"role": "user", "content": "Hi"}]}\n'
        '\n{"prompt": "two\u2028lines"}\n',
        encoding="utf-8",
    )
    got = list(read_prompts(file))
    assert got[0] == [{"role": "user", "content": "How many?"}]
    assert got[1] == [{"role": "user", "content": "How few?"}]
    assert [turn["role"] for turn in got[2]] == ["system", "user"]
    assert got[3:] == [[{"role": "user", "content": "two\u2028lines"}]]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "2: not JSON"),
        ('{"text": "x"}', "2: no `messages` and none of prompt"),
        ('{"messages": [{"role": "user"}]}', "2: a message needs"),
        ("[]", "2: no `messages`"),
    ],
)
def test_a_line_that_holds_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        list(read_prompts(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_prompts(tmp_path / "none.jsonl"))


def test_general_prompts_are_many_distinct_and_stable() -> None:
    texts = [turns[0]["content"] for turns in general_prompts()]
    assert len(texts) == len(set(texts)) > 500
    assert all("{" not in text and "\n" not in text for text in texts)
    assert texts[0] == "What is the capital of Japan?"
