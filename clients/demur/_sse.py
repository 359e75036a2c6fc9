"""Server-sent events, as the HTML standard has them: the data of each event from pieces of bytes.

Pieces may end anywhere: within a line, a line's end or a character.
"""

from __future__ import annotations

import codecs
import re

# Not str.splitlines: it also ends lines at U+2028, form feeds and the like, which JSON may hold.
_LINE_END = re.compile(r"\r\n|\n|\r")


class Decoder:
    """Feed it bytes as they come; it gives the data of the events that they complete."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._rest = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """Data of the events that this piece completes."""
        return self._events(self._decode(piece))

    def end(self) -> list[str]:
        """Data of an event that the end of the stream cut short, if there is one."""
        return self._events(self._decode(b"", final=True) + "\n\n")

    def _events(self, text: str) -> list[str]:
        text = self._rest + text
        # A carriage return at the end may be half of one line end.
        held = "\r" if text.endswith("\r") else ""
        *lines, rest = _LINE_END.split(text[: len(text) - len(held)])
        self._rest = rest + held
        return [data for line in lines if (data := self._line(line)) is not None]

    def _line(self, line: str) -> str | None:
        """The data of the event that a blank line ends; other lines are kept for it."""
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        return None  # a comment, or a field that says nothing here: event, id, retry
