"""A client that hangs up, by speaking ASGI to the app itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any


async def hang_up(
    app: Any, path: str, body: dict[str, Any], when: Callable[[bytes], bool]
) -> list[dict[str, Any]]:
    """Send a body, hang up once `when` holds of what has come, and wait for the app to notice.

    Returns:
        The messages that came.
    """
    sent: list[dict[str, Any]] = []
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    content = json.dumps(body).encode()
    messages.put_nowait({"type": "http.request", "body": content, "more_body": False})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("demur", 80),
        "scheme": "http",
        "root_path": "",
    }

    async def send(message: Any) -> None:
        sent.append(message)

    call = asyncio.create_task(app(scope, messages.get, send))
    while not when(b"".join(message.get("body", b"") for message in sent)):
        assert not call.done(), "the app was done before the moment to hang up"
        await asyncio.sleep(0.001)
    messages.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(call, 5)
    return sent
