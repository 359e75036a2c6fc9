"""Where the time of vLLM's worker goes, by parts: timers put around its functions while it runs.

A part's time is its own: what another part takes within it counts for that one. Sent to the worker
by `collective_rpc`, which takes a function with VLLM_ALLOW_INSECURE_SERIALIZATION=1.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

# Where a part's functions are, from the worker or a module; of those that are not there in the
# code that is measured, the others stand alone.
PARTS = {
    "step": ["model_runner.execute_model", "model_runner.sample_tokens"],
    "layers": ["model_runner.model.forward"],
    "lm_head": ["model_runner.model.target.compute_logits"],
    "students": ["model_runner.model.students.*.moves"],
    "draft_heads": ["model_runner.model.students.*.changes"],
    "divergence": [
        "model_runner.model._measure",
        "model_runner.model.students.*.scales",
        "drafts.vllm_model:target_rows",
        "drafts.vllm_model:measure_rows",
        "drafts.vllm_model:measure_block",
    ],
    "prompt": ["model_runner.model.measure_prompt", "model_runner._get_prompt_logprobs_dict"],
    "sampled": ["model_runner.model.compute_logits", "model_runner._sample"],
}


class Timers:
    """Seconds and calls of each part, each part's own."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._open: list[tuple[str, float]] = []
        self._since = 0.0

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            if self._open:
                self.seconds[self._open[-1][0]] += now - self._since
            self._open.append((part, now))
            self._since = now
            self.calls[part] += 1
            try:
                return function(*args, **kwargs)
            finally:
                now = time.perf_counter()
                self.seconds[part] += now - self._since
                self._open.pop()
                self._since = now

        return timed


def install(worker: Any) -> list[str]:
    """Put the timers in; the paths that were found."""
    import importlib

    timers = worker.demur_timers = Timers()
    found = []
    for part, paths in PARTS.items():
        for path in paths:
            module, _, rest = path.rpartition(":")
            root = importlib.import_module(module) if module else worker
            for holder in _holders(root, rest.split(".")[:-1]):
                name = rest.split(".")[-1]
                if hasattr(holder, name):
                    setattr(holder, name, timers.around(part, getattr(holder, name)))
                    found.append(path)
    return found


def read(worker: Any) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and calls by part since the last reading."""
    timers = worker.demur_timers
    told = dict(timers.seconds), dict(timers.calls)
    timers.seconds.clear()
    timers.calls.clear()
    return told


def _holders(root: Any, names: Sequence[str]) -> list[Any]:
    holders = [root]
    for name in names:
        if name == "*":
            holders = [member for holder in holders for member in holder]
        else:
            holders = [getattr(holder, name) for holder in holders if hasattr(holder, name)]
    return holders
