"""Residual head, metric channel, gate, spans, aggregation and settings, each by itself."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm.logprobs import FlatLogprobs

from drafts import channel
from drafts.aggregate import aggregate
from drafts.divergence import measures
from drafts.errors import NonFiniteError
from drafts.gate import Gate
from drafts.outputs import read_step
from drafts.passes import target_rows
from drafts.residual import LOCAL_TOKENS, ResidualConfig, ResidualHead, confidence, draw_scale
from drafts.residual_group import ResidualGroup
from drafts.scores import TokenScores
from drafts.spans import find_spans
from server.settings import Settings, read_settings

# Residual head.


def residual_head(**changes: Any) -> ResidualHead:
    shape = {"hidden_size": 8, "taps": [2], "rank": 3, "factors": 2, "width": 5, "draws": 4}
    config = ResidualConfig.model_validate(shape | changes)
    return ResidualHead(config).initialise(torch.Generator().manual_seed(0), scale=0.5)


def test_residual_is_its_formula() -> None:
    head = residual_head()
    h, tap, unembed = torch.randn(6, 8), torch.randn(6, 8), torch.randn(30, 8)
    logits, directions = h @ unembed.T, unembed @ head.basis
    moves = head.moves(h, [tap], confidence(logits))
    assert (moves.sigma_Tr > 0).all()
    assert moves.kl_T is not None
    assert (moves.kl_T > 0).all()
    drawn = moves.at(head.z[[1, 3]], head.eps[[1, 3]])
    # Scaled for the two draws in use, not for the four that are kept.
    scale = draw_scale(drawn, moves.kl_T, directions, logits).unsqueeze(-1)
    both = head(h, [tap], logits, directions, [1, 3])
    for place, (draw, moved) in enumerate(zip((1, 3), both, strict=True)):
        move = moves.mu_Tr + torch.einsum("trq,q->tr", moves.phi_Trq, head.z[draw])
        move = move + moves.sigma_Tr * head.eps[draw]
        torch.testing.assert_close(drawn[place], move)
        expected = h + torch.einsum("dr,tr->td", head.basis, scale * move)
        torch.testing.assert_close(moved, expected)


def test_draws_that_are_not_scaled_are_as_they_were_drawn() -> None:
    head = residual_head(scaled=False)
    h, tap, unembed = torch.randn(6, 8), torch.randn(6, 8), torch.randn(30, 8)
    logits, directions = h @ unembed.T, unembed @ head.basis
    drawn = head.moves(h, [tap], confidence(logits)).at(head.z, head.eps)
    for draw, moved in enumerate(head(h, [tap], logits, directions, [0, 1, 2, 3])):
        torch.testing.assert_close(moved, h + drawn[draw] @ head.basis.T)


def test_residual_draws_differ_and_stay_fixed() -> None:
    head = residual_head(taps=[], draws=2)
    h, unembed = torch.randn(4, 8), torch.randn(30, 8)
    inputs = (h, [], h @ unembed.T, unembed @ head.basis)
    one, other = head(*inputs, [0, 1])
    assert not torch.allclose(one, other)
    again = residual_head(taps=[], draws=2)
    again.load_weights(head.state_dict().items())
    torch.testing.assert_close(again(*inputs, [1, 0])[1], one)


@given(
    draws=st.integers(1, 6),
    vocab=st.integers(3, 300),
    kl=st.floats(1e-5, 1.0),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_scaled_draws_have_the_mean_kl_that_is_asked_for(
    draws: int, vocab: int, kl: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    drawn, directions, logits = random(draws, 5, 3), random(vocab, 3), 3 * random(5, vocab)
    wanted = torch.full((5,), kl)
    scale = draw_scale(drawn, wanted, directions, logits)
    assert ((scale > 0) & (scale <= 2.0001)).all()
    moved = logits + scale.unsqueeze(-1) * drawn @ directions.T
    got = measures(moved, logits).epistemic
    if vocab <= 256:  # no tokens are left out
        # Too little where twice the draws is not enough, never too much.
        assert (got <= kl * 1.02 + 1e-6).all()
        near = (got - kl).abs() <= 0.02 * kl + 1e-6
        assert (near | (scale > 1.999)).all()
    else:
        assert (got <= 1.5 * kl + 1e-6).all()


def test_a_step_that_holds_several_tokens_is_read_like_each_alone() -> None:
    """vLLM merges steps through a dict, which leaves out what it has twice."""

    def step(*rows: list[tuple[int, float]]) -> SimpleNamespace:
        flat = FlatLogprobs()
        for row in rows:
            ids, values = [token for token, _ in row], [value for _, value in row]
            flat.append_fast(
                ids, values, itertools.chain([8], range(1, len(ids))), [None] * len(ids)
            )
        return SimpleNamespace(
            token_ids=[row[0][0] for row in rows], logprobs=flat, finish_reason=None
        )

    columns = [(100 + i, 2.5 + i) for i in range(channel.M)]
    likely = [(7, -1.0), *columns, (7, -1.0), (8, -2.0)]  # sampled: the likeliest
    unlikely = [(9, -5.0), *columns, (7, -1.0), (8, -2.0)]  # sampled: beyond them
    apart = [read_step(step(row), 2, 100, "v1") for row in (likely, unlikely)]
    merged = step(likely)
    merged.logprobs.extend(step(unlikely).logprobs)
    merged.token_ids.append(9)
    twice = step(likely)
    twice.logprobs = FlatLogprobs()
    twice.logprobs.extend(step(likely).logprobs)  # as vLLM does
    together = read_step(merged, 2, 100, "v1")
    assert together.likeliest == [one.likeliest[0] for one in apart]
    assert [[token for token, _ in row] for row in together.likeliest] == [[7, 8], [7, 8]]
    assert read_step(twice, 2, 100, "v1").likeliest == apart[0].likeliest
    assert together.scores is not None
    assert together.scores.logprob.tolist() == [-1.5, -5.5]
    assert together.scores.rank.tolist() == [3, 3]


@pytest.mark.parametrize("share", [False, True])
def test_a_group_of_students_does_what_each_does_alone(share: bool) -> None:
    """The vLLM model's arrangement against the reference's, with unlike students.

    Args:
        share: two of them move h along the same basis.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shape = {"hidden_size": 12, "rank": 4, "factors": 2, "width": 8}
    students = [
        (ResidualConfig(**shape, taps=[1], draws=4), [0, 2, 3]),
        (ResidualConfig(**shape, taps=[], draws=2, scaled=False), [1, 0]),
        (ResidualConfig(**shape, taps=[2, 3], draws=1), [0]),
        (ResidualConfig(**shape, taps=[2, 3], draws=1), [0]),
    ]
    group = ResidualGroup(students)
    unembed, h, taps = random(40, 12), random(5, 12), [random(5, 12) for _ in range(3)]
    logits = h @ unembed.T
    expected = []
    with torch.no_grad():
        for head in group.heads:
            head.initialise(generator, scale=0.5)
        if share:
            group.heads[1].basis.copy_(group.heads[0].basis)
        for head, (config, draws) in zip(group.heads, students, strict=True):
            mine = [taps[layer - 1] for layer in config.taps]
            moved = head(h, mine, logits, unembed @ head.basis, draws)
            expected += [state @ unembed.T for state in moved]
        rows = target_rows(logits, torch.zeros(5, dtype=torch.int64), LOCAL_TOKENS)
        group.prepare(lambda states: states @ unembed.T)
        moves, wanted = group.moves(h, dict(enumerate(taps, start=1)), rows.confidence())
        changes = group.changes(moves)
        scales = group.scales(changes, wanted, rows)
    got = logits + scales.unsqueeze(-1) * changes
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=1e-4)
    # Were the draws alike or hardly moved, this would show nothing.
    assert (got - logits).abs().amax((-1, -2)).min() > 0.1


