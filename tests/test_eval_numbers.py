"""Numbers in answers: hard forms, and both filters against lm-eval's own."""

from __future__ import annotations

import re
from fractions import Fraction
from importlib.resources import files
from typing import Any

import pytest
import yaml
from demur.evals.numbers import (
    grade_number,
    last_number,
    numbers_in,
    parse_number,
    strict_number,
)
from demur.evals.sets import Grade, Question
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.filters.extraction import RegexFilter

LM_EVAL: dict[str, Any] = yaml.safe_load(
    files("lm_eval").joinpath("tasks/gsm8k/gsm8k.yaml").read_text()
)


def values(text: str) -> list[str]:
    return [str(value) for _, _, value in numbers_in(text)]


def question(gold: str) -> Question:
    return Question(id="q", task="t", group="g", half="dev", prompt="?", accepted=[gold])


@pytest.mark.parametrize(
    "text, expected",
    [
        # separators
        ("1,234", "1234"),
        ("12,345,678.9", "123456789/10"),
        ("1,2,3", "1 2 3"),
        ("18, 19", "18 19"),
        ("12,34 and 1,2345", "12 34 1 2345"),
        # currencies and units
        ("$18 €5 £1,200.50 ¥7", "18 5 2401/2 7"),
        ("18$, 5 €, US$5, $ 5, \\$18, $18$", "18 5 5 5 18 18"),
        ("5 km/h, 18%, 3 m/s, 18km, 1st", "5 18 3 18 1"),
        # fractions
        ("3/4", "3/4"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-3/2"),
        ("1,000 1/2", "2001/2"),
        ("7.5/3, 24/$2, 1 / 2", "5/2 12 1/2"),
        ("Step 1\n1/2 of it", "1 1/2"),
        # not what one can divide by
        ("1/0", "1 0"),
        ("5/0.00 1 1/0", "5 0 1 1 0"),
        # signs
        ("-5 −5 -$5 $-5 £−5 -$ 5 -.5", "-5 -5 -5 -5 -5 -5 -1/2"),
        ("5-3 5 - 3 $5-$3 5$-3 3-5 20-30%", "5 3 5 3 5 3 5 3 3 5 20 30"),
        ("(2+3)-1 [4]-3 {4}-3 5%-3 x-3 covid-19 2–3", "2 3 1 4 3 4 3 5 3 3 19 2 3"),
        ("The answer is -3", "-3"),
        ("x = -3, x=-3, 2*-3, 5 -3", "-3 -3 2 -3 5 -3"),
        ("- 5 apples\n- 6 pears", "5 6"),
        # decimals and points
        (".5 18.0 18.00 18. 18... 18.5.", "1/2 18 18 18 18 37/2"),
        ("No.5, 1.2.3, ...5", "5 6/5 3 5"),
        # neighbours
        ("3x + x3, H2O, 1e400, 1.5e3", "3 3 2 1 400 3/2 3"),
        ("2024-01-05, 12/31/2024, 10:30", "2024 1 5 12/31 2024 10 30"),
        ("\\boxed{18} \\boxed{-18} **18** *-18* (1,200)", "18 -18 18 -18 1200"),
        ("none, -, $, -$, ., ,", ""),
        ("٣ and ３", "3 3"),
    ],
)
def test_forms_of_numbers(text: str, expected: str) -> None:
    assert values(text) == expected.split()


@pytest.mark.parametrize(
    "text, spans",
    [
        ("has 18 eggs", ["18"]),  # without the space before it
        ("is\n18", ["18"]),
        ("= $18.", ["$18"]),
        ("= - $5", ["$5"]),
        ("5-3", ["5", "3"]),
        ("-$5, 1 1/2 or 3 / 4", ["-$5", "1 1/2", "3 / 4"]),
    ],
)
def test_spans(text: str, spans: list[str]) -> None:
    assert [text[start:end] for start, end, _ in numbers_in(text)] == spans


@pytest.mark.parametrize(
    "text, strict",
    [
        ("#### 18", 18),
        ("#### 1,234.", 1234),
        ("#### $18", 18),
        ("#### $18.00 a day", 18),
        ("#### -5", -5),
        ("####18 or 20", 18),
        ("##### 18", 18),
        ("####   18", 18),
        ("it is 3\n#### 5\n#### 7", 5),
        ("#### so: #### 7", 7),
        ("#### 3/4", Fraction(3, 4)),
        ("### 18", None),
        ("####\n18", None),
        ("#### eighteen, 18", None),
        ("#### **18**", None),
        ("#### ", None),
        ("18", None),
        ("", None),
    ],
)
def test_strict_takes_what_is_right_behind_the_first_marks(
    text: str, strict: Fraction | None
) -> None:
    assert strict_number(text) == strict


def test_of_two_candidates_flexible_takes_the_last_and_strict_the_marked() -> None:
    text = "It is 20.\n#### 18\nOr was it 21?"
    assert (last_number(text), strict_number(text)) == (21, 18)
    assert grade_number(text, question("18")) == Grade(correct=False, strict=True, extracted="21")
    assert grade_number(text, question("21")) == Grade(correct=True, strict=False, extracted="21")


@pytest.mark.parametrize("same", ["18", "18.0", "$18.00", "36/2", "17 2/2", "18 apples."])
def test_forms_of_one_number_are_one_answer(same: str) -> None:
    graded = grade_number(f"She has {same}", question("18.0"))
    assert graded == Grade(correct=True, strict=False, extracted="18")


def test_no_number_is_no_answer() -> None:
    assert grade_number("I do not know.", question("0")) == Grade(False, False, None)


@pytest.mark.parametrize("text", ["", "none", "1 2", "5-3"])
def test_a_reference_is_one_number(text: str) -> None:
    with pytest.raises(ValueError, match="is no number"):
        parse_number(text)


@pytest.mark.parametrize(
    "text",
    ["9" * 5000, "1/" + "9" * 5000, "0." + "3" * 5000, "1" + ",111" * 1500, "1/" + "0" * 100_000],
)
def test_endless_digits_are_no_error(text: str) -> None:
    grade_number(f"#### {text}", question("1"))


@settings(max_examples=500)
@given(st.text() | st.text(alphabet="0123456789.,/-−$€% \n#(){}xe٣", max_size=40))
def test_any_text(text: str) -> None:
    """Nothing raises, and each number's characters by themselves are that number."""
    grade_number(text, question("1"))
    behind = 0
    for start, end, value in numbers_in(text):
        assert behind <= start < end
        assert parse_number(text[start:end]) == value
        behind = end


@given(
    value=st.integers(-(10**9), 10**9),
    decimals=st.integers(0, 3),
    grouped=st.booleans(),
    sign=st.sampled_from(["-", "−"]),
    style=st.sampled_from(
        ["{}", "{}.", "{}%", "{} km/h", "**{}**", "({})", "\\boxed{{{}}}", "= {},", "4 + 4 is {}!"]
    ),
    currency=st.sampled_from(["", "$", "€", "£ "]),
)
def test_a_decimal_comes_back(
    value: int, decimals: int, grouped: bool, sign: str, style: str, currency: str
) -> None:
    number = Fraction(value, 10**decimals)
    shown = f"{abs(value) / 10**decimals:{',' if grouped else ''}.{decimals}f}"
    text = style.format((sign if value < 0 else "") + currency + shown)
    assert last_number(text) == number
    assert strict_number(f"First 3.\n#### {currency}{shown}") == abs(number)


@given(st.integers(0, 999), st.integers(1, 998), st.integers(1, 999), st.sampled_from(["", "-"]))
def test_a_fraction_comes_back(whole: int, above: int, below: int, sign: str) -> None:
    factor = -1 if sign else 1
    assert last_number(f"It is {sign}{above}/{below}.") == factor * Fraction(above, below)
    mixed = whole + Fraction(above, below)
    assert last_number(f"It is {sign}{whole} {above}/{below}.") == factor * mixed


def lm_eval(text: str, gold: str) -> dict[str, bool]:
    """What lm-eval's gsm8k task says of an answer, by each of its filters."""
    (metric,) = LM_EVAL["metric_list"]
    found = {}
    for each in LM_EVAL["filter_list"]:
        regex, _ = each["filter"]
        arguments = {name: value for name, value in regex.items() if name != "function"}
        ((first,),) = RegexFilter(**arguments).apply([[text]], [{}])
        plain = []
        for form in (first, f"#### {gold}"):
            for ignored in metric["regexes_to_ignore"]:
                form = re.sub(ignored, "", form)
            plain.append(form.lower())
        found[each["name"]] = plain[0] == plain[1]
    return found


def ours(text: str, gold: str) -> dict[str, bool | None]:
    graded = grade_number(text, question(gold))
    return {"strict-match": graded.strict, "flexible-extract": graded.correct}


@given(
    said=st.integers(-20, 20) | st.integers(-(10**7), 10**7),
    gold=st.integers(-20, 20) | st.integers(-(10**7), 10**7),
    right=st.booleans(),
    form=st.sampled_from(["{}", "{:,}"]),
    dollar=st.booleans(),
    style=st.sampled_from(
        [
            "#### {}",
            "#### {}.",
            "3 + 4 = 7 of 1,000\n#### {}",
            "She makes {} a day.",
            "{} eggs",
            "Of 12 eggs, {}",
            "\\boxed{{{}}}",
            "**{}**",
            "#### {}\nQuestion: What is 2 + 2?",
        ]
    ),
)
def test_plain_answers_are_graded_as_by_lm_eval(
    said: int, gold: int, right: bool, form: str, dollar: bool, style: str
) -> None:
    if right:
        gold = said
    shown = form.format(abs(said))
    if dollar and "####" not in style:
        shown = f"${shown}"
    text = style.format(f"-{shown}" if said < 0 else shown)
    assert ours(text, str(gold)) == lm_eval(text, str(gold))


@pytest.mark.parametrize(
    "text, gold, strict, flexible",
    [
        # Each: is it right, by us and by lm-eval?
        ("#### 18.00", "18", (True, False), (True, False)),
        ("#### $18", "18", (True, False), (True, True)),
        ("####18", "18", (True, False), (True, True)),
        ("####  18", "18", (True, False), (True, True)),
        ("#### −18", "-18", (True, False), (True, False)),
        ("#### 1,234.0", "1234", (True, False), (True, False)),
        ("#### 3/4", "3/4", (True, False), (True, False)),
        ("It is 3/4", "4", (False, False), (False, True)),
        ("It is 1 1/2", "2", (False, False), (False, True)),
        ("16-3-4 is nine, so 12-3", "3", (False, False), (True, False)),
        ("It is 18...", "18", (False, False), (True, False)),
        ("It is 18. And so on..", "18", (False, False), (True, False)),
        ("It is No.5", "5", (False, False), (True, False)),
        ("They are 2,3", "23", (False, False), (False, True)),
    ],
)
def test_where_lm_eval_is_left_on_purpose(
    text: str, gold: str, strict: tuple[bool, bool], flexible: tuple[bool, bool]
) -> None:
    found, theirs = ours(text, gold), lm_eval(text, gold)
    assert (found["strict-match"], theirs["strict-match"]) == strict
    assert (found["flexible-extract"], theirs["flexible-extract"]) == flexible
