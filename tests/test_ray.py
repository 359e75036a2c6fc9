"""The service on Ray Serve: two replicas on a local cluster, a bucket, a Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from ray_cluster import Cluster, cluster

from drafts.store import DraftsStore
from osd.spool import START, open_spool
from server import ray_app
from server.settings import Settings
from tests.redis_server import RedisServer
from tests.serving import ENVIRONMENT
from tests.tiny import mixed_ensemble


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def redis(place: Path) -> Iterator[RedisServer]:
    (place / "redis").mkdir()
    server = RedisServer(place / "redis")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def running(place: Path, redis: RedisServer) -> Iterator[Cluster]:
    sizes = {name.removeprefix("DEMUR_").lower(): value for name, value in ENVIRONMENT.items()}
    settings = sizes | {
        "ensemble": str(mixed_ensemble(place / "v1")),
        "osd": "capture",
        "osd_folder": str(place / "osd"),
        "spool": redis.url,
        "follow_every_s": "0.5",
        "allow_no_keys": "true",
        "max_num_seqs": "2",  # so that few requests fill a replica
    }
    with cluster(settings) as found:
        found.serve(min_replicas=2, max_replicas=2, max_queued_requests=1)
        yield found


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def score(url: str, number: int) -> httpx.Response:
    body = {"prompt": f"How much is {number} + 1?", "response": f"It is {number + 1}."}
    headers = {"X-Request-Id": f"test-{number}"}
    return httpx.post(f"{url}/v1/score", json=body, headers=headers, timeout=60)


def generate(url: str, number: int) -> tuple[httpx.Response, list[bytes]]:
    """A stream, read to its end, and the pieces that it came in."""
    body = {"prompt": f"And {number}?", "max_tokens": 24, "stream": True, "uncertainty": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        return stream, list(stream.iter_raw())


@pytest.mark.engine
def test_two_replicas_answer_and_share_a_spool_and_a_store(
    running: Cluster, redis: RedisServer, place: Path
) -> None:
    # Nothing has to be waited for: Serve knows no replica before its engine answers.
    answers = [score(running.url, number) for number in range(8)]
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    assert [answer.headers["X-Request-Id"] for answer in answers] == [
        f"test-{number}" for number in range(8)
    ]
    assert list(running.replicas().values()) == ["v1", "v1"]

    # A stream comes through the proxy as it is made.
    _, chunks = generate(running.url, -1)
    assert len(chunks) > 3
    *events, done = b"".join(chunks).decode().split("\n\n")[:-1]
    assert done == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["choices"]

    # What does not fit is told to come again, in Serve's own words.
    with ThreadPoolExecutor(40) as clients:
        answers = [answer for answer, _ in clients.map(partial(generate, running.url), range(40))]
    assert {answer.status_code for answer in answers} == {200, 429}
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.headers["Retry-After"] == "5"
    accepted = sum(answer.status_code == 200 for answer in answers)

    # A version that is published serves in both.
    second = mixed_ensemble(place / "v2", seed=100, version="v2")
    DraftsStore(running.store).publish(second, about={})
    wait_for(lambda: set(running.replicas().values()) == {"v2"})
    assert len(running.replicas()) == 2
    assert score(running.url, 99).json()["estimator"]["weights_version"] == "v2"

    # The end of a replica writes what its queue holds.
    assert score(running.url, 100).status_code == 200
    serve.delete("demur")
    kept = open_spool(redis.url, name="tiny-llama").read(START, 100)
    assert len(kept) == 8 + 1 + accepted + 2


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({}, "set keys_file, api_keys or admin_keys"),
        ({"host": "127.0.0.1"}, "no keys are set"),  # Serve's proxies listen, not on `host`
        ({"api_keys": ["k"], "osd": "train"}, "deploy server.ray_app:trainer"),
        ({"api_keys": ["k"], "osd": "capture"}, "spool is not set"),
        ({"api_keys": ["k"], "osd": "capture", "spool": "redis://r"}, "drafts_store is not set"),
    ],
)
def test_what_replicas_cannot_share_is_refused(
    tmp_path: Path, settings: dict[str, Any], refused: str
) -> None:
    with pytest.raises(ValueError, match=refused):
        ray_app.checked(Settings(ensemble=tmp_path, **settings))


def test_the_example_fits_the_builders(monkeypatch: pytest.MonkeyPatch) -> None:
    example = yaml.safe_load(Path("docker/ray.yaml").read_text())
    ServeDeploySchema.model_validate(example)
    service, trainer = example["applications"]
    assert service["import_path"] == "server.ray_app:app"
    assert trainer["import_path"] == "server.ray_app:trainer"
    for name, value in service["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    # As Serve does with what a command line or a file gives.
    built = [
        call_user_app_builder_with_args_if_necessary(builder, application["args"])
        for builder, application in ((ray_app.app, service), (ray_app.trainer, trainer))
    ]
    deployments = [application._bound_deployment for application in built]
    assert [deployment.name for deployment in deployments] == ["demur", "trainer"]
    scaling = deployments[0]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
