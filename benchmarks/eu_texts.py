"""The texts of benchmarks/eu_rmse.py and eu_frontier.py, which no draft is trained on.

    python benchmarks/eu_texts.py --data ../shared/data

Writes four corpora beside the default ensemble: `gsm8k-test`, `gsm8k-dev` and `svamp`, the target's
own sampled answers to test questions, to training questions that its drafts were not shown and to
SVAMP's, and `gsm8k-labelled`, solutions that other models wrote to other test questions.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from pathlib import Path

from drafts.init import default_folder, init_default
from drafts.manifest import load_ensemble
from drafts.text import TextEncoder
from osd.corpus import Corpus, Text
from osd.prompts import Messages
from osd.shards import conversation_key
from osd.synthesize import run

WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and svamp/")
    parser.add_argument("--ensemble", type=Path, default=default_folder())
    parser.add_argument("--out", type=Path, default=default_folder().parent)
    parser.add_argument("--gsm8k", type=int, default=200, help="questions")
    parser.add_argument("--others", type=int, default=64, help="questions of each other kind")
    parser.add_argument("--dev-from", type=int, default=5000, help="first training question")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.ensemble == default_folder():
        init_default(default_folder(), print)

    test = rows(arguments.data / "gsm8k/test.jsonl")
    questions = [ask(row["question"]) for row in test[: arguments.gsm8k]]
    svamp = json.loads((arguments.data / "svamp/SVAMP.json").read_text())
    every = len(svamp) // arguments.others
    bodies = [ask(f"{row['Body'].rstrip('. ')}. {row['Question']}") for row in svamp[::every]]
    train = rows(arguments.data / "gsm8k/train.jsonl")[arguments.dev_from :]
    sets = {
        "gsm8k-test": questions,
        "gsm8k-dev": [ask(row["question"]) for row in train[: arguments.others]],
        "svamp": bodies[: arguments.others],
    }
    for name, prompts in sets.items():
        asyncio.run(
            run(
                arguments.ensemble,
                arguments.out / name,
                prompts,
                max_new_tokens=arguments.max_new_tokens,
                temperature=1.0,
                per_part=256,
            )
        )
    solutions = rows(arguments.data / "gsm8k/example_model_solutions.jsonl")
    other = solutions[arguments.gsm8k :: 7][: arguments.others]
    labelled(other, arguments.ensemble, arguments.out / "gsm8k-labelled")


def labelled(solutions: list[dict[str, object]], ensemble: Path, folder: Path) -> None:
    """Solutions to questions, the writing models taking turns."""
    encoder = TextEncoder(load_ensemble(ensemble).target_path)
    texts = []
    for number, row in enumerate(solutions):
        written = row[WRITERS[number % len(WRITERS)]]
        assert isinstance(written, dict)
        messages = ask(str(row["question"]))
        encoded = encoder.encode(encoder.render(messages), written["solution"], rendered=True)
        key = conversation_key(messages=messages)
        texts.append(
            Text(key=key, response_start=encoded.response_start, token_ids=encoded.token_ids)
        )
    about = {"texts": "labelled GSM8K solutions", "solutions": len(texts)}
    keys = json.dumps([text.key for text in texts]).encode()
    Corpus(folder, about | {"keys_sha256": hashlib.sha256(keys).hexdigest()}).add(0, texts)
    print(f"wrote {folder}")


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def ask(question: object) -> Messages:
    return [{"role": "user", "content": str(question)}]


if __name__ == "__main__":
    main()
