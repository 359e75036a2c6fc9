"""Twenty answers of mixed length to score: GSM8K's model solutions where the data is at hand."""

import json
import warnings
from pathlib import Path

_GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/example_model_solutions.jsonl"
_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def answers() -> list[tuple[str, str]]:
    """Twenty (question, answer) pairs."""
    if _GSM8K.exists():
        with _GSM8K.open() as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(5), strict=False)]
        return [(row["question"], row[model]["solution"]) for row in rows for model in _MODELS]
    warnings.warn(f"{_GSM8K} is not at hand: scoring made-up answers", stacklevel=2)
    return [_made(n) for n in range(20)]


def _made(n: int) -> tuple[str, str]:
    each, count = 3 + n, 2 + n % 5
    question = f"A box holds {each} pens. Tom buys {count} and gives 3 pens away. What is left?"
    steps = " ".join(f"After box {i} he has {i * each} pens." for i in range(1, count + 1 + n % 4))
    return (
        question,
        f"{steps} Then {count * each} - 3 = {count * each - 3}.\n#### {count * each - 3}",
    )
