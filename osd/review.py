"""Measures versions of the drafts beside each other, for the gate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from drafts.errors import WeightsError
from drafts.manifest import Ensemble, load_ensemble
from drafts.store import DraftsStore
from osd import gate
from osd.corpus import Text
from osd.evaluate import Agreement, HeldOut
from osd.gate import Measured
from osd.online_config import OnlineConfig
from osd.precision import bfloat16_products
from osd.publish import open_version
from osd.recalibrate import Recalibrator
from osd.schedule import derived_seed
from osd.states import KeptStates, States
from osd.students import Trainee
from osd.teacher import Teacher
from osd.warm_start import students_of

logger = logging.getLogger(__name__)


class Review(NamedTuple):
    """What was found of a candidate, and of the versions that it was held against."""

    reasons: list[str]  # why it must not go live
    candidate: Measured | None  # None: its weights cannot be used
    serving: Measured
    first: Measured
    calibration: str  # what became of it

    def __str__(self) -> str:
        now = "none" if self.candidate is None else f"{self.candidate.traffic.kl_mixture:.4f}"
        before = self.serving.traffic.kl_mixture
        return f"KL on traffic {now}, was {before:.4f}; calibration {self.calibration}"

    def about(self) -> dict[str, Any]:
        """What is told of the version in the store."""
        told: dict[str, Any] = {
            "refused": self.reasons,
            "serving, on traffic": self.serving.traffic._asdict(),
            "first, on traffic": self.first.traffic._asdict(),
            "calibration": self.calibration,
        }
        if self.candidate is not None:
            told["reference"] = self.candidate.reference._asdict()
            told["traffic"] = self.candidate.traffic._asdict()
        return told


class Reviewer:
    """A reference set that never changes, and versions that are measured on it and on traffic.

    Args:
        fresh: states of texts that are seen once.
        reference: texts that no draft learns from; their states are kept in `work`.
        work: this trainer's folder.
        breathe: called between pieces of work; it may rest, or raise to end it.
    """

    def __init__(
        self,
        config: OnlineConfig,
        ensemble: Ensemble,
        store: DraftsStore,
        teacher: Teacher,
        fresh: States,
        reference: list[Text],
        work: Path,
        breathe: Callable[[], None],
    ) -> None:
        self._breathe = breathe
        # Whole weights: nothing is trained here, and norms are of what serves.
        self._config = config.model_copy(update={"lora_rank": None})
        self._ensemble = ensemble
        self._store = store
        self._teacher = teacher
        self._fresh = fresh
        self._work = work
        kept = KeptStates(
            teacher,
            reference,
            layers=ensemble.hidden_layers,
            draws=config.reference_draws,
            max_tokens=config.measured_tokens,
            seed=config.seed,
            folder=work,
        )
        self._recalibrator = Recalibrator(ensemble, teacher, fresh, breathe)
        self._reference = self._set(kept, reference, config.reference_draws)
        self._on_reference: dict[str, Agreement] = {}  # it never changes, nor does a version

    def review(self, folder: Path, texts: list[Text], *, serving: str, first: str) -> Review:
        """Judge the version in a folder, and write its calibration beside it if it may go live.

        What is judged is what was written, not what is in memory.

        Args:
            texts: of the traffic, which no draft has learned from.
            serving: the version that serves now.
            first: the one that bounds are taken from.
        """
        written = load_ensemble(folder, self._ensemble.target_path)
        traffic = self._traffic(texts)
        old = {name: self._measured(name, traffic) for name in {serving, first}}
        calibration = "not checked: the version is refused"
        try:
            candidate = students_of(written, self._config, self._teacher)
        except WeightsError as error:  # NaN or infinity
            return Review([str(error)], None, old[serving], old[first], calibration)
        new = Measured(self._measure(self._reference, candidate), self._measure(traffic, candidate))
        began = self._students(first)
        reasons = gate.check_norms(candidate, began, self._config.gate)
        reasons += gate.judge(new, old[serving], old[first], self._config.gate)
        if not reasons:
            name = written.manifest.weights_version
            calibration = self._recalibrator.calibrate(folder, name, candidate, began)
        return Review(reasons, new, old[serving], old[first], calibration)

    def watch(
        self, texts: list[Text], *, serving: str, parent: str
    ) -> tuple[str | None, Agreement]:
        """Why the version that serves should be taken back, if it should, and how it does.

        Args:
            texts: of the traffic since it serves, which no draft has learned from.
        """
        traffic = self._traffic(texts)
        now = self._measure(traffic, self._students(serving))
        before = self._measure(traffic, self._students(parent))
        return gate.watch(now, before, self._config.gate), now

    def _measured(self, name: str, traffic: HeldOut) -> Measured:
        students = self._students(name)
        if name not in self._on_reference:
            self._on_reference[name] = self._measure(self._reference, students)
        return Measured(self._on_reference[name], self._measure(traffic, students))

    def _students(self, name: str) -> list[Trainee]:
        """For measuring only; made again each time: models can be large, and this is seldom."""
        version = self._store.version(name)
        opened = open_version(self._store, version, self._ensemble, self._work)
        return students_of(opened, self._config, self._teacher)

    def _traffic(self, texts: list[Text]) -> HeldOut:
        short = [text for text in texts if text.response_start < self._config.measured_tokens]
        return self._set(self._fresh, short, self._config.held_out_draws)

    def _set(self, states: States, texts: Sequence[Text], draws: int) -> HeldOut:
        return HeldOut(
            states,
            self._teacher.head_Vd,
            texts,
            draws=draws,
            max_tokens=self._config.measured_tokens,
            seed=derived_seed(self._config.seed, "held out"),
            breathe=self._breathe,
        )

    def _measure(self, on: HeldOut, students: Sequence[Trainee]) -> Agreement:
        with bfloat16_products(self._teacher.model.dtype == torch.bfloat16):
            return on.measure(students)
