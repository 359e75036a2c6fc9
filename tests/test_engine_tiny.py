"""The engine on tiny random ensembles: architectures, sampling, swaps of weights, bad arguments."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts import channel
from drafts.engine import Engine, EngineConfig
from drafts.errors import DraftsError, EngineNotReady, ManifestError, WeightsError
from drafts.manifest import load_ensemble
from drafts.outputs import scoring_params
from drafts.reference import Reference
from drafts.scores import Generated, Sampling, TokenScores
from drafts.text import TextEncoder
from osd.corpus import Corpus
from osd.shards import conversation_key
from osd.synthesize import synthesize
from tests.engine_checks import TOLERANCE, assert_close, joined, running
from tests.tiny import edit_manifest, mixed_ensemble

pytestmark = pytest.mark.engine

TINY = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "kv_cache_gib": 0.05,
}


def some_texts(seed: int = 0, count: int = 12) -> list[tuple[list[int], int]]:
    """Random token ids and the place where the response begins."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        length = rng.randint(3, 150)
        ids = [rng.randrange(320) for _ in range(length)]
        texts.append((ids, rng.randint(1, length - 1)))
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_ensemble(tmp_path_factory.mktemp("tiny") / "v1")


@pytest.fixture(scope="module")
def second(folder: Path) -> Path:
    """The same ensemble with other draft weights."""
    return mixed_ensemble(folder.parent / "v2", seed=100, version="v2")


@pytest.fixture(scope="module")
async def engine(folder: Path) -> AsyncIterator[Engine]:
    async with running(folder, **TINY) as engine:
        yield engine


def expected(folder: Path, texts: list[tuple[list[int], int]]) -> list[TokenScores]:
    oracle = Reference(load_ensemble(folder))
    return [oracle.score(ids, start) for ids, start in texts]


async def test_all_kinds_of_draft(engine: Engine, folder: Path) -> None:
    texts = some_texts()
    reference = expected(folder, texts)
    # Were the drafts alike, this would test nothing.
    assert joined(reference, "jsd").mean() > 0.05
    assert joined(reference, "kl").mean() > 0.05
    assert_close([await engine.score(*text) for text in texts], reference)
    assert_close(await asyncio.gather(*(engine.score(*text) for text in texts)), reference)


async def test_another_architecture(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "qwen", architecture="qwen2")
    texts = some_texts(1)
    others = set(psutil.Process().children(recursive=True))
    async with running(folder, **TINY) as engine:
        got = await asyncio.gather(*(engine.score(*text) for text in texts))
        assert_close(got, expected(folder, texts))
        # An engine whose process dies says so, to those who wait as well.
        waiting = asyncio.gather(*(engine.score(*text) for text in texts), return_exceptions=True)
        await asyncio.sleep(0)
        for process in set(psutil.Process().children(recursive=True)) - others:
            process.kill()
        results = await asyncio.wait_for(waiting, 60)
        assert any(isinstance(result, EngineNotReady) for result in results)
        with pytest.raises(EngineNotReady, match="has died"):
            await engine.check_health()
        with pytest.raises(EngineNotReady, match="has died"):
            await engine.score(*texts[0])


async def collect(
    engine: Engine, prompt: list[int], sampling: Sampling, pause: float = 0.0
) -> list[Generated]:
    """All steps of a stream, read by somebody who takes his time."""
    async with aclosing(engine.stream(prompt, sampling)) as steps:
        out = []
        async for step in steps:
            out.append(step)
            await asyncio.sleep(pause)
    return out


