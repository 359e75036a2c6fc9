"""When a request is sent again, and after how long."""

from __future__ import annotations

import random

import httpx

from demur.errors import APIStatusError

_STATUSES = frozenset({408, 429, 502, 503})
# The connection is gone, and with it what the service was doing for it; after a read timeout the
# service may still be at it.
_DROPPED = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)

_FIRST_S = 0.5
_LONGEST_S = 8.0
# A service that asks for a longer wait is not waited for: the caller decides.
_LONGEST_ASKED_S = 60.0


def wait_before_retry(
    error: httpx.RequestError | APIStatusError, attempt: int, max_retries: int
) -> float | None:
    """Seconds to wait after the failure of an attempt (0 = the first); None: do not try again."""
    if attempt >= max_retries:
        return None
    backoff = min(_FIRST_S * 2**attempt, _LONGEST_S) * random.uniform(0.75, 1.25)
    if isinstance(error, httpx.RequestError):
        return backoff if isinstance(error, _DROPPED) else None
    if error.status_code not in _STATUSES:
        return None
    asked = error.retry_after or 0.0
    return max(asked, backoff) if asked <= _LONGEST_ASKED_S else None
