"""The SDK against the real app (fake engine), in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import demur
import httpx
import pytest
from demur import Client, DemurError
from demur.heatmap import render
from rich.console import Console
from starlette.testclient import TestClient

from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.fake_engine import FakeEngine

QUESTION = [{"role": "user", "content": "Capital?"}]


@pytest.fixture
def client(encoder: TextEncoder) -> Iterator[Client]:
    async def start(_: Settings) -> tuple[str, FakeEngine, TextEncoder]:
        return "tiny", FakeEngine(), encoder

    app = create_app(Settings(ensemble=Path("unused"), api_keys=["key"]), start)
    with TestClient(app) as server:
        while server.get("/ready").status_code != 200:
            pass

        def forward(request: httpx.Request) -> httpx.Response:
            path, headers = str(request.url.raw_path, "ascii"), dict(request.headers)
            answer = server.request(request.method, path, content=request.read(), headers=headers)
            return httpx.Response(
                answer.status_code, headers=dict(answer.headers), content=answer.content
            )

        transport = httpx.MockTransport(forward)
        with Client("http://testserver", api_key="key", transport=transport) as client:
            yield client


def test_score(client: Client) -> None:
    score = client.score("Tokyo.", messages=QUESTION)
    assert "".join(token.token for token in score.tokens) == "Tokyo."
    assert score.hallucination_score is None
    assert score.sequence["n_tokens"] == len(score.tokens) == score.usage.completion_tokens
    assert client.score(" Tokyo.", prompt="The capital is").tokens
    assert client.ready()


@pytest.mark.parametrize(
    ("arguments", "error", "param"),
    [
        ({"response": ""}, demur.BadRequestError, "response"),
        ({"response": "x", "model": "other"}, demur.NotFoundError, "model"),
        ({"response": "word " * 99}, demur.RequestTooLargeError, None),
    ],
)
def test_errors(
    client: Client, arguments: dict[str, Any], error: type[demur.APIStatusError], param: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.score(messages=QUESTION, **arguments)
    assert caught.value.param == param
    assert caught.value.request_id
    assert isinstance(caught.value, demur.DemurError)


def test_a_wrong_key(client: Client) -> None:
    client._http.headers["Authorization"] = "Bearer wrong"
    with pytest.raises(demur.AuthenticationError, match="valid key"):
        client.score("x", prompt="y")


def test_nobody_answers() -> None:
    client = Client("http://127.0.0.1:9", timeout=2)
    with pytest.raises(demur.APIConnectionError, match="is the service running"):
        client.score("x", prompt="y")
    assert client.ready() is False


def test_an_answer_that_is_not_ours() -> None:
    page = httpx.MockTransport(lambda _: httpx.Response(502, text="<h1>Bad gateway</h1>"))
    with pytest.raises(demur.ServerError, match="502: HTTP 502"):
        Client(transport=page).score("x", prompt="y")


def test_a_page_in_place_of_an_answer() -> None:
    page = httpx.MockTransport(lambda _: httpx.Response(200, text="<h1>Log in</h1>"))
    with pytest.raises(demur.DemurError, match="is it a demur service"):
        Client(transport=page).score("x", prompt="y")
    moved = httpx.MockTransport(lambda _: httpx.Response(307, headers={"Location": "/login"}))
    with pytest.raises(demur.APIStatusError, match="307"):
        Client(transport=moved).score("x", prompt="y")


def test_heat_map_shows_the_whole_response_and_its_numbers(client: Client) -> None:
    text = "Tokyo 東京 🎉 [bold]not markup[/bold]"
    score = client.score(text, messages=QUESTION)
    out = StringIO()
    console = Console(
        file=out, width=200, record=True, force_terminal=True, color_system="truecolor"
    )
    console.print(render(score))
    assert "48;2;128;0;38" in out.getvalue()  # the darkest shade: the most doubtful token
    plain = console.export_text()
    assert text in plain
    assert "most doubtful" in plain
    assert f"{score.sequence['epistemic_mean']:.3f}" in plain


def test_the_sdk_needs_no_torch_and_no_server() -> None:
    check = (
        "import sys, demur; heavy = {'torch', 'numpy', 'transformers', 'vllm', 'fastapi', 'server',"
        " 'drafts', 'typer'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_exports() -> None:
    assert demur.__all__ == sorted(demur.__all__)
    for name in demur.__all__:
        assert getattr(demur, name).__module__.startswith("demur.")


def test_what_no_request_can_carry_is_said() -> None:
    with pytest.raises(DemurError, match="is no URL"):
        Client("http://[::1")
    with pytest.raises(DemurError, match="no header can carry"):
        Client(api_key="\u00e9")
    with Client() as client, pytest.raises(DemurError, match="not valid Unicode"):
        client.score("a\udcff", prompt="b")
