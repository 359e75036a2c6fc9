"""The passes in C against the same by torch, and both against `drafts.divergence`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drafts import passes
from drafts.divergence import measures
from drafts.passes import local_scales, measure_rows, target_rows
from drafts.residual import LOCAL_TOKENS, confidence, likeliest, local_scale

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["C", "torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(passes, "_library", lambda: None)
    else:
        assert passes.is_compiled(), "a compiler is among what these tests need"


def some_logits(seed: int, *shape: int, spread: float = 4.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 31, 320, 4097, 49152])
def test_a_target_is_read(vocab: int, dtype: torch.dtype) -> None:
    logits = some_logits(vocab, 5, vocab).to(dtype)
    tokens = torch.arange(5) % vocab
    rows = target_rows(logits, tokens, 256)
    exact = logits.double()
    logp = torch.log_softmax(exact, -1)
    torch.testing.assert_close(rows.top, exact.amax(-1).float())
    picked = logp.gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(rows.logprob, picked.float(), atol=1e-5, rtol=0)
    entropy = measures(logp[None], logp).entropy.float()
    torch.testing.assert_close(rows.entropy, entropy, atol=1e-5, rtol=1e-5)
    rank = (logits >= logits.gather(-1, tokens[:, None])).sum(-1)
    assert rows.rank.tolist() == rank.tolist()
    values, _ = likeliest(logits)
    torch.testing.assert_close(rows.likeliest.sort(-1, descending=True).values, values)
    torch.testing.assert_close(logits.float().gather(-1, rows.ids), rows.likeliest)
    for ids in rows.ids:
        assert len(ids.unique()) == min(256, vocab)
    if vocab > 1:
        torch.testing.assert_close(rows.confidence(), confidence(logits), atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 4, 16])
@pytest.mark.parametrize("vocab", [2, 320, 5000])
def test_drafts_are_measured(vocab: int, k: int, dtype: torch.dtype) -> None:
    target = some_logits(1, 7, vocab).to(dtype)
    drafts = some_logits(2, k, 7, vocab, spread=2.0).to(dtype)
    scale = torch.rand(k, 7, generator=torch.Generator().manual_seed(3)) * 2
    scale[k // 2] = math.nan  # has logits of its own
    rows = target_rows(target, torch.zeros(7, dtype=torch.int64), 256)
    got = measure_rows(target, rows, drafts, scale)
    own = scale.isnan().unsqueeze(-1)
    changed = target.double() + scale.nan_to_num().double().unsqueeze(-1) * drafts.double()
    expected = measures(torch.where(own, drafts.double(), changed), target.double())
    for name, values in zip(("total", "jsd", "kl"), got, strict=True):
        exact = getattr(expected, name).float()
        torch.testing.assert_close(values, exact, atol=2e-5, rtol=2e-5, msg=name)


@pytest.mark.usefixtures("how")
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 6),
    vocab=st.integers(1, 700),
    spread=st.floats(0.0, 200.0),
)
def test_identity_and_bounds(seed: int, k: int, vocab: int, spread: float) -> None:
    target = some_logits(seed, 3, vocab, spread=spread)
    drafts = some_logits(seed + 1, k, 3, vocab, spread=spread)
    rows = target_rows(target, torch.zeros(3, dtype=torch.int64), 8)
    total, jsd, kl = measure_rows(target, rows, drafts, torch.full((k, 3), math.nan))
    assert bool(((jsd >= 0) & (jsd <= math.log(k) + 1e-6) & (kl >= 0) & (total >= 0)).all())
    p, q = torch.log_softmax(target.double(), -1), torch.log_softmax(drafts.double(), -1)
    floor = math.log(torch.finfo(torch.float32).tiny)
    p, q = p.clamp_min(floor), q.clamp_min(floor)
    mean = (q.exp() * (q - p)).sum(-1).mean(0)
    np.testing.assert_allclose((jsd + kl).double(), mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [3, 5000])
def test_draws_are_scaled_as_torch_does(vocab: int, dtype: torch.dtype) -> None:
    target = some_logits(1, 9, vocab).to(dtype)
    changes = some_logits(2, 5, 9, vocab, spread=0.7).to(dtype)
    share = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 1.0, 0]])  # two students, 3 draws of them
    wanted = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) * 0.3
    rows = target_rows(target, torch.zeros(9, dtype=torch.int64), LOCAL_TOKENS)
    got = local_scales(rows, changes, share, wanted)
    change = changes.gather(-1, rows.ids.expand(5, -1, -1)).float()
    expected = local_scale(change, rows.likeliest, wanted, share)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("how")
def test_equal_drafts_do_not_disagree() -> None:
    target = some_logits(1, 4, 1000)
    rows = target_rows(target, torch.zeros(4, dtype=torch.int64), 256)
    drafts = some_logits(2, 1, 4, 1000).expand(3, -1, -1)
    _, jsd, kl = measure_rows(target, rows, drafts, torch.full((3, 4), math.nan))
    assert bool((jsd < 1e-6).all())
    assert bool((kl > 0).all())
    _, jsd, kl = measure_rows(target, rows, drafts, torch.zeros(3, 4))
    assert bool((jsd < 1e-6).all())
    assert bool((kl < 1e-6).all())


@pytest.mark.usefixtures("how")
def test_rows_do_not_mix_and_strides_are_kept() -> None:
    wide = some_logits(1, 9, 405)
    target = wide[:, :400]  # the rows of a larger array
    drafts = some_logits(2, 2, 9, 400)
    tokens = torch.arange(9) * 40
    scale = torch.ones(2, 9)
    rows = target_rows(target, tokens, 16)
    together = measure_rows(target, rows, drafts, scale)
    for t in range(9):
        part = slice(t, t + 1)
        alone = target_rows(target[part].clone(), tokens[part], 16)
        for one, all_of_them in zip(alone, rows.rows(part), strict=True):
            torch.testing.assert_close(one, all_of_them, rtol=1e-6, atol=1e-6)
        got = measure_rows(target[part], alone, drafts[:, part], scale[:, part])
        torch.testing.assert_close(got, together[:, part], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_rows_are_told_and_spoil_no_other(bad: float) -> None:
    target = some_logits(1, 3, 300)
    target[1, 77] = bad
    rows = target_rows(target, torch.zeros(3, dtype=torch.int64), 16)
    assert rows.entropy.isnan().tolist() == [False, True, False]
    assert rows.logprob.isnan().tolist() == [False, True, False]
    drafts = some_logits(2, 2, 3, 300)
    _, _, kl = measure_rows(target, rows, drafts, torch.ones(2, 3))
    assert bool(kl[[0, 2]].isfinite().all())
    drafts[1, 0, 5] = bad
    whole = target_rows(some_logits(1, 3, 300), torch.zeros(3, dtype=torch.int64), 16)
    _, jsd, _ = measure_rows(some_logits(1, 3, 300), whole, drafts, torch.ones(2, 3))
    assert jsd.isfinite().tolist() == [False, True, True]


@pytest.mark.usefixtures("how")
def test_tokens_that_cannot_be_are_no_trouble() -> None:
    """Logits of minus infinity, as padding of the vocabulary has them."""
    target = some_logits(1, 2, 300)
    target[:, 290:] = -math.inf
    rows = target_rows(target, torch.tensor([0, 289]), 299)
    drafts = some_logits(2, 2, 2, 300)
    got = measure_rows(target, rows, drafts, torch.ones(2, 2))
    short = target[:, :290].contiguous()
    fewer = target_rows(short, torch.tensor([0, 289]), 290)
    torch.testing.assert_close(rows.entropy, fewer.entropy)
    expected = measure_rows(short, fewer, drafts[..., :290], torch.ones(2, 2))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_of_tokens_alike_the_first_are_taken() -> None:
    rows = target_rows(torch.zeros(2, 1000), torch.zeros(2, dtype=torch.int64), 256)
    assert rows.ids.tolist() == [list(range(256))] * 2
    assert rows.runner_up.tolist() == [0.0, 0.0]


def test_what_does_not_fit_is_refused() -> None:
    target = some_logits(1, 3, 300)
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.299"):
        target_rows(target, torch.tensor([0, 1, 300]), 16)
    with pytest.raises(ValueError, match="side by side"):
        target_rows(target.T, torch.zeros(300, dtype=torch.int64), 2)
    rows = target_rows(target, torch.zeros(3, dtype=torch.int64), 16)
    with pytest.raises(ValueError, match="do not fit"):
        measure_rows(target, rows, some_logits(2, 2, 2, 300), torch.ones(2, 3))
