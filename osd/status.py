"""The trainer's reports of how it does."""

from __future__ import annotations

import logging
import time

from drafts.errors import DraftsError
from osd.control import Activity, Control, TrainerStatus
from osd.progress import Progress
from osd.traffic import Traffic

logger = logging.getLogger(__name__)

_EVERY_S = 2.0
_KEEPS = 0.9  # of the mean loss, at each step


class Reporter:
    """Writes `TrainerStatus`."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._last: tuple[float, Activity | None] = (0.0, None)
        self._loss: float | None = None

    def loss(self, loss: float) -> None:
        """Of a step."""
        before = loss if self._loss is None else self._loss
        self._loss = _KEEPS * before + (1 - _KEEPS) * loss

    def report_now_and_then(self, activity: Activity, progress: Progress, traffic: Traffic) -> None:
        """Report if the last one is some seconds old, or of something else."""
        at, last = self._last
        if activity != last or time.monotonic() - at > _EVERY_S:
            self.report(activity, progress, traffic)

    def stuck(self, problem: str, progress: Progress, traffic: Traffic) -> None:
        """Report a problem, if the report can be written."""
        try:
            self.report("stuck", progress, traffic, problem)
        except (OSError, DraftsError) as error:
            logger.error("nor can the status be written: %s", error)

    def report(
        self,
        activity: Activity,
        progress: Progress,
        traffic: Traffic | None = None,
        problem: str | None = None,
    ) -> None:
        """Write it."""
        waiting = [] if traffic is None else traffic.all_waiting()
        self._control.report(
            TrainerStatus(
                activity=activity,
                problem=problem,
                updated=time.time(),
                base=progress.base,
                step=progress.step,
                steps_since=progress.since,
                last_step=progress.last_step,
                loss=self._loss,
                texts=progress.texts,
                waiting=waiting,
                skipped=progress.skipped,
                unusable=0 if traffic is None else traffic.unusable,
                diverged=progress.diverged,
                held_out=0 if traffic is None else len(traffic.held_out_after()),
                published=progress.published,
                refused=progress.refused,
                taken_back=progress.taken_back,
                traffic=progress.traffic,
                reference=progress.reference,
                last_verdict=progress.last_verdict,
            )
        )
        self._last = (time.monotonic(), activity)
