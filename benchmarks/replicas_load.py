"""Clients that score texts in a closed loop through the SDK, and know what became of each."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
from demur import Client, DemurError
from demur.errors import APIStatusError

_RETRIES = 5
_SETTLE_S = 120.0


class Load:
    """Any number of clients, one request each at a time.

    Args:
        url: of the service.
        bodies: chats to score, taken in turns; each gets its request's number into the question.
    """

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        self._url, self._bodies = url, bodies
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._wanted = 0
        self._pause_s = 0.0
        self.begun = 0
        self.attempts: dict[int, list[str]] = {}  # of each request, what each try came to
        self.finals: dict[int, str] = {}  # what the SDK's caller was told

    def run(self, clients: int, pause_s: float = 0.0) -> None:
        """From now on so many clients, with a pause after each answer."""
        self._wanted, self._pause_s = clients, pause_s
        for index in range(len(self._threads), clients):
            self._threads.append(threading.Thread(target=self._client, args=(index,), daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """No request begins; those under way end."""
        self._wanted = -1
        for thread in self._threads:
            thread.join(timeout=_SETTLE_S)

    def settle(self, before: int) -> None:
        """Wait until what was begun between a number and now has ended."""
        until, last = time.monotonic() + _SETTLE_S, self.begun
        while not all(number in self.finals for number in range(before, last)):
            if time.monotonic() > until:
                return  # the books will show it
            time.sleep(0.1)

    def counts(self, before: int) -> dict[str, Any]:
        """Outcomes of the requests from a number on that have ended."""
        numbers = [number for number in self.finals if number >= before]
        tries = Counter(attempt for number in numbers for attempt in self.attempts[number])
        failed = Counter(self.finals[n] for n in numbers if self.finals[n] != "200")
        return {
            "ended": len(numbers),
            "failed": sum(failed.values()),
            "failed with": dict(failed),
            "tries": dict(tries),
        }

    def _client(self, index: int) -> None:
        watched = _Watched()
        with Client(
            self._url, max_retries=_RETRIES, timeout=_SETTLE_S, transport=watched
        ) as client:
            while self._wanted >= 0:
                if index >= self._wanted:
                    time.sleep(0.1)
                    continue
                with self._lock:
                    number, self.begun = self.begun, self.begun + 1
                watched.number, watched.tries = number, []
                self.attempts[number] = watched.tries
                self.finals[number] = self._ask(client, number)
                time.sleep(self._pause_s)

    def _ask(self, client: Client, number: int) -> str:
        body = self._bodies[number % len(self._bodies)]
        [message] = body["messages"]
        question = f"[request {number}] {message['content']}"
        try:
            client.score(body["response"], messages=[{**message, "content": question}])
        except APIStatusError as error:
            return str(error.status_code)
        except DemurError as error:
            return type(error).__name__
        return "200"


class _Watched(httpx.BaseTransport):
    """Gives each try an id of its own, and writes down what came of it."""

    def __init__(self) -> None:
        self._network = httpx.HTTPTransport()
        self.number = 0
        self.tries: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["X-Request-Id"] = f"{self.number}-{len(self.tries)}"
        try:
            response = self._network.handle_request(request)
        except httpx.TransportError as error:
            self.tries.append(type(error).__name__)
            raise
        self.tries.append(str(response.status_code))
        return response

    def close(self) -> None:
        self._network.close()
