"""Swaps of residual drafts, of which the engine holds two versions: nobody waits for a swap."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts.engine import Engine
from drafts.errors import EngineNotReady, WeightsError
from drafts.init import write_manifest
from drafts.manifest import load_ensemble
from drafts.reference import Reference
from drafts.residual import ResidualConfig
from drafts.scores import Generated, Sampling, TokenScores
from tests.engine_checks import assert_close, running
from tests.test_engine_tiny import TINY, some_texts
from tests.tiny import save_lm, save_residual

pytestmark = pytest.mark.engine

PROMPT = list(range(5, 25))
LONG = Sampling(max_new_tokens=200, temperature=0.0)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three versions of two students with two draws each."""
    place = tmp_path_factory.mktemp("slots")
    target = save_lm(place / "target", seed=1)
    config = ResidualConfig(hidden_size=64, taps=[1, 3], rank=16, factors=4, width=32, draws=2)
    folders = {}
    for number, version in enumerate(("v1", "v2", "v3")):
        folder = folders[version] = place / version
        drafts: list[dict[str, object]] = []
        for student in "ab":
            save_residual(folder / student, 10 * number + ord(student), config)
            drafts += [
                {"name": f"{student}_{name}", "kind": "residual", "source": student, "draw": draw}
                for draw, name in enumerate(("one", "two"))
            ]
        write_manifest(folder, "slots", version, str(target), drafts)
    return folders


@pytest.fixture(scope="module")
async def engine(versions: dict[str, Path]) -> AsyncIterator[Engine]:
    async with running(versions["v1"], **TINY) as engine:
        yield engine


def expected(folder: Path, texts: list[tuple[list[int], int]]) -> list[TokenScores]:
    oracle = Reference(load_ensemble(folder))
    return [oracle.score(ids, start) for ids, start in texts]


async def generate(engine: Engine, begun: asyncio.Event) -> list[Generated]:
    steps = []
    async with aclosing(engine.stream(PROMPT, LONG)) as stream:
        async for step in stream:
            steps.append(step)
            begun.set()
    return steps


async def start(engine: Engine) -> asyncio.Task[list[Generated]]:
    """A long generation that has begun."""
    begun = asyncio.Event()
    task = asyncio.create_task(generate(engine, begun))
    await begun.wait()
    return task


def check(steps: list[Generated], version: str, folder: Path) -> None:
    """All tokens were measured by one version, and that is the one that they name."""
    assert {step.weights_version for step in steps} == {version}
    tokens = [token for step in steps for token in step.token_ids]
    got = TokenScores.join([step.scores for step in steps if step.scores is not None])
    assert_close([got], expected(folder, [(PROMPT + tokens, len(PROMPT))]))


async def test_a_swap_waits_for_no_generation_and_changes_none_under_way(
    engine: Engine, versions: dict[str, Path]
) -> None:
    texts = some_texts(4, count=6)
    assert engine.weights_version == "v1"
    old = await start(engine)
    await engine.swap(versions["v2"])
    assert not old.done()
    # Both versions at once, in the same steps.
    new = await start(engine)
    scores = await asyncio.gather(*(engine.score(*text) for text in texts))
    assert not old.done()
    assert {score.weights_version for score in scores} == {"v2"}
    assert_close(scores, expected(versions["v2"], texts))

    # A third has to wait for the first's last request, and nobody waits for it.
    third = asyncio.create_task(engine.swap(versions["v3"]))
    await asyncio.sleep(0.05)
    assert not third.done()
    during = await engine.score(*texts[0])
    assert during.weights_version == "v2"
    check(await old, "v1", versions["v1"])
    await third
    assert engine.weights_version == "v3"
    after = await asyncio.gather(*(engine.score(*text) for text in texts))
    assert_close(after, expected(versions["v3"], texts))
    check(await new, "v2", versions["v2"])
    await engine.swap(versions["v1"])


async def test_a_version_that_is_there_still_is_back_at_once(
    engine: Engine, versions: dict[str, Path]
) -> None:
    """As after a version that is taken back: the one before has requests under way."""
    [text] = some_texts(7, count=1)
    assert engine.weights_version == "v1"
    old = await start(engine)
    await engine.swap(versions["v2"])
    await engine.swap(versions["v1"])
    assert not old.done()
    score = await engine.score(*text)
    assert score.weights_version == "v1"
    assert_close([score], expected(versions["v1"], [text]))
    check(await old, "v1", versions["v1"])


async def test_many_swaps_under_load_fail_no_request_and_mix_nothing(
    engine: Engine, versions: dict[str, Path]
) -> None:
    texts = some_texts(5, count=8)
    references = {name: expected(folder, texts) for name, folder in versions.items()}
    done = False
    answered: list[tuple[int, TokenScores]] = []

    async def client(number: int) -> None:
        turn = number
        while not done:
            index = turn % len(texts)
            answered.append((index, await engine.score(*texts[index])))
            turn += 1

    clients = [asyncio.create_task(client(number)) for number in range(6)]
    names = ["v2", "v3", "v1"]
    memory = []
    for number in range(200):
        await engine.swap(versions[names[number % 3]])
        if number % 20 == 19:
            workers = psutil.Process().children(recursive=True)
            memory.append(sum(worker.memory_info().rss for worker in workers))
    done = True
    await asyncio.gather(*clients)
    assert len(answered) > 200
    assert {score.weights_version for _, score in answered} == set(names)
    for index, score in answered:
        assert_close([score], [references[score.weights_version][index]])
    # What 200 swaps leave behind: less than the weights of one more version each would be.
    assert memory[-1] - memory[1] < 20 * 2**20, memory
    await engine.swap(versions["v1"])


async def test_a_version_that_cannot_be_used_spoils_neither_slot(
    engine: Engine, versions: dict[str, Path], tmp_path: Path
) -> None:

    texts = some_texts(6, count=3)
    before = engine.weights_version
    damaged = tmp_path / "damaged"
    shutil.copytree(versions["v2"], damaged)
    file = damaged / "b" / "model.safetensors"

    weights = load_file(file)
    whole = dict(weights)
    weights["up.weight"][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(WeightsError, match="NaN"):
        await engine.swap(damaged)
    save_file(whole | {"up.weight": whole["up.weight"].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(WeightsError, match="float8_e4m3fn, which is not served"):
        await engine.swap(damaged)
    assert engine.weights_version == before
    scores = await asyncio.gather(*(engine.score(*text) for text in texts))
    assert_close(scores, expected(versions[before], texts))
    await engine.swap(versions["v2"])
    scores = await asyncio.gather(*(engine.score(*text) for text in texts))
    assert_close(scores, expected(versions["v2"], texts))


async def test_zz_a_worker_that_hangs_in_a_swap_is_an_engine_that_has_failed(
    engine: Engine, versions: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this engine."""
    monkeypatch.setattr("drafts.engine._SWAP_WITHIN_S", 0.0)
    with pytest.raises(EngineNotReady, match="half-way"):
        await engine.swap(versions["v3"])
    with pytest.raises(EngineNotReady):
        await engine.check_health()
    with pytest.raises(EngineNotReady):
        await engine.score(*some_texts(1, count=1)[0])
