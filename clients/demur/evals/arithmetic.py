"""Problems that reasoning-gym makes, of any difficulty, with no end of them.

Its item i of seed s is item 0 of seed s + i, so the halves' seeds are far apart. Small numbers
soon repeat: an expression is in one half only, its mirror image with it, and its own characters
decide in which; so is an equation, whatever its unknown is called, and a word problem, whatever its
numbers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from demur.evals.numbers import grade_number
from demur.evals.sets import EvalSet, Half, Question, SetError, half_of

SEEDS: dict[Half, int] = {"dev": 1_000_000, "test": 2_000_000}
PER_HALF = 250
_DRAWS = 5000  # for small numbers, of which there are not as many as are wanted


def questions(name: str, **datasets: dict[str, Any]) -> Callable[[str | None], list[Question]]:
    """What loads some of reasoning-gym's data sets, each at one difficulty, as one set."""

    def load(data: str | None) -> list[Question]:
        if data is not None:
            raise SetError(f"{name} is made by reasoning-gym and takes no --data")
        found = []
        for dataset, difficulty in datasets.items():
            for half, seed in SEEDS.items():
                found += _half(name, dataset, difficulty, half, seed)
        return found

    return load


def _half(
    name: str, dataset: str, difficulty: dict[str, Any], half: Half, seed: int
) -> list[Question]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise SetError("the package reasoning-gym is missing: pip install 'demur[eval]'") from error
    items = reasoning_gym.create_dataset(dataset, seed=seed, size=_DRAWS, **difficulty)
    made: dict[str, Question] = {}
    for i in range(_DRAWS):
        if len(made) == PER_HALF:
            break
        item = items[i]
        group = f"{name}/{_shared(item['metadata'])}"
        if half_of(group) == half and item["question"] not in made:
            made[item["question"]] = Question(
                id=f"{name}/{dataset}/{seed + i}",
                task=f"{name}/{dataset}",
                group=group,
                half=half,
                prompt=item["question"],
                accepted=[str(item["answer"])],
            )
    return list(made.values())


def _shared(metadata: dict[str, Any]) -> str:
    """What items have in common that must not be in both halves."""
    if "equation" in metadata:
        return str(metadata["equation"]).replace(metadata["variable"], "x")
    if "variables" in metadata:  # their names are the template's, and no other has the same
        return " ".join(sorted(metadata["variables"]))
    terms = str(metadata["expression"]).split()
    if len(terms) == 3 and terms[1] in "+*":  # 3 + 5 is 5 + 3
        terms = [*sorted(terms[::2]), terms[1]]
    return " ".join(terms)


_ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}

SETS = [
    EvalSet(
        "sums",
        questions(
            "sums",
            chain_sum=_ONE_DIGIT,
            # Without division: there it asks another expression than it answers (4 / 3, 4 / 0).
            basic_arithmetic=_ONE_DIGIT
            | {
                "operators": ("+", "-", "*"),
                "allow_parentheses": False,
                "allow_negation": False,
            },
        ),
        grade_number,
        max_tokens=64,
    ),
    EvalSet(
        "equations",
        questions("equations", simple_equations={"min_terms": 2, "max_terms": 2, "max_value": 9}),
        grade_number,
        max_tokens=128,
    ),
    EvalSet(
        "gsm-symbolic", questions("gsm-symbolic", gsm_symbolic={}), grade_number, max_tokens=256
    ),
]
