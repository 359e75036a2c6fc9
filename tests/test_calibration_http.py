"""A calibrated service: probabilities, flags and warnings, over HTTP and in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import demur
import httpx
import numpy as np
import pytest
from demur import cli
from demur.cli_conversation import Show
from typer.testing import CliRunner

from drafts.calibration import CALIBRATION_NAME, save_calibration
from drafts.features import claim_of
from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.calibrations import fake_calibration
from tests.conftest import Service, run_service
from tests.fake_engine import END, FakeEngine
from tests.test_generation import CHAT, chat, events
from tests.test_http import GOOD, QUESTION, error_of

# The calibration was fitted to texts of 3 to 19 tokens, which here are bytes.
NEAR = {"prompt": "Name it:", "response": " Tokyo, I think."}
FAR = {"prompt": "Name it:", "response": "o" * 50}


@pytest.fixture
async def calibrated(encoder: TextEncoder, tmp_path: Path) -> AsyncIterator[Service]:
    save_calibration(fake_calibration(), tmp_path / CALIBRATION_NAME)
    async for running in run_service(encoder, ensemble=tmp_path):
        yield running


async def scored(service: Service, **body: Any) -> dict[str, Any]:
    response = await service.score(**body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def expected(service: Service, encoder: TextEncoder, body: dict[str, Any]) -> float:
    """The probability, by the library alone."""
    text = encoder.encode(body["prompt"], body["response"], rendered=False, max_tokens=64)
    scores = await service.engine.score(text.token_ids, text.response_start)
    pieces = [body["response"][token.start : token.end] for token in text.tokens]
    return fake_calibration().probability(scores, claim_of(pieces, body["prompt"]))


async def test_a_score(calibrated: Service, encoder: TextEncoder) -> None:
    score = await scored(calibrated, **NEAR)
    assert score["hallucination_score"] == await expected(calibrated, encoder, NEAR)
    assert 0 < score["hallucination_score"] < 1
    assert score["flagged"] is None
    assert score["warnings"] == []
    assert score["calibration"] == {
        "id": fake_calibration().id,
        "kind": "logistic",
        "fitted_on": ["facts/capital"],
        "n": 300,
    }


async def test_a_threshold_flags(calibrated: Service) -> None:
    probability = (await scored(calibrated, **NEAR))["hallucination_score"]
    for threshold, flagged in ((0, True), (probability - 1e-6, True), (probability, False)):
        score = await scored(calibrated, **NEAR, threshold=threshold)
        assert score["flagged"] is flagged
        assert score["threshold"] == threshold


async def test_more_doubt_is_a_higher_score(calibrated: Service, encoder: TextEncoder) -> None:
    # The fake's measures grow with byte % 7.
    ids = {byte: encoder.tokenizer.encode(chr(byte)).ids for byte in range(33, 127)}
    by_doubt = sorted((i[0] % 7, chr(byte)) for byte, i in ids.items() if len(i) == 1)
    low, high = by_doubt[0], by_doubt[-1]
    assert (low[0], high[0]) == (0, 6)
    answers = [await scored(calibrated, prompt="", response=text * 8) for _, text in (low, high)]
    assert answers[0]["hallucination_score"] < 0.3 < 0.7 < answers[1]["hallucination_score"]


async def test_a_far_text_is_warned_of_and_counted(calibrated: Service) -> None:
    before = await counted(calibrated, "far_from_calibration")
    score = await scored(calibrated, **FAR)
    assert [warning["code"] for warning in score["warnings"]] == ["far_from_calibration"]
    assert "facts/capital" in score["warnings"][0]["message"]
    assert 0 <= score["hallucination_score"] <= 1
    assert await counted(calibrated, "far_from_calibration") == before + 1


async def counted(service: Service, code: str) -> float:
    name = f'demur_score_warnings_total{{code="{code}"}} '
    lines = (await service.client.get("/metrics")).text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


async def test_scores_are_counted(calibrated: Service, service: Service) -> None:
    async def count() -> float:
        lines = (await service.client.get("/metrics")).text.splitlines()
        name = "demur_hallucination_score_count "
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = await count()
    await scored(service, **NEAR)
    assert await count() == before
    await scored(calibrated, **NEAR)
    assert await count() == before + 1


def serve_other_weights(service: Service) -> None:
    """A version of the drafts with a calibration that was fitted to another one's measures."""
    service.app.state.demur.serving.served.calibrate("fake-2", fake_calibration())
    service.engine.weights_version = "fake-2"


async def test_other_weights_are_warned_of(calibrated: Service) -> None:
    serve_other_weights(calibrated)
    (warning,) = (await scored(calibrated, **NEAR))["warnings"]
    assert warning["code"] == "calibrated_on_other_weights"
    assert "fake-1" in warning["message"]
    assert "fake-2" in warning["message"]


async def test_a_list(calibrated: Service) -> None:
    items = [NEAR, FAR, NEAR | {"threshold": 0}, {"prompt": "x", "response": ""}]
    answer = (await calibrated.client.post("/v1/score", json=items)).json()
    near, far, flagged = (item["score"] for item in answer["data"][:3])
    assert near["hallucination_score"] == flagged["hallucination_score"]
    assert (near["flagged"], flagged["flagged"]) == (None, True)
    assert (len(near["warnings"]), len(far["warnings"])) == (0, 1)
    # A text without tokens has no probability: it is refused as ever.
    assert answer["data"][3]["error"]["param"] == "response"


