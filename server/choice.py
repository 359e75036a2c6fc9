"""One choice of a generation: its text, its tokens' measures, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from drafts.aggregate import aggregate
from drafts.decoding import Piece, StreamDecoder
from drafts.early_stop import EarlyStop
from drafts.scores import Generated, Sampling, TokenScores
from drafts.spans import find_spans
from server import metrics
from server.judgement import Judgement, judge
from server.openai_schemas import (
    MEASURES,
    ChoiceUncertainty,
    FinishReason,
    LogprobEntry,
    TopLogprob,
    Uncertainty,
    UncertaintyStop,
)
from server.scoring import spans_out
from server.served import Served


@dataclass(frozen=True)
class Prompt:
    """What a choice goes on from: its tokens, and the words in it that a person wrote.

    `conversation` is the key by which its draft is found (`osd.shards`).
    """

    token_ids: list[int]
    text: str
    conversation: int


@dataclass(frozen=True)
class Job:
    """What a request asks of the engine. Choice i goes on from prompt i // n."""

    operation: Literal["chat", "text_completion"]
    prompts: list[Prompt]
    n: int
    sampling: Sampling
    stop: list[str]
    early: UncertaintyStop | None
    logprobs: bool  # in the answer, for each token
    uncertainty: bool  # beside them, and for each choice; never without them
    store: bool = True  # may it be kept for distillation?

    @property
    def n_choices(self) -> int:
        return self.n * len(self.prompts)

    @property
    def most_tokens(self) -> int:
        """Prompts, and answers if none ends before it must."""
        prompts = sum(len(prompt.token_ids) for prompt in self.prompts)
        return prompts + self.n_choices * self.sampling.max_new_tokens


@dataclass(frozen=True)
class Part:
    """What has been added to a choice. Only its last part has what follows `entries`."""

    index: int
    text: str
    weights_version: str
    entries: list[LogprobEntry]  # of the tokens of `text`; empty if the job does not want them
    finish_reason: FinishReason | None = None
    uncertainty: ChoiceUncertainty | None = None
    n_generated: int = 0


# A token with the scores that hold it, its place in them, and the likeliest ones in its place.
_Row = tuple[TokenScores | None, int, list[tuple[int, float]]]


class Choice:
    """The state of one choice."""

    def __init__(self, served: Served, job: Job, prompt: Prompt) -> None:
        self._served = served
        self._job = job
        self._asked = prompt.text
        self._decoder: StreamDecoder[_Row] = StreamDecoder(
            served.encoder, prompt.token_ids, job.stop
        )
        self._early: EarlyStop | None = None
        if job.early is not None:
            self._early = EarlyStop(job.early.threshold, job.early.window)
        self._shown: list[Piece[_Row]] = []
        self._version = served.engine.weights_version
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []

    @property
    def n_generated(self) -> int:
        """Tokens that were generated, and not thrown away."""
        return len(self.token_ids)

    def take(self, step: Generated) -> list[Piece[_Row]]:
        """Add the engine's next tokens; what can be shown now. May set `finish_reason`."""
        pieces: list[Piece[_Row]] = []
        count = len(step.token_ids)
        self.token_ids += step.token_ids
        self._version = step.weights_version
        # The end-of-text token is no part of the text.
        for i in range(count - (step.finish_reason == "stop")):
            pieces += self._decoder.push(step.token_ids[i], (step.scores, i, step.likeliest[i]))
            if self._decoder.stopped:
                return self._finish("stop", pieces, count - i - 1)
            if self._doubt_stays_high(step.scores, i):
                return self._finish("uncertainty", pieces, count - i - 1)
        if step.finish_reason is not None:
            return self._finish("stop" if step.finish_reason == "stop" else "length", pieces, 0)
        return pieces

    def part(self, index: int, pieces: list[Piece[_Row]]) -> Part:
        """Pieces as a part of the answer."""
        # Only a block at the end needs them again.
        self._shown += pieces if self._job.uncertainty else []
        text = "".join(piece.text for piece in pieces)
        entries = [self._entry(piece) for piece in pieces] if self._job.logprobs else []
        return Part(index, text, self._version, entries)

    def last_part(self, index: int, pieces: list[Piece[_Row]]) -> Part:
        """The last pieces, and what is said of the whole choice."""
        part = self.part(index, pieces)
        return replace(
            part,
            finish_reason=self.finish_reason,
            uncertainty=self._block(),
            n_generated=self.n_generated,
        )

    def _finish(
        self, reason: FinishReason, pieces: list[Piece[_Row]], unread: int
    ) -> list[Piece[_Row]]:
        self.finish_reason = reason
        del self.token_ids[self.n_generated - unread :]
        return pieces + self._decoder.flush()

    def _doubt_stays_high(self, scores: TokenScores | None, i: int) -> bool:
        if self._early is None or self._job.early is None or scores is None:
            return False
        return self._early.add(float(getattr(scores, self._job.early.measure)[i]))

    def _entry(self, piece: Piece[_Row]) -> LogprobEntry:
        scores, i, likeliest = piece.kept
        assert scores is not None
        measures = None
        if self._job.uncertainty:
            measures = Uncertainty(**{name: float(getattr(scores, name)[i]) for name in MEASURES})
        return LogprobEntry(
            token=piece.text,
            bytes=list(piece.raw),
            logprob=float(scores.logprob[i]),
            top_logprobs=[
                TopLogprob(token=text, bytes=list(raw), logprob=logprob)
                for text, raw, logprob in self._shown_alone(likeliest)
            ],
            uncertainty=measures,
        )

    def _shown_alone(
        self, likeliest: list[tuple[int, float]]
    ) -> Iterator[tuple[str, bytes, float]]:
        for token_id, logprob in likeliest:
            text = self._served.encoder.token_text(token_id)
            raw = self._served.encoder.raw_bytes(token_id)
            yield text, text.encode() if raw is None else raw, logprob

    def _block(self) -> ChoiceUncertainty | None:
        if not self._job.uncertainty:
            return None
        rows = [scores.row(i) for scores, i, _ in (p.kept for p in self._shown) if scores]
        sequence: dict[str, float | int] = {"n_tokens": 0}
        spans = []
        judgement = Judgement()
        if rows:
            scores = TokenScores.join(rows)
            sequence = aggregate(scores)
            judgement = judge(self._served, scores, [p.text for p in self._shown], self._asked)
            text, offsets = _offsets(self._shown)
            spans = spans_out(text, find_spans(text, offsets, scores.epistemic))
            metrics.EPISTEMIC.observe(sequence["epistemic_mean"])
            metrics.JSD.observe(sequence["jsd_mean"])
        return ChoiceUncertainty(
            estimator=self._served.estimator(self._version),
            hallucination_score=judgement.hallucination_score,
            warnings=judgement.warnings,
            sequence=sequence,
            spans=spans,
        )


def _offsets(pieces: list[Piece[_Row]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of pieces, and the characters of each."""
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece.text))
    return "".join(piece.text for piece in pieces), list(pairwise(ends))
