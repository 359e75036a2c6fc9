"""Text of a generation as it comes, against the tokenizer's own decoding of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafts.decoding import Piece, StreamDecoder
from drafts.text import TextEncoder

PROMPT = [5, 6, 7]
SETTINGS = settings(max_examples=150, deadline=None)
TEXTS = st.text(st.sampled_from("abc \n60$é東🎉"), min_size=1, max_size=30)


def run(
    encoder: TextEncoder, ids: list[int], stop: list[str]
) -> tuple[list[Piece[int]], list[int], bool]:
    """The pieces, how many had come after each token, and whether a stop string ended it."""
    decoder: StreamDecoder[int] = StreamDecoder(encoder, PROMPT, stop)
    pieces: list[Piece[int]] = []
    counts = []
    for index, token_id in enumerate(ids):
        pieces += decoder.push(token_id, index)
        counts.append(len(pieces))
        if decoder.stopped:
            return pieces, counts, True
    return pieces + decoder.flush(), counts, False


@SETTINGS
@given(text=TEXTS)
def test_pieces_join_to_the_text(encoder: TextEncoder, text: str) -> None:
    ids = encoder.tokenizer.encode(text).ids
    pieces, counts, _ = run(encoder, ids, [])
    assert "".join(piece.text for piece in pieces) == text
    assert b"".join(piece.raw for piece in pieces) == text.encode()
    assert [piece.kept for piece in pieces] == list(range(len(ids)))
    # Without stop strings nothing waits but what is no whole character yet.
    for count, piece in zip(counts, pieces, strict=True):
        assert count == (piece.kept + 1 if piece.text else [0, *counts][piece.kept])


@SETTINGS
@given(text=TEXTS, stop=st.lists(st.text(st.sampled_from("ab c\né"), min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_stop_string(
    encoder: TextEncoder, text: str, stop: list[str]
) -> None:
    ids = encoder.tokenizer.encode(text).ids
    pieces, _, stopped = run(encoder, ids, stop)
    # By the definition: the stop string that is complete first, as characters come.
    ends = [
        end
        for end in range(1, len(text) + 1)
        if any(text[:end].endswith(string) for string in stop)
    ]
    got = "".join(piece.text for piece in pieces)
    assert stopped == bool(ends)
    if not ends:
        assert got == text
        return
    longest = max(len(string) for string in stop if text[: ends[0]].endswith(string))
    assert got == text[: ends[0] - longest]
    assert [piece.kept for piece in pieces] == list(range(len(pieces)))
    assert b"".join(piece.raw for piece in pieces) == got.encode()


def test_what_cannot_begin_a_stop_string_is_not_held_back(encoder: TextEncoder) -> None:
    ids = encoder.tokenizer.encode("a b c").ids
    _, counts, _ = run(encoder, ids, ["\n\n", "Question:"])
    assert counts == list(range(1, len(ids) + 1))


def test_a_split_character_belongs_to_its_last_token(encoder: TextEncoder) -> None:
    ids = encoder.tokenizer.encode("🎉").ids
    assert len(ids) == 4
    pieces, _, _ = run(encoder, ids, [])
    assert [piece.text for piece in pieces] == ["", "", "", "🎉"]
    # Cut off in the middle, it does not show.
    pieces, _, _ = run(encoder, ids[:3], [])
    assert [piece.text for piece in pieces] == ["", "", ""]


def test_a_replacement_character_that_is_meant_is_shown(encoder: TextEncoder) -> None:
    ids = encoder.tokenizer.encode("ok \ufffd").ids
    pieces, _, _ = run(encoder, ids, [])
    assert "".join(piece.text for piece in pieces) == "ok \ufffd"


@pytest.mark.parametrize("end", ["\ufffd", "🎉"])
def test_nothing_of_the_prompt_is_in_the_text(encoder: TextEncoder, end: str) -> None:
    prompt = encoder.tokenizer.encode("SECRET Q:" + end).ids
    prompt = prompt if end == "\ufffd" else prompt[:-1]  # within the character
    decoder: StreamDecoder[int] = StreamDecoder(encoder, prompt, ["Q:"])
    pieces: list[Piece[int]] = []
    for index, token_id in enumerate(encoder.tokenizer.encode("abc 60").ids):
        pieces += decoder.push(token_id, index)
    assert "".join(piece.text for piece in pieces + decoder.flush()) == "abc 60"


@SETTINGS
@given(ids=st.lists(st.integers(0, 319), min_size=1, max_size=40))
def test_any_tokens_can_be_decoded(encoder: TextEncoder, ids: list[int]) -> None:
    pieces, _, _ = run(encoder, ids, ["ab"])
    "".join(piece.text for piece in pieces).encode()


@pytest.mark.parametrize("token_id", range(0, 320, 7))
def test_every_token_can_be_shown(encoder: TextEncoder, token_id: int) -> None:
    assert isinstance(encoder.token_text(token_id), str)