async def test_streamed_tokens_carry_measures_and_are_never_columns(
    engine: Engine, folder: Path
) -> None:
    # Flat enough to sample a metric column, were they not masked; prompts longer than a step.
    prompts = [[(5 + 7 * i * j) % 320 for i in range(4 + 30 * j)] for j in range(6)]
    sampling = Sampling(max_new_tokens=40, temperature=2.0, top=3)
    # A slow reader gets several tokens at once, and loses none.
    streams = await asyncio.gather(
        *(
            collect(engine, prompt, sampling, pause=0.2 * (j == 1))
            for j, prompt in enumerate(prompts)
        )
    )
    assert any(len(step.token_ids) > 1 for steps in streams for step in steps)
    oracle = Reference(load_ensemble(folder))
    for prompt, steps in zip(prompts, streams, strict=True):
        ids = [token for step in steps for token in step.token_ids]
        assert max(ids) < 320
        assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
        assert steps[-1].finish_reason == ("length" if len(ids) == 40 else "stop")
        scores = TokenScores.join([step.scores for step in steps if step.scores is not None])
        assert_close([scores], [oracle.score(prompt + ids, len(prompt))])
        _, target_TV = oracle.logits(prompt + ids)
        logp_TV = torch.log_softmax(target_TV[len(prompt) - 1 : -1].float(), -1)
        likeliest = [pairs for step in steps for pairs in step.likeliest]
        for pairs, logp_V in zip(likeliest, logp_TV, strict=True):
            values = [value for _, value in pairs]
            assert values == pytest.approx(logp_V.topk(3).values.tolist(), abs=TOLERANCE)
            chosen = [float(logp_V[token]) for token, _ in pairs]
            assert chosen == pytest.approx(values, abs=TOLERANCE)


async def test_a_stream_without_measures_says_the_same(engine: Engine) -> None:
    prompt = [5, 6, 7, 8]
    plain = Sampling(max_new_tokens=20, temperature=0.0, measured=False)
    measured = Sampling(max_new_tokens=20, temperature=0.0)
    ids = [
        [token for step in await collect(engine, prompt, sampling) for token in step.token_ids]
        for sampling in (plain, measured)
    ]
    assert ids[0] == ids[1] == await engine.generate(prompt, max_new_tokens=20, temperature=0.0)
    assert all(step.scores is None for step in await collect(engine, prompt, plain))


async def test_a_stream_that_is_left_ends_in_the_engine(engine: Engine) -> None:
    async with aclosing(engine.stream([5, 6], Sampling(max_new_tokens=200))) as steps:
        await anext(steps)
        assert engine._llm.get_num_unfinished_requests() == 1
    assert engine._llm.get_num_unfinished_requests() == 0
    # It holds up no swap either.
    assert engine._gates[0]._holders == 0


async def test_what_a_stream_cannot_be_is_refused(engine: Engine) -> None:
    for prompt, sampling, said in (
        ([], Sampling(max_new_tokens=3), "at least 1"),
        ([320], Sampling(max_new_tokens=3), "0..319"),
        ([5] * 250, Sampling(max_new_tokens=7), "at most 249"),
        ([5], Sampling(max_new_tokens=3, seed=1), "seed"),
    ):
        with pytest.raises(ValueError, match=said):
            await collect(engine, prompt, sampling)


async def test_swaps_under_load_never_mix_versions(
    engine: Engine, folder: Path, second: Path
) -> None:
    texts = some_texts(2, count=40)
    references = {"v1": expected(folder, texts), "v2": expected(second, texts)}

    def burst(indices: range) -> list[asyncio.Task[TokenScores]]:
        return [asyncio.create_task(engine.score(*texts[index])) for index in indices]

    # More texts than a step takes, then a swap while they are under way, then more: twice.
    early = burst(range(20))
    await asyncio.sleep(0.05)
    assert engine._llm.get_num_unfinished_requests() > 0
    there = asyncio.create_task(engine.swap(second))
    while not engine._gates[0]._waiting:
        await asyncio.sleep(0.001)
    assert not all(task.done() for task in early)
    late = burst(range(20, 40))
    await there
    # Cancelling who asked for a swap does not leave it half done.
    back = asyncio.create_task(engine.swap(folder))
    while not (engine._gates[0]._waiting or engine._gates[0]._closed):
        await asyncio.sleep(0.001)
    back.cancel()
    last = burst(range(20))
    for version, indices, tasks in (
        ("v1", range(20), early),
        ("v2", range(20, 40), late),
        ("v1", range(20), last),
    ):
        scores = await asyncio.gather(*tasks)
        assert {score.weights_version for score in scores} == {version}
        assert_close(scores, [references[version][index] for index in indices])
    assert engine.weights_version == "v1"


