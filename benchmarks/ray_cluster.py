"""Ray on this machine and a bucket, for the service's replicas: the benchmark and the tests."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
import httpx
import ray
from moto.server import ThreadedMotoServer
from ray import serve

from server.ray_app import Scale, TrainerPlace, app, trainer

_BUCKET = "drafts"


@dataclass
class Cluster:
    """A Ray cluster, and where the service will be."""

    url: str
    store: str
    settings: Mapping[str, str]

    def serve(self, **scale: float) -> None:
        """The service, once it is ready; it is named "demur"."""
        with environment(self.settings):
            built = app(Scale.model_validate(scale))
        serve.run(built, name="demur")

    def train(self) -> None:
        """The trainer of the replicas."""
        with environment(self.settings):
            built = trainer(TrainerPlace())
        serve.run(built, name="demur-trainer", route_prefix=None)

    def replicas(self) -> dict[str, str]:
        """The version that each replica serves with, by the time at which its process began."""
        found = {}
        for _ in range(20):  # each time another replica may answer
            answer = httpx.get(f"{self.url}/metrics", timeout=60).raise_for_status()
            lines = dict(
                line.rsplit(" ", 1) for line in answer.text.splitlines() if line[:1] != "#"
            )
            [version] = [name for name in lines if name.startswith("demur_drafts_version{")]
            found[lines["process_start_time_seconds"]] = version.split('"')[1]
        return found


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def cluster(settings: Mapping[str, str]) -> Iterator[Cluster]:
    """A Ray cluster of this machine alone with an empty bucket, and no service yet.

    Args:
        settings: of the service, without their prefix; the store is added.
    """
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    bucket = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    bucket.start()
    host, port = bucket.get_host_and_port()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        http_port = probe.getsockname()[1]
    store = f"s3://{_BUCKET}/store"
    # Every process of the cluster inherits these.
    machines = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody's",
        "AWS_SECRET_ACCESS_KEY": "nobody's",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Else Ray writes a token into the user's home.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    given = {**settings, "drafts_store": store}
    named = {f"DEMUR_{name.upper()}": value for name, value in given.items()}
    with environment(machines):
        try:
            fsspec.filesystem("s3").mkdir(_BUCKET)
            # Logical CPUs: replicas and a trainer fit, whatever the machine has.
            ray.init(num_cpus=8, include_dashboard=False, object_store_memory=10**8)
            serve.start(http_options={"host": "127.0.0.1", "port": http_port})
            yield Cluster(f"http://127.0.0.1:{http_port}", store, named)
        finally:
            serve.shutdown()
            ray.shutdown()
            bucket.stop()
