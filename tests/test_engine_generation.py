"""Generation through the service with a real model, against scoring and against stock vLLM."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import httpx
import pytest

from drafts.init import default_folder, init_default
from drafts.launch import set_environment
from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.engine_checks import TOLERANCE
from tests.texts import answers

pytestmark = pytest.mark.engine

_SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16}
_MAX_TOKENS = 24
_MEASURES = ("entropy", "total", "aleatoric", "jsd", "kl", "epistemic")


def prompts() -> list[list[dict[str, str]]]:
    """50 questions."""
    questions = list(dict.fromkeys(question for question, _ in answers()))[:5]
    wishes = ["", " Answer in one word.", " Explain it to a child.", " Think step by step."]
    wishes += [" Say only the number.", " Why?", " Answer in French.", " Write a poem of it."]
    wishes += [" Begin with the result.", " List what is given."]
    asked = [question + wish for wish in wishes for question in questions]
    return [[{"role": "user", "content": text}] for text in asked]


def stock_texts(folder: str, pipe: Connection) -> None:
    """What stock vLLM says to each list of token ids, greedily, with the target alone."""
    from vllm import LLM, SamplingParams

    set_environment()
    llm = LLM(folder, kv_cache_memory_bytes=2**29, enforce_eager=True, **_SETTINGS)
    params = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0)
    ids = pipe.recv()
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    pipe.send([output.outputs[0].text for output in outputs])
    # Or this process would wait for the engine's, which waits for work.
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    init_default(default_folder())
    settings = Settings(ensemble=default_folder(), kv_cache_gib=0.5, **_SETTINGS)
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=600
        ) as client:
            while (answer := await client.get("/ready")).status_code != 200:
                assert (await client.get("/health")).status_code == 200, answer.text
                await asyncio.sleep(0.1)
            yield client


async def streamed(client: httpx.AsyncClient, messages: Any) -> tuple[str, list[Any], Any]:
    """Text, entries and last choice of a greedy stream."""
    body = {"messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
    body |= {"stream": True, "uncertainty": True}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in data]
    text = "".join(choice["delta"]["content"] for choice in choices)
    return text, [e for choice in choices for e in choice["logprobs"]["content"]], choices[-1]


async def test_what_is_streamed_equals_the_score_of_the_same_text_and_stock_vllm(
    client: httpx.AsyncClient,
) -> None:
    asked = prompts()
    assert len(asked) == 50
    got = await asyncio.gather(*(streamed(client, messages) for messages in asked))
    scores = await asyncio.gather(
        *(
            client.post("/v1/score", json={"messages": messages, "response": text})
            for messages, (text, _, _) in zip(asked, got, strict=True)
        )
    )
    compared = 0
    for (text, entries, last), answer in zip(got, scores, strict=True):
        score = answer.json()
        tokens = score["tokens"]
        assert [entry["token"] for entry in entries] == [token["token"] for token in tokens], text
        for entry, token in zip(entries, tokens, strict=True):
            assert entry["logprob"] == pytest.approx(token["logprob"], abs=TOLERANCE)
            for name in _MEASURES:
                assert entry["uncertainty"][name] == pytest.approx(token[name], abs=TOLERANCE)
            compared += 1
        sequence = last["uncertainty"]["sequence"]
        assert sequence == pytest.approx(score["sequence"], abs=_MAX_TOKENS * TOLERANCE)
        places = [(span["start"], span["end"]) for span in score["spans"]]
        assert [(span["start"], span["end"]) for span in last["uncertainty"]["spans"]] == places
    assert compared > 800

    target = default_folder() / "target"
    encoder = TextEncoder(target)
    ids = [encoder.token_ids(encoder.render(messages), rendered=True) for messages in asked]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=stock_texts, args=(str(target), theirs))
    process.start()
    theirs.close()
    ours.send(ids)
    expected = await asyncio.to_thread(ours.recv)
    process.join()
    assert [text for text, _, _ in got] == expected


async def test_early_stop_on_a_real_model(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"messages": prompts()[0], "temperature": 0, "max_tokens": 40}
    whole = (await client.post("/v1/chat/completions", json=body | {"uncertainty": True})).json()
    entries = whole["choices"][0]["logprobs"]["content"]
    values = [entry["uncertainty"]["epistemic"] for entry in entries]
    window = 4
    means = [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]
    threshold = sorted(means)[-3]
    first = next(i for i, mean in enumerate(means) if mean > threshold) + window
    rule = {"measure": "epistemic", "threshold": threshold, "window": window}
    cut = (await client.post("/v1/chat/completions", json=body | {"uncertainty_stop": rule})).json()
    assert cut["choices"][0]["finish_reason"] == "uncertainty"
    assert cut["usage"]["completion_tokens"] == first
    assert whole["choices"][0]["message"]["content"].startswith(
        cut["choices"][0]["message"]["content"]
    )
