"""Estimates as the service gives them: through the engine, with its arithmetic."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from eu_compare import Estimate, Floats
from eu_estimators import MAX_TOKENS

from drafts.engine import Engine, EngineConfig
from osd.corpus import Text

Item = tuple[list[int], int]


def served(folder: Path, texts: list[Text]) -> list[Estimate]:
    """jsd + kl of an ensemble's engine in bfloat16; what it costs in time is measured elsewhere
    (benchmarks/score_throughput.py)."""
    items = [(text.token_ids[:MAX_TOKENS], text.response_start) for text in texts]
    # vLLM wants a process that has not used torch yet.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        values = pool.submit(_in_process, folder, items).result()
    return [Estimate("jsd + kl", values, time=None)]


def _in_process(folder: Path, items: list[Item]) -> list[Floats]:
    return asyncio.run(_scores(folder, items))


async def _scores(folder: Path, items: list[Item]) -> list[Floats]:
    engine = await Engine.start(EngineConfig(ensemble=folder, dtype="bfloat16"))
    try:
        scores = await asyncio.gather(*(engine.score(ids, start) for ids, start in items))
        return [score.epistemic for score in scores]
    finally:
        await engine.shutdown()
