"""Where an answer makes its claim: its first sentence, and the first name or number in it.

What follows often repeats or embroiders, and its doubt dilutes that of the claim. Rules of
characters, not of a language; the SDK's harness has the same ones (`demur.evals.claims`).
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
# `1.` of a list and `Well.` are not yet sentences.
_FEWEST_WORDS = 3


def first_sentence(text: str) -> int:
    """Where the first sentence ends: its characters are [0, end)."""
    for match in _SENTENCE_END.finditer(text):
        if len(_WORD.findall(text, 0, match.start())) >= _FEWEST_WORDS:
            return match.end()
    return len(text)


def first_name(text: str, prompt: str) -> tuple[int, int] | None:
    """The first number or capitalised word that the prompt does not have: characters [start, end).

    The text's first word counts only if it is a number: it has its capital for another reason. None
    where there is no such word.
    """
    asked = {word.casefold() for word in _WORD.findall(prompt)}
    for match in _WORD.finditer(text):
        word = match.group()
        named = word[0].isdigit() or (word[0].isupper() and match.start() > 0)
        if named and word.casefold() not in asked:
            return match.span()
    return None
