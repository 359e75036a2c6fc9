"""Starting real engines in tests, and comparing them with the reference."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from drafts.engine import Engine, EngineConfig
from drafts.scores import FloatArray, TokenScores

MEASURES = ("logprob", "entropy", "total", "aleatoric", "jsd", "kl", "epistemic")
# DESIGN's tolerance in float32, nats.
TOLERANCE = 1e-3


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Engine]:
    """A real engine, stopped at the end."""
    engine = await Engine.start(EngineConfig(ensemble=folder, **settings))
    try:
        yield engine
    finally:
        await engine.shutdown()


def joined(scores: Sequence[TokenScores], measure: str) -> FloatArray:
    """A measure over the tokens of all texts."""
    return np.concatenate([getattr(score, measure) for score in scores])


def assert_close(got: Sequence[TokenScores], expected: Sequence[TokenScores]) -> None:
    """Equal token for token within `TOLERANCE`."""
    for measure in MEASURES:
        worst = np.abs(joined(got, measure) - joined(expected, measure)).max()
        assert worst <= TOLERANCE, f"{measure} is off by {worst:.2e} nats"
