"""The students of the online trainer: their weights and moments, their steps, their checkpoints."""

from __future__ import annotations

from pathlib import Path

from drafts.manifest import Ensemble
from drafts.store import DraftsStore, Version
from osd import checkpoint
from osd.corpus import Text
from osd.errors import OsdError
from osd.online_config import OnlineConfig
from osd.progress import Progress
from osd.publish import open_version
from osd.schedule import derived_seed
from osd.states import States
from osd.step import new_optimiser, posterior_lesson, take_step
from osd.students import Lesson
from osd.teacher import Teacher, collate
from osd.warm_start import checkpoints, students_of, target_metric


class Learner:
    """A student for each checkpoint of an ensemble, with an optimiser of its own.

    Args:
        version: whose weights they begin with.
        fresh: states of texts that are seen once.
        reference: texts of the corpus, on which the target's metric is taken.
        folder: of checkpoints.
    """

    def __init__(
        self,
        config: OnlineConfig,
        ensemble: Ensemble,
        store: DraftsStore,
        version: Version,
        teacher: Teacher,
        fresh: States,
        reference: list[Text],
        folder: Path,
    ) -> None:
        self._config = config
        self._ensemble = ensemble
        self._store = store
        self._teacher = teacher
        self._fresh = fresh
        self._folder = folder
        self._metric_dd = target_metric(fresh, reference, teacher, config.measured_tokens)
        # Of what a checkpoint is: students of another model are none of these.
        self.fixed = {"ensemble": ensemble.manifest.name, "students": len(checkpoints(ensemble))}
        self.begin_from(version)

    def begin_from(self, version: Version) -> None:
        """Students with a version's weights, and new moments."""
        opened = open_version(self._store, version, self._ensemble, self._folder)
        self.students = students_of(opened, self._config, self._teacher, self._metric_dd)
        self.optimisers = [
            new_optimiser(s.module, self._config.learning_rate, self._config.weight_decay)
            for s in self.students
        ]

    def learn(self, number: int, index: int, texts: list[Text], rate: float) -> float:
        """One step of a student, its `index`-th; the loss.

        Raises:
            Diverged: if the loss or its gradient is not finite; no weight was changed.
            OsdError: if torch cannot make it, for want of memory, say.
        """
        student, optimiser = self.students[number], self.optimisers[number]
        try:
            lessons = [self.lesson(number, index, texts)]
            clip_norm = self._config.clip_norm
            loss, _ = take_step(
                student, optimiser, lessons, count=1, rate=rate, clip_norm=clip_norm
            )
        except RuntimeError as error:
            optimiser.zero_grad()
            raise OsdError(f"student {number}, step {index}: {error}") from error
        return loss

    def lesson(self, number: int, index: int, texts: list[Text]) -> Lesson:
        """Texts as fresh draws of the posterior see them."""
        seed = self._config.seed
        drafts = getattr(self.students[number], "config", None)
        draws = getattr(drafts, "teacher_draws", 1)
        return posterior_lesson(
            self._fresh,
            texts,
            collate(texts, self._config.max_tokens, self._teacher.head_Vd.device),
            visit=0,
            seeds=[derived_seed(seed, "draw", number, index, n) for n in range(draws)],
            rows_seed=derived_seed(seed, "rows", number, index),
            loss_tokens=self._config.loss_tokens,
            with_eu=False,
        )

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of the students, and of what belongs to their weights."""
        checkpoint.save(
            self._folder,
            progress.step,
            self.fixed,
            [student.module for student in self.students],
            self.optimisers,
            progress.model_dump(mode="json"),
        )

    def load(self) -> Progress | None:
        """Put the last checkpoint into the students; None if there is none.

        Raises:
            CheckpointError: if it cannot be used; students may hold a part of it.
        """
        modules = [student.module for student in self.students]
        checkpoint.load_last(self._folder, self.fixed, modules, self.optimisers)
        told = checkpoint.read_progress(self._folder)
        return Progress.read(told) if told else None

    def drop_last(self) -> None:
        """Remove the last checkpoint."""
        checkpoint.drop_last(self._folder)
