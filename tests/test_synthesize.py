"""Synthesis without an engine: when there is nothing to do, and when another is at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock
from typer.testing import CliRunner

from drafts.engine import Engine, EngineConfig
from drafts.errors import EngineNotReady
from osd import commands
from osd.corpus import Corpus, Text
from osd.errors import OsdError
from osd.synthesize import run
from tests.tiny import mixed_ensemble


async def test_a_corpus_that_is_whole_needs_no_engine_and_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(config: EngineConfig) -> Engine:
        raise EngineNotReady("an engine was started")

    folder = mixed_ensemble(tmp_path / "ensemble")
    monkeypatch.setattr(Engine, "start", start)
    out, prompts = tmp_path / "corpus", [[{"role": "user", "content": "Hi"}]]
    limits: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "per_part": 4}
    with pytest.raises(EngineNotReady, match="an engine was started"):
        await run(folder, out, prompts, **limits)
    Corpus(out).add(0, [Text(key=1, response_start=1, token_ids=[1, 2, 3])])
    assert (await run(folder, out, prompts, **limits)).parts
    with FileLock(out / ".lock"), pytest.raises(OsdError, match="another `demur synthesize`"):
        await run(folder, out, prompts, **limits)


def test_errors_of_files_are_sentences_and_others_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer()
    app.command()(commands.synthesize)
    out, prompts = tmp_path / "file", tmp_path / "prompts.jsonl"
    out.write_text("")
    prompts.write_text('{"prompt": "Hi"}\n')
    ensemble = mixed_ensemble(tmp_path / "ensemble")
    options = ["--out", str(out), "--prompts", str(prompts), "--ensemble", str(ensemble)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 1
    assert f"error: [Errno 17] File exists: '{out}'" in done.output

    async def broken(*args: Any, **kwargs: Any) -> Corpus:
        raise TimeoutError

    monkeypatch.setattr("osd.synthesize.run", broken)
    assert isinstance(CliRunner().invoke(app, options).exception, TimeoutError)
