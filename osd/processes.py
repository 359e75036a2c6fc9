"""Several processes, a device each: `accelerate launch --num_processes 4 .venv/bin/demur distill`.

Students are independent of each other and draw from seeds of their own, so each process trains some
of them, and what comes out is what one process would make. Before drafts are measured or written,
every student's weights and moments are sent to all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from osd import checkpoint


class Processes:
    """Those that train together; without `accelerate launch` there is one.

    Args:
        device: of the configuration. `cuda` becomes this process's own.
    """

    def __init__(self, device: str) -> None:
        # The first process may work for hours on what is kept on disk, while the others wait.
        self._state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
        self.is_main: bool = self._state.is_main_process
        self.count: int = self._state.num_processes
        self.index: int = self._state.process_index
        self.device = str(self._state.device) if self.count > 1 else device

    def own(self, number: int) -> bool:
        """Whether this process trains student `number`."""
        return number % self.count == self.index

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process makes what is kept on disk; the others then find it there."""
        with self._state.main_process_first():
            yield

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums of values over all processes."""
        if self.count == 1:
            return list(values)
        return [sum(column) for column in zip(*gather_object([list(values)]), strict=True)]

    def share(
        self, modules: Sequence[nn.Module], optimisers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Give all processes every student as its own process has it."""
        if self.count == 1:
            return
        for number, (module, optimiser) in enumerate(zip(modules, optimisers, strict=True)):
            packed = [checkpoint.pack(module, optimiser) if self.own(number) else None]
            broadcast_object_list(packed, from_process=number % self.count)
            if not self.own(number) and packed[0] is not None:
                checkpoint.unpack(module, optimiser, *packed[0])
