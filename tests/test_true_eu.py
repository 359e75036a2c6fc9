"""The reference EU*: against a plain computation, unbiased in the number of draws, resumable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drafts.divergence import measures
from osd.corpus import Text
from osd.posterior import PosteriorConfig, WeightPosterior
from osd.schedule import derived_seed
from osd.teacher import Teacher
from osd.true_eu import true_eu
from tests.tiny import save_lm

TEXTS = [
    Text(key=n, response_start=3 + n % 2, token_ids=[(7 * n + i * i) % 320 for i in range(8 + n)])
    for n in range(10)
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    model = AutoModelForCausalLM.from_pretrained(save_lm(tmp_path_factory.mktemp("t") / "lm", 1))
    return Teacher(model, WeightPosterior(model, PosteriorConfig()))


def compute(teacher: Teacher, cache: Path, draws: int, seed: int = 0) -> list[np.ndarray]:
    found = true_eu(teacher, TEXTS, draws=draws, max_tokens=64, seed=seed, cache=cache)
    return [np.stack([eu.whole, eu.first, eu.second, eu.shift]) for eu in found]


def test_it_is_the_plain_computation(teacher: Teacher, tmp_path: Path) -> None:
    got = compute(teacher, tmp_path, draws=12)
    # Batches are of like length, eight texts each; the shortest eight come first.
    for index, start in ((0, 0), (9, 8)):
        text = TEXTS[index]
        ids = torch.tensor([text.token_ids])
        rows = slice(text.response_start - 1, len(text.token_ids) - 1)
        logits = []
        for draw in range(12):
            with teacher.posterior.sampled(derived_seed(0, start) + draw), torch.no_grad():
                logits.append(teacher.model(ids).logits[0, rows])
        with torch.no_grad():
            clean = teacher.model(ids).logits[0, rows]
        whole = measures(torch.stack(logits), clean)
        halves = [measures(torch.stack(part), clean) for part in (logits[:6], logits[6:])]
        expected = [whole.jsd * 12 / 11, *(half.jsd * 6 / 5 for half in halves)]
        for value, want in zip(got[index], [*expected, None], strict=True):
            if want is not None:
                np.testing.assert_allclose(value, want.numpy(), atol=2e-5)
        # KL(p_T || p), the posterior mean first.
        p_mean = torch.softmax(torch.stack(logits), -1).mean(0)
        shift = (p_mean * (p_mean.log() - torch.log_softmax(clean, -1))).sum(-1)
        np.testing.assert_allclose(got[index][3], shift.numpy(), atol=2e-5)


def test_few_draws_are_right_on_average(teacher: Teacher, tmp_path: Path) -> None:
    """Without the correction, four draws would see three quarters of it."""
    many = np.concatenate([eu[0] for eu in compute(teacher, tmp_path / "many", 64)])
    few = np.mean(
        [
            np.concatenate([eu[0] for eu in compute(teacher, tmp_path / f"few{n}", 4, seed=n + 1)])
            for n in range(16)
        ],
        axis=0,
    )
    assert few.mean() / many.mean() == pytest.approx(1, abs=0.08)


def test_what_was_computed_is_not_computed_again(teacher: Teacher, tmp_path: Path) -> None:
    first = compute(teacher, tmp_path, draws=4)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    stamp = files[0].stat().st_mtime_ns
    files[1].unlink()
    again = compute(teacher, tmp_path, draws=4)
    assert files[0].stat().st_mtime_ns == stamp
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
