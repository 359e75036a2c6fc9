"""The engine against plain transformers, on a real model with all three kinds of draft."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from drafts.exits import copy_exit
from drafts.init import default_folder, init_default, write_manifest
from drafts.manifest import load_ensemble
from drafts.reference import Reference
from drafts.residual import ResidualConfig
from drafts.scores import TokenScores
from drafts.text import EncodedText, TextEncoder
from tests.engine_checks import MEASURES, assert_close, joined, running
from tests.texts import answers
from tests.tiny import edit_manifest, perturb, save_residual

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exits of unlike depth, a small model, and two draws of a residual head."""
    init_default(default_folder())
    target = default_folder() / "target"
    folder = tmp_path_factory.mktemp("smollm")
    config = ResidualConfig(hidden_size=576, taps=[10, 20], rank=64, factors=8, width=128, draws=2)
    save_residual(folder / "student", 0, config, scale=0.05)
    drafts = [
        copy_exit(target, folder / "exit_a", own_layers=3, layer=25),
        copy_exit(target, folder / "exit_b", own_layers=2, layer=26),
        _short_model(target, folder / "model_a"),
        {"name": "residual_a", "kind": "residual", "source": "student", "draw": 0},
        {"name": "residual_b", "kind": "residual", "source": "student", "draw": 1},
    ]
    write_manifest(folder, "smollm-mixed", "v1", str(target), drafts)
    return folder


def _short_model(target: Path, folder: Path) -> dict[str, object]:
    """A language model of its own: the target without its layers 4 to 26."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / file, folder)
    config = json.loads((target / "config.json").read_text())
    kept = [0, 1, 2, 3, 27, 28, 29]
    weights = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        weights[".".join(parts)] = tensor.clone()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(kept)}))
    return {"name": "model_a", "kind": "model", "source": "model_a"}


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[EncodedText]:
    encoder = TextEncoder(load_ensemble(folder).target_path)
    return [
        encoder.encode(
            encoder.render([{"role": "user", "content": question}]), answer, rendered=True
        )
        for question, answer in answers()
    ]


@pytest.fixture(scope="module")
def reference(folder: Path, texts: list[EncodedText]) -> list[TokenScores]:
    oracle = Reference(load_ensemble(folder))
    return [oracle.score(text.token_ids, text.response_start) for text in texts]


async def test_float32_alone_and_in_a_batch(
    folder: Path, texts: list[EncodedText], reference: list[TokenScores]
) -> None:
    async with running(folder, dtype="float32") as engine:
        alone = [await engine.score(text.token_ids, text.response_start) for text in texts]
        batch = await asyncio.gather(
            *(engine.score(text.token_ids, text.response_start) for text in texts)
        )
    assert_close(alone, reference)
    assert_close(batch, reference)
    # The row of token i predicts token i, the first and the last included: a row off by one would
    # be off by nats.
    for got, expected in zip(batch, reference, strict=True):
        assert len(got) == len(expected)
        assert abs(got.logprob[[0, -1]] - expected.logprob[[0, -1]]).max() <= 1e-3
    # Ranks are whole numbers: they may differ only where two logits nearly tie.
    ranks = joined(batch, "rank"), joined(reference, "rank")
    assert (ranks[0] == ranks[1]).mean() > 0.99


async def test_float32_with_prefill_in_small_chunks(
    folder: Path, texts: list[EncodedText], reference: list[TokenScores]
) -> None:
    async with running(
        folder, dtype="float32", max_num_batched_tokens=48, max_num_seqs=8
    ) as engine:
        got = await asyncio.gather(
            *(engine.score(text.token_ids, text.response_start) for text in texts)
        )
    assert_close(got, reference)


async def test_bfloat16_ranks_tokens_alike(
    folder: Path, texts: list[EncodedText], reference: list[TokenScores], tmp_path: Path
) -> None:
    async with running(folder, dtype="bfloat16") as engine:
        got = await asyncio.gather(
            *(engine.score(text.token_ids, text.response_start) for text in texts)
        )
        # And after a swap, which repacks the weights in another way than in float32.
        other = shutil.copytree(folder, tmp_path / "v2")
        for index, name in enumerate(("exit_a", "exit_b", "model_a", "student")):
            perturb(other / name, seed=index, scale=0.05)
        edit_manifest(other, weights_version="v2")
        await engine.swap(other)
        few = texts[::4]
        swapped = [await engine.score(text.token_ids, text.response_start) for text in few]
    _assert_ranked_alike(got, reference)
    oracle = Reference(load_ensemble(other))
    _assert_ranked_alike(
        swapped, [oracle.score(text.token_ids, text.response_start) for text in few]
    )


def _assert_ranked_alike(got: list[TokenScores], expected: list[TokenScores]) -> None:
    for measure in MEASURES:
        rho = spearmanr(joined(got, measure), joined(expected, measure)).statistic
        assert rho >= 0.99, f"{measure}: Spearman {rho:.4f}"
