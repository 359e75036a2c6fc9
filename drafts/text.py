"""Texts as the target sees them: chat template, tokens, and where each token lies in the response.

The response is cut into tokens after the prompt, as one text where that leaves the prompt's own
tokens as they are, else by itself. Every character of it belongs to exactly one token: a
character whose bytes are split over several belongs to the last of them, and the others are
empty. So the offsets cut the response back into its tokens, and joining those gives the response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class TextError(ValueError):
    """A text that cannot be rendered or cut into tokens; the message is for its author."""


class TooManyTokens(TextError):
    """A text that is longer than the model takes."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what} are over the {limit} that this model takes")


@dataclass(frozen=True)
class ResponseToken:
    """A token of the response; `start` and `end` are characters of the response."""

    token_id: int
    start: int
    end: int
    raw: bytes


@dataclass(frozen=True)
class EncodedText:
    """A prompt and response as token ids, and the response's tokens."""

    token_ids: list[int]
    response_start: int
    tokens: list[ResponseToken]


class TextEncoder:
    """Renders and tokenises for one target. Safe to use from several threads."""

    def __init__(self, target_path: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        tokenizer = AutoTokenizer.from_pretrained(
            target_path, local_files_only=True, trust_remote_code=False
        )
        if not tokenizer.is_fast:
            raise TextError(f"{target_path}: a tokenizer.json is needed (a fast tokenizer)")
        self._tokenizer: Any = tokenizer
        # The Rust tokenizer itself: unlike the wrapper, encoding with it changes no state.
        self._backend: Any = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._byte_of: dict[str, int] | None = None
        if "ByteLevel" in repr(self._backend.decoder):
            self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as the target's chat template writes it, up to the assistant's turn.

        transformers runs the template, which comes with the target, in Jinja's sandbox: it reaches
        neither files nor Python, but nothing bounds its time and memory.

        Raises:
            TextError: if the target has no template, or it refuses these messages.
        """
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template can divide by zero, too
            if self._tokenizer.chat_template is None:
                message = f"this target has no chat template; send a prompt ({error})"
                raise TextError(message) from error
            raise TextError(f"the chat template refuses these messages: {error}") from error
        return str(rendered)

    def encode(
        self, prompt: str, response: str, *, rendered: bool, max_tokens: int | None = None
    ) -> EncodedText:
        """Tokens of a prompt and a response.

        Args:
            rendered: the prompt came from `render`, which writes the special tokens itself.
            max_tokens: of both together.

        Raises:
            TextError: if either has no tokens.
            TooManyTokens: if there are more than `max_tokens`.
        """
        prompt_ids = self.token_ids(prompt, rendered=rendered)
        if max_tokens is not None and len(prompt_ids) >= max_tokens:
            raise TooManyTokens(f"the prompt's {len(prompt_ids)} tokens", max_tokens)
        joint = self._encoding(prompt + response, special=not rendered)
        start = len(prompt_ids)
        if joint.ids[:start] == prompt_ids and joint.offsets[start - 1][1] <= len(prompt):
            ids, names = joint.ids[start:], joint.tokens[start:]
            ends = [end - len(prompt) for _, end in joint.offsets[start:]]
        else:
            alone = self._encoding(response, special=False)
            ids, names, ends = alone.ids, alone.tokens, [end for _, end in alone.offsets]
        if not ids:
            raise TextError("the response has no tokens")
        if max_tokens is not None and start + len(ids) > max_tokens:
            raise TooManyTokens(f"{start} prompt and {len(ids)} response tokens", max_tokens)
        raw = [self._raw(name) for name in names]
        if b"".join(piece or b"" for piece in raw) == response.encode() and None not in raw:
            spans = _spans_of_bytes(response, [piece or b"" for piece in raw])
        else:
            spans = _spans_of_ends(response, ends)
        tokens = [
            ResponseToken(token_id, begin, end, response[begin:end].encode() if b is None else b)
            for token_id, (begin, end), b in zip(ids, spans, raw, strict=True)
        ]
        return EncodedText([*prompt_ids, *ids], start, tokens)

    def token_ids(self, prompt: str, *, rendered: bool) -> list[int]:
        """Tokens of a prompt by itself; `rendered` as in `encode`. Never empty.

        Raises:
            TextError: if it is empty and the target has no token to begin with.
        """
        return list(self._encoding(prompt, special=not rendered).ids) or self._beginning()

    @property
    def tokenizer(self) -> Any:
        """The Rust tokenizer."""
        return self._backend

    def raw_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token adds to a text: none if it is special; None if unknown."""
        if token_id in self._special:
            return b""
        return self._raw(self._backend.id_to_token(token_id) or "")

    def token_text(self, token_id: int) -> str:
        """A token shown by itself; special ones by name, parts of a character as U+FFFD."""
        name = self._backend.id_to_token(token_id) or ""
        if token_id in self._special:
            return name
        raw = self._raw(name)
        # U+2581 is how SentencePiece writes a space.
        return name.replace("\u2581", " ") if raw is None else raw.decode(errors="replace")

    def _encoding(self, text: str, *, special: bool) -> Any:
        # A batch of one: unlike `encode`, it lets other threads run meanwhile.
        return self._backend.encode_batch([text], add_special_tokens=special)[0]

    def _beginning(self) -> list[int]:
        # An empty prompt: the first response token still needs something before it.
        if self._tokenizer.bos_token_id is None:
            raise TextError("the prompt is empty and this target has no beginning-of-text token")
        return [int(self._tokenizer.bos_token_id)]

    def _raw(self, name: str) -> bytes | None:
        """The bytes that a vocabulary entry stands for; None where only the text can tell."""
        if match := _BYTE_FALLBACK.fullmatch(name):
            return bytes([int(match[1], 16)])
        if self._byte_of is None or any(char not in self._byte_of for char in name):
            return None
        return bytes(self._byte_of[char] for char in name)


def _spans_of_bytes(text: str, pieces: list[bytes]) -> list[tuple[int, int]]:
    """A character belongs to the token that holds its last byte."""
    char_at = [0]  # number of whole characters in the first i bytes
    for char in text:
        width = len(char.encode())
        char_at += [char_at[-1]] * (width - 1) + [char_at[-1] + 1]
    ends = [char_at[end] for end in accumulate(map(len, pieces))]
    return list(pairwise([0, *ends]))


def _spans_of_ends(text: str, ends: list[int]) -> list[tuple[int, int]]:
    """Cut where the tokenizer says tokens end; of tokens with one end, the last has the text."""
    cuts: list[int] = []
    limit = len(text)
    for end, following in zip(reversed(ends), reversed([*ends[1:], None]), strict=True):
        if following is None:
            limit = len(text)
        elif end >= following:
            # Shares its character with the token after it: empty, ends where that one begins.
            limit = min(limit, following - 1)
        else:
            limit = min(limit, end)
        cuts.append(max(0, limit))
    cuts.reverse()
    return list(pairwise([0, *cuts]))
