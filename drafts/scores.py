"""What an engine answers: the measures of a response's tokens, and the interface of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class TokenScores:
    """Measures of T response tokens; entry i is of the distribution that predicts token i.

    All arrays have shape [T] and are in nats; `rank` counts the tokens that the target holds at
    least as likely, the token itself included, so 1 is the most likely.
    """

    logprob: FloatArray
    rank: NDArray[np.int64]
    entropy: FloatArray
    total: FloatArray
    jsd: FloatArray
    kl: FloatArray
    weights_version: str

    def __len__(self) -> int:
        return len(self.logprob)

    @property
    def aleatoric(self) -> FloatArray:
        """Mean entropy of the drafts, total - jsd."""
        return np.maximum(self.total - self.jsd, 0.0)

    @property
    def epistemic(self) -> FloatArray:
        """jsd + kl."""
        return self.jsd + self.kl


class ScoringEngine(Protocol):
    """What the service needs of an engine; `drafts.engine.Engine` is the real one."""

    n_drafts: int
    max_tokens: int

    @property
    def weights_version(self) -> str: ...

    async def score(self, token_ids: Sequence[int], response_start: int) -> TokenScores: ...

    async def check_health(self) -> None: ...

    async def shutdown(self) -> None: ...
