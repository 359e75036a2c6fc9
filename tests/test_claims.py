"""The first sentence and the first name of an answer; the server and the harness have one rule."""

from __future__ import annotations

import pytest
from demur.evals import claims as theirs
from demur.evals.detectors import touching
from hypothesis import given
from hypothesis import strategies as st

from drafts import claims
from drafts.features import claim_of


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("The capital is Paris. It is large.", "The capital is Paris."),
        ("The answer is 3.5 apples! Yes.", "The answer is 3.5 apples!"),
        ("1. First we add them.\nThen", "1. First we add them."),
        ("Well. Paris", "Well. Paris"),
        ("no end at all", "no end at all"),
        ("a b c\nd e f", "a b c\n"),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert text[: claims.first_sentence(text)] == sentence


@pytest.mark.parametrize(
    ("text", "prompt", "name"),
    [
        ("The capital of France is Paris, not Lyon.", "What is the capital of France?", "Paris"),
        ("The answer is 18.", "What is 9 + 9?", "18"),
        ("18 it is", "What is 9 + 9?", "18"),
        ("Paris", "What is the capital of France?", None),
        ("It is FRANCE", "What about France?", None),
        ("the world is große Éire", "", "Éire"),
        ("", "", None),
    ],
)
def test_first_name(text: str, prompt: str, name: str | None) -> None:
    found = claims.first_name(text, prompt)
    assert (None if found is None else text[slice(*found)]) == name


@given(st.text(), st.text())
def test_server_and_harness_agree(text: str, prompt: str) -> None:
    assert claims.first_sentence(text) == theirs.first_sentence(text)
    assert claims.first_name(text, prompt) == theirs.first_name(text, prompt)
    assert 0 <= claims.first_sentence(text) <= len(text)


@given(st.lists(st.sampled_from(["It", " is", " ", "", "Éire", ". ", "18", "\n", "no"])), st.text())
def test_they_mark_the_same_tokens(pieces: list[str], prompt: str) -> None:
    """Empty pieces too: first bytes of a character that the next piece has whole."""
    text = "".join(pieces)
    claim = claim_of(pieces, prompt)
    name = theirs.first_name(text, prompt)
    for marks, spans in (
        (claim.sentence, [(0, theirs.first_sentence(text))]),
        (claim.name, [] if name is None else [name]),
    ):
        expected = touching(pieces, spans)
        assert marks.tolist() == (expected if expected.any() else ~expected).tolist()
