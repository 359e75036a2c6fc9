"""How far the online trainer has come.

It is kept in each checkpoint, and in each version that the trainer publishes, with the weights that
it belongs to: whichever of the two is found, they are of one moment.
"""

from __future__ import annotations

import time
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from osd.control import LastVerdict
from osd.errors import CheckpointError
from osd.spool import START

_LEAST_RATE = 1 / 16
_Measures = dict[str, float]  # of an `Agreement`


class Progress(BaseModel):
    """Counts of the whole life of an OSD folder, and where it stands."""

    model_config = ConfigDict(extra="forbid")

    base: str  # the version that the weights descend from
    origin: str  # the one that students were made of: low-rank updates are to its weights
    first: str  # the one that the gate's bounds are taken from
    spool: str  # its identity
    positions: list[str]  # in it, of each student's last text
    steps: list[int]  # of each student
    texts: list[int]  # of the traffic, that each student has learned from
    since: int = 0  # steps of all students since the base
    warm: int = 0  # steps of all students since their optimisers were new
    rate: float = 1.0  # share of the learning rate; halved by each refusal
    watched: str | None = None  # the base went live at this position, and is watched
    judged: str = START  # the position at the last verdict
    skipped: int = 0
    diverged: int = 0
    published: int = 0
    refused: int = 0
    taken_back: int = 0
    last_step: float | None = None
    last_verdict: LastVerdict | None = None
    reference: dict[str, float] | None = None  # of the base, on the reference set
    traffic: dict[str, float] | None = None  # and on held-out traffic, when last measured

    @classmethod
    def new(cls, version: str, students: int, spool: str) -> Progress:
        """Before the first step."""
        return cls(
            base=version,
            origin=version,
            first=version,
            spool=spool,
            positions=[START] * students,
            steps=[0] * students,
            texts=[0] * students,
        )

    @property
    def step(self) -> int:
        """Steps of all students, ever."""
        return sum(self.steps)

    @classmethod
    def read(cls, told: Any) -> Self:
        """What a checkpoint or a version holds.

        Raises:
            CheckpointError: if it is of another demur.
        """
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            raise CheckpointError(f"a progress of another demur ({error})") from error

    def refuse(self, version: str, reasons: list[str], read: str, traffic: _Measures) -> Self:
        """What it is once a version is refused: behind what was read, and more careful.

        Args:
            read: position up to which the spool was read.
            traffic: of the version that serves, on held-out traffic.
        """
        after = self._judged(version, "refused", reasons)
        after.refused += 1
        after.rate = max(_LEAST_RATE, after.rate / 2)
        after.since, after.judged, after.traffic = 0, read, traffic
        return after

    def publish(self, version: str, read: str, traffic: _Measures, reference: _Measures) -> Self:
        """What it is once a version goes live.

        Args:
            read: position up to which the spool was read.
            traffic, reference: of the version, on held-out traffic and on the reference set.
        """
        after = self._judged(version, "published", [])
        after.published += 1
        after.rate = min(1.0, after.rate * 2)
        after.since, after.judged, after.traffic = 0, read, traffic
        after.base, after.watched, after.reference = version, read, reference
        return after

    def take_back(self, version: str, reason: str, traffic: _Measures) -> Self:
        """What it is once the version that serves is taken back.

        Args:
            traffic: of the version, on held-out traffic.
        """
        after = self._judged(version, "taken back", [reason])
        after.taken_back += 1
        after.watched, after.traffic = None, traffic
        after.rate = max(_LEAST_RATE, after.rate / 2)
        return after

    def go_on_from(self, version: str, its: Self | None, reference: _Measures | None) -> Self:
        """What it is once somebody else has made another version current.

        Args:
            its: the progress that is kept with the version; None if it was made elsewhere.
            reference: of the version, on the reference set, where that is known.
        """
        if its and its.spool == self.spool and its.base == version and its.step >= self.step:
            return its  # this trainer was killed between publishing it and its checkpoint
        mine = self.model_copy(deep=True)  # the version may yet turn out to be damaged
        if its is None:
            mine.first = version  # bounds are taken from it
        mine.since, mine.watched, mine.traffic, mine.reference = 0, None, None, reference
        return mine

    def _judged(
        self,
        version: str,
        verdict: Literal["published", "refused", "taken back"],
        reasons: list[str],
    ) -> Self:
        after = self.model_copy(deep=True)  # the store may fail before it comes to that
        after.last_verdict = LastVerdict(
            version=version, verdict=verdict, reasons=reasons, time=time.time()
        )
        return after
