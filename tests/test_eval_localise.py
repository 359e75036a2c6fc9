"""The first wrong number of a solution, and where a measure peaks."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from demur.evals.localise import ANNOTATION, Step, compute, first_wrong, peak, steps_of

SLIPPED = "16-3=$<<16-3=13>>13\nTwice that is <<13*2=26>>28.\nA: 28"
WRONG = Step(start=23, end=25, value=Fraction(28), computed=Fraction(26))
GOLD = "16-4=<<16-4=12>>12\n12*2=<<12*2=24>>24\n#### 24"


@pytest.mark.parametrize(
    "annotated, numbers, computed",
    [
        ("16-3=<<16-3=13>>13 eggs, $<<13*2=26>>26.", ["13", "26"], [13, 26]),
        ("It is <<2*617=1234>>$1,234.50 or <<1/2=.5>> .5", ["$1,234.50", ".5"], [1234, "1/2"]),
        ("20%: <<20*.01=.2>>.2, so <<50*.2=10>>10%", [".2", "10"], ["1/5", 10]),
        ("<<5-8=-3>>-3 and <<6/8=3/4>>3/4", ["-3", "3/4"], [-3, "3/4"]),
        ("<<2+2=4>>4<<4*2=8>>8", ["4", "8"], [4, 8]),
        ("<<1+1=2>>two, <<2+2=4>>\n4, <<3+3=6>>a 6", [], []),
        (
            "<<x+4=4+4=8>>8 <<5>>5 <<5*2/5=2.0=2.0>>2 <<x=1>>1",
            ["8", "5", "2", "1"],
            [8, None, 2, None],
        ),
        ("<<>>7 <<=>>8", ["7", "8"], [None, None]),
        ("No annotation, 5.", [], []),
        ("", [], []),
    ],
)
def test_steps(annotated: str, numbers: list[str], computed: list[int | str | None]) -> None:
    """Their offsets are those of the text that readers see."""
    shown = ANNOTATION.sub("", annotated)
    steps = steps_of(annotated)
    assert [shown[step.start : step.end] for step in steps] == numbers
    assert [step.computed for step in steps] == [
        None if each is None else Fraction(each) for each in computed
    ]


def test_a_step_has_what_is_written() -> None:
    (step,) = steps_of("2*9=$<<2*9=18>>1,900.5")
    assert step == Step(start=5, end=12, value=Fraction(3801, 2), computed=Fraction(18))


@pytest.mark.parametrize(
    "expression, value",
    [
        ("16-3-4", 9),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-(2+3)", -5),
        ("-5+-3", -8),
        ("+5", 5),
        ("((1/3)*3)", 1),
        ("07*.05", "0.35"),
        ("0.05*00.5", "0.025"),
        ("1,234+1,000,000", 1_001_234),
        ("$5*$3.50", "17.5"),
        (" 0.1 + 0.2 ", "0.3"),
        ("10/4", "2.5"),
        ("100-100.00", 0),
    ],
)
def test_compute(expression: str, value: int | str) -> None:
    assert compute(expression) == Fraction(value)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "=",
        "1/0",
        "1/(2-2)",
        "50%*2",
        "10%3",
        "2x3",
        "x+1",
        "2(3)",
        "2+3=5",
        "1//2",
        "2**3",
        "True",
        "2j",
        "1e400",
        "nan",
        "1<<9",
        "(1,2)",
        "[1]*9",
        "f'{1}'",
        "lambda: 1",
        "__import__('os')",
        "__import__('os').system('true')",
        "9**9**9",
        '"a"*10**9',
        "\0",
        "\ud800",
        "9" * 5000,
        "(" * 10_000 + "1" + ")" * 10_000,
        "1+" * 50_000 + "1",
        "-" * 100_000 + "1",
    ],
    ids=lambda expression: repr(expression[:20]),
)
def test_what_is_no_arithmetic_is_quickly_none(expression: str) -> None:
    began = time.process_time()
    assert compute(expression) is None
    assert time.process_time() - began < 2


def test_a_slip_comes_first() -> None:
    found = first_wrong(SLIPPED, GOLD)
    assert found == (WRONG, True)
    assert ANNOTATION.sub("", SLIPPED)[23:25] == "28"


def test_else_the_first_result_that_the_reference_lacks() -> None:
    found = first_wrong("16-4=<<16-4=12>>12, 12/2=<<12/2=6>>6, 6+1=<<6+1=7>>7", GOLD)
    assert found is not None
    assert (found[0].value, found[1]) == (6, False)


@pytest.mark.parametrize(
    "annotated, gold",
    [
        (GOLD, GOLD),
        ("<<12*2=24>>24.004", GOLD),  # near enough
        ("<<12*2=24>>24", "It is 24, without annotations"),
        ("A: 5", GOLD),
        ("", ""),
    ],
)
def test_nothing_wrong_is_seen(annotated: str, gold: str) -> None:
    assert first_wrong(annotated, gold) is None


@pytest.mark.parametrize(
    "annotated, slip",
    [
        ("<<20/3=6.67>>6.67", False),
        ("<<20/3=6>>6", False),  # cut
        ("<<20/3=7>>7", False),
        ("<<180/7=25.7>>25.7", False),
        ("<<180/7=25.6>>25.6", True),
        ("<<20/3=5>>5", True),
        ("<<0.1*3=0.30000000000000004>>0.30000000000000004", False),
        ("<<4+5=9>>10", True),
        ("<<4+5=9>>9.00", False),
        ("<<4.20+9.45+1.35=15>>14.99", False),
        ("<<8-12=4>>4", True),
        ("<<100*20%=30>>30", False),  # cannot be computed
        ("<<9/0=1>>1", False),
    ],
)
def test_slips(annotated: str, slip: bool) -> None:
    found = first_wrong(annotated, "")
    assert found is not None  # the reference has no number at all
    assert found[1] is slip


TEXT = ["16", "-3=", "$1", "3\nTwice that", " is ", "2", "8", ".\nA: 28"]


@pytest.mark.parametrize(
    "doubts, expected",
    [
        # 13 lies in the third and fourth token, the wrong 28 in the sixth and seventh.
        ([9, 9, 1, 3, 9, 2, 4, 9], (True, 1.0, 2)),
        ([0, 0, 4, 4, 0, 1, 2, 0], (False, 0.0, 2)),
        ([0, 0, 2, 4, 0, 4, 2, 0], (False, 0.5, 2)),
    ],
)
def test_peak(doubts: list[float], expected: tuple[bool, float, int]) -> None:
    assert "".join(TEXT) == ANNOTATION.sub("", SLIPPED)
    assert peak(np.array(doubts, dtype=float), TEXT, SLIPPED, WRONG) == expected


def test_peak_among_several() -> None:
    annotated = "<<1+0=1>>1 <<2+0=2>>2 <<3+0=3>>4 <<5+0=5>>5"
    found = first_wrong(annotated, "")
    assert found is not None
    text = ["1", " ", "2", " ", "4", " ", "5"]
    values = np.array([0.1, 9, 0.5, 9, 0.5, 9, 0.7])
    assert peak(values, text, annotated, found[0]) == (False, 1.5 / 3, 4)


def test_a_result_alone_has_no_peak() -> None:
    annotated = "<<1+1=2>>3"
    found = first_wrong(annotated, "")
    assert found is not None
    assert peak(np.ones(1), ["3"], annotated, found[0]) is None