def test_confidence_is_that_of_the_distribution() -> None:
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0], [0.25] * 4])
    entropy, spread, first, second = confidence(p.log() + 3).T
    log2 = math.log(2)
    torch.testing.assert_close(entropy, torch.tensor([1.75, 0.0, 2.0]) * log2)
    # -log2 p is 1, 2, 3, 3: its mean square is 0.5 + 4 / 4 + 9 / 4.
    expected = torch.tensor([(3.75 - 1.75**2) ** 0.5, 0.0, 0.0]) * log2
    torch.testing.assert_close(spread, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(first, torch.tensor([-1.0, 0.0, -2.0]) * log2)
    torch.testing.assert_close(second, torch.tensor([-2 * log2, -10.0, -2 * log2]))


# Metric channel.


@given(
    st.lists(st.tuples(*[st.floats(0, 90)] * channel.M), min_size=1, max_size=5),
    st.integers(10, 60_000),
    st.randoms(),
)
@settings(max_examples=200, deadline=None)
def test_the_channel_loses_less_than_1e_5(
    rows: list[tuple[float, ...]], vocab: int, rng: object
) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    columns = channel.encode(values)
    assert columns.dtype == torch.float32
    assert (columns > 0).all(), "a column must lie above every shifted logit"
    order = torch.stack([torch.randperm(channel.M) for _ in rows])  # top-k sorts by value
    got = channel.decode(
        np.zeros(len(rows)),
        (order + vocab).numpy(),
        columns.gather(1, order).double().numpy(),
        vocab,
    )
    for index, name in enumerate(channel.COLUMNS):
        assert np.abs(got[name] - values[:, index].numpy()).max() <= 1e-5
    assert np.abs(got["logprob"] + values[:, 0].numpy()).max() <= 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_channel_reports_what_is_not_finite(bad: float) -> None:
    values = torch.ones(2, channel.M)
    values[1, 2] = bad
    ids = np.arange(100, 100 + channel.M)[None].repeat(2, 0)
    with pytest.raises(NonFiniteError):
        channel.decode(np.zeros(2), ids, channel.encode(values).double().numpy(), 100)


def test_the_channel_reports_tokens_in_place_of_columns() -> None:
    ids = np.arange(99, 99 + channel.M)[None]
    with pytest.raises(NonFiniteError, match="where the metric columns belong"):
        channel.decode(np.zeros(1), ids, np.full((1, channel.M), 2.0), 100)


# Gate.


async def test_gate_lets_requests_share_and_swaps_be_alone() -> None:
    gate, log = Gate(), []

    async def request(name: str, seconds: float) -> None:
        async with gate.shared():
            log.append(f"+{name}")
            await asyncio.sleep(seconds)
            log.append(f"-{name}")

    async def swap() -> None:
        async with gate.alone():
            log.append("+swap")
            await asyncio.sleep(0.01)
            log.append("-swap")

    first = [asyncio.create_task(request(name, 0.02)) for name in "ab"]
    await asyncio.sleep(0.005)
    alone = asyncio.create_task(swap())
    await asyncio.sleep(0)
    late = asyncio.create_task(request("c", 0))
    await asyncio.wait_for(asyncio.gather(*first, alone, late), 5)
    assert log[:2] == ["+a", "+b"]  # side by side
    assert sorted(log[2:4]) == ["-a", "-b"]
    assert log[4:] == ["+swap", "-swap", "+c", "-c"]  # a waiting swap keeps later ones out


@pytest.mark.parametrize("victim", ["holder", "swap", "waiter"])
async def test_gate_survives_cancellation(victim: str) -> None:
    gate = Gate()

    async def hold() -> None:
        async with gate.shared():
            await asyncio.sleep(0.02)

    async def swap() -> None:
        async with gate.alone():
            pass

    tasks = {"holder": asyncio.create_task(hold())}
    await asyncio.sleep(0)
    tasks["swap"] = asyncio.create_task(swap())
    await asyncio.sleep(0)
    tasks["waiter"] = asyncio.create_task(hold())
    await asyncio.sleep(0.001)
    tasks[victim].cancel()
    await asyncio.wait(tasks.values(), timeout=5)
    assert all(task.done() for task in tasks.values())
    await asyncio.wait_for(swap(), 5)
    await asyncio.wait_for(hold(), 5)


# Spans.


def cut(text: str, *pieces: str) -> list[tuple[int, int]]:
    offsets, position = [], 0
    for piece in pieces:
        offsets.append((position, position + len(piece)))
        position += len(piece)
    assert "".join(pieces) == text
    return offsets


def spans_of(text: str, pieces: list[str], values: list[float]) -> list[str]:
    spans = find_spans(text, cut(text, *pieces), np.array(values))
    return [text[span.start : span.end] for span in spans]


def test_spans_grow_to_whole_words_and_numbers() -> None:
    pieces = ["It", " is", " Nai", "robi", ",", " 1", ",", "2", "5", "0", " km", "."]
    text = "".join(pieces)
    assert spans_of(text, pieces, [0, 0, 0, 9, 0, 0, 0, 0, 9, 0, 0, 0]) == ["Nairobi", "1,250"]


def test_adjacent_doubtful_words_are_one_span() -> None:
    pieces = ["a", " bb", " cc", " d", " e", " f"]
    assert spans_of("a bb cc d e f", pieces, [0, 9, 9, 0, 0, 0]) == ["bb cc"]


def test_scripts_without_spaces_are_cut_by_character() -> None:
    assert spans_of("日本の首都", list("日本の首都"), [0, 0, 0, 9, 0]) == ["首"]


def test_an_empty_token_counts_with_the_character_it_opens() -> None:
    offsets = [(0, 1), (1, 1), (1, 1), (1, 2), (2, 3)]
    spans = find_spans("a🎉b", offsets, np.array([0, 9.0, 0, 0, 0]))
    assert [(span.start, span.end) for span in spans] == [(1, 2)]
    assert spans[0].epistemic_mean == pytest.approx(3.0)
    assert spans[0].epistemic_max == 9.0


def test_an_even_response_has_no_spans() -> None:
    assert spans_of("a b c", ["a", " b", " c"], [1, 1, 1]) == []
    assert spans_of("a", ["a"], [7]) == []


# Aggregation.


def test_aggregate_names_say_what_they_are() -> None:
    x = np.array([1.0, 2.0, 6.0])
    scores = TokenScores(-x, x.astype(np.int64), x, 2 * x, x, 3 * x, "v")
    got = aggregate(scores)
    assert got["n_tokens"] == 3
    assert got["epistemic_mean"] == pytest.approx(12.0)
    assert got["epistemic_max"] == pytest.approx(24.0)
    assert got["epistemic_sum"] == pytest.approx(36.0)
    assert got["logprob_mean"] == pytest.approx(-3.0)
    assert got["logprob_min"] == pytest.approx(-6.0)


# Settings.


def test_environment_goes_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "demur.toml"
    file.write_text('port = 9000\nhost = "0.0.0.0"\napi_keys = ["hush"]\n')
    monkeypatch.setenv("DEMUR_CONFIG", str(file))
    monkeypatch.setenv("DEMUR_PORT", "9001")
    got = Settings()
    assert (got.port, got.host) == (9001, "0.0.0.0")
    assert "hush" not in repr(got)  # keys are not printed
    assert got.engine_config().dtype == got.dtype == "bfloat16"


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_CONFIG", "/no/such/demur.toml")
    with pytest.raises(ValueError, match="no file"):
        Settings()  # without it the service would start without its keys


def test_errors_do_not_print_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "demur.toml"
    file.write_text('api_keys = "hush"\n')
    monkeypatch.setenv("DEMUR_CONFIG", str(file))
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "hush" not in str(caught.value)


def test_a_full_list_must_fit_the_queue() -> None:
    with pytest.raises(ValidationError, match="never fit"):
        Settings(max_pending=10)


def test_unknown_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "demur.toml"
    file.write_text("prot = 9000\n")
    monkeypatch.setenv("DEMUR_CONFIG", str(file))
    with pytest.raises(ValidationError, match="prot"):
        Settings()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("API_KEYS", '["good", ""]', "api_keys: a key is empty"),
        ("API_KEYS", "secret", "DEMUR_API_KEYS .* must be JSON lists"),
        ("KV_CACHE_GIB", "inf", "kv_cache_gib: .*finite"),
        ("PORT", "70000", "port: .*65535"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"DEMUR_{name}", value)
    with pytest.raises(ValueError, match=message) as raised:
        read_settings()
    assert "secret" not in str(raised.value)


def test_a_broken_settings_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "demur.toml").write_text("port = = 1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"demur\.toml cannot be read"):
        read_settings()
