"""A conversation on a terminal: answers shaded token by token, and a line of numbers below each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import typer
from rich.console import Console
from rich.text import Text

from demur._cli_common import complain, console, warn
from demur._measures import Measure
from demur._terminal import shaded
from demur._visible import visible
from demur._words import doubtful
from demur.chat_stream import ChatStream
from demur.chat_types import ChatChoice, ChatCompletion, heat_token
from demur.client import Client
from demur.errors import AuthenticationError, DemurError
from demur.heatmap import HeatToken, cells_of
from demur.params import ChatOptions

_ENDED_BY = {
    "stop": "complete",
    "length": "cut off at the longest length",
    "uncertainty": "ended by uncertainty (--stop-above)",
}


class Show:
    """Prints answers.

    Args:
        measure: what to shade by.
        top: the end of the scale of shades, in nats: the same for all answers.
    """

    def __init__(self, measure: Measure, top: float) -> None:
        self._measure = measure
        self._top = top
        self._out = console()
        self._notes = Console(stderr=True, highlight=False)

    def tokens(self, stream: ChatStream) -> None:
        """The tokens of an answer as they come."""
        try:
            for cell in cells_of(_tokens(stream)):
                self._out.print(shaded(cell, self._measure, self._top), end="", soft_wrap=True)
                self._out.file.flush()
        finally:
            self._out.print()

    def numbers(self, choice: ChatChoice) -> None:
        """One dim line below the answer."""
        if choice.uncertainty is None:
            return
        sequence = choice.uncertainty.sequence
        parts = [f"{len(choice.tokens)} tokens"]
        for name in ("epistemic_mean", "epistemic_max"):
            if name in sequence:
                parts.append(f"{name.replace('_', ' ')} {sequence[name]:.3f}")
        if choice.uncertainty.hallucination_score is not None:
            parts.append(f"wrong with probability {choice.uncertainty.hallucination_score:.2f}")
        reason = choice.finish_reason or ""
        parts += [_ENDED_BY.get(reason, visible(reason)), *doubtful(choice.heatmap())]
        self._notes.print(Text(", ".join(parts), style="dim"))
        for warning in choice.uncertainty.warnings:
            warn(warning.message)


class Conversation:
    """What was said, and what the service is asked with."""

    def __init__(
        self, client: Client, options: ChatOptions, system: str | None, show: Show
    ) -> None:
        self._client = client
        self._options = options
        self._show = show
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._history = list(self._opening)

    def answer(self, question: str) -> ChatCompletion:
        """The answer, not shown."""
        return self._client.chat(self._with(question), **self._options)

    def ask(self, question: str) -> None:
        """Show the answer as it comes, and remember both."""
        turns = self._with(question)
        with self._client.chat(turns, stream=True, **self._options) as stream:
            self._show.tokens(stream)
            choice = stream.completion().choices[0]
        self._show.numbers(choice)
        self._history = [*turns, {"role": "assistant", "content": choice.text}]

    def run(self) -> None:
        """Ask and answer until the user ends it. A failed or interrupted turn is forgotten."""
        with suppress(ImportError):
            import readline  # noqa: F401  # keys of the line editor, where there is one
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                typer.echo()
                return
            if question == "/exit":
                return
            if question == "/reset":
                self._history = list(self._opening)
            elif question:
                self._turn(question)

    def _turn(self, question: str) -> None:
        try:
            self.ask(question)
        except KeyboardInterrupt:
            complain("stopped; Ctrl-D ends the conversation")
        except AuthenticationError:
            raise  # no other question would fare better
        except DemurError as error:
            complain(str(error))

    def _with(self, question: str) -> list[dict[str, str]]:
        return [*self._history, {"role": "user", "content": question}]


def _tokens(stream: ChatStream) -> Iterator[HeatToken]:
    for chunk in stream:
        for choice in chunk.choices:
            yield from map(heat_token, choice.tokens)