async def test_answers_to_one_question_share_its_prompt(
    engine: Engine, folder: Path, second: Path
) -> None:
    prompt = [(11 * i) % 320 for i in range(250)]
    block = engine._llm.vllm_config.cache_config.block_size
    starts = [start + move for start in (block, 2 * block) for move in (-1, 0, 1, 2)]
    texts = [(prompt[: start + 20], start) for start in starts]

    async def cached(text: tuple[list[int], int]) -> int:
        ids, start = text
        async with aclosing(engine._outputs(ids, partial(scoring_params, start))) as outputs:
            [(final, _)] = [output async for output in outputs]
        count: int = final.num_cached_tokens
        return count

    await engine.score(prompt, len(prompt) - 1)
    for text in texts:
        # What predicts the first token of the response has to be computed, and what comes after.
        assert await cached(text) == (text[1] - 1) // block * block
    for version in (folder, second, folder):
        if version != engine.ensemble.folder:
            await engine.swap(version)  # forgets what the other drafts have written
            assert await cached(texts[-1]) == 0
        assert_close([await engine.score(*text) for text in texts], expected(version, texts))
        assert_close(
            await asyncio.gather(*(engine.score(*text) for text in texts)), expected(version, texts)
        )


async def test_a_swap_forgets_the_prefixes_that_old_drafts_wrote(
    engine: Engine, folder: Path, second: Path
) -> None:
    """Of a generation: one token after a long prompt."""
    from vllm import SamplingParams

    prompt = [(7 * i) % 320 for i in range(200)]  # more than one block of the CPU's cache

    async def generate(name: str) -> tuple[int, dict[str, Any]]:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=channel.M,
            flat_logprobs=True,
            detokenize=False,
            extra_args={channel.MEASURE_FROM: len(prompt)},
        )
        async for output in engine._llm.generate({"prompt_token_ids": prompt}, params, name):
            final = output
        flat = final.outputs[0].logprobs
        values, ids = np.array([flat.logprobs]), np.array([flat.token_ids])
        return final, channel.decode(values[:, 0], ids[:, 1:], values[:, 1:], 320)

    await generate("fills the cache")
    cached, _ = await generate("reads the cache")
    assert cached.num_cached_tokens > 0
    await engine.swap(second)
    fresh, got = await generate("after the swap")
    await engine.swap(folder)
    assert not fresh.num_cached_tokens
    (reference,) = expected(second, [(prompt + list(fresh.outputs[0].token_ids), len(prompt))])
    for name in ("entropy", "total", "jsd", "kl"):
        assert np.abs(got[name] - getattr(reference, name)).max() <= TOLERANCE, name


async def test_tensors_that_no_model_reads_do_no_harm(
    engine: Engine, folder: Path, second: Path
) -> None:
    extra = folder.parent / "extra"
    shutil.copytree(second, extra)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.o_norm.weight"] = torch.ones(32)

    _rewrite(extra / "model_a/model.safetensors", change)
    texts = some_texts(6, count=3)
    await engine.swap(extra)
    assert_close([await engine.score(*text) for text in texts], expected(second, texts))
    await engine.swap(folder)
    assert_close([await engine.score(*text) for text in texts], expected(folder, texts))


async def test_a_target_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.copytree(folder.parent / "target-llama", broken / "target")
    edit_manifest(broken, target={"source": "target"})
    name = "model.layers.3.mlp.up_proj.weight"
    _rewrite(broken / "target/model.safetensors", lambda weights: weights.pop(name))
    with pytest.raises(WeightsError, match=f"the target: 1 tensors are missing, {name}"):
        await Engine.start(EngineConfig(ensemble=broken, **TINY))


