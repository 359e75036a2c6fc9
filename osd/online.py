"""The online trainer: drafts that follow the traffic (OSD, arXiv 2602.01956) while it is served.

    run(OnlineConfig(), Places(ensemble, store="drafts", spool="spool.sqlite", ...), stop)

One round of it, again and again:

    follow the store → read the spool → a step of a student → (now and then) judge and publish

All that it knows is its checkpoint: weights, moments, and each student's position in the spool, in
one folder that appears whole. Killed at any line, it goes on from there: what it had learned since
is learned again, from the same texts, by weights that have not seen them.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from drafts.errors import DraftsError, StoreError
from drafts.manifest import load_ensemble, read_manifest
from drafts.store import DraftsStore, Version
from osd.alone import alone
from osd.build import check_device, open_teacher, shards, split
from osd.control import Activity, Control
from osd.corpus import Corpus, Text, check_target
from osd.errors import CheckpointError, OsdError, OtherRunError
from osd.learner import Learner
from osd.online_config import OnlineConfig
from osd.pace import Pace, is_busy, step_aside
from osd.progress import Progress
from osd.publish import first_version, write_version
from osd.review import Review, Reviewer
from osd.schedule import batch_at, derived_seed
from osd.spool import Spool, open_spool
from osd.states import FreshStates
from osd.status import Reporter
from osd.step import Diverged
from osd.traffic import Traffic
from osd.warm_start import checkpoints

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0  # at the store and the spool
_STUCK_S = (1.0, 5.0, 30.0)  # waits after failures in a row


class _Interrupted(Exception):
    """A judgement is cut short: the trainer is to stop or to rest, or its texts were deleted."""


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        ensemble: folder of what the service was started with; its target is the teacher.
        store: of the drafts' versions, a folder or a URL.
        spool: a path or a Redis URL.
        folder: of checkpoints and kept states; this trainer's own.
        corpus: the target's own answers, for replay and the reference set.
        load: folder where services on this machine tell how busy they are.
    """

    ensemble: Path
    store: str
    spool: str
    folder: Path
    corpus: Path
    load: Path


def run(config: OnlineConfig, places: Places, stop: threading.Event) -> None:
    """Follow the traffic until `stop` is set.

    Raises:
        DraftsError, OsdError: if it cannot begin. What goes wrong later is logged and tried again.
    """
    check_device(config.device)
    name = read_manifest(places.ensemble).name
    with alone(places.folder, "osd"), open_spool(places.spool, name=name) as spool:
        step_aside()
        torch.set_num_threads(config.threads)
        OnlineTrainer(config, places, spool).follow_traffic(stop)


