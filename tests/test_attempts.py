"""Swaps that ended the engine are counted, also by who starts anew and by neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from server.attempts import Attempts

TRY = "import sys, os; from pathlib import Path; from server.attempts import Attempts\n"
TRY += "a = Attempts(Path(sys.argv[1])); a.begin('v2'); print('begun', flush=True); "


def test_a_process_that_died_of_a_swap_has_tried(tmp_path: Path) -> None:
    for count in (1, 2):
        subprocess.run([sys.executable, "-c", TRY + "os._exit(9)", str(tmp_path)], check=False)
        assert Attempts(tmp_path).too_many("v2") is (count == 2)
    assert not Attempts(tmp_path).too_many("v")
    assert not Attempts(tmp_path).too_many("v3")
    Attempts(tmp_path).forgive("v2")
    assert not Attempts(tmp_path).too_many("v2")


def test_what_goes_on_has_not_failed(tmp_path: Path) -> None:
    # Replicas of one machine see a new version at the same time.
    others = [
        subprocess.Popen(
            [sys.executable, "-c", TRY + "input(); a.end()", str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for other in others:
        assert other.stdout is not None
        other.stdout.readline()
    mine = Attempts(tmp_path)
    assert not mine.too_many("v2")
    mine.begin("v2")
    mine.failed()
    mine.forgive("v3")
    mine.begin("v2")
    mine.end()  # takes back no other's
    assert len(os.listdir(tmp_path)) == 4
    others[0].kill()
    for other in others:
        other.communicate(b"\n")
    assert len(os.listdir(tmp_path)) == 2
    assert mine.too_many("v2")
