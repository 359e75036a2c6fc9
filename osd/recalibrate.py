"""The calibration of a new version: the old one if it still holds, else a new fit, else none.

The answers that the ensemble's calibration was fitted to lie beside it. A version's drafts measure
them again; the Brier score of the probabilities says whether these are still worth their name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from drafts.calibration import CALIBRATION_NAME, Calibration, load_calibration, save_calibration
from drafts.calibration_fit import fit
from drafts.calibration_parts import FittedTask, Origin
from drafts.divergence import measures
from drafts.features import claim_of
from drafts.labelled import LabelledText, read_texts
from drafts.manifest import Ensemble
from drafts.scores import FloatArray, TokenScores
from drafts.text import TextEncoder, TextError
from osd.corpus import Text
from osd.precision import bfloat16_products
from osd.states import States
from osd.students import Trainee
from osd.teacher import Teacher, collate

logger = logging.getLogger(__name__)

_TEXTS = 8  # of one forward pass
_ROWS = 64  # whose logits are held at once
# Answers that are measured for each version, evenly taken: of the default's, a minute on one core.
_AT_MOST = 160
# How much the Brier score may rise, on the same answers: a fifth of what separates the default's
# from that of a constant.
_MARGIN = 0.01


class Recalibrator:
    """Labelled answers, and the calibration that was fitted to them.

    Args:
        ensemble: whose folder holds both; without either, no version has a calibration.
        states: of its target.
        breathe: called between batches.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        teacher: Teacher,
        states: States,
        breathe: Callable[[], None] = lambda: None,
    ) -> None:
        self._breathe = breathe
        self._name = ensemble.manifest.name
        self._teacher = teacher
        self._states = states
        self._original = load_calibration(ensemble.folder)
        found = read_texts(ensemble.folder)
        found = found[:: -(-len(found) // _AT_MOST) or 1]
        self._labelled: list[LabelledText] = []
        self._texts: list[Text] = []
        self._pieces: list[list[str]] = []
        if self._original is not None and found:
            self._encode(TextEncoder(ensemble.target_path), found)
        self._brier: float | None = None  # of the original, with the drafts it was fitted with

    @property
    def is_able(self) -> bool:
        """Whether there is anything to calibrate with."""
        return bool(self._texts)

    def calibrate(
        self, folder: Path, version: str, students: Sequence[Trainee], first: Sequence[Trainee]
    ) -> str:
        """Write the calibration of a version into its folder, or none; say which.

        Args:
            students: the version's.
            first: those that the original calibration is taken to hold for.
        """
        (folder / CALIBRATION_NAME).unlink(missing_ok=True)
        if self._original is None or not self.is_able:
            return "withheld: there are no labelled answers to check it with (demur calibrate)"
        if self._brier is None:
            self._brier = self._brier_of(self._original, self._measure(first, version))
        bound = self._brier + _MARGIN
        scores = self._measure(students, version)
        brier = self._brier_of(self._original, scores)
        if brier <= bound:
            origin = self._original.origin.model_copy(update={"weights_version": version})
            kept = self._original.model_copy(update={"origin": origin})
            save_calibration(kept, folder / CALIBRATION_NAME)
            return f"kept: Brier {brier:.4f}, at the start {self._brier:.4f}"
        try:
            fitted = self._fit(version, scores)
        except ValueError as error:
            return f"withheld: Brier {brier:.4f} is over {bound:.4f}, and {error}"
        if fitted.held_out.brier > bound:
            return (
                f"withheld: Brier {brier:.4f} is over {bound:.4f}, and {fitted.held_out.brier:.4f} "
                "after a new fit"
            )
        save_calibration(fitted, folder / CALIBRATION_NAME)
        now = fitted.held_out.brier
        return f"fitted again: Brier {brier:.4f} was over {bound:.4f}, and is {now:.4f}"

    def _encode(self, encoder: TextEncoder, found: Sequence[LabelledText]) -> None:
        for labelled in found:
            prompt = encoder.render([{"role": "user", "content": labelled.prompt}])
            try:
                text = encoder.encode(prompt, labelled.response, rendered=True)
            except TextError as error:
                logger.warning("a labelled answer is left out: %s", error)
                continue
            self._labelled.append(labelled)
            self._texts.append(
                Text(key=0, response_start=text.response_start, token_ids=list(text.token_ids))
            )
            self._pieces.append([labelled.response[t.start : t.end] for t in text.tokens])

    def _brier_of(self, calibration: Calibration, scores: Sequence[TokenScores]) -> float:
        errors = [
            calibration.probability(one, claim_of(pieces, labelled.prompt)) - labelled.wrong
            for one, pieces, labelled in zip(scores, self._pieces, self._labelled, strict=True)
        ]
        return float(np.mean(np.square(errors)))

    def _fit(self, version: str, scores: Sequence[TokenScores]) -> Calibration:
        original = self._original
        assert original is not None
        wrong_of: dict[tuple[str, str], list[bool]] = {}
        for labelled in self._labelled:
            wrong_of.setdefault((labelled.task, labelled.mode), []).append(labelled.wrong)
        origin = Origin(
            tasks=[
                FittedTask(task=task, mode=mode, n=len(wrong), wrong=sum(wrong) / len(wrong))
                for (task, mode), wrong in sorted(wrong_of.items())
            ],
            half=original.origin.half,
            model=self._name,
            weights_version=version,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=original.origin.seed,
            demur=metadata.version("demur-server"),
            command="demur osd",
        )
        claims = [
            claim_of(pieces, labelled.prompt)
            for pieces, labelled in zip(self._pieces, self._labelled, strict=True)
        ]
        wrong = [labelled.wrong for labelled in self._labelled]
        groups = [labelled.group for labelled in self._labelled]
        return fit(scores, claims, wrong, groups, original.features, original.kind, origin)

    @torch.no_grad()
    def _measure(self, students: Sequence[Trainee], version: str) -> list[TokenScores]:
        """What the service would measure of the labelled answers."""
        order = sorted(range(len(self._texts)), key=lambda i: len(self._texts[i].token_ids))
        found: dict[int, TokenScores] = {}
        for start in range(0, len(order), _TEXTS):
            numbers = order[start : start + _TEXTS]
            texts = [self._texts[number] for number in numbers]
            found |= zip(numbers, self._measure_batch(students, texts, version), strict=True)
            self._breathe()
        return [found[number] for number in range(len(self._texts))]

    def _measure_batch(
        self, students: Sequence[Trainee], texts: list[Text], version: str
    ) -> list[TokenScores]:
        longest = max(len(text.token_ids) for text in texts)
        batch = collate(texts, longest, self._teacher.head_Vd.device)
        clean = self._states.clean(texts, batch)
        drafts = [draft for student in students for draft in student.drafts(batch, clean)]
        own = batch.ids_BL[batch.text_T, batch.place_T + 1]
        columns = []
        with bfloat16_products(self._teacher.model.dtype == torch.bfloat16):
            for start in range(0, len(own), _ROWS):
                rows = slice(start, start + _ROWS)
                logits_TV = self._teacher.logits(clean.h_Td[rows])
                logits_KTV = torch.stack([F.linear(d.h_Td[rows], d.head_Vd) for d in drafts])
                logprob = torch.log_softmax(logits_TV, -1).gather(-1, own[rows, None]).squeeze(-1)
                columns.append(torch.stack([logprob, *measures(logits_KTV, logits_TV)]))
        by_text = batch.by_text(torch.cat(columns, dim=1).T)
        return [_scores(values_T5.double().cpu().numpy(), version) for values_T5 in by_text]


def _scores(values_T5: FloatArray, version: str) -> TokenScores:
    logprob, entropy, total, jsd, kl = values_T5.T
    rank = np.ones(len(logprob), np.int64)  # no feature is made of it
    return TokenScores(logprob, rank, entropy, total, jsd, kl, version)
