"""The parts of a calibration: what each holds, and what it computes.

Every number is bounded, so that whatever file is accepted gives a finite probability for any
finite measures.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from drafts.scores import FloatArray

_MAX_LOGIT = 30.0
# Below it a direction of the domain would be as good as flat, and any text far off in it.
_LEAST_VARIANCE = 1e-6

Kind = Literal["logistic", "isotonic"]
_Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
_Scale = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
_Count = Annotated[int, Field(ge=0, le=10**9)]


class Strict(BaseModel):
    """Base of all parts: what is unknown, or of another type, is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Standard(Strict):
    """Mean and scale of each feature over the fitted texts."""

    mean: list[_Number]
    scale: list[_Scale]

    def z(self, x_NF: FloatArray) -> FloatArray:
        """Standardised features, shape [N, F]."""
        return np.asarray((x_NF - np.array(self.mean)) / np.array(self.scale))


class Logistic(Strict):
    """P(wrong) = 1 / (1 + exp(-(z · coefficients + intercept))).

    `l2` is the penalty of the fit: the coefficients minimise Σ log loss + l2/2 |coefficients|².
    """

    kind: Literal["logistic"]
    coefficients: list[_Number]
    intercept: _Number
    l2: _Number

    def probability(self, z_NF: FloatArray) -> FloatArray:
        """P(wrong) of each text, shape [N]."""
        logit_N = z_NF @ np.array(self.coefficients) + self.intercept
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logit_N, -_MAX_LOGIT, _MAX_LOGIT))))


class Isotonic(Strict):
    """P(wrong) grows with one feature: through the points (z, probability), level beyond them."""

    kind: Literal["isotonic"]
    thresholds: list[_Number] = Field(min_length=1, max_length=10_000, description="z, ascending")
    probabilities: list[_Share]

    @model_validator(mode="after")
    def _monotone(self) -> Isotonic:
        if len(self.thresholds) != len(self.probabilities):
            raise ValueError("thresholds and probabilities differ in length")
        if any(a >= b for a, b in pairwise(self.thresholds)):
            raise ValueError("thresholds do not ascend")
        if any(a > b for a, b in pairwise(self.probabilities)):
            raise ValueError("probabilities descend")
        return self

    def probability(self, z_NF: FloatArray) -> FloatArray:
        """P(wrong) of each text, shape [N]."""
        return np.interp(z_NF[:, 0], self.thresholds, self.probabilities)


class Domain(Strict):
    """Where the fitted texts lay: covariance of z, and the distance that 99% of them are within."""

    covariance: list[list[_Number]]
    limit: _Scale

    def distance(self, z_NF: FloatArray) -> FloatArray:
        """Mahalanobis distance of each text from the fitted ones, sqrt(zᵀ C⁻¹ z), shape [N]."""
        return np.asarray(np.linalg.norm(z_NF @ self._whitening, axis=1))

    @cached_property
    def _whitening(self) -> FloatArray:
        """A with A Aᵀ = C⁻¹, shape [F, F]."""
        return np.asarray(np.linalg.inv(np.linalg.cholesky(np.array(self.covariance))).T)

    @model_validator(mode="after")
    def _positive_definite(self) -> Domain:
        if any(len(row) != len(self.covariance) for row in self.covariance):
            raise ValueError("covariance is not square")
        covariance = np.array(self.covariance)
        if not np.array_equal(covariance, covariance.T):
            raise ValueError("covariance is not symmetric")
        if len(covariance) and np.linalg.eigvalsh(covariance)[0] < _LEAST_VARIANCE:
            raise ValueError("covariance is not positive definite")
        return self


class FittedTask(Strict):
    """What one task gave: n answers, of which a share is wrong."""

    task: Name
    mode: Name = Field(description="of the run: the target's own answers, or given ones")
    n: _Count
    wrong: _Share


class Origin(Strict):
    """What a calibration was fitted to, and how it is made again."""

    tasks: list[FittedTask] = Field(min_length=1, max_length=1000)
    half: Literal["dev", "all"] = Field(description="of the data sets' groups")
    model: Name = Field(description="the ensemble's name")
    weights_version: Name
    date: Name
    seed: int = Field(ge=0, lt=2**32)
    demur: Name = Field(description="version of demur")
    command: str = Field(max_length=100_000)

    @property
    def n(self) -> int:
        """Fitted answers."""
        return sum(task.n for task in self.tasks)

    @property
    def names(self) -> list[str]:
        """The tasks, each once."""
        return list(dict.fromkeys(task.task for task in self.tasks))


class HeldOut(Strict):
    """Quality on texts left out of the fit, cross-validated by groups within the fitted half."""

    folds: _Count
    groups: _Count
    ece: _Share = Field(description="expected calibration error, ten bins of equal count")
    brier: _Share
    auroc: _Share
