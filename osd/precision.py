"""Matrix products of float32 tensors in bfloat16, summed in float32: what CPUs are fast at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bfloat16_products(on: bool = True) -> Iterator[None]:
    """Inside, float32 factors on a CPU are rounded to bfloat16; sums and results stay float32.

    Factors that came out of bfloat16 numbers lose nothing.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if on:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
