"""The gate's rules, and the trainer's pace."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from osd import gate
from osd.evaluate import Agreement
from osd.gate import Measured
from osd.online_config import GateConfig
from osd.pace import Load, Pace, is_busy

GOOD = Agreement(
    kl_drafts=0.3, kl_mixture=0.10, jsd=0.12, epistemic=0.16, reference=0.15, rmse=0.05
)
CONFIG = GateConfig(kl_margin=0.01, reference_margin=0.05, jsd_floor=0.8, watch_margin=0.02)


def judge(**changes: Any) -> list[str]:
    """Of a version that differs from what serves as said, on one of the sets."""
    on = changes.pop("on")
    new = GOOD._replace(**changes)
    candidate = Measured(new, GOOD) if on == "reference" else Measured(GOOD, new)
    return gate.judge(candidate, Measured(GOOD, GOOD), Measured(GOOD, GOOD), CONFIG)


def test_a_version_that_is_no_worse_may_go_live() -> None:
    same = Measured(GOOD, GOOD)
    assert gate.judge(same, same, same, CONFIG) == []
    assert judge(on="traffic", kl_mixture=0.05, jsd=0.2) == []
    # Agreement with the target beyond what serves is what all of it is for, EU* is no bound on it.
    assert judge(on="reference", kl_mixture=0.02, rmse=0.01) == []


@pytest.mark.parametrize(
    ("on", "change", "says"),
    [
        ("traffic", {"kl_mixture": 0.102}, "KL to the posterior mean on held-out traffic is 0.102"),
        ("reference", {"kl_mixture": 0.106}, "KL to the posterior mean on the reference set"),
        ("reference", {"rmse": 0.0535}, r"RMSE against EU\* on the reference set is 0.0535"),
        ("reference", {"jsd": 0.09}, "JSD of the drafts on the reference set is 0.09"),
        ("traffic", {"jsd": 0.09}, "JSD of the drafts on held-out traffic is 0.09"),
    ],
)
def test_a_version_that_is_worse_is_refused_with_the_reason(
    on: str, change: dict[str, float], says: str
) -> None:
    reason, *_ = judge(on=on, **change)
    assert re.match(says, reason)


def test_small_losses_on_traffic_do_not_add_up() -> None:
    """A version that is hardly worse than what serves, which is worse than the first."""
    serving = GOOD._replace(kl_mixture=0.105)
    candidate = GOOD._replace(kl_mixture=0.1056)
    [reason] = gate.judge(
        Measured(GOOD, candidate), Measured(GOOD, serving), Measured(GOOD, GOOD), CONFIG
    )
    assert "the first version's" in reason


def test_noise_around_nothing_decides_nothing() -> None:
    none = Measured(GOOD, GOOD._replace(kl_mixture=-0.0001))
    little = Measured(GOOD, GOOD._replace(kl_mixture=0.0003))
    assert gate.judge(little, none, none, CONFIG) == []
    assert gate.watch(little.traffic, none.traffic, CONFIG) is None


@given(
    on=st.sampled_from(["traffic", "reference"]),
    field=st.sampled_from(["kl_mixture", "jsd", "rmse"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_no_version_with_nan_goes_live(on: str, field: str, value: float) -> None:
    reasons = judge(on=on, **{field: value})
    harmless = (on == "traffic" and field == "rmse") or (
        # Impossible values that are "better" than any bound are still no reason to trust it, but
        # cannot come of finite weights.
        value == (math.inf if field == "jsd" else -math.inf)
    )
    assert harmless or reasons


def test_disagreement_beyond_what_the_posterior_has_may_go() -> None:
    wild = GOOD._replace(jsd=1.0)
    candidate, first = Measured(GOOD, GOOD), Measured(wild, wild)
    assert gate.judge(candidate, first, first, CONFIG) == []
    collapsed = Measured(GOOD._replace(jsd=0.11), GOOD)
    [reason] = gate.judge(collapsed, first, first, CONFIG)  # 80% of EU*, 0.15, are 0.12
    assert "under 0.12" in reason


def test_a_version_is_taken_back_for_its_parents_sake() -> None:
    parent = GOOD._replace(kl_mixture=0.1)
    assert gate.watch(GOOD._replace(kl_mixture=0.1019), parent, CONFIG) is None
    assert "0.103" in (gate.watch(GOOD._replace(kl_mixture=0.103), parent, CONFIG) or "")
    assert gate.watch(GOOD._replace(kl_mixture=math.nan), parent, CONFIG) is not None


class _Student:
    def __init__(self, scale: float = 1.0) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(4, 4)
        with torch.no_grad():
            self.module.weight.mul_(scale)
            self.module.bias.zero_()


@pytest.mark.parametrize(
    ("scale", "says"),
    [(1.0, None), (1.9, None), (2.1, "norm of weight"), (0.4, "norm"), (math.nan, "norm")],
)
def test_weights_that_ran_away_are_refused(scale: float, says: str | None) -> None:
    reasons = gate.check_norms([_Student(scale)], [_Student()], CONFIG)  # type: ignore[list-item]
    assert (says is None and not reasons) or (says is not None and says in reasons[0])


def seconds_of(pace: Pace, stop: threading.Event | None = None) -> float:
    started = time.monotonic()
    pace.rest(stop or threading.Event())
    return time.monotonic() - started


def test_the_pace_rests_as_its_share_says() -> None:
    pace = Pace(share=0.5, busy_share=0.1, busy=lambda: False)
    pace.worked(0.2, within=0.2)
    assert seconds_of(pace) >= 0.2
    pace.worked(0.2, within=0.4)  # it was held up for so long, and has rested
    pace.worked(0.1, within=0.2)
    assert pace._owed == pytest.approx(0)
    busy = Pace(share=1.0, busy_share=0.1, busy=lambda: True)
    busy.worked(0.05, within=0.05)
    assert seconds_of(busy) >= 0.45
    idle = Pace(share=1.0, busy_share=0.1, busy=lambda: False)
    idle.worked(1e6, within=1e6)  # a share of 1 rests never
    assert idle._owed == 0
    stop = threading.Event()
    stop.set()
    busy.worked(1e6, within=1e6)
    seconds_of(busy, stop)  # and who is told to stop does not rest first


def test_a_service_that_becomes_idle_shortens_the_rest() -> None:
    asked = []

    def busy() -> bool:
        asked.append(1)
        return len(asked) < 4

    pace = Pace(share=1.0, busy_share=0.001, busy=busy)
    pace.worked(0.3, within=0.3)  # five minutes of rest, were it busy for so long
    assert seconds_of(pace) < 60
    assert len(asked) >= 4


def test_the_load_of_a_process_that_has_died_counts_for_nothing(tmp_path: Path) -> None:
    assert not is_busy(tmp_path / "nowhere")
    load = Load(tmp_path)
    assert not is_busy(tmp_path)
    load.tell(3)
    assert is_busy(tmp_path)
    load.close()
    assert not is_busy(tmp_path)
    tells = "import os, sys; from pathlib import Path; from osd.pace import Load; "
    tells += "Load(Path(sys.argv[1])).tell(3); print('told', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", tells, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"told\n"
        assert is_busy(tmp_path)
        other.kill()
    assert not is_busy(tmp_path)
    assert not list(tmp_path.iterdir())
