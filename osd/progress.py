"""How far the online trainer has come.

It is kept in each checkpoint, and in each version that the trainer publishes, with the weights that
it belongs to: whichever of the two is found, they are of one moment.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from osd.control import LastVerdict
from osd.spool import START


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
