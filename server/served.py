"""What is served: an ensemble's engine and the encoder of its texts; how their errors are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from drafts.calibration import Calibration
from drafts.errors import EngineNotReady, NonFiniteError
from drafts.scores import ServingEngine
from drafts.text import TextEncoder, TextError, TooManyTokens
from server import schemas
from server.errors import ApiError, BadRequest, NotFound, NotReady, TooLarge

# Of versions that may still have answers under way: those that serve, and some before.
_CALIBRATIONS = 8


@dataclass
class Served:
    """The one ensemble of this service."""

    name: str
    engine: ServingEngine
    encoder: TextEncoder
    created: int = field(default_factory=lambda: int(time.time()))
    calibration: Calibration | None = None  # of the version that it begins with
    _calibrations: dict[str, Calibration | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calibrations[self.engine.weights_version] = self.calibration

    def replace(self, engine: ServingEngine) -> None:
        """Go on with another engine of the same ensemble, after this one has failed."""
        self.engine = engine
        # It begins with the version that the service began with.
        self.calibrate(engine.weights_version, self.calibration)

    def calibrate(self, weights_version: str, calibration: Calibration | None) -> None:
        """From a version on, its calibration counts; None: it gives no probability."""
        serving = self.engine.weights_version
        for name in (serving, weights_version):  # the last two
            self._calibrations[name] = self._calibrations.pop(name, None)
        self._calibrations[weights_version] = calibration
        while len(self._calibrations) > _CALIBRATIONS:
            del self._calibrations[next(iter(self._calibrations))]

    def calibration_of(self, weights_version: str) -> Calibration | None:
        """What makes probabilities of what a version has measured; None if nothing does."""
        return self._calibrations.get(weights_version)

    def check_model(self, model: str | None) -> None:
        """Raise `NotFound` if a request names another model."""
        if model is not None and model != self.name:
            raise NotFound(
                f"model '{model}' is not served here; '{self.name}' is",
                param="model",
                code="model_not_found",
            )

    def render(self, messages: list[schemas.Message]) -> str:
        """A conversation as the target's chat template writes it."""
        return self.encoder.render([message.turn for message in messages])

    def estimator(self, weights_version: str) -> schemas.Estimator:
        """What produced an answer's numbers."""
        return schemas.Estimator(drafts=self.engine.n_drafts, weights_version=weights_version)

    def calibrated_by(self, weights_version: str) -> schemas.Calibration | None:
        """The same, as it is answered."""
        calibration = self.calibration_of(weights_version)
        if calibration is None:
            return None
        return schemas.Calibration(
            id=calibration.id,
            kind=calibration.kind,
            fitted_on=calibration.origin.names,
            n=calibration.origin.n,
        )


@contextmanager
def told_to_clients() -> Iterator[None]:
    """Errors of texts and of the engine, as `ApiError`s."""
    try:
        yield
    except TooManyTokens as error:
        raise TooLarge(str(error), code="context_length_exceeded") from error
    except TextError as error:
        raise BadRequest(str(error), code="invalid_text") from error
    except EngineNotReady as error:
        raise NotReady(str(error), retry_after_s=30) from error
    except NonFiniteError as error:
        raise ApiError(str(error), code="not_finite") from error
