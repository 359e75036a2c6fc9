"""Detectors: one number an answer, the higher the more doubtful, from what is known of it.

A statistic of a measure (`total mean`, `jsd max`, `surprisal sum`) reduces an answer's tokens to a
number. Where the higher values of a measure mean that the model is sure (self-certainty, DeepConf's
confidence, P(True)), the detector is minus that. What an answer lacks makes NaN.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from demur.evals.claims import first_name, first_sentence
from demur.evals.numbers import numbers_in
from demur.evals.records import Columns, Record

Floats = NDArray[np.float64]
Family = Literal["demur", "calibrated", "target", "rival", "tokur", "samples", "baseline"]

OURS = ("total", "epistemic", "jsd", "kl", "aleatoric")
TARGETS = ("surprisal", "entropy")
TOKUR_SAMPLES = (2, 5, 10)

_GROUP = 16  # tokens; DeepConf's window of 2,048 is longer than any answer here


@dataclass(frozen=True)
class Answer:
    """An answer with the token columns of the service and, where measured, of the rivals.

    The rivals' tokens are of the same text, and may be cut otherwise.
    """

    record: Record
    rivals: Mapping[str, Floats]
    rival_text: Sequence[str]

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self._columns.text)

    @property
    def _columns(self) -> Columns:
        assert self.record.tokens is not None
        return self.record.tokens

    def column(self, name: str) -> tuple[Floats, Sequence[str]] | None:
        """A measure's values [T] and the tokens' texts, or None where it was not measured."""
        own = self._columns
        if name in self.rivals:
            return self.rivals[name], self.rival_text
        derived: dict[str, Callable[[], list[float]]] = {
            "surprisal": lambda: [-value for value in own.logprob],
            "entropy": lambda: own.entropy,
            "total": lambda: own.total,
            "jsd": lambda: own.jsd,
            "kl": lambda: own.kl,
            "epistemic": lambda: [a + b for a, b in zip(own.jsd, own.kl, strict=True)],
            "aleatoric": lambda: [a - b for a, b in zip(own.total, own.jsd, strict=True)],
        }
        if name == "top_logprob_mean" and own.top_logprob_mean is not None:
            return np.array(own.top_logprob_mean), own.text
        return (np.array(derived[name]()), own.text) if name in derived else None


@dataclass(frozen=True)
class Detector:
    """A named number of an answer.

    Attributes:
        cost: forward passes of the target that it adds to making the answer, about; None where
            the ensemble's own say.
    """

    name: str
    family: Family
    doubt: Callable[[Answer], float]
    cost: float | None = 0.0


def mean(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Mean over the tokens."""
    return float(values.mean())


