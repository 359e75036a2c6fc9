"""Generated tokens as text, while they come, and cut at the first stop string.

Joining the pieces gives the text. As in `drafts.text`, a character whose bytes are split over
several tokens belongs to the last of them, and the others are empty; they come together. Text that
may be the beginning of a stop string is held back until it is known not to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from drafts.text import TextEncoder

T = TypeVar("T")

# Tokens of the prompt that can matter for how the first ones after it are written.
_CONTEXT = 16
_UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character, or not yet


@dataclass(frozen=True)
class Piece(Generic[T]):
    """A token's part of the text, its bytes, and what the caller keeps with it."""

    text: str
    raw: bytes
    kept: T


class StreamDecoder(Generic[T]):
    """The text of one generation.

    Args:
        prompt_ids: what it goes on from; some tokenizers write a word's first space only if there
            is something before it.
        stop: strings before which the text ends.
    """

    def __init__(
        self, encoder: TextEncoder, prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._encoder = encoder
        before = list(prompt_ids)[-_CONTEXT:]
        if encoder.tokenizer.decode(before).endswith(_UNFINISHED):
            before = []  # the stream would take the whole prompt for text that is still to come
        self._stream = DecodeStream(ids=before, skip_special_tokens=True)
        self._stop = list(stop)
        self._held: list[Piece[T]] = []
        self.stopped = False

    def push(self, token_id: int, kept: T) -> list[Piece[T]]:
        """Add a token; the pieces that are final now. After a stop string there are no more."""
        text = self._step(token_id)
        raw = self._encoder.raw_bytes(token_id)
        self._held.append(Piece(text, text.encode() if raw is None else raw, kept))
        if not self._stop:
            return self._release(len(text))
        held = "".join(piece.text for piece in self._held)
        begin = _first_stop(held, self._stop)
        if begin is not None:
            self.stopped = True
            return self._cut(begin)
        return self._release(len(held) - _may_begin(held, self._stop))

    def flush(self) -> list[Piece[T]]:
        """What is held back when the generation has ended otherwise."""
        pieces, self._held = self._held, []
        # The stream waits after U+FFFD, which may be a character that the model means. A character
        # that was cut off does not show.
        text = b"".join(piece.raw for piece in pieces[_n_shown(pieces) :]).decode(errors="ignore")
        if text:
            pieces[-1] = replace(pieces[-1], text=text)
        return pieces

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._encoder.tokenizer, token_id) or ""
        except Exception as error:
            # Bytes that are no UTF-8 can upset the stream, which tells it by a bare Exception.
            # What has come of such bytes until now is not shown; the text goes on after them.
            if "Invalid prefix" not in str(error):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._encoder.tokenizer, token_id) or ""

    def _release(self, length: int) -> list[Piece[T]]:
        """The held pieces that lie within the first `length` characters."""
        end, count = 0, 0
        for piece in self._held:
            end += len(piece.text)
            if end > length:
                break
            count += 1
        count = _n_shown(self._held[:count])
        pieces, self._held = self._held[:count], self._held[count:]
        return pieces

    def _cut(self, length: int) -> list[Piece[T]]:
        """The held pieces up to `length` characters, the last one shortened."""
        pieces: list[Piece[T]] = []
        for piece in self._held:
            if length <= 0:
                break
            text = piece.text[:length]
            raw = piece.raw if text == piece.text else text.encode()
            pieces.append(Piece(text, raw, piece.kept))
            length -= len(text)
        self._held = []
        return pieces


def _n_shown(pieces: Sequence[Piece[T]]) -> int:
    """Pieces up to the last one that has text; what follows belongs to a character to come."""
    return max((i + 1 for i, piece in enumerate(pieces) if piece.text), default=0)


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that ends first."""
    found = [(begin + len(string), begin) for string in stop if (begin := text.find(string)) >= 0]
    return min(found)[1] if found else None


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop string begins."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
