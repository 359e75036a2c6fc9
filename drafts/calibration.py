"""From an answer's measures to a probability that it is wrong: `calibration.json`.

It lies beside the ensemble's `demur.json`, is plain JSON, and holds

    features       what of an answer counts (`drafts.features`)
    standard       mean and scale of each, by which they are standardised: z = (x - mean) / scale
    estimator      how z becomes a probability: `logistic` or `isotonic`
    domain         where z lay in the texts that it was fitted to, to notice a text that is unlike
    origin         what it was fitted to, with which weights of the drafts, and by which command
    held_out       how good it was on texts that it was not fitted to

`drafts.calibration_fit` makes one.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from drafts.calibration_parts import (
    Domain,
    HeldOut,
    Isotonic,
    Kind,
    Logistic,
    Name,
    Origin,
    Standard,
    Strict,
)
from drafts.errors import CalibrationError
from drafts.features import Claim, check_names, features
from drafts.scores import FloatArray, TokenScores

CALIBRATION_NAME = "calibration.json"

_MAX_BYTES = 4 * 2**20
_TASKS_NAMED = 5


class ScoreWarning(NamedTuple):
    """Why a probability should be doubted."""

    code: Literal["far_from_calibration", "calibrated_on_other_weights"]
    message: str


class Calibration(Strict):
    """The contents of `calibration.json`."""

    format: Literal[1]
    features: list[Name] = Field(min_length=1)
    standard: Standard
    estimator: Annotated[Logistic | Isotonic, Field(discriminator="kind")]
    domain: Domain
    origin: Origin
    held_out: HeldOut

    @field_validator("features")
    @classmethod
    def _known_features(cls, names: list[str]) -> list[str]:
        check_names(names)
        return names

    @model_validator(mode="after")
    def _of_one_size(self) -> Calibration:
        lengths = {
            "standard.mean": len(self.standard.mean),
            "standard.scale": len(self.standard.scale),
            "domain.covariance": len(self.domain.covariance),
        }
        if isinstance(self.estimator, Logistic):
            lengths["estimator.coefficients"] = len(self.estimator.coefficients)
        elif len(self.features) > 1:
            raise ValueError("an isotonic calibration has one feature")
        for name, length in lengths.items():
            if length != len(self.features):
                raise ValueError(f"{name} has {length} entries for {len(self.features)} features")
        return self

    @property
    def kind(self) -> Kind:
        """How features become a probability."""
        return self.estimator.kind

    @cached_property
    def id(self) -> str:
        """A short hash of the file."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:12]

    def text(self) -> str:
        """The file's contents."""
        return self.model_dump_json(indent=1) + "\n"

    def probability(self, scores: TokenScores, claim: Claim) -> float:
        """The probability, in [0, 1], that a text of at least one token is wrong."""
        return float(self.estimator.probability(self._z(scores, claim))[0])

    def distance(self, scores: TokenScores, claim: Claim) -> float:
        """How far a text lies from the fitted ones; 99% of them are within `domain.limit`."""
        return float(self.domain.distance(self._z(scores, claim))[0])

    def warnings(self, scores: TokenScores, claim: Claim, model: str) -> list[ScoreWarning]:
        """Why the probability of a text that an ensemble has measured should be doubted."""
        found = []
        if (distance := self.distance(scores, claim)) > self.domain.limit:
            message = (
                f"this text is unlike those that the calibration was fitted to: its distance from "
                f"them is {distance:.3g}, and 99% of them are within {self.domain.limit:.3g} "
                f"({self._tasks()}); fit the calibration to such texts, too"
            )
            found.append(ScoreWarning("far_from_calibration", message))
        fitted, now = (self.origin.model, self.origin.weights_version), scores.weights_version
        if fitted != (model, now):
            message = (
                f"the calibration was fitted with {fitted[0]}, weights {fitted[1]}, and this text "
                f"was measured with {model}, weights {now}; fit it again: demur calibrate"
            )
            found.append(ScoreWarning("calibrated_on_other_weights", message))
        return found

    def _z(self, scores: TokenScores, claim: Claim) -> FloatArray:
        return self.standard.z(features(scores, claim, self.features)[None])

    def _tasks(self) -> str:
        names = self.origin.names
        more = len(names) - _TASKS_NAMED
        return ", ".join(names[:_TASKS_NAMED]) + (f" and {more} more" if more > 0 else "")


def load_calibration(folder: Path) -> Calibration | None:
    """The calibration of an ensemble's folder, None if it has none.

    Raises:
        CalibrationError: if there is one that cannot be used; the sentence says what is wrong.
    """
    path = folder.expanduser() / CALIBRATION_NAME
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror})") from error
    what_next = "Fit it again (demur calibrate), or remove it to serve without"
    if len(content) > _MAX_BYTES:
        raise CalibrationError(f"{path} is over {_MAX_BYTES} bytes. {what_next}")
    try:
        return Calibration.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        message = str(first["msg"]).removeprefix("Value error, ")
        raise CalibrationError(f"{path}: {where}: {message}. {what_next}") from error


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration in one piece: who reads meanwhile finds the old one, or the new."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(calibration.text(), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
