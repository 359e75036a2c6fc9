"""OpenAI's routes, against the real app and a fake engine."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from drafts.text import TextEncoder
from tests.conftest import Service, run_service
from tests.fake_engine import END
from tests.hang_up import hang_up
from tests.test_http import QUESTION, error_of

CHAT = {"messages": QUESTION}
PATH = "/v1/chat/completions"
MEASURES = {"entropy", "total", "aleatoric", "jsd", "kl", "epistemic"}


def speak(service: Service, encoder: TextEncoder, text: str) -> list[int]:
    """Let the fake engine say a text; its token ids."""
    ids = list(encoder.tokenizer.encode(text).ids)
    service.engine.answer = [*ids, END]
    return ids


async def chat(service: Service, **body: Any) -> dict[str, Any]:
    response = await service.client.post("/v1/chat/completions", json=CHAT | body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def events(service: Service, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, `[DONE]` among them."""
    response = await service.client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [
        "[DONE]" if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
        for line in lines
    ]


async def test_a_chat_has_openais_shape(service: Service, encoder: TextEncoder) -> None:
    ids = speak(service, encoder, "Tokyo é 🎉.")
    answer = await chat(service)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"] == "fake-1"
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Tokyo é 🎉.", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(ids) + 1  # the end-of-text token is generated, too
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    # Without a wish for them, no measures are made.
    assert [sampling.measured for sampling in service.engine.samplings] == [False]


async def test_uncertainty_stands_with_each_token(service: Service, encoder: TextEncoder) -> None:
    speak(service, encoder, "The capital is 東京.")
    answer = await chat(service, uncertainty=True)
    (choice,) = answer["choices"]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == "The capital is 東京."
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "The capital is 東京."
    for entry in entries:
        assert set(entry) == {"token", "bytes", "logprob", "top_logprobs", "uncertainty"}
        measures = entry["uncertainty"]
        assert set(measures) == MEASURES
        assert measures["epistemic"] == pytest.approx(measures["jsd"] + measures["kl"])
        assert measures["total"] == pytest.approx(measures["aleatoric"] + measures["jsd"])
    block = choice["uncertainty"]
    assert block["estimator"]["drafts"] == 4
    assert block["hallucination_score"] is None
    assert block["sequence"]["n_tokens"] == len(entries)
    mean = sum(entry["uncertainty"]["epistemic"] for entry in entries) / len(entries)
    assert block["sequence"]["epistemic_mean"] == pytest.approx(mean)
    assert block["spans"]


