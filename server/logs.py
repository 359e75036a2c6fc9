"""Logging of the service: one line an event, with the request's id, as text or as JSON.

What clients send is not logged: no texts, no keys, no paths, no exceptions that quote them.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

from server.middleware import REQUEST_ID
from server.tracing import current_trace_id

_TEXT = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
_JSON = ("asctime", "levelname", "name", "message", "request_id", "trace_id")
_JSON_NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}


class _Context(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        record.trace_id = current_trace_id()
        return True


def configure_logging(level: str, form: Literal["text", "json"] = "text") -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(_Context())
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def formatter(form: Literal["text", "json"]) -> logging.Formatter:
    """Of a record that has the request's id and trace."""
    if form == "json":
        return _Json(_JSON, rename_fields=_JSON_NAMES)
    return _Text(_TEXT)


class _Quiet(logging.Formatter):
    """Tracebacks without the exceptions' messages, which may quote what a client sent.

    At level debug they are there.
    """

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            return super().formatException(ei)
        parts, error = [], ei[1]
        while error is not None:
            frames = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"{frames}{type(error).__name__} (its message: at log_level debug)")
            error = error.__cause__ or error.__context__
        return "\n-- after\n".join(parts)


class _Text(_Quiet):
    """One line a record."""


class _Json(_Quiet, JsonFormatter):
    """One JSON object a line."""