async def test_a_chat_and_its_stream(calibrated: Service, encoder: TextEncoder) -> None:
    text = "Tokyo, I think."
    calibrated.engine.answer = [*encoder.tokenizer.encode(text).ids, END]
    (choice,) = (await chat(calibrated, uncertainty=True))["choices"]
    score = await scored(calibrated, messages=QUESTION, response=text)
    assert choice["uncertainty"]["hallucination_score"] == score["hallucination_score"]
    assert choice["uncertainty"]["warnings"] == []
    chunks = await events(calibrated, "/v1/chat/completions", CHAT | {"uncertainty": True})
    assert chunks[-2]["choices"][0]["uncertainty"] == choice["uncertainty"]
    body = {"prompt": "x", "uncertainty": True, "max_tokens": 60}
    calibrated.engine.answer = [255]
    answer = (await calibrated.client.post("/v1/completions", json=body)).json()
    (warning,) = answer["choices"][0]["uncertainty"]["warnings"]
    assert warning["code"] == "far_from_calibration"


async def test_a_choice_without_a_token_has_no_probability(calibrated: Service) -> None:
    calibrated.engine.answer = [END]
    (choice,) = (await chat(calibrated, uncertainty=True))["choices"]
    assert choice["uncertainty"]["hallucination_score"] is None
    assert choice["uncertainty"]["warnings"] == []


async def test_without_a_calibration_there_is_no_probability(service: Service) -> None:
    score = await scored(service, **GOOD, threshold=0)
    for name in ("hallucination_score", "flagged", "calibration"):
        assert score[name] is None
    assert score["warnings"] == []
    (model,) = (await service.client.get("/v1/models")).json()["data"]
    assert model["calibration"] is None


async def test_models_name_the_calibration(calibrated: Service) -> None:
    (model,) = (await calibrated.client.get("/v1/models")).json()["data"]
    assert model["calibration"] == fake_calibration().id


async def test_a_damaged_calibration_is_no_service(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_NAME).write_text('{"format": 1}')
    failed = asyncio.Event()

    async def start(_: Settings) -> Any:
        pytest.fail("the engine was started")

    app = create_app(Settings(ensemble=tmp_path), start, failed.set)
    async with app.router.lifespan_context(app):
        await asyncio.wait_for(failed.wait(), 5)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            told = error_of(await client.get("/ready"), 503)["message"]
    assert str(tmp_path / CALIBRATION_NAME) in told
    assert "demur calibrate" in told


async def test_the_sdk_has_them(calibrated: Service) -> None:
    score = demur.Score.model_validate(await scored(calibrated, **FAR))
    assert score.hallucination_score is not None
    assert isinstance(score.warnings[0], demur.ScoreWarning)
    assert isinstance(score.calibration, demur.Calibration)
    answer = demur.ChatCompletion.model_validate(await chat(calibrated, uncertainty=True))
    assert answer.choices[0].uncertainty is not None
    assert answer.choices[0].uncertainty.hallucination_score is not None


async def test_the_sdk_takes_answers_of_a_service_that_has_them_not(service: Service) -> None:
    answer = await scored(service, **GOOD)
    del answer["warnings"], answer["calibration"]
    score = demur.Score.model_validate(answer)
    assert (score.warnings, score.calibration) == ([], None)
    model = (await service.client.get("/v1/models")).json()["data"][0]
    del model["calibration"]
    assert demur.Model.model_validate(model).calibration is None


async def test_the_terminal_shows_them(
    calibrated: Service, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shown(service: Service, body: dict[str, Any]) -> tuple[str, str]:
        score = demur.Score.model_validate(await scored(service, **body))
        monkeypatch.setattr("demur.client.Client.score", lambda *_, **__: score)
        done = CliRunner().invoke(cli.app, ["score", "-r", "x", "-q", "y"])
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    stdout, stderr = await shown(calibrated, FAR)
    assert "probability that it is wrong: " in stdout
    assert "warning: this text is unlike" in stderr
    stdout, stderr = await shown(calibrated, NEAR)
    assert "probability that it is wrong: " in stdout
    assert stderr == ""
    assert "probability" not in (await shown(service, NEAR))[0]


async def test_a_conversation_shows_them(
    calibrated: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_other_weights(calibrated)
    answer = demur.ChatCompletion.model_validate(await chat(calibrated, uncertainty=True))
    Show("epistemic", 0.5).numbers(answer.choices[0])
    told = " ".join(capsys.readouterr().err.split())  # lines break where the terminal ends
    assert "wrong with probability 0." in told
    assert "warning: the calibration was fitted with tiny, weights fake-1" in told


async def test_numbers_that_are_odd_do_not_stop_the_service(
    calibrated: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FakeEngine._scores

    def odd(self: FakeEngine, token_ids: Any) -> Any:
        scores = plain(self, token_ids)
        columns = vars(scores) | {"total": np.full(len(scores), 1e300)}
        return type(scores)(**columns)

    monkeypatch.setattr(FakeEngine, "_scores", odd)
    score = await scored(calibrated, **NEAR)
    assert 0 <= score["hallucination_score"] <= 1
    monkeypatch.undo()
    assert (await scored(calibrated, **NEAR))["warnings"] == []