async def test_weights_that_are_no_numbers_are_named_at_the_start(
    folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    edit_manifest(broken, target={"source": str(load_ensemble(folder).target_path)})
    _nan(broken)
    with pytest.raises(WeightsError, match=r"draft 'model_b'.*model\.norm\.weight holds NaN"):
        await Engine.start(EngineConfig(ensemble=broken, **TINY))


async def test_a_length_that_a_member_does_not_take_is_refused(folder: Path) -> None:
    with pytest.raises(ManifestError, match=r"max_model_len is 600 and .* takes at most 512"):
        await Engine.start(EngineConfig(ensemble=folder, **{**TINY, "max_model_len": 600}))


def _truncated(path: Path) -> None:
    file = path / "exit_b/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(path: Path) -> None:
    (path / "model_a/model.safetensors").write_bytes(b"not weights")


def _missing_file(path: Path) -> None:
    (path / "student/model.safetensors").unlink()


def _rewrite(path: Path, change: Any) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def _nan(path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = float("nan")

    _rewrite(path / "model_b/model.safetensors", change)


def _misshapen(path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["basis"] = weights["basis"][:, :-1].contiguous()

    _rewrite(path / "student/model.safetensors", change)


def _missing_tensor(path: Path) -> None:
    _rewrite(path / "exit_a/model.safetensors", lambda weights: weights.pop("model.norm.weight"))


def _extra_tensor(path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)

    _rewrite(path / "exit_a/model.safetensors", change)


def _other_kinds(path: Path) -> None:
    drafts = load_ensemble(path).manifest.model_dump()["drafts"]
    edit_manifest(path, drafts=drafts[:-1])


def _other_depth(path: Path) -> None:
    file = path / "exit_b/config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))


def _other_student(path: Path) -> None:
    shutil.copytree(path / "student", path / "another")
    drafts = load_ensemble(path).manifest.model_dump()["drafts"]
    drafts[-1]["source"] = "another"
    edit_manifest(path, drafts=drafts)


def _other_target(path: Path) -> None:
    shutil.copytree(path.parent / "target-llama", path / "target", dirs_exist_ok=True)
    edit_manifest(path, target={"source": "target"})


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_truncated, WeightsError, "exit_b.*cannot be read"),
        (_garbage, WeightsError, "model_a.*cannot be read"),
        (_missing_file, WeightsError, "residual_a.*no model.safetensors"),
        (_nan, WeightsError, "model_b.*model.norm.weight holds NaN"),
        (_misshapen, WeightsError, "basis has shape"),
        (_missing_tensor, WeightsError, "exit_a.*missing.*model.norm.weight"),
        (_extra_tensor, WeightsError, "exit_a.*unknown.*layers.7"),
        (_other_kinds, ManifestError, "cannot change the drafts' name"),
        (_other_depth, ManifestError, "config.json of draft 'exit_b' differs"),
        (_other_student, ManifestError, "share a checkpoint"),
        (_other_target, ManifestError, "changes drafts only"),
    ],
)
async def test_weights_that_cannot_be_used_are_refused_and_the_old_serve_on(
    engine: Engine,
    folder: Path,
    second: Path,
    damage: Any,
    kind: type[DraftsError],
    message: str,
) -> None:
    texts = some_texts(3, count=3)
    before = [await engine.score(*text) for text in texts]
    damaged = folder.parent / f"damaged{damage.__name__}"
    shutil.copytree(second, damaged)
    damage(damaged)
    with pytest.raises(kind, match=message):
        await engine.swap(damaged)
    assert engine.weights_version == "v1"
    after = [await engine.score(*text) for text in texts]
    assert_close(after, before)
    assert_close(after, expected(folder, texts))


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([], 0),
        ([1], 0),
        ([1, 2], 0),
        ([1, 2], 2),
        ([1, 320], 1),  # the first metric column
        ([1, -1], 1),
        ([1] * 256, 1),  # no place for the token that vLLM samples
    ],
)
async def test_bad_arguments_do_not_reach_vllm(engine: Engine, ids: list[int], start: int) -> None:
    with pytest.raises(ValueError, match=r"response_start|token ids|tokens, at least 1"):
        await engine.score(ids, start)
    assert len(await engine.score([1] * 255, 254)) == 1


