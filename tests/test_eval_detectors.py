"""Detectors on tokens that are reckoned by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from demur.evals.detectors import (
    OURS,
    STATISTICS,
    TARGETS,
    Answer,
    all_detectors,
    statistic,
    touching,
)
from demur.evals.records import Columns, Record
from scipy.special import digamma

DETECTORS = {detector.name: detector for detector in all_detectors()}
TEXT = ["She", " has ", "1", "2", " eggs", ", so", " ", "3", "4", "."]
RIVALS = ["self_certainty", "logtoku_au", "logtoku_eu"] + [
    f"tokur_{kind}_{count}" for kind in ("tu", "au", "eu") for count in (2, 5, 10)
]


def answer(
    text: Sequence[str] = TEXT,
    *,
    rivals: dict[str, list[float]] | None = None,
    rival_text: Sequence[str] | None = None,
    columns: dict[str, list[float]] | None = None,
    **record: Any,
) -> Answer:
    """An answer whose `entropy` counts its tokens, and what else it is given."""
    known = dict.fromkeys(("logprob", "total", "jsd", "kl"), [0.0] * len(text))
    known["entropy"] = [float(i) for i in range(len(text))]
    return Answer(
        Record(
            id=record.pop("id", "q"),
            task="t",
            group="g",
            half="dev",
            prompt=record.pop("prompt", "How many eggs has she?"),
            accepted=["34"],
            tokens=Columns(text=list(text), **known | (columns or {})),
            **record,
        ),
        {name: np.array(values) for name, values in (rivals or {}).items()},
        list(text if rival_text is None else rival_text),
    )


def doubt(name: str, of: Answer) -> float:
    return DETECTORS[name].doubt(of)


# --- statistics


@pytest.mark.parametrize(
    "reduce, value",
    [
        ("mean", 4.5),
        ("sum", 45),
        ("max", 9),
        ("top 10%", 9),
        ("new words", (2 + 3 + 5 + 7 + 8) / 5),  # 12, so, 34
        ("numbers", (2 + 3 + 7 + 8) / 4),
        ("final number", (7 + 8) / 2),
    ],
)
def test_statistics(reduce: str, value: float) -> None:
    assert doubt(f"entropy {reduce}", answer()) == pytest.approx(value)
    minus = statistic("entropy", reduce, "target", sign=-1.0).doubt(answer())
    expected = {"max": 0.0, "top 10%": 0.0}.get(reduce, -value)
    assert minus == pytest.approx(expected)


@pytest.mark.parametrize(("n", "tenth"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_a_tenth_is_at_least_that(n: int, tenth: int) -> None:
    of = answer(["a"] * n)
    assert doubt("entropy top 10%", of) == pytest.approx(np.mean(range(n - tenth, n)))


@pytest.mark.parametrize(
    "reduce, text, prompt",
    [
        ("numbers", ["no ", "number"], "?"),
        ("final number", ["no ", "number"], "?"),
        ("new words", ["Eggs", " HOW many"], "How many eggs?"),
        ("new words", [".", "!"], "?"),
    ],
)
def test_where_there_are_none_all_tokens_count(reduce: str, text: list[str], prompt: str) -> None:
    assert doubt(f"entropy {reduce}", answer(text, prompt=prompt)) == 0.5


@pytest.mark.parametrize(
    "text, spans, expected",
    [
        (["ab", "cd", "ef"], [(2, 4)], [1]),
        (["ab", "cd", "ef"], [(1, 3)], [0, 1]),  # they cut tokens
        (["ab", "cd", "ef"], [(0, 1), (5, 6)], [0, 2]),
        (["ab", "cd", "ef"], [], []),
        (["abcdef"], [(2, 3)], [0]),
        # A character in several tokens is the last one's, and the others are empty.
        (["a", "", "", "é", "b"], [(1, 2)], [1, 2, 3]),
        (["a", "", "", "é", "b"], [(0, 1)], [0]),
        (["a", "", "", "é", "b"], [(2, 3)], [4]),
        (["a", "", "é"], [(0, 2)], [0, 1, 2]),
        ([], [(0, 1)], []),
    ],
)
def test_tokens_that_touch_spans(
    text: list[str], spans: list[tuple[int, int]], expected: list[int]
) -> None:
    assert np.flatnonzero(touching(text, spans)).tolist() == expected


def test_numbers_begin_with_the_bytes_of_their_sign() -> None:
    of = answer(["costs", " ", "", "€", "1", "8", " ", "now"])
    assert doubt("entropy numbers", of) == np.mean([2, 3, 4, 5])


# --- measures


def test_measures_of_the_service() -> None:
    columns = {
        "logprob": [-1.0, -2.0],
        "entropy": [0.5, 1.0],
        "total": [2.0, 3.0],
        "jsd": [0.25, 0.5],
        "kl": [1.0, 2.0],
    }
    of = answer(["a", "b"], columns=columns)
    means = {name: doubt(f"{name} mean", of) for name in (*OURS, *TARGETS)}
    assert means == {
        "total": 2.5,
        "epistemic": (1.25 + 2.5) / 2,
        "jsd": 0.375,
        "kl": 1.5,
        "aleatoric": (1.75 + 2.5) / 2,
        "surprisal": 1.5,
        "entropy": 0.75,
    }
    assert doubt("perplexity", of) == pytest.approx(math.exp(1.5))
    assert doubt("length", of) == 2


def test_perplexity_has_an_end() -> None:
    of = answer(["a"], columns={"logprob": [-1e6]})
    assert math.isfinite(doubt("perplexity", of))


def test_rivals_have_tokens_of_their_own() -> None:
    """Of the same text, but cut otherwise."""
    of = answer(
        ["is 1", "8"], rivals={"tokur_eu_5": [0.0, 8.0, 16.0]}, rival_text=["is", " ", "18"]
    )
    assert doubt("tokur_eu_5 final number", of) == 16
    assert doubt("tokur_eu_5 sum", of) == 24
    assert doubt("entropy final number", of) == 0.5


def test_logtoku_is_a_product_token_by_token() -> None:
    of = answer(["a", "b"], rivals={"logtoku_au": [1.0, 3.0], "logtoku_eu": [0.5, 2.0]})
    assert doubt("LogTokU mean", of) == 3.25
    assert doubt("LogTokU top 10%", of) == 6


def test_deepconf_by_hand() -> None:
    """Groups of 16: of 18 tokens there are three."""
    confidence = [3.0] * 8 + [1.0] + [3.0] * 7 + [2.0, 5.0]
    groups = [sum(confidence[i : i + 16]) / 16 for i in range(3)]
    of = answer(["a"] * 18, columns={"top_logprob_mean": [-one for one in confidence]})
    assert doubt("DeepConf mean", of) == pytest.approx(-sum(confidence) / 18)
    assert doubt("DeepConf tail", of) == pytest.approx(-groups[2])
    assert doubt("DeepConf lowest group", of) == pytest.approx(-min(groups))
    assert doubt("DeepConf bottom 10%", of) == pytest.approx(-min(groups))
    long = answer(["a"] * 40, columns={"top_logprob_mean": [-float(i) for i in range(40)]})
    # 25 groups, of which the three first are the least confident.
    assert doubt("DeepConf bottom 10%", long) == pytest.approx(-(7.5 + 8.5 + 9.5) / 3)


def test_deepconf_of_a_short_answer_is_its_mean() -> None:
    of = answer(["a", "b"], columns={"top_logprob_mean": [-1.0, -3.0]})
    assert {doubt(name, of) for name in DETECTORS if name.startswith("DeepConf")} == {-2.0}


def test_deepconf_of_a_scored_answer_comes_from_the_rivals() -> None:
    of = answer(["ab"], rivals={"top_logprob_mean": [-1.0, -3.0]}, rival_text=["a", "b"])
    assert doubt("DeepConf mean", of) == -2


# --- samples


@pytest.mark.parametrize(
    "extracted, samples, inconsistency, entropy",
    [
        ("18", ["18", "18", "18", "18"], 0.0, 0.0),
        ("18", ["18", "18", "18", "20"], 0.25, 0.25 * math.log(4) + 0.75 * math.log(4 / 3)),
        ("18", ["1", "2", "3", "4"], 1.0, math.log(4)),
        ("18", ["20", "20"], 1.0, 0.0),
        ("18", [None, "18"], 0.5, math.log(2)),
    ],
)
def test_samples(
    extracted: str | None, samples: list[str | None], inconsistency: float, entropy: float
) -> None:
    texts = ["No idea."] * len(samples)
    of = answer(extracted=extracted, sample_answers=samples, samples=texts)
    assert doubt("self-consistency", of) == pytest.approx(inconsistency)
    assert doubt("semantic entropy", of) == pytest.approx(entropy)


@pytest.mark.parametrize(
    "response, samples, inconsistency, entropy",
    [
        # A name that the grader does not know, in other words; and another such name.
        ("It is Buenningi.", ["The capital: Buenningi, I think."] * 2, 0.0, 0.0),
        ("It is Buenningi.", ["It is Kartzmara.", "It is Buenningi."], 0.5, math.log(2)),
        # The name alone, and no name at all.
        ("Buenningi", ["buenningi.", "It is unknown to me."], 0.5, math.log(2)),
        ("i do not know.", ["I do not know. It is far.", "I do not know!"], 0.0, 0.0),
    ],
)
def test_answers_without_a_final_one_agree_in_what_they_claim(
    response: str, samples: list[str], inconsistency: float, entropy: float
) -> None:
    of = answer(
        response=response,
        prompt="What is the capital of Burundi?",
        samples=samples,
        sample_answers=[None] * len(samples),
    )
    assert doubt("self-consistency", of) == pytest.approx(inconsistency)
    assert doubt("semantic entropy", of) == pytest.approx(entropy)


def test_chance_is_stable() -> None:
    assert doubt("random", answer(id="facts/1")) == doubt("random", answer(["b"], id="facts/1"))
    drawn = [doubt("random", answer(id=f"facts/{i}")) for i in range(1000)]
    assert len(set(drawn)) == 1000
    assert 0 <= min(drawn) < 0.01 < 0.99 < max(drawn) < 1
    assert abs(np.mean(drawn) - 0.5) < 0.04


# --- what an answer lacks, and what it means


def test_what_was_not_measured_is_nan() -> None:
    of = answer()
    free = {f"{measure} {reduce}" for measure in (*OURS, *TARGETS) for reduce in STATISTICS}
    free |= {"perplexity", "length", "random"}
    assert {name for name in DETECTORS if not math.isnan(doubt(name, of))} == free
    assert math.isnan(doubt("LogTokU mean", answer(rivals={"logtoku_au": [1.0] * len(TEXT)})))
    assert math.isnan(doubt("self-consistency", answer(samples=[], sample_answers=[])))


def test_an_empty_answer_has_no_doubt() -> None:
    of = answer([], columns={"top_logprob_mean": []}, rivals={name: [] for name in RIVALS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = {name for name in DETECTORS if not math.isnan(doubt(name, of))}
    assert known == {"length", "random"}


def measured(logits: list[float], agreement: float, **record: Any) -> Answer:
    """What would be measured if every token had these logits: each rival by its definition."""
    p = np.exp(logits) / np.exp(logits).sum()
    logp = np.log(p)
    likeliest = np.sort(logp)[::-1]
    evidence = np.clip(np.sort(logits)[::-1][:10], 0, None)
    shares = evidence / evidence.sum()
    entropy = float(-(p * logp).sum())
    spread = 1 - agreement
    column = {
        "logprob": likeliest[0],
        "entropy": entropy,
        "total": entropy + spread,
        "jsd": spread / 2,
        "kl": spread,
        "top_logprob_mean": likeliest[:20].mean(),
    }
    rivals = {
        "self_certainty": -np.log(len(p)) - logp.mean(),  # KL(U || p)
        "logtoku_au": -(shares * (digamma(evidence + 1) - digamma(evidence.sum() + 1))).sum(),
        "logtoku_eu": 10 / (evidence.sum() + 10),
        **dict.fromkeys([name for name in RIVALS if "tokur_" in name], spread),
    }
    text = ["It", " is", " ", "1", "8"]
    return answer(
        text,
        columns={name: [float(value)] * len(text) for name, value in column.items()},
        rivals={name: [float(value)] * len(text) for name, value in rivals.items()},
        **record,
    )


SURE = measured(
    [20.0, 9.0] + [5.0] * 98,
    0.9,
    extracted="18",
    sample_answers=["18", "18", "18"],
    samples=["18", "18", "18"],
    p_true=0.9,
    hallucination_score=0.1,
)
DOUBTFUL = measured(
    [3.0, 2.9] + [2.5] * 98,
    0.2,
    extracted="18",
    sample_answers=["18", "20", "21"],
    samples=["18", "20", "21"],
    p_true=0.2,
    hallucination_score=0.8,
)


@pytest.mark.parametrize("name", DETECTORS)
def test_doubt_is_greater_where_the_target_is_less_sure(name: str) -> None:
    more, less = doubt(name, DOUBTFUL), doubt(name, SURE)
    if DETECTORS[name].family == "baseline":
        assert more == less
    else:
        assert more > less


def test_detectors_have_names_of_their_own() -> None:
    names = [detector.name for detector in all_detectors()]
    assert len(names) == len(set(names))
