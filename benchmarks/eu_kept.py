"""Estimates on disk, so that a long comparison that was cut short goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from eu_compare import Estimate


def kept(file: Path, make: Callable[[], list[Estimate]]) -> list[Estimate]:
    """The estimates in `file.npz`; they are made and written there if there is none."""
    file = file.with_name(f"{file.name}.npz")
    if not file.exists():
        write(file, make())
    with np.load(file) as arrays:
        about = json.loads(str(arrays["about"]))
        ends = np.cumsum(arrays["lengths"])[:-1]
        return [
            Estimate(values=list(np.split(arrays[f"values_{i}"], ends)), **fields)
            for i, fields in enumerate(about)
        ]


def write(file: Path, estimates: list[Estimate]) -> None:
    """Write estimates on the same texts, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = [{k: v for k, v in vars(one).items() if k != "values"} for one in estimates]
    arrays = {f"values_{i}": np.concatenate(one.values) for i, one in enumerate(estimates)}
    lengths = [len(values) for values in estimates[0].values]
    partial = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, about=json.dumps(about), lengths=lengths, **arrays)
    partial.rename(file)
