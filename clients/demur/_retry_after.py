"""The Retry-After header: seconds, or an HTTP date."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime


def seconds_of(header: str | None) -> float | None:
    """How many seconds to wait, 0 for a time that has passed; None if it does not say."""
    if header is None:
        return None
    # ASCII alone: str.isdigit and float() take digits of other scripts, "inf" and "nan" as well.
    if header.isascii() and header.strip().isdigit():
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())
