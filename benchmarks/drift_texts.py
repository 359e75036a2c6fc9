"""The texts of benchmarks/online_drift.py: an old domain, and one that the traffic turns to.

    python benchmarks/drift_texts.py --data ../shared/data

The old domain is GSM8K, to which drafts are aligned first (drafts/drift-old.yaml); the new one is
translation into four languages: "Translate this into French: ..." with a problem of MAWPS, in the
traffic, or of SVAMP, to measure on. Written beside the default ensemble, under `drift`: the
prompts, and the target's own sampled answers: to measure on (`old-test`, `new-test`), to replay
(`old-train`), and to distil drafts on from nothing (`new-train`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from pathlib import Path

from eu_texts import ask, rows

from drafts.init import default_folder, init_default
from osd.prompts import Messages, read_prompts
from osd.synthesize import run

LANGUAGES = ("French", "German", "Spanish", "Italian")
OLD_TRAFFIC = "old-traffic.jsonl"
NEW_TRAFFIC = "new-train.jsonl"
_PER_PART = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/, mawps/, ...")
    parser.add_argument("--out", type=Path, default=default_folder().parent / "drift")
    parser.add_argument("--test", type=int, default=60, help="texts of each domain to measure on")
    parser.add_argument("--replay", type=int, default=256, help="texts of the old domain to replay")
    arguments = parser.parse_args()
    init_default(default_folder(), print)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    questions = rows(arguments.data / "gsm8k/train.jsonl")[arguments.replay :]
    write(out / OLD_TRAFFIC, [str(row["question"]) for row in questions[:1000]])
    translations = {"new-train": mawps(arguments.data), "new-test": svamp(arguments.data)}
    for name, prompts in translations.items():
        write(out / f"{name}.jsonl", prompts)
    for name, count in {"test": arguments.test, "train": arguments.replay}.items():
        questions = rows(arguments.data / f"gsm8k/{name}.jsonl")[:count]
        prompts = [ask(row["question"]) for row in questions]
        synthesize(out / f"old-{name}", prompts, max_new_tokens=200)
    for name in translations:
        prompts = list(read_prompts(out / f"{name}.jsonl"))
        some = prompts if name == "new-train" else prompts[: arguments.test]
        synthesize(out / name, some, max_new_tokens=160)


def write(file: Path, prompts: list[str]) -> None:
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def synthesize(folder: Path, prompts: list[Messages], *, max_new_tokens: int) -> None:
    made = run(
        default_folder(),
        folder,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        per_part=_PER_PART,
    )
    asyncio.run(made)


def mawps(data: Path) -> list[str]:
    """Each problem once, in an order of its own."""
    files = sorted((data / "mawps").glob("*.jsonl"))
    problems = [str(row["input"]) for file in files for row in rows(file)]
    random.Random(0).shuffle(problems)
    prompts: dict[str, str] = {}
    for number, text in enumerate(problems):
        prompts.setdefault(text, translate(number, text))
    return list(prompts.values())


def svamp(data: Path) -> list[str]:
    problems = json.loads((data / "svamp/SVAMP.json").read_text())
    return [
        translate(i, f"{row['Body'].rstrip('. ')}. {row['Question']}")
        for i, row in enumerate(problems)
    ]


def translate(number: int, text: str) -> str:
    """The languages take turns."""
    return f"Translate this into {LANGUAGES[number % len(LANGUAGES)]}: {text}"


if __name__ == "__main__":
    main()
