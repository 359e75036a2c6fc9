"""Fixtures that several files share."""

# ruff: noqa: E402
import os

# Tests speak to no hub, and to no service that the user runs. Before any import that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests of two workers share the cores: threads that wait for one another must not spin meanwhile.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
for _name in [name for name in os.environ if name.startswith("DEMUR_")]:
    del os.environ[_name]

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.fake_engine import FakeEngine
from tests.tiny import byte_level_tokenizer, save_tokenizer

# No test asserts how long something takes: the machine may be busy.
hypothesis.settings.register_profile("demur", deadline=None)
hypothesis.settings.load_profile("demur")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that workers end together: those that start an engine."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, byte_level_tokenizer())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return TextEncoder(folder)


@dataclass
class Service:
    """The real app around the fake engine."""

    client: httpx.AsyncClient
    engine: FakeEngine
    app: Any

    async def score(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/score", json=body)


async def run_service(encoder: TextEncoder, **settings: Any) -> AsyncIterator[Service]:
    engine = FakeEngine()

    async def start(_: Settings) -> tuple[str, FakeEngine, TextEncoder]:
        return "tiny", engine, encoder

    app = create_app(Settings(**{"ensemble": Path("unused")} | settings), start)
    async with app.router.lifespan_context(app):
        while app.state.demur.serving is None:
            await asyncio.sleep(0)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield Service(client, engine, app)


@pytest.fixture
async def service(encoder: TextEncoder) -> AsyncIterator[Service]:
    async for running in run_service(encoder):
        yield running
