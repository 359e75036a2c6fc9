"""The trainer: distils a target's posterior into data-diverse drafts.

    result = train(read_config(Path("distill.yaml")))

One step of a student: take a batch of its own shard, draw one theta from the posterior, run the
target as it is and at theta, and move the student towards theta's distribution (OSD). Students are
independent of each other; they advance together so that their disagreement can be watched.

In the run's folder: `log.csv`, `log.png`, checkpoints to go on from, and at the end `ensemble/`,
which `demur serve --ensemble` takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from drafts.manifest import read_target, resolve_source
from osd import checkpoint
from osd.alone import alone
from osd.build import check_device, check_fits, load_teacher, new_students, shards, split
from osd.config import DistillConfig
from osd.corpus import Corpus, Text, check_target
from osd.ensemble import write_ensemble
from osd.errors import OsdError
from osd.evaluate import Agreement, HeldOut
from osd.log import RunLog, read_measured
from osd.precision import bfloat16_products
from osd.processes import Processes
from osd.schedule import batch_at, batches_per_epoch, derived_seed, learning_rate
from osd.states import FreshStates, KeptStates, States, fingerprint
from osd.step import Diverged, new_optimiser, posterior_lesson, take_step
from osd.students import Lesson
from osd.teacher import Batch, collate

# What may change between a run and its going on.
_FREE = {"run", "device", "evaluate_every", "checkpoint_every"}


@dataclass(frozen=True)
class Result:
    """A finished run."""

    ensemble: Path
    before: Agreement | None  # None if the log of the first step was lost
    after: Agreement


def train(config: DistillConfig) -> Result:
    """Train, from the run's last checkpoint if there is one, and write the ensemble.

    Raises:
        OsdError: if the configuration, the corpus or a checkpoint cannot be used, or the loss
            stopped being a number.
    """
    check_device(config.device)
    with alone(config.run, "distill", Processes(config.device).is_main):
        run = Run(config)
        if run.unmeasured():  # at the start, or the log was lost
            run.evaluate()
        for _ in run.steps():
            if run.step % config.evaluate_every == 0 or run.step == config.steps:
                run.evaluate()
            if run.step % config.checkpoint_every == 0 or run.step == config.steps:
                run.save()
        return run.finish()


class Run:
    """Everything that a training run holds."""

    def __init__(self, config: DistillConfig) -> None:
        self.processes = Processes(config.device)
        config = config.model_copy(update={"device": self.processes.device})
        self.config = config
        with self.processes.main_first():
            self._prepare()

    def _prepare(self) -> None:
        config = self.config
        self.target_path = resolve_source(Path.cwd(), config.target, config.revision)
        check_fits(config, read_target(self.target_path))
        self.corpus = Corpus(config.corpus)
        check_target(self.corpus, self.target_path)
        self.teacher = load_teacher(config, self.target_path)
        texts = self.corpus.read(self.teacher.model.config.vocab_size)
        usable = [text for text in texts if text.response_start < config.max_tokens]
        held_out, training = split(usable, config.held_out)
        count = config.drafts.students
        self.texts = shards(training, count) if config.diverse else [training] * count
        self.states = self._states(training, config.draws_per_text)
        self.students = new_students(config, self.target_path, self.teacher, self.states, training)
        if self.processes.is_main:
            draws = config.held_out_draws
            self.held_out = HeldOut(
                self._states(held_out, draws if config.draws_per_text else None),
                self.teacher.head_Vd,
                held_out,
                draws=draws,
                max_tokens=config.max_tokens,
                seed=derived_seed(config.seed, "held out"),
            )
        self.optimisers = [
            new_optimiser(student.module, config.learning_rate, config.weight_decay)
            for student in self.students
        ]
        config.run.mkdir(parents=True, exist_ok=True)
        modules = [student.module for student in self.students]
        # What a run that goes on must share.
        self.fixed: dict[str, Any] = json.loads(config.model_dump_json(exclude=_FREE))
        self.fixed["target or corpus"] = fingerprint(
            self.teacher, usable, config.max_tokens, config.seed
        )
        self.step = checkpoint.load_last(config.run, self.fixed, modules, self.optimisers)
        self.log = RunLog(config.run, keep_until=self.step, write=self.processes.is_main)

    def _states(self, texts: list[Text], draws: int | None) -> States:
        """Fresh draws, or `draws` kept ones of each text."""
        config = self.config
        if draws is None:
            return FreshStates(self.teacher, config.drafts.layers)
        return KeptStates(
            self.teacher,
            texts,
            layers=config.drafts.layers,
            draws=draws,
            max_tokens=config.max_tokens,
            seed=config.seed,
            folder=config.run.parent,
        )

    def steps(self) -> Iterator[int]:
        """Train step by step; yields after each, `self.step` being the number of steps done."""
        config, own = self.config, self.processes.own
        numbers = [number for number in range(len(self.students)) if own(number)]
        with tqdm(
            total=config.steps,
            initial=self.step,
            desc="distil",
            unit="step",
            disable=not self.processes.is_main,
        ) as bar:
            while self.step < config.steps:
                started = time.monotonic()
                rate = learning_rate(self.step, config.steps, config.learning_rate, config.warmup)
                done = [self._student_step(number, rate) for number in numbers]
                self.step += 1
                own_loss, own_tokens = sum(d[0] for d in done), sum(d[1] for d in done)
                loss, n_tokens = self.processes.total([own_loss, own_tokens])
                mean = loss / len(self.students)
                per_second = n_tokens / (time.monotonic() - started)
                self.log.add(self.step, loss=mean, rate=rate, tokens_per_second=per_second)
                shown = {"loss": f"{mean:.4f}", "tok/s": f"{per_second:.0f}"}
                bar.set_postfix(shown | self.log.state())
                bar.update()
                yield self.step

    def _student_step(self, number: int, rate: float) -> tuple[float, int]:
        """One optimiser step of one student; its loss, and the tokens that it saw."""
        try:
            return take_step(
                self.students[number],
                self.optimisers[number],
                self._lessons(number),
                count=self.config.accumulate,
                rate=rate,
                clip_norm=self.config.clip_norm,
            )
        except Diverged as error:
            raise self._diverged(number) from error

    def _lessons(self, number: int) -> Iterator[Lesson]:
        config = self.config
        order = derived_seed(config.seed, "order", number)
        for part in range(config.accumulate):
            index = self.step * config.accumulate + part
            texts = batch_at(self.texts[number], index, config.texts, order)
            batch = collate(texts, config.max_tokens, self.teacher.head_Vd.device)
            yield self._lesson(number, index, texts, batch)

    def _lesson(self, number: int, index: int, texts: list[Text], batch: Batch) -> Lesson:
        config = self.config
        visit, seeds = 0, []
        if config.teacher == "posterior":
            count = getattr(config.drafts, "teacher_draws", 1)
            visit = index // batches_per_epoch(self.texts[number], config.texts) * count
            seeds = [derived_seed(config.seed, "draw", number, index, n) for n in range(count)]
        return posterior_lesson(
            self.states,
            texts,
            batch,
            visit=visit,
            seeds=seeds,
            rows_seed=derived_seed(config.seed, "rows", number, index),
            loss_tokens=config.loss_tokens,
            with_eu=getattr(config.drafts, "match", 0) > 0,
        )

    def _diverged(self, number: int) -> OsdError:
        return OsdError(
            f"step {self.step}, student {number}: the loss or its gradient is not finite; lower "
            "learning_rate, and remove the run's folder or choose another. What it holds is whole"
        )

    def unmeasured(self) -> bool:
        """Whether the log holds no measurement. All processes go by what the first one sees."""
        missing = self.processes.is_main and not self.log.measured()
        return self.processes.total([float(missing)])[0] > 0

    def evaluate(self) -> None:
        """Measure the drafts on held-out texts."""
        self._share()
        if self.processes.is_main:
            with bfloat16_products(self.teacher.model.dtype == torch.bfloat16):
                self.log.add(self.step, agreement=self.held_out.measure(self.students))

    def save(self) -> None:
        """Write a checkpoint."""
        self._share()
        if self.processes.is_main:
            modules = [student.module for student in self.students]
            checkpoint.save(self.config.run, self.step, self.fixed, modules, self.optimisers)

    def finish(self) -> Result:
        """Plot the log and write the ensemble."""
        with self.processes.main_first():
            if self.processes.is_main:
                self.log.plot()
                write_ensemble(self.config, self.step, self.students, self.corpus.about)
        measured = read_measured(self.config.run)
        step, before = measured[0]
        after = measured[-1][1]
        return Result(self.config.run / "ensemble", None if step else before, after)

    def _share(self) -> None:
        self.processes.share([student.module for student in self.students], self.optimisers)
