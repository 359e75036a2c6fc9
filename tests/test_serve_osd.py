"""`demur serve` with its trainer, as processes: drafts follow the traffic, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from osd.corpus import Text
from osd.spool import START, open_spool
from tests.online_world import EXIT, NEW, World, answers, make_world, online
from tests.serving import Running, gauge, serving

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("served"), EXIT)


@pytest.fixture(scope="module")
def traffic(world: World) -> list[Text]:
    return answers(world.target, NEW, 400, "new")


@pytest.fixture
def settings(world: World, tmp_path: Path) -> dict[str, str]:
    config = tmp_path / "osd.yaml"
    config.write_text(yaml.safe_dump(json.loads(online().model_dump_json())))
    return {
        "osd": "train",
        "osd_folder": str(tmp_path / "osd"),
        "osd_config": str(config),
        "osd_corpus": str(world.places.corpus),
        "follow_every_s": "0.2",
    }


def send(url: str, texts: list[Text]) -> set[str]:
    """Let the service go on from the prompts of texts; the versions that its answers name."""
    versions = set()
    for start in range(0, len(texts), 16):
        body = {
            "prompt": [text.token_ids[: text.response_start] for text in texts[start : start + 16]],
            "max_tokens": 14,
            "uncertainty": True,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        versions |= {
            choice["uncertainty"]["estimator"]["weights_version"]
            for choice in answer.json()["choices"]
        }
    return versions


def osd(url: str) -> dict[str, Any]:
    answer = httpx.get(f"{url}/v1/osd", timeout=60)
    assert answer.status_code == 200
    return dict(answer.json())


def wait_for(running: Running, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        assert running.process.poll() is None, running.log.read_text()
        assert time.monotonic() < deadline, running.log.read_text()
        time.sleep(0.2)


def trainers(running: Running) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(running.process.pid).children(recursive=True):
        try:
            if process.cmdline()[1:3] == ["-m", "osd"]:
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def test_drafts_follow_the_traffic_while_they_serve(
    world: World, settings: dict[str, str], tmp_path: Path, traffic: list[Text]
) -> None:
    with serving(tmp_path / "service", world.places.ensemble, **settings) as service:
        follow(service, traffic)
    with open_spool(str(tmp_path / "osd" / "spool.sqlite")) as spool:
        assert len(spool.read(START, 100)) >= 4


def follow(service: Running, traffic: list[Text]) -> None:
    [first] = send(service.url, traffic[:160])
    wait_for(service, lambda: (osd(service.url)["trainer"] or {}).get("published", 0) > 0)
    wait_for(service, lambda: send(service.url, traffic[160:161]) != {first})
    listed = httpx.get(f"{service.url}/v1/drafts").json()
    assert listed["weights_version"].startswith("exit-osd-")
    assert listed["versions"][0]["name"] == first
    assert listed["versions"][-1]["measured"]["traffic"]["kl_mixture"] > 0
    assert gauge(service.url, "demur_drafts_swaps_total") >= 1
    assert gauge(service.url, "demur_osd_texts") > 0

    # Pause, and nothing is learned from what comes.
    httpx.post(f"{service.url}/v1/osd/pause")
    wait_for(service, lambda: osd(service.url)["trainer"]["activity"] == "paused")
    step = osd(service.url)["trainer"]["step"]
    send(service.url, traffic[200:260])
    time.sleep(3)
    assert osd(service.url)["trainer"]["step"] == step
    rolled = httpx.post(f"{service.url}/v1/drafts/rollback", json={"version": first}, timeout=60)
    assert rolled.json()["weights_version"] == first
    assert send(service.url, traffic[300:304]) == {first}
    assert httpx.delete(f"{service.url}/v1/osd/spool").json()["deleted"] > 0
    httpx.post(f"{service.url}/v1/osd/resume")
    wait_for(service, lambda: osd(service.url)["trainer"]["activity"] == "waiting")
    assert osd(service.url)["trainer"]["base"] == first

    # On SIGTERM all of it ends, and what was answered last is in the spool.
    send(service.url, traffic[380:384])
    [trainer] = trainers(service)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=120) == 0
    assert "Traceback" not in service.log.read_text()
    assert not trainer.is_running()


def test_whoever_is_killed_comes_back_and_goes_on(
    world: World, settings: dict[str, str], tmp_path: Path, traffic: list[Text]
) -> None:
    with serving(tmp_path / "one", world.places.ensemble, **settings) as running:
        [first] = send(running.url, traffic[:120])
        wait_for(running, lambda: (osd(running.url)["trainer"] or {}).get("step", 0) >= 4)
        [trainer] = trainers(running)
        os.kill(trainer.pid, signal.SIGKILL)
        before = osd(running.url)["trainer"]["step"]
        send(running.url, traffic[120:160])  # served as if nothing had happened
        wait_for(running, lambda: [p.pid for p in trainers(running)] not in ([], [trainer.pid]))
        wait_for(running, lambda: osd(running.url)["trainer"]["step"] > before)
        assert gauge(running.url, "demur_osd_trainer_deaths_total") == 1

        # A server takes its trainer along, and begins with what served.
        wait_for(running, lambda: (osd(running.url)["trainer"] or {}).get("published", 0) > 0)
        wait_for(running, lambda: send(running.url, traffic[160:161]) != {first})
        httpx.post(f"{running.url}/v1/osd/pause")
        wait_for(running, lambda: osd(running.url)["trainer"]["activity"] == "paused")
        [serves] = send(running.url, traffic[161:162])
        spooled = osd(running.url)["spool"]["texts"]
        [trainer] = trainers(running)
        os.kill(running.process.pid, signal.SIGKILL)
        trainer.wait(timeout=60)
    with serving(tmp_path / "two", world.places.ensemble, **settings) as running:
        assert send(running.url, traffic[162:163]) == {serves}
        assert osd(running.url)["spool"]["texts"] >= spooled
