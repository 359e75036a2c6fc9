"""The online trainer as a process of the service: what it is started with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drafts.launch import set_environment
from server.settings import Settings
from server.trainer_process import environment

# Holes between blocks that stay keep freed memory from the system, unless each has a place of its
# own.
HOLES = """
import ctypes, psutil
allocate = ctypes.CDLL(None).malloc
allocate.restype = ctypes.c_void_p
free = ctypes.CDLL(None).free
free.argtypes = [ctypes.c_void_p]
def resident():
    return psutil.Process().memory_info().rss
before = resident()
blocks, stay = [], []
for _ in range(20):
    blocks.append(allocate(16 << 20))
    ctypes.memset(blocks[-1], 1, 16 << 20)
    stay.append(allocate(64))
grown = resident() - before
for block in blocks:
    free(block)
print(grown >> 20, (resident() - before) >> 20)
"""


@pytest.mark.parametrize("is_trainer", [True, False])
def test_the_trainer_gives_memory_back_and_the_engine_keeps_it(
    is_trainer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    set_environment()
    settings = Settings(ensemble=tmp_path, osd="train", osd_folder=tmp_path)
    env = environment(settings) if is_trainer else dict(os.environ)
    told = subprocess.run(
        [sys.executable, "-c", HOLES], env=env, capture_output=True, text=True, check=True
    )
    grown, kept = map(int, told.stdout.split())
    assert grown >= 300
    assert kept < 30 if is_trainer else kept >= 300
