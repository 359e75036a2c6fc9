"""Final answers that are numbers, found and compared after lm-eval's two GSM8K filters.

strict: the number right after `####`; flexible: the last number of the text. lm-eval compares
strings without commas and dollar signs; here the numbers themselves are compared, so that 18, 18.0,
$18.00 and 36/2 are one answer. Also other than there, `5-3` ends in 3 and `1 1/2` is one number,
a list's commas part its numbers, and `####` may be followed by a currency, and by no space or many.
"""

from __future__ import annotations

import re
from fractions import Fraction

from demur.evals.sets import Grade, Question

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_BELOW = rf"(?=0*(?:\.0*)?[1-9]){_DIGITS}(?:\.\d+)?"  # what one can divide by: not 0
_NUMBER = re.compile(
    # A minus right after one of these is an operator, or a dash: 5-3, (2+3)-1, 3-5.
    r"(?P<sign>(?<![\w)\]}%$€£¥])[-−])?"
    r"(?:(?<!\d)[$€£¥]\s?(?P<minus>[-−])?)?"
    rf"(?:(?P<ones>{_DIGITS})[ ](?=\d+/{_BELOW}))?"  # 1 1/2
    # No.5 is a five, and .5 a half.
    rf"(?P<number>{_DIGITS}(?:\.\d+)?|(?<![\w.])\.\d+)"
    rf"(?:\s?/\s?[$€£¥]?(?P<below>{_BELOW}))?"
)
# Python neither reads nor writes integers of over 4,300 digits; nobody means such a number.
_LONGEST = 4000


def numbers_in(text: str) -> list[tuple[int, int, Fraction]]:
    """Each number of a text: its characters [start, end) and its value."""
    found = []
    for match in _NUMBER.finditer(text):
        if match.end() - match.start() > _LONGEST:
            continue
        value = _fraction(match["number"]) / _fraction(match["below"] or "1")
        value += _fraction(match["ones"] or "0")
        negative = match["sign"] or match["minus"]
        found.append((match.start(), match.end(), -value if negative else value))
    return found


def last_number(text: str) -> Fraction | None:
    """lm-eval's flexible-extract: the last number of the text."""
    found = numbers_in(text)
    return found[-1][2] if found else None


def strict_number(text: str) -> Fraction | None:
    """lm-eval's strict-match: what follows the first `####` that has a number right behind it."""
    for after in re.split("#{4,} *", text)[1:]:
        found = numbers_in(after)
        if found and found[0][0] == 0:
            return found[0][2]
    return None


def parse_number(text: str) -> Fraction:
    """A reference answer.

    Raises:
        ValueError: if it is not one number.
    """
    found = numbers_in(text)
    if len(found) != 1:
        raise ValueError(f"{text!r} is no number")
    return found[0][2]


def grade_number(text: str, question: Question) -> Grade:
    """Grade an answer whose reference is a number, by both filters."""
    gold = parse_number(question.accepted[0])
    flexible, strict = last_number(text), strict_number(text)
    return Grade(
        correct=flexible == gold,
        strict=strict == gold,
        extracted=None if flexible is None else str(flexible),
    )


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
