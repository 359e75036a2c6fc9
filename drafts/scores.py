"""What an engine is asked and answers: tokens, their measures, and the interface of an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from drafts.manifest import Manifest

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

    def row(self, i: int) -> TokenScores:
        """Token i alone."""
        names = [field.name for field in fields(self) if field.name != "weights_version"]
        return replace(self, **{name: getattr(self, name)[i : i + 1] for name in names})

    @staticmethod
    def join(rows: Sequence[TokenScores]) -> TokenScores:
        """The tokens of several, which one version of the weights has measured."""
        names = [field.name for field in fields(TokenScores) if field.name != "weights_version"]
        arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in names}
        return TokenScores(**arrays, weights_version=rows[0].weights_version)


@dataclass(frozen=True)
class Sampling:
    """How to go on with a text; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    measured: bool = True  # with the measures of each token
    top: int = 0  # so many likeliest tokens beside each, at most `MAX_TOP`; needs `measured`


@dataclass(frozen=True)
class Generated:
    """Tokens that a generation has come to since the last such answer.

    `scores` is None if they were not asked for. `likeliest` has, for each token, the likeliest
    ones in its place and their log-probs. `finish_reason` is given with the last tokens.
    """

    token_ids: list[int]
    scores: TokenScores | None
    likeliest: list[list[tuple[int, float]]]
    finish_reason: str | None
    weights_version: str


class ServingEngine(Protocol):
    """What the service needs of an engine; `drafts.engine.Engine` is the real one."""

    n_drafts: int
    max_tokens: int
    takes_seed: bool

    @property
    def vocab_size(self) -> int: ...

    @property
    def weights_version(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...
    @property
    def added_passes(self) -> float: ...

    async def score(self, token_ids: Sequence[int], response_start: int) -> TokenScores: ...

    def stream(
        self, token_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Generated, None]: ...

    async def swap(self, folder: Path, target_path: Path | None = None) -> None: ...

    async def check_health(self) -> None: ...

    async def ping(self, within_s: float) -> None: ...

    async def abort_all(self) -> None: ...

    async def kill(self) -> None: ...

    async def shutdown(self) -> None: ...
