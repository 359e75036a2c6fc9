"""What can be wrong with what a trainer is given."""

from __future__ import annotations


class OsdError(Exception):
    """The message says what to do; no traceback is needed."""


class CorpusError(OsdError):
    """Texts that cannot be used."""


class CheckpointError(OsdError):
    """A training checkpoint that cannot be used."""


class OtherRunError(CheckpointError):
    """A training checkpoint of something else, which is whole."""


class ConfigError(OsdError):
    """A configuration that cannot be used."""


class SpoolError(OsdError):
    """A traffic spool that cannot be used now."""
