"""What the service and the trainer tell each other: pause, and how it goes.

Two small files beside the versions of the drafts, so that whoever reaches these reaches those too:

    <store>/osd/paused        there while the trainer is to rest; holds why
    <store>/osd/status.json   what the trainer does, written by it every few seconds
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from drafts.errors import StoreError
from drafts.store import DraftsStore

_PAUSED, _STATUS = "osd/paused", "osd/status.json"
# A trainer writes every few seconds; less often while it judges a version on a busy machine.
STALE_S = 900.0

Activity = Literal[
    "starting", "waiting", "training", "judging", "resting", "paused", "stuck", "stopped"
]


# Fields of `osd.evaluate.Agreement`.
MEASURES = ("kl_drafts", "kl_mixture", "jsd", "epistemic", "reference", "rmse")


def _known(measured: dict[str, float]) -> dict[str, float]:
    # Each becomes a metric: who can write to the store must not be able to make them without end.
    if unknown := set(measured) - set(MEASURES):
        raise ValueError(f"{len(unknown)} unknown measures")
    return measured


_Measured = Annotated[dict[str, float], AfterValidator(_known)]


class LastVerdict(BaseModel):
    """What became of a version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    verdict: Literal["published", "refused", "taken back"]
    reasons: list[str]
    time: float


class TrainerStatus(BaseModel):
    """How the trainer does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    activity: Activity
    problem: str | None = Field(description="why it is stuck")
    updated: float = Field(description="seconds since 1970")
    base: str | None = Field(description="the version that its drafts descend from")
    step: int = Field(description="steps of all students, ever")
    steps_since: int = Field(description="of them since the last version")
    last_step: float | None = Field(description="when it was, seconds since 1970")
    loss: float | None = Field(description="its mean over the last steps")
    texts: list[int] = Field(description="texts of the traffic that each student has learned from")
    waiting: list[int] = Field(description="texts that wait for each student")
    skipped: int = Field(description="texts that came too fast to be learned from")
    unusable: int = Field(
        description="texts since the trainer started whose answer begins behind where texts are "
        "cut, or of another model"
    )
    diverged: int = Field(
        description="steps whose gradient was not finite, and which were not made"
    )
    held_out: int = Field(description="held-out texts of the traffic at hand, to measure on")
    published: int
    refused: int
    taken_back: int
    traffic: _Measured | None = Field(
        description="of the version that serves, on held-out traffic, nats"
    )
    reference: _Measured | None = Field(
        description="of the version that serves, on the reference set, nats"
    )
    last_verdict: LastVerdict | None

    @property
    def age_s(self) -> float:
        """How old it is."""
        return max(0.0, time.time() - self.updated)


class Control:
    """Reads and writes these files. Every method may raise `StoreError`."""

    def __init__(self, store: DraftsStore) -> None:
        self._store = store

    def pause(self, reason: str) -> None:
        """Let the trainer rest, after the step that it is at."""
        self._store.write_note(_PAUSED, reason)

    def resume(self) -> None:
        """Let it go on."""
        self._store.remove_note(_PAUSED)

    def paused(self) -> str | None:
        """Why it rests, or None."""
        return self._store.read_note(_PAUSED)

    def report(self, status: TrainerStatus) -> None:
        """The trainer's side."""
        self._store.write_note(_STATUS, status.model_dump_json())

    def status(self) -> TrainerStatus | None:
        """The service's side; None if no trainer has written any."""
        text = self._store.read_note(_STATUS)
        if text is None:
            return None
        try:
            return TrainerStatus.model_validate_json(text)
        except ValidationError as error:
            raise StoreError(f"{_STATUS} cannot be read ({error.error_count()} errors)") from error
