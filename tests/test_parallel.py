"""One engine over several workers: tensor parallel times data parallel, with all kinds of draft."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from pydantic import ValidationError
from transformers import LlamaConfig

from drafts.engine import Engine, EngineConfig
from drafts.errors import EngineNotReady, ManifestError
from drafts.manifest import load_ensemble
from drafts.parallel import check_divides
from drafts.reference import Reference
from drafts.scores import Generated, Sampling, TokenScores
from tests.engine_checks import assert_close, running
from tests.test_engine_tiny import TINY, some_texts
from tests.tiny import mixed_ensemble, save_lm

# No multiple of 2 x 64: the last device's share of the vocabulary is filled up.
VOCABULARY = 322
SIZES = {"tensor_parallel_size": 2, "data_parallel_size": 2}
WORKERS = 4
# Longer than a block of the prefix cache, 128 tokens on a CPU.
PROMPT = [number * 7 % 320 for number in range(150)]


def divisible(folder: Path, seed: int) -> Path:
    """All kinds of draft, with heads for two devices: keys and values are copied, or shared out."""
    mixed_ensemble(folder, seed, version=folder.name, vocab_size=VOCABULARY)
    for name, layers, pairs in (("model_a", 2, 1), ("model_b", 3, 2)):
        changes = {"num_hidden_layers": layers, "num_key_value_heads": pairs}
        save_lm(folder / name, seed + 10 * layers, vocab_size=VOCABULARY, **changes)
    return folder


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("parallel")
    return divisible(place / "v1", 0), divisible(place / "v2", 100)


@pytest.fixture(scope="module")
async def engine(versions: tuple[Path, Path]) -> AsyncIterator[Engine]:
    async with running(versions[0], **TINY, **SIZES) as engine:
        yield engine


async def generate(engine: Engine) -> tuple[list[int], TokenScores]:
    sampling = Sampling(max_new_tokens=4, temperature=0.0)
    async with aclosing(engine.stream(PROMPT, sampling)) as stream:
        steps: list[Generated] = [step async for step in stream]
    ids = [token for step in steps for token in step.token_ids]
    return ids, TokenScores.join([step.scores for step in steps])


async def agrees(engine: Engine, folder: Path) -> None:
    """Scores and generations of many requests at once, against plain transformers."""
    oracle = Reference(load_ensemble(folder))
    texts = some_texts()
    got = await asyncio.gather(*(engine.score(ids, start) for ids, start in texts))
    assert_close(got, [oracle.score(ids, start) for ids, start in texts])
    # Enough that both engines have the prompt in their prefix caches.
    for _ in range(2):
        answers = await asyncio.gather(*(generate(engine) for _ in range(4)))
        expected = [oracle.score(PROMPT + ids, len(PROMPT)) for ids, _ in answers]
        assert_close([scores for _, scores in answers], expected)
        assert {scores.weights_version for _, scores in answers} == {folder.name}


@pytest.mark.engine
async def test_every_worker_measures_right_and_takes_the_new_weights(
    engine: Engine, versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await agrees(engine, versions[0])
    await engine.swap(versions[1])
    await agrees(engine, versions[1])
    answered = {
        sample.labels["engine"]: sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:prompt_tokens_total"
    }
    assert set(answered) == {"0", "1"}
    assert all(answered.values())

    # What one worker alone says is heard, whichever it is; the others have the new weights then.
    assert await engine._call_workers("ping") == [None] * WORKERS

    async def one_refuses(*_: Any) -> list[str | None]:
        return [None] * (WORKERS - 1) + ["its disk is gone"]

    monkeypatch.setattr(engine, "_call_workers", one_refuses)
    with pytest.raises(EngineNotReady, match=r"half-way .*its disk is gone"):
        await engine.swap(versions[0])
    with pytest.raises(EngineNotReady):
        await engine.score([1, 2, 3], 1)


def test_pipeline_parallel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="must meet on one device"):
        EngineConfig(ensemble=tmp_path, pipeline_parallel_size=2)


def test_a_draft_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    ensemble = load_ensemble(mixed_ensemble(tmp_path / "ensemble"))
    check_divides(ensemble, 1)
    with pytest.raises(ManifestError, match="draft 'model_a' has 1 attention heads"):
        check_divides(ensemble, 2)


@pytest.mark.parametrize(
    "changes, ranks, refused",
    [
        ({"num_attention_heads": 3}, 2, "the target has 3 attention heads"),
        ({"intermediate_size": 129}, 2, "129 columns"),
        ({"vocab_size": 322}, 3, None),  # filled up to 384
        ({"vocab_size": 300}, 3, "320 tokens"),
        ({"num_key_value_heads": 6, "num_attention_heads": 12}, 4, "6 heads of keys and values"),
    ],
)
def test_a_target_that_cannot_be_shared_is_refused(
    changes: dict[str, int], ranks: int, refused: str | None
) -> None:
    sizes = {
        "hidden_size": 384,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 144,
    }
    config = LlamaConfig(**(sizes | {"vocab_size": 384} | changes))
    ensemble: Any = SimpleNamespace(target_config=config, members=[])
    if refused is None:
        check_divides(ensemble, ranks)
        return
    with pytest.raises(ManifestError, match=refused):
        check_divides(ensemble, ranks)
