"""Does the doubt peak where a wrong solution first goes wrong?

GSM8K's solutions carry calculator annotations, `<<16-3-4=9>>9`. The first wrong number of a
solution is the first result that its own annotation, computed again, does not give, even cut or
rounded; if there is no such slip, the first result that the reference solution does not have. The
second is a guess (there are other right ways to an answer), so it is taken only of solutions that
are labelled wrong.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from demur.evals.detectors import touching
from demur.evals.numbers import numbers_in

ANNOTATION = re.compile(r"<<(?P<inside>[^<>]*)>>")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# Results are written with a few decimals.
_TOLERANCE = Fraction(1, 100)


@dataclass(frozen=True)
class Step:
    """A result in a solution.

    Attributes:
        start, end: characters of it in the solution without annotations.
        value: what is written.
        computed: what its annotation gives when it is computed again; None if it cannot be.
    """

    start: int
    end: int
    value: Fraction
    computed: Fraction | None


def steps_of(annotated: str) -> list[Step]:
    """The annotated results of a solution, in order."""
    found: list[Step] = []
    removed = 0
    for match in ANNOTATION.finditer(annotated):
        removed += len(match.group())
        behind = numbers_in(annotated[match.end() :].split("\n", 1)[0])
        if behind and behind[0][0] <= 1:  # right behind it, or after a space or sign
            start, end, value = behind[0]
            place = match.end() - removed
            # Of x+4=4+4=8, what stands between the last two.
            expression = match["inside"].rpartition("=")[0].rpartition("=")[2]
            found.append(Step(place + start, place + end, value, compute(expression)))
    return found


def first_wrong(annotated: str, gold: str) -> tuple[Step, bool] | None:
    """The first wrong number, and whether it is a slip of arithmetic; None if none is seen."""
    steps = steps_of(annotated)
    solution = ANNOTATION.sub("", annotated)
    for step in steps:
        if step.computed is not None:
            off = abs(step.computed - step.value)
            decimals = len(solution[step.start : step.end].partition(".")[2])
            # 20/3=6 and 180/7=25.7 are cut or rounded, and no slips.
            if off > _TOLERANCE and off >= Fraction(1, 10**decimals):
                return step, True
    known = {value for _, _, value in numbers_in(ANNOTATION.sub("", gold))}
    for step in steps:
        if all(abs(step.value - value) > _TOLERANCE for value in known):
            return step, False
    return None


def compute(expression: str) -> Fraction | None:
    """An annotation's expression; None if it is none of + - * / on numbers."""
    # `3.50` and `07` as people write them; a thousands separator is none in Python.
    cleaned = re.sub(r"(?<=\d),(?=\d{3})", "", expression).replace("$", "").strip()
    cleaned = re.sub(r"(?<![\d.])0+(?=\d)", "", cleaned)
    try:
        return _value(ast.parse(cleaned, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # the last two where it is nested too deep


def peak(
    values: NDArray[np.float64], text: list[str], annotated: str, wrong: Step
) -> tuple[bool, float, int] | None:
    """How a measure [T] sees the first wrong number among the solution's results.

    Returns:
        Whether the wrong one has the greatest mean over its tokens, the share of the others that
        are below it (ties count half), and how many results there are; None if it is alone.
    """

    def doubt(step: Step) -> float:
        return float(values[touching(text, [(step.start, step.end)])].mean())

    steps = steps_of(annotated)
    others = [doubt(step) for step in steps if step.start != wrong.start]
    if not others:
        return None
    own = doubt(wrong)
    below = sum(1.0 if other < own else 0.5 if other == own else 0.0 for other in others)
    return own > max(others), below / len(others), len(others) + 1


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("no arithmetic")