class OnlineTrainer:
    """Students, and how far they have come."""

    def __init__(self, config: OnlineConfig, places: Places, spool: Spool) -> None:
        self.config = config
        self.places = places
        self.store = DraftsStore(places.store)
        self.control = Control(self.store)
        self.pace = Pace(config.share, config.busy_share, lambda: is_busy(places.load))
        self.ensemble = load_ensemble(places.ensemble)
        current = first_version(self.store, self.ensemble, places.folder)
        count = len(checkpoints(self.ensemble))
        self.progress = Progress.new(current.name, count, spool.identity())
        self.reporter = Reporter(self.control)
        self.reporter.report("starting", self.progress)
        target = self.ensemble.target_path
        reference = self._read_corpus(target, count)
        self.teacher = open_teacher(
            target, config.posterior, config.dtype, config.device, places.folder / "svd"
        )
        self.fresh = FreshStates(self.teacher, self.ensemble.hidden_layers)
        self.learner = Learner(
            config,
            self.ensemble,
            self.store,
            current,
            self.teacher,
            self.fresh,
            reference,
            places.folder,
        )
        self._go_on(current, spool)
        self.traffic = Traffic(spool, self.progress.positions, config, self.ensemble.vocab_size)
        self._follow_store()
        self._looked, self._paused, self._saved = float("-inf"), False, ""
        self._stop = threading.Event()
        self._activity: Activity = "starting"
        self._charged = (time.monotonic(), self._work_clock())
        self.reviewer = Reviewer(
            config,
            self.ensemble,
            self.store,
            self.teacher,
            self.fresh,
            reference,
            places.folder,
            self._breathe,
        )

    def follow_traffic(self, stop: threading.Event) -> None:
        """Round after round until `stop` is set; then a last checkpoint."""
        self._stop = stop
        failures = 0
        while not stop.is_set():
            self._charged = (time.monotonic(), self._work_clock())
            try:
                if not self.pace.rest(stop, _LOOK_EVERY_S):
                    self._look()  # resting can take long: who pauses it, or deletes, is heard
                    self.reporter.report_now_and_then("resting", self.progress, self.traffic)
                    continue
                activity = self.round()
                failures = 0
            except (OSError, SafetensorError, OsdError, DraftsError) as error:
                # A full disk, a store or a spool that is away: what is in memory goes on later.
                wait = _STUCK_S[min(failures, len(_STUCK_S) - 1)]
                logger.error("%s; trying again in %g s", error, wait)
                failures += 1
                self.reporter.stuck(str(error), self.progress, self.traffic)
                stop.wait(wait)
                continue
            if activity in ("waiting", "paused"):
                stop.wait(_LOOK_EVERY_S)
            else:
                self._charge()
        try:
            self.save()
            self.reporter.report("stopped", self.progress, self.traffic)
        except (OSError, SafetensorError, DraftsError) as error:
            # The checkpoint before is whole: the steps since are taken again.
            logger.error("the last steps are not kept: %s", error)

    def _charge(self) -> None:
        """Tell the pace of the work since the last time."""
        before, now = self._charged, (time.monotonic(), self._work_clock())
        self.pace.worked(now[1] - before[1], now[0] - before[0])
        self._charged = now

    def _breathe(self) -> None:
        """In the midst of what takes minutes: keep to the share, and hear a stop."""
        self._charge()
        done = False
        while not done:
            done = self.pace.rest(self._stop, _LOOK_EVERY_S)
            self.reporter.report_now_and_then(self._activity, self.progress, self.traffic)
        if self._stop.is_set():
            raise _Interrupted("the trainer is to stop")
        if self._activity == "judging" and time.monotonic() - self._looked > _LOOK_EVERY_S:
            cleared, paused = self.traffic.forget_if_cleared(), self.control.paused()
            self._looked = time.monotonic() if not cleared and paused is None else float("-inf")
            if cleared or paused is not None:
                raise _Interrupted("the spool was emptied" if cleared else "the trainer is to rest")
        self._charged = (time.monotonic(), self._work_clock())

    def _work_clock(self) -> float:
        """Seconds of work on the device, or on each of the `threads` cores."""
        if self.config.device == "cpu":
            return time.process_time() / self.config.threads
        return time.monotonic()

    def round(self) -> Activity:
        """Do the next thing, and say what it was."""
        self._look()
        self._activity = activity = self._next()
        self.reporter.report_now_and_then(activity, self.progress, self.traffic)
        if activity == "training":
            self.step()
        elif activity == "judging":
            try:
                self.judge()
            except _Interrupted as why:
                logger.info("a judgement was cut short: %s", why)
            self.reporter.report(activity, self.progress, self.traffic)
        if activity in ("waiting", "paused") or self._is_due():
            self.save()
        return activity

    def _look(self) -> None:
        """Every few seconds: what others have chosen, and what has come."""
        if time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._follow_store()
            self._paused = self.control.paused() is not None
            self.traffic.pull()
            self._looked = time.monotonic()

    def _next(self) -> Activity:
        if self._paused:
            return "paused"
        if self._to_watch() or self._may_judge():
            return "judging"
        return "waiting" if self._next_student() is None else "training"

    # Steps.

    def step(self) -> None:
        """One step of the student whose turn it is, on traffic and replay."""
        number = self._next_student()
        assert number is not None
        config, progress = self.config, self.progress
        texts = self.traffic.next_texts(number, config.texts - config.replayed)
        learned = len(texts)
        index, warm = progress.steps[number], progress.warm // len(self.learner.students)
        if config.replayed:
            order = derived_seed(config.seed, "replay", number)
            texts += batch_at(self.replay[number], index, config.replayed, order)
        warmth = min(1.0, (warm + 1) / max(1, config.warmup))
        try:
            rate = config.learning_rate * progress.rate * warmth
            loss = self.learner.learn(number, index, texts, rate)
        except Diverged as error:
            progress.diverged += 1
            logger.warning("student %d, step %d: %s; it is left out", number, index, error)
        else:
            progress.last_step = time.time()
            self.reporter.loss(loss)
        self.traffic.done(number, learned)
        progress.texts[number] += learned
        progress.steps[number] += 1
        progress.since += 1
        progress.warm += 1

    def _next_student(self) -> int | None:
        """The one with the fewest steps among those for which enough texts wait."""
        wanted = self.config.texts - self.config.replayed
        ready = [n for n in range(len(self.learner.students)) if self.traffic.waiting(n) >= wanted]
        return min(ready, key=lambda n: (self.progress.steps[n], n), default=None)

    # Versions.

    def judge(self) -> None:
        """Take the version that serves back if it does badly; else publish a new one, or refuse it.

        Either way the progress that is written with it is that of after it, so that a kill between
        the two lets nothing be learned twice.
        """
        if fresh := self._to_watch():
            self._watch(fresh)
            return
        folder = self.places.folder / "candidate"
        stem = f"{self.ensemble.members[0].draft.kind}-osd-{self.progress.step}"
        name = write_version(self.ensemble, self.learner.students, folder, stem)
        held_out = self.traffic.held_out_after()
        review = self.reviewer.review(
            folder, held_out, serving=self.progress.base, first=self.progress.first
        )
        if self._is_overruled():
            logger.info("version %s is dropped: somebody has chosen otherwise meanwhile", name)
            return
        after = self._after(name, review)
        about: dict[str, Any] = {
            "made by": "online stochastic distillation",
            **review.about(),
            "progress": after.model_dump(mode="json"),
        }
        self._publish(folder, name, about)
        if review.reasons:
            logger.warning("version %s is refused: %s", name, "; ".join(review.reasons))
            self._start_from(self.store.version(after.base), after)
        elif self._is_overruled():  # while it was written: `current` is not the trainer's to set
            self.store.withdraw(
                name, "somebody chose another version, or a pause, while it was published"
            )
            return
        else:
            self.store.make_current(name)
            logger.info("version %s goes live: %s", name, review)
            self.progress = after
        self.save()
        self._tidy()

    def _after(self, name: str, review: Review) -> Progress:
        self.progress.positions = list(self.traffic.positions)
        read = self.traffic.last
        if review.reasons or review.candidate is None:
            serving = review.serving.traffic._asdict()
            return self.progress.refuse(name, review.reasons, read, serving)
        new = review.candidate
        return self.progress.publish(name, read, new.traffic._asdict(), new.reference._asdict())

    def _is_overruled(self) -> bool:
        """Whether somebody chose another version, or a pause, while this one was measured."""
        self._paused = self.control.paused() is not None
        return self._paused or self.store.current_name() != self.progress.base

    def _tidy(self) -> None:
        """Keep so many versions that served, and so many that did not; here, what the store has."""
        served = [v.name for v in self.store.versions() if not v.about.get("refused")]
        mine = self.progress
        spared = [mine.first, mine.base, mine.origin, *served[-self.config.keep_versions :]]
        self.store.prune(self.config.keep_versions, spared)
        kept = {version.name for version in self.store.versions()}
        for folder in (self.places.folder / "versions").iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _watch(self, fresh: list[Text]) -> None:
        version = self.store.version(self.progress.base)
        if version.parent is None:
            self.progress.watched = None
            return
        reason, now = self.reviewer.watch(fresh, serving=version.name, parent=version.parent)
        if self._is_overruled():
            return
        if reason is None:
            self.progress.watched, self.progress.traffic = None, now._asdict()
            return
        logger.warning("version %s is taken back: %s", version.name, reason)
        after = self.progress.take_back(version.name, reason, now._asdict())
        self.store.withdraw(version.name, reason)
        self._start_from(self.store.make_current(version.parent), after)
        self.save()

    def _to_watch(self) -> list[Text]:
        """Held-out traffic since the version that serves, if it is watched and that is enough."""
        if self.progress.watched is None:
            return []
        fresh = self.traffic.held_out_after(self.progress.watched)
        return fresh if len(fresh) >= self.config.least_held_out else []

    def _may_judge(self) -> bool:
        # Of what has come since the last verdict, or a client could have it judged on old texts.
        fresh = len(self.traffic.held_out_after(self.progress.judged))
        enough = fresh >= self.config.least_held_out
        return enough and self.progress.since >= self.config.publish_every

    def _publish(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        try:
            self.store.publish(folder, about=about, make_current=False)
        except StoreError:
            # Killed after it was published, and come to the same weights again: nothing to add.
            self.store.version(name)

    def _follow_store(self) -> None:
        """Begin from the current version when somebody else has chosen it."""
        current = self.store.current()
        if current.name != self.progress.base:
            logger.info("%s serves now, not %s: going on from it", current.name, self.progress.base)
            self.progress.positions = list(self.traffic.positions)
            self._start_from(current, self._progress_of(current))
            self.traffic.go_to(self.progress.positions)

    def _progress_of(self, version: Version) -> Progress:
        told = version.about.get("progress")
        its = None
        if told is not None:
            try:
                its = Progress.read(told)
            except CheckpointError as error:
                logger.warning("version %s: %s", version.name, error)
        return self.progress.go_on_from(version.name, its, version.about.get("reference"))

    def _start_from(self, version: Version, progress: Progress) -> None:
        """Students with a version's weights, and new moments."""
        self.learner.begin_from(version)
        progress.base = progress.origin = version.name
        progress.warm, progress.since = 0, 0
        self.progress = progress

    # What outlives this process.

    def save(self) -> None:
        """Write a checkpoint, if anything changed."""
        self.progress.positions = list(self.traffic.positions)
        self.progress.skipped += self.traffic.count_skipped()
        state = self.progress.model_dump_json()
        if state == self._saved:
            return
        self.learner.save(self.progress)
        self._saved = state

    def _is_due(self) -> bool:
        return self.progress.step % self.config.checkpoint_every == 0

    def _go_on(self, current: Version, spool: Spool) -> None:
        """From the last whole checkpoint, or from the current version."""
        while True:
            self._start_from(current, self.progress)
            try:
                found = self.learner.load()
                if found is not None and found.origin != current.name:
                    self.learner.begin_from(self.store.version(found.origin))
                    self.learner.load()
                break
            except OtherRunError:
                raise  # it is whole: whoever named another ensemble by mistake wants it back
            except (CheckpointError, DraftsError) as error:
                # The one before has positions of its own: nothing is lost with this one but time.
                logger.warning("%s", error)
                self.learner.drop_last()
        if found is None:
            self._start_from(current, self._progress_of(current))
            return
        if found.spool != spool.identity():
            logger.warning("this is another spool: reading it from its start")
            fresh = Progress.new(found.base, len(found.positions), spool.identity())
            found = found.model_copy(
                update={"spool": fresh.spool, "positions": fresh.positions, "judged": fresh.judged}
            )
            found.watched = None
        self.progress = found

    def _read_corpus(self, target: Path, count: int) -> list[Text]:
        """Sets `replay`, a list of texts for each student; returns the reference set."""
        config = self.config
        corpus = Corpus(self.places.corpus)
        check_target(corpus, target)
        shortest = min(config.max_tokens, config.measured_tokens)
        texts = corpus.read(self.ensemble.vocab_size)
        short = [text for text in texts if text.response_start < shortest]
        reference, training = split(short, config.reference_texts)
        self.replay = shards(training, count) if config.diverse else [training] * count
        return reference