async def test_a_cancelled_request_leaves_the_engine_well(engine: Engine, folder: Path) -> None:
    texts = some_texts(4)
    tasks = [asyncio.create_task(engine.score(*text)) for text in texts]
    await asyncio.sleep(0.01)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in done[::2])
    assert_close(
        [r for r in done[1::2] if isinstance(r, TokenScores)], expected(folder, texts[1::2])
    )
    assert engine._llm.get_num_unfinished_requests() == 0
    await asyncio.wait_for(engine.swap(folder), 30)  # no cancelled request still holds the gate


async def test_generation_follows_the_target(engine: Engine, folder: Path) -> None:
    prompt = [5, 17, 3, 200]
    got = await engine.generate(prompt, max_new_tokens=8, temperature=0)
    oracle = Reference(load_ensemble(folder))
    ids = list(prompt)
    for token in got:
        _, target_TV = oracle.logits(ids)
        best = target_TV[-1].topk(2)
        assert token == int(best.indices[0]) or float(best.values[0] - best.values[1]) < 1e-3
        ids.append(token)
    assert 1 <= len(got) <= 8
    with pytest.raises(ValueError, match="at most 156"):
        await engine.generate([1] * 157, max_new_tokens=100)


async def test_the_target_answers_prompts_for_distillation(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    prompts = [[{"role": "user", "content": f"What is {n} + {n}?"}] for n in range(10)]
    encoder = TextEncoder(load_ensemble(folder).target_path)
    about = {"per_part": 4, "max_new_tokens": 12, "temperature": 1.0}
    corpus = Corpus(tmp_path / "corpus", about)
    assert await synthesize(engine, encoder, corpus, prompts) == 10
    texts = corpus.read(320)
    assert [text.key for text in texts] == [conversation_key(messages=turns) for turns in prompts]
    for text, messages in zip(texts, prompts, strict=True):
        rendered = encoder.encode(encoder.render(messages), "x", rendered=True)
        assert text.token_ids[: text.response_start] == rendered.token_ids[:-1]
        assert 1 <= len(text.token_ids) - text.response_start <= 12
    # A part that a stop cost is made again, the others are not.
    del corpus.parts["part-00001.jsonl"]
    kept = (tmp_path / "corpus/part-00002.jsonl").read_bytes()
    assert await synthesize(engine, encoder, corpus, prompts) == 4
    assert (tmp_path / "corpus/part-00002.jsonl").read_bytes() == kept
    assert len(Corpus(tmp_path / "corpus", about).read(320)) == 10


def test_no_process_is_left_of_a_front_end_that_was_killed(folder: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from drafts.engine import *\n"
        "async def main():\n"
        "    config = EngineConfig(ensemble=Path(sys.argv[1]), max_model_len=64)\n"
        "    engine = await Engine.start(config)\n"
        "    print('up', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "if __name__ == '__main__': asyncio.run(main())\n"
    )
    script = folder.parent / "front.py"
    script.write_text(code)
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert b"up\n" in iter(process.stdout.readline, b"")  # vLLM may log before it
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


async def test_zz_a_shut_down_engine_says_so(engine: Engine) -> None:
    """Last of this file: it ends the shared engine."""
    texts = some_texts(5)
    waiting = asyncio.gather(*(engine.score(*text) for text in texts), return_exceptions=True)
    await asyncio.sleep(0.01)
    await engine.shutdown()
    for result in await asyncio.wait_for(waiting, 30):
        assert isinstance(result, TokenScores | EngineNotReady)
    with pytest.raises(EngineNotReady):
        await engine.score([1, 2], 1)
    with pytest.raises(EngineNotReady):
        await engine.check_health()
