"""A service with the fake engine, on a port, for `demur eval`: it counts, and it goes wrong.

With it come a small GSM8K and the lines of a run.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from drafts.scores import Generated, Sampling
from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.fake_engine import END, FakeEngine

Body = dict[str, Any]
Message = MutableMapping[str, Any]
WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True)
class Mishap:
    """An answer that is none. Without a status, there is none for as long as the client waits."""

    status: int | None
    retry_after: str | None = None


class Mishaps:
    """Draws them for a share of all requests: for each of its tries, whatever comes in between."""

    def __init__(self, seed: int, share: float, kinds: Sequence[Mishap]) -> None:
        self.seed = seed
        self.share = share
        self.kinds = kinds
        self.drawn: Counter[Mishap] = Counter()
        self._tries: Counter[str] = Counter()

    def __call__(self, body: Body) -> Mishap | None:
        key = json.dumps(body)
        self._tries[key] += 1
        draw = random.Random(f"{self.seed} {self._tries[key]} {key}")
        if draw.random() >= self.share:
            return None
        kind = draw.choice(self.kinds)
        self.drawn[kind] += 1
        return kind


class AnsweringEngine(FakeEngine):
    """Its answer is a number, and depends on the prompt and on nothing else."""

    max_tokens = 511

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    async def stream(
        self, token_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Generated, None]:
        one = FakeEngine()
        one.weights_version = self.weights_version
        text = f"It is {sum(token_ids) % 3 + 4}."
        one.answer = [*self.encoder.tokenizer.encode(text).ids, END]
        async for step in one.stream(token_ids, sampling):
            yield step


class EvalService:
    """The real app in a thread, and what it has been asked.

    Attributes:
        asked: the bodies of all requests, as they came; {} for one without.
        most: the most of them that were under way at once.
        held: none with a body is answered while this is set.
        slow_s: an answer is put off by a random time up to this.
        mishap: what goes wrong with a request, if anything does.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.engine = AnsweringEngine(encoder)
        self.asked: list[Body] = []
        self.under_way = 0
        self.most = 0
        self.held = False
        self.slow_s = 0.0
        self.mishap: Callable[[Body], Mishap | None] = lambda body: None

        async def start(_: Settings) -> tuple[str, FakeEngine, TextEncoder]:
            return "tiny", self.engine, encoder

        self._app = create_app(Settings(ensemble=Path("unused"), api_keys=["key"]), start)
        config = uvicorn.Config(self._watched, port=0, log_level="error", interface="asgi3")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    @property
    def greedy(self) -> list[str]:
        """The prompts of the requests for greedy answers."""
        return [prompt_of(body) for body in self.asked if body.get("temperature") == 0]

    def die(self) -> None:
        """Answer what is under way, and nothing from then on; for `mishap` to call."""
        # What uvicorn does when it ends, but at once: by itself it looks every 0.1 s if it shall.
        for listening in self._server.servers:
            listening.close()
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    def end(self) -> None:
        self.held = False
        self._server.should_exit = True
        self._thread.join()

    async def _watched(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        content = b"".join(message.get("body", b"") for message in messages)

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        body: Body = json.loads(content) if content else {}
        self.asked.append(body)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        answered = False

        async def counted(message: Message) -> None:
            nonlocal answered
            # Before the answer is out: whoever has it may ask the next.
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered = True
                self.under_way -= 1
            await send(message)

        try:
            await asyncio.sleep(random.uniform(0, self.slow_s))
            while self.held and body:
                await asyncio.sleep(0.005)
            mishap = self.mishap(body)
            if mishap is None:
                await self._app(scope, again, counted)
            elif mishap.status is None:
                while (await again())["type"] != "http.disconnect":
                    pass
            else:
                await _refuse(mishap.status, mishap.retry_after, counted)
        finally:
            self.under_way -= not answered


async def _refuse(status: int, retry_after: str | None, send: Any) -> None:
    error = {"message": "made up", "type": "t", "param": None, "code": "c"}
    headers = [(b"content-type", b"application/json")]
    if retry_after is not None:
        headers.append((b"retry-after", retry_after.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def prompt_of(body: Body) -> str:
    """What a request's user says."""
    (message,) = body["messages"]
    return str(message["content"])


def write_gsm8k(folder: Path, n: int) -> Path:
    """n questions, and four solutions to each of which the first is right."""
    folder.mkdir()
    with (
        (folder / "test.jsonl").open("w") as tests,
        (folder / "example_model_solutions.jsonl").open("w") as solved,
    ):
        for i in range(n):
            question, gold = f"Tom has {i} pens. How many boxes does he need?", i % 3 + 4
            worked = f"He needs {gold}.\n#### {gold}"
            tests.write(json.dumps({"question": question, "answer": worked}) + "\n")
            solutions = {
                writer: {"solution": f"It is {gold + k}.", "is_correct": k == 0}
                for k, writer in enumerate(WRITERS)
            }
            row = {"question": question, "ground_truth": worked, **solutions}
            solved.write(json.dumps(row) + "\n")
    return folder


def kept(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run so far."""
    file = run / "answers.jsonl"
    if not file.exists():
        return []
    *whole, _ = file.read_bytes().split(b"\n")
    return [json.loads(line) for line in whole]


def findings(run: Path) -> dict[str, dict[str, Any]]:
    """What is in the lines but for the time that each took, by question; one line for each."""
    found = {line["id"]: {**line, "seconds": None} for line in kept(run)}
    assert len(found) == len(kept(run))
    return found