def total_sum(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Sum over the tokens: length takes part in it."""
    return float(values.sum())


def greatest(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """The greatest token's."""
    return float(values.max())


def top_tenth(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Mean of the greatest tenth of the tokens, at least one."""
    return float(np.sort(values)[-math.ceil(len(values) / 10) :].mean())


def over_numbers(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Mean over tokens of numbers; over all if there is no number."""
    spans = [(start, end) for start, end, _ in numbers_in("".join(text))]
    return _mean_in(values, text, spans)


def final_number(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Mean over the tokens of the last number; over all if there is no number."""
    spans = [(start, end) for start, end, _ in numbers_in("".join(text))]
    return _mean_in(values, text, spans[-1:])


def new_words(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Mean over tokens of words that the question does not have; over all if it has them all."""
    asked = {word for _, _, word in _words(answer.record.prompt)}
    spans = [(start, end) for start, end, word in _words("".join(text)) if word not in asked]
    return _mean_in(values, text, spans)


def in_first_sentence(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Mean over the tokens of the first sentence, which makes the claim."""
    return _mean_in(values, text, [(0, first_sentence("".join(text)))])


def of_first_name(values: Floats, text: Sequence[str], answer: Answer) -> float:
    """Mean over the first name or number that the question does not have; over all if none."""
    found = first_name("".join(text), answer.record.prompt)
    return _mean_in(values, text, [] if found is None else [found])


STATISTICS: dict[str, Callable[[Floats, Sequence[str], Answer], float]] = {
    "mean": mean,
    "sum": total_sum,
    "max": greatest,
    "top 10%": top_tenth,
    "first sentence": in_first_sentence,
    "first name": of_first_name,
    "new words": new_words,
    "numbers": over_numbers,
    "final number": final_number,
}


def statistic(
    measure: str, reduce: str, family: Family, *, cost: float | None = 0.0, sign: float = 1.0
) -> Detector:
    """The detector that reduces a measure's column."""

    def doubt(answer: Answer) -> float:
        found = answer.column(measure)
        if found is None or not len(found[0]):
            return math.nan
        return STATISTICS[reduce](sign * found[0], found[1], answer)

    return Detector(f"{measure} {reduce}", family, doubt, cost)


def touching(text: Sequence[str], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens hold a character of a span, or some of its bytes."""
    lengths = np.array([len(piece) for piece in text], dtype=int)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # An empty token has the first bytes of the character that comes next.
    ends = np.maximum(ends, starts + 1)
    marks = np.zeros(len(text), dtype=bool)
    for start, end in spans:
        marks |= (starts < end) & (start < ends)
    return marks


def all_detectors() -> list[Detector]:
    """Every detector of the tables. Which an answer has depends on what was measured."""
    found: list[Detector] = []
    for reduce in STATISTICS:
        found += [statistic(measure, reduce, "demur", cost=None) for measure in OURS]
        found += [statistic(measure, reduce, "target") for measure in TARGETS]
        for count in TOKUR_SAMPLES:
            found += [
                statistic(f"tokur_{kind}_{count}", reduce, "tokur", cost=count - 1.0)
                for kind in ("tu", "au", "eu")
            ]
    found += [
        Detector("perplexity", "target", _perplexity),
        statistic("self_certainty", "mean", "rival", sign=-1.0),
        # DeepConf (2508.15260): the mean of a trace, its end, its least confident stretch, and the
        # mean of the tenth of its stretches that are least confident.
        Detector("DeepConf mean", "rival", _deepconf(lambda groups, all_: all_.mean())),
        Detector("DeepConf tail", "rival", _deepconf(lambda groups, all_: groups[-1])),
        Detector("DeepConf lowest group", "rival", _deepconf(lambda groups, all_: groups.max())),
        Detector(
            "DeepConf bottom 10%",
            "rival",
            _deepconf(lambda groups, all_: np.sort(groups)[-math.ceil(len(groups) / 10) :].mean()),
        ),
        Detector("LogTokU mean", "rival", _logtoku(mean)),
        Detector("LogTokU top 10%", "rival", _logtoku(top_tenth)),
        Detector("P(True)", "rival", _p_true, cost=1.0),
        Detector("self-consistency", "samples", _inconsistency, cost=None),
        Detector("semantic entropy", "samples", _semantic_entropy, cost=None),
        Detector("hallucination_score", "calibrated", _score, cost=None),
        Detector("length", "baseline", lambda answer: float(answer.n_tokens)),
        Detector("random", "baseline", _random),
    ]
    return found


def _mean_in(values: Floats, text: Sequence[str], spans: Sequence[tuple[int, int]]) -> float:
    chosen = values[touching(text, spans)]
    return float(chosen.mean() if len(chosen) else values.mean())


def _words(text: str) -> list[tuple[int, int, str]]:
    """Words: the characters [start, end) that they are, and in lower case."""
    return [(m.start(), m.end(), m.group().casefold()) for m in re.finditer(r"\w+", text)]


def _perplexity(answer: Answer) -> float:
    mean_surprisal = statistic("surprisal", "mean", "target").doubt(answer)
    return math.exp(min(mean_surprisal, 700.0))


def _deepconf(reduce: Callable[[Floats, Floats], float]) -> Callable[[Answer], float]:
    def doubt(answer: Answer) -> float:
        found = answer.column("top_logprob_mean")
        if found is None or not len(found[0]):
            return math.nan
        values = found[0]  # minus the confidence of each token: the mean of log p is negative
        size = min(_GROUP, len(values))
        groups = np.convolve(values, np.full(size, 1.0 / size), mode="valid")
        return float(reduce(groups, values))

    return doubt


def _logtoku(
    reduce: Callable[[Floats, Sequence[str], Answer], float],
) -> Callable[[Answer], float]:
    def doubt(answer: Answer) -> float:
        aleatoric, epistemic = answer.column("logtoku_au"), answer.column("logtoku_eu")
        if aleatoric is None or epistemic is None or not len(aleatoric[0]):
            return math.nan
        return reduce(aleatoric[0] * epistemic[0], aleatoric[1], answer)

    return doubt


def _p_true(answer: Answer) -> float:
    return math.nan if answer.record.p_true is None else -answer.record.p_true


def _clusters(answer: Answer) -> Counter[str] | None:
    record = answer.record
    if not record.samples or record.sample_answers is None:
        return None
    drawn = zip(record.sample_answers, record.samples, strict=True)
    return Counter(_meaning(extracted, text, record.prompt) for extracted, text in drawn)


def _meaning(extracted: str | None, text: str, prompt: str) -> str:
    """What two answers share that say the same: the final answer, or what stands for it.

    An answer in which the grader finds none (a name that it does not know) says something, too:
    two such are the same only if the first names in their first sentences are, or where there is
    no name the sentences.
    """
    if extracted is not None:
        return extracted
    sentence = text[: first_sentence(text)]
    start, end = first_name(sentence, prompt) or (0, len(sentence))
    return sentence[start:end].strip(" .!?\n").casefold()


def _inconsistency(answer: Answer) -> float:
    """The share of samples whose final answer is not this one's (Wang et al. 2022)."""
    clusters = _clusters(answer)
    if clusters is None:
        return math.nan
    record = answer.record
    own = _meaning(record.extracted, record.response, record.prompt)
    return 1.0 - clusters[own] / clusters.total()


def _semantic_entropy(answer: Answer) -> float:
    """Discrete, over the samples' final answers (Kuhn et al. 2023; Farquhar et al. 2024)."""
    clusters = _clusters(answer)
    if clusters is None:
        return math.nan
    shares = np.array(list(clusters.values())) / clusters.total()
    return float(-(shares * np.log(shares)).sum())


def _score(answer: Answer) -> float:
    given = answer.record.hallucination_score
    return math.nan if given is None else given


def _random(answer: Answer) -> float:
    digest = hashlib.sha256(f"random/{answer.record.id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
