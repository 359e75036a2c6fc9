"""What can go wrong with an ensemble or its engine.

DraftsError
├── ManifestError      an ensemble folder that cannot be used; the sentence says what differs
├── StoreError         a version of the drafts store that is not there or not whole
├── CalibrationError   a calibration that cannot be used, or answers that none can be fitted to
├── WeightsError       draft weights that are broken, wrongly shaped or not finite
├── EngineNotReady     the engine is starting, stopping or dead
└── NonFiniteError     a forward pass produced NaN or infinity
"""


class DraftsError(Exception):
    """Base of every error that the `drafts` package raises on purpose."""


class ManifestError(DraftsError):
    """An ensemble folder that cannot be used."""


class CalibrationError(DraftsError):
    """A calibration that cannot be used, or answers that none can be fitted to."""


class WeightsError(DraftsError):
    """Draft weights that are broken, wrongly shaped or not finite."""


class StoreError(DraftsError):
    """A version of the drafts store that is not there or not whole."""


class EngineNotReady(DraftsError):
    """The engine is starting, stopping or dead."""


class NonFiniteError(DraftsError):
    """A forward pass produced NaN or infinity."""