async def test_spans_and_numbers_are_those_of_the_score_of_the_same_text(
    service: Service, encoder: TextEncoder
) -> None:
    text = "4 shirts cost 4 * 15 = 60 dollars. 東京 🎉"
    speak(service, encoder, text)
    (choice,) = (await chat(service, uncertainty=True))["choices"]
    score = (await service.score(messages=QUESTION, response=text)).json()
    assert choice["uncertainty"]["spans"] == score["spans"]
    assert choice["uncertainty"]["sequence"] == score["sequence"]
    for entry, token in zip(choice["logprobs"]["content"], score["tokens"], strict=True):
        assert (entry["token"], entry["bytes"]) == (token["token"], token["bytes"])
        assert entry["logprob"] == token["logprob"]
        assert entry["uncertainty"] == {name: token[name] for name in MEASURES}


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("stop", [None, ["ost 4", "never"]])
async def test_a_stream_carries_what_the_whole_answer_has(
    service: Service, encoder: TextEncoder, per_step: int, stop: list[str] | None
) -> None:
    speak(service, encoder, "4 shirts cost 4 * 15 = é60 dollars.")
    service.engine.per_step = per_step
    body = CHAT | {"uncertainty": True, "stop": stop}
    whole = await chat(service, **body)
    (expected,) = whole["choices"]
    chunks = await events(
        service, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}}
    )
    assert chunks.pop() == "[DONE]"
    last = chunks.pop()
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    text = "".join(choice["delta"]["content"] for choice in choices)
    assert text == expected["message"]["content"]
    # Each chunk has the measures of just the tokens of its text.
    for choice in choices:
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert "".join(tokens) == choice["delta"]["content"]
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert entries == expected["logprobs"]["content"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "stop"
    assert all("uncertainty" not in choice for choice in choices[:-1])
    assert choices[-1]["uncertainty"] == expected["uncertainty"]
    if stop:
        assert text == "4 shirts c"


async def test_the_engine_stops_at_a_stop_string(service: Service, encoder: TextEncoder) -> None:
    speak(service, encoder, "one\n\ntwo three four")
    answer = await chat(service, stop="\n\n")
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "one"
    assert choice["finish_reason"] == "stop"
    assert service.engine.running == 0
    made = len(encoder.tokenizer.encode("one\n\n").ids)
    assert answer["usage"]["completion_tokens"] <= made
    assert service.engine.calls <= made


async def test_length(service: Service, encoder: TextEncoder) -> None:
    speak(service, encoder, "one two three four")
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await chat(service, **{name: 2})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 2
    # A chat goes on for as long as there is room, a completion for 16 tokens.
    speak(service, encoder, "a" * 100)
    answer = await chat(service)
    assert answer["usage"]["total_tokens"] == service.engine.max_tokens + 1
    response = await service.client.post("/v1/completions", json={"prompt": "a"})
    assert response.json()["usage"]["completion_tokens"] == 16


async def test_an_answer_without_a_token(service: Service) -> None:
    service.engine.answer = [END]
    (choice,) = (await chat(service, uncertainty=True))["choices"]
    assert choice["message"]["content"] == ""
    assert choice["logprobs"]["content"] == []
    assert choice["uncertainty"]["sequence"] == {"n_tokens": 0}
    chunks = await events(service, "/v1/chat/completions", CHAT | {"uncertainty": True})
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_choices_and_top_logprobs(service: Service, encoder: TextEncoder) -> None:
    ids = speak(service, encoder, "ab")
    answer = await chat(service, n=3, logprobs=True, top_logprobs=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * (len(ids) + 1)
    for choice in answer["choices"]:
        assert "uncertainty" not in choice
        for entry in choice["logprobs"]["content"]:
            assert set(entry) == {"token", "bytes", "logprob", "top_logprobs"}
            assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
            assert entry["top_logprobs"][0]["token"] == entry["token"]
    chunks = await events(service, "/v1/chat/completions", CHAT | {"n": 3})
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"]["content"]
    assert texts == {0: "ab", 1: "ab", 2: "ab"}


async def test_completions(service: Service, encoder: TextEncoder) -> None:
    ids = speak(service, encoder, "ab c")
    token_ids = [5, 6, 7]
    for prompt in ("x y", ["x y", "z"], token_ids, [token_ids, [8]]):
        n_prompts = 2 if prompt not in ("x y", token_ids) else 1
        body = {"prompt": prompt, "logprobs": 2, "uncertainty": True}
        whole = (await service.client.post("/v1/completions", json=body)).json()
        assert whole["object"] == "text_completion"
        assert [choice["index"] for choice in whole["choices"]] == list(range(n_prompts))
        for choice in whole["choices"]:
            assert choice["text"] == "ab c"
            logprobs = choice["logprobs"]
            assert "".join(logprobs["tokens"]) == "ab c"
            lengths = [len(token) for token in logprobs["tokens"]]
            assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
            assert len(logprobs["token_logprobs"]) == len(ids)
            assert [set(measures) for measures in logprobs["uncertainty"]] == [MEASURES] * len(ids)
            assert max(logprobs["top_logprobs"][0].values()) == -0.5
            assert choice["uncertainty"]["sequence"]["n_tokens"] == len(ids)
        chunks = await events(service, "/v1/completions", body)
        for expected in whole["choices"]:
            mine = [c["choices"][0] for c in chunks[:-1]]
            mine = [choice for choice in mine if choice["index"] == expected["index"]]
            assert "".join(choice["text"] for choice in mine) == expected["text"]
            for name in ("tokens", "text_offset", "uncertainty"):
                joined = [value for choice in mine for value in choice["logprobs"][name]]
                assert joined == expected["logprobs"][name]
            assert mine[-1]["uncertainty"] == expected["uncertainty"]


async def test_doubt_that_stays_high_ends_a_generation(
    service: Service, encoder: TextEncoder
) -> None:
    # The fake's epistemic uncertainty of token t is (t % 7 + 1) * 3 / 8: here low, then high.
    low, high = 42, 48
    service.engine.answer = [low, high, low, low, *[high] * 20, END]
    value = (high % 7 + 1) * 3 / 8
    rule = {"measure": "epistemic", "threshold": value * 0.9, "window": 3}
    answer = await chat(service, uncertainty_stop=rule)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "uncertainty"
    # The first window whose mean is over the threshold is the first that is all high.
    assert answer["usage"]["completion_tokens"] == 7
    assert service.engine.running == 0
    # Not asked for, the measures are not sent.
    assert choice["logprobs"] is None
    text = await chat(service, uncertainty_stop=rule, uncertainty=True)
    assert text["choices"][0]["uncertainty"]["sequence"]["n_tokens"] == 7
    calm = await chat(service, uncertainty_stop=rule | {"threshold": value})
    assert calm["choices"][0]["finish_reason"] == "stop"
    wide = await chat(service, uncertainty_stop=rule | {"window": 30})
    assert wide["choices"][0]["finish_reason"] == "stop"
    chunks = await events(service, "/v1/chat/completions", CHAT | {"uncertainty_stop": rule})
    assert chunks[-2]["choices"][0]["finish_reason"] == "uncertainty"
    counted = 'demur_generations_total{finish_reason="uncertainty"}'
    assert counted in (await service.client.get("/metrics")).text


BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("unknown", {"beam_width": 3}, 400, "beam_width"),
    ("no messages", {"messages": []}, 400, "messages"),
    ("role", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    ("model", {"model": "gpt-17"}, 404, "model"),
    ("temperature", {"temperature": 2.1}, 400, "temperature"),
    ("temperature type", {"temperature": "0"}, 400, "temperature"),
    ("top_p", {"top_p": 0}, 400, "top_p"),
    ("max_tokens", {"max_tokens": 0}, 400, "max_tokens"),
    ("two lengths", {"max_tokens": 2, "max_completion_tokens": 3}, 400, None),
    ("n", {"n": 0}, 400, "n"),
    ("many choices", {"n": 129}, 400, "n"),
    ("empty stop", {"stop": ""}, 400, "stop"),
    ("empty stop in a list", {"stop": ["a", ""]}, 400, None),
    ("seed", {"seed": 7}, 400, "seed"),
    ("huge seed", {"seed": 10**30, "temperature": 0}, 400, "seed"),
    ("top_logprobs alone", {"top_logprobs": 2}, 400, None),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ("penalty", {"presence_penalty": 0.5}, 400, "presence_penalty"),
    ("options without a stream", {"stream_options": {"include_usage": True}}, 400, None),
    ("tools", {"tools": [{"type": "function"}]}, 400, "tools"),
    ("echo as a number", {"echo": 0}, 400, "echo"),
    ("format", {"response_format": {"type": "json_object"}}, 400, "response_format"),
    ("measure", {"uncertainty_stop": {"measure": "fear", "threshold": 1}}, 400, None),
    ("threshold", {"uncertainty_stop": {"threshold": -1}}, 400, "uncertainty_stop.threshold"),
    ("no threshold", {"uncertainty_stop": {"window": 3}}, 400, "uncertainty_stop.threshold"),
    (
        "window",
        {"uncertainty_stop": {"threshold": 1, "window": 0}},
        400,
        "uncertainty_stop.window",
    ),
    ("too long", {"messages": [{"role": "user", "content": "word " * 99}]}, 413, None),
    ("max_tokens too long", {"max_tokens": 1000}, 413, "max_tokens"),
    ("control", {"messages": [{"role": "user", "content": "\x07"}]}, 400, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "status", "param"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
async def test_bad_requests(
    service: Service, body: dict[str, Any], status: int, param: str | None, stream: bool
) -> None:
    if stream and "stream_options" not in body:
        body = body | {"stream": True}
    error = error_of(await service.client.post("/v1/chat/completions", json=CHAT | body), status)
    if param is not None:
        assert error["param"] == param
    assert not service.engine.samplings


BAD_PROMPTS = [[], [[]], [1, "a"], ["a", 1], [-1], [320], [[5], [320]], None, 7, [[1], "a"], "\x07"]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=str)
async def test_bad_prompts(service: Service, prompt: Any) -> None:
    error = error_of(await service.client.post("/v1/completions", json={"prompt": prompt}), 400)
    # The field and the place in it, and no name of our own for a kind of prompt.
    assert re.fullmatch(r"prompt(\[\d+\])*", error["param"])


async def test_what_means_nothing_is_taken(service: Service) -> None:
    """Nulls and defaults that clients send, and a seed where nothing is drawn."""
    names = ["model", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options"]
    names += ["max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "user"]
    names += ["uncertainty", "uncertainty_stop", "presence_penalty", "frequency_penalty", "store"]
    await chat(service, **dict.fromkeys(names))
    await chat(service, presence_penalty=0, frequency_penalty=0.0, user="me", stop=[], store=True)
    await chat(service, temperature=0, seed=1234)
    assert service.engine.samplings[-1].seed is None
    service.engine.takes_seed = True
    await chat(service, seed=1234, n=3)
    # Choices by one seed would all be the same.
    assert [sampling.seed for sampling in service.engine.samplings[-3:]] == [1234, 1235, 1236]
    idle = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    idle |= {"logit_bias": {}, "parallel_tool_calls": None, "metadata": None, "functions": None}
    await chat(service, **idle)
    body = {"prompt": "a", "echo": False, "best_of": 1, "suffix": None}
    assert (await service.client.post("/v1/completions", json=body)).status_code == 200


async def test_an_answer_can_be_sent_back_as_a_turn(service: Service) -> None:
    message = (await chat(service))["choices"][0]["message"]
    turns = [{"role": "developer", "content": "Brief."}, *QUESTION, message]
    turns.append({"role": "user", "content": "And?", "name": "me"})
    await chat(service, messages=turns)
    score = await service.score(messages=turns, response="Paris.")
    assert score.status_code == 200


async def test_long_lists_that_are_wrong_fail_at_once(service: Service) -> None:
    ids = [1] * 200_000
    for prompt in ([*ids, "a"], ["a", *ids], [[1], *ids]):
        response = await service.client.post("/v1/completions", json={"prompt": prompt})
        assert error_of(response, 400)["param"].startswith("prompt")
    response = await service.client.post("/v1/chat/completions", json={"messages": ids})
    assert error_of(response, 400)["param"].startswith("messages")


async def test_too_many_prompts_are_not_tokenised_first(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": ["a"] * 1000, "logprobs": 20}
    refused = error_of(await service.client.post("/v1/completions", json=body), 400)
    assert "log-probs" in refused["message"]
    monkeypatch.setattr(TextEncoder, "token_ids", lambda *_, **__: pytest.fail("tokenised"))
    response = await service.client.post("/v1/completions", json={"prompt": ["a"] * 1001})
    assert error_of(response, 400)["code"] == "too_many_items"


async def test_many_choices_leave_the_engine_room_for_others(service: Service) -> None:
    body = {"prompt": ["a"] * 500, "max_tokens": 2}
    response = await service.client.post("/v1/completions", json=body)
    assert len(response.json()["choices"]) == 500
    assert 1 < service.engine.most_running <= 32


async def test_the_fingerprint_is_that_of_the_weights_that_answered(service: Service) -> None:
    engine = service.engine
    engine.release.clear()
    waiting = asyncio.create_task(chat(service, uncertainty=True))
    while not engine.running:
        await asyncio.sleep(0.001)
    engine.weights_version = "fake-2"
    engine.release.set()
    answer = await waiting
    assert answer["system_fingerprint"] == "fake-2"
    assert answer["choices"][0]["uncertainty"]["estimator"]["weights_version"] == "fake-2"


async def test_errors_in_mid_stream_are_told_by_an_event(service: Service) -> None:
    service.engine.fails_after = 2
    chunks = await events(service, "/v1/chat/completions", CHAT)
    assert chunks[-1]["error"]["code"] == "not_finite"
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in chunks
    # Before the first event an error has a status of its own.
    service.engine.fails_after = 0
    response = await service.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert error_of(response, 500)["code"] == "not_finite"
    assert service.app.state.demur.admission.pending == 0


async def test_a_deadline(encoder: TextEncoder) -> None:
    async for service in run_service(encoder, request_timeout_s=0.05):
        service.engine.release.clear()
        for body in (CHAT, CHAT | {"stream": True}, CHAT | {"n": 3}):
            response = await service.client.post("/v1/chat/completions", json=body)
            assert error_of(response, 504)["code"] == "deadline_exceeded"
        assert service.engine.running == 0
        assert service.engine.cancelled == 5


async def test_choices_take_places_in_the_queue(encoder: TextEncoder) -> None:
    async for service in run_service(encoder, max_pending=3, max_batch_items=3):
        for body in ({"n": 4}, {"prompt": ["a", "b"], "n": 2}):
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            body = body if "prompt" in body else CHAT | body
            refused = await service.client.post(path, json=body)
            assert error_of(refused, 400)["code"] == "too_many_items"
        service.engine.release.clear()
        waiting = asyncio.create_task(chat(service, n=2))
        while service.engine.running < 2:
            await asyncio.sleep(0.001)
        for stream in (False, True):
            body = CHAT | {"n": 2, "stream": stream}
            refused = await service.client.post("/v1/chat/completions", json=body)
            assert error_of(refused, 429)["code"] == "queue_full"
        service.engine.release.set()
        await waiting
        assert service.app.state.demur.admission.pending == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_hangs_up_frees_its_places(
    service: Service, stream: bool, n: int
) -> None:
    engine = service.engine
    engine.release.clear()
    body = CHAT | {"stream": stream, "n": n}
    await hang_up(service.app, PATH, body, lambda _: engine.running == n)
    assert engine.running == 0
    assert engine.cancelled == n
    assert service.app.state.demur.admission.pending == 0


async def test_hanging_up_in_mid_stream(service: Service) -> None:
    engine = service.engine
    engine.answer = [40]
    engine.pauses_after = 3

    def when(content: bytes) -> bool:
        return content.count(b"data: ") >= 3 and not engine.release.is_set()

    sent = await hang_up(service.app, PATH, CHAT | {"stream": True}, when)
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
    assert engine.running == 0
    assert engine.cancelled == 1
    assert service.app.state.demur.admission.pending == 0


async def test_streams_do_not_mix(service: Service, encoder: TextEncoder) -> None:
    """Each of 64 streams gets its own tokens, whoever else is served."""
    engine = service.engine
    answers = {f"marker {i}": f"answer {i} " * 3 for i in range(64)}
    plain_stream = engine.stream

    def stream(token_ids: Any, sampling: Any) -> Any:
        asked = encoder.tokenizer.decode(token_ids)
        name = next(name for name in sorted(answers, key=len, reverse=True) if name in asked)
        mine = list(encoder.tokenizer.encode(answers[name]).ids)

        async def own() -> Any:
            async for step in plain_stream(token_ids, sampling):
                ids = [mine.pop(0) if mine else END for _ in step.token_ids]
                reason = "stop" if ids[-1] == END else step.finish_reason
                yield type(step)(ids, None, [[] for _ in ids], reason, step.weights_version)
                if reason:
                    return

        return own()

    engine.stream = stream  # type: ignore[method-assign]
    engine.answer = [40]

    async def ask(name: str) -> str:
        body = {"messages": [{"role": "user", "content": name}], "max_tokens": 40}
        chunks = await events(service, "/v1/chat/completions", body)
        return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])

    got = await asyncio.gather(*(ask(name) for name in answers))
    assert got == list(answers.values())


async def test_a_dead_engine_and_keys(encoder: TextEncoder) -> None:
    async for service in run_service(encoder, api_keys=["key"], admin_keys=["admin"]):
        paths = {"/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "a"}}
        for path, body in paths.items():
            post: Callable[..., Any] = service.client.post
            error_of(await post(path, json=body), 401)
            headers = {"Authorization": "Bearer key"}
            assert (await post(path, json=body, headers=headers)).status_code == 200
        service.engine.alive = False
        answer = await service.client.post(
            "/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer key"}
        )
        assert error_of(answer, 503)["code"] == "not_ready"


async def test_models_and_drafts(encoder: TextEncoder) -> None:
    async for service in run_service(encoder):
        assert (await service.client.get("/v1/models/tiny")).json()["id"] == "tiny"
        error_of(await service.client.get("/v1/models/other"), 404)
        drafts = (await service.client.get("/v1/drafts")).json()
        assert drafts["weights_version"] == "fake-1"
        assert [draft["kind"] for draft in drafts["data"]] == ["exit"] + ["residual"] * 3
        assert drafts["data"][0] == {"name": "early", "kind": "exit", "layer": 3, "draw": None}


async def test_drafts_need_an_admin_key_where_there_are_keys(encoder: TextEncoder) -> None:
    async def get(service: Service, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return await service.client.get("/v1/drafts", headers=headers)

    async for service in run_service(encoder, api_keys=["key"], admin_keys=["admin"]):
        for key in (None, "wrong"):
            assert error_of(await get(service, key), 401)["code"] == "invalid_api_key"
        assert error_of(await get(service, "key"), 403)["code"] == "scope_needed"
        assert (await get(service, "admin")).status_code == 200
        # An admin's key is good for scoring as well.
        headers = {"Authorization": "Bearer admin"}
        assert (await service.client.get("/v1/models", headers=headers)).status_code == 200
    async for service in run_service(encoder, api_keys=["key"]):
        assert "generate, score" in error_of(await get(service, "key"), 403)["message"]
