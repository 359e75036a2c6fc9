"""States that are kept on disk are those that a forward pass makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafts.divergence import jsd
from osd.corpus import Text
from osd.posterior import PosteriorConfig, WeightPosterior
from osd.states import FreshStates, KeptStates
from osd.teacher import Teacher, collate
from tests.tiny import save_lm

MAX_TOKENS = 20
LAYERS = [1, 3]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def teacher(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Teacher:
    folder = save_lm(tmp_path_factory.mktemp("states") / "target", seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, request.param))
    return Teacher(model, WeightPosterior(model, PosteriorConfig(sigma=0.3)))


def some_texts(count: int = 21) -> list[Text]:
    generator = torch.Generator().manual_seed(5)
    texts = []
    for key in range(count):
        ids = torch.randint(0, 320, (6 + 7 * key % 19,), generator=generator).tolist()
        texts.append(Text(key=key, response_start=1 + key % 4, token_ids=ids))
    return texts


def kept(teacher: Teacher, texts: list[Text], folder: Path, **changes: Any) -> KeptStates:
    values: dict[str, Any] = {"layers": LAYERS, "draws": 2, "max_tokens": MAX_TOKENS, "seed": 0}
    return KeptStates(teacher, texts, folder=folder, **(values | changes))


def test_kept_eu_is_that_of_the_kept_draws(teacher: Teacher, tmp_path: Path) -> None:
    texts = some_texts()
    states = kept(teacher, texts, tmp_path, draws=3)
    chosen = [texts[3], texts[17], texts[0]]
    batch = collate(chosen, MAX_TOKENS)
    shown = torch.stack([states.draw(chosen, batch, draw, 0) for draw in range(3)])
    got = states.eu(chosen, batch)
    assert got is not None
    logits = shown @ teacher.head_Vd.T
    expected = jsd(torch.log_softmax(logits, -1)) * 3 / 2
    narrow = teacher.model.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=1e-2 if narrow else 1e-5, rtol=0.02)
    assert kept(teacher, texts, tmp_path, draws=1).eu(chosen, batch) is None
    assert FreshStates(teacher, LAYERS).eu(chosen, batch) is None


def test_they_are_what_a_forward_pass_gives(teacher: Teacher, tmp_path: Path) -> None:
    texts = some_texts()
    states = kept(teacher, texts, tmp_path)
    chosen = [texts[3], texts[17], texts[0]]
    batch = collate(chosen, MAX_TOKENS)
    expected_h, expected, expected_confidence = FreshStates(teacher, LAYERS).clean(chosen, batch)
    h, inner, confidence = states.clean(chosen, batch)
    # Batches of other sizes sum in another order.
    narrow = teacher.model.dtype == torch.bfloat16
    tolerance = {"atol": 0.06, "rtol": 0.03} if narrow else {"atol": 1e-5, "rtol": 1e-5}
    assert torch.allclose(h, expected_h, **tolerance)
    assert torch.allclose(confidence, expected_confidence, **tolerance)
    assert inner.keys() == expected.keys() == set(LAYERS)
    for layer, state in inner.items():
        assert state.shape == expected[layer].shape
        assert torch.allclose(
            batch.rows(state).float(), batch.rows(expected[layer]).float(), **tolerance
        )
    first, second = (states.draw(chosen, batch, visit, seed=9) for visit in (0, 1))
    assert not torch.allclose(first, second, atol=1e-2)
    assert not torch.allclose(first, h, atol=1e-2)
    assert torch.equal(states.draw(chosen, batch, 2, seed=8), first)


def test_what_is_there_is_not_made_again(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts()
    first = kept(teacher, texts, tmp_path)
    batch = collate(texts[:3], MAX_TOKENS)
    expected = first.draw(texts[:3], batch, 1, seed=0)
    calls: list[str] = []
    states, draw = Teacher.states, Teacher.draw
    monkeypatch.setattr(
        Teacher, "states", lambda *args, **kw: (calls.append("states"), states(*args, **kw))[1]
    )
    monkeypatch.setattr(
        Teacher, "draw", lambda *args, **kw: (calls.append("draw"), draw(*args, **kw))[1]
    )
    again = kept(teacher, texts, tmp_path)
    assert calls == []
    assert torch.equal(again.draw(texts[:3], batch, 1, seed=0), expected)
    kept(teacher, texts, tmp_path, layers=[2, 3])
    kept(teacher, texts, tmp_path, draws=3)
    assert calls == ["states"] * 3 + ["draw"] * 3  # a layer more, a draw more, for three groups
    calls.clear()
    (tmp_path / first.folder.name / "00001-draw-0.safetensors").unlink()
    kept(teacher, texts, tmp_path)
    assert calls == ["draw"]


def test_another_seed_text_or_target_has_a_folder_of_its_own(
    teacher: Teacher, tmp_path: Path
) -> None:
    texts = some_texts()
    folders = [
        kept(teacher, texts, tmp_path).folder,
        kept(teacher, texts, tmp_path, seed=1).folder,
        kept(teacher, texts[:-1], tmp_path).folder,
        kept(teacher, texts, tmp_path, max_tokens=MAX_TOKENS - 1).folder,
    ]
    with torch.no_grad():
        norm = teacher.model.base_model.norm.weight
        norm.mul_(2)
        folders.append(kept(teacher, texts, tmp_path).folder)
        norm.div_(2)
    assert len(set(folders)) == len(folders)


def test_logits_of_narrow_states_are_exact(teacher: Teacher) -> None:
    batch = collate(some_texts(), MAX_TOKENS)
    final, _ = teacher.states(batch)
    h = batch.rows(final).float()
    exact = h.double() @ teacher.head_Vd.double().T
    assert (teacher.logits(h) - exact).abs().max() < 1e-5
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # type: ignore[attr-defined]
