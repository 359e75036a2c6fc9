"""Spans by OpenTelemetry's conventions, logs that name them, and metrics that stay few."""

import json
import logging
import uuid
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import REGISTRY

from drafts.text import TextEncoder
from server import tracing
from server.logs import _Context, formatter
from tests.conftest import Service, run_service
from tests.test_http import GOOD, error_of

SAID = "my private words"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    [span] = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


async def test_a_score(service: Service, spans: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    body = GOOD | {"response": SAID}
    answer = (await service.client.post("/v1/score", json=body, headers=headers)).json()
    request = named(spans, "POST /v1/score")
    assert request.kind == SpanKind.SERVER
    assert request.context is not None
    assert format(request.context.trace_id, "032x") == TRACE
    assert format(parent_of(request) or 0, "016x") == PARENT
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/score",
        "http.response.status_code": 200,
        "demur.request_id": "mine",
    }
    operation = named(spans, "score tiny")
    assert operation.context is not None
    assert parent_of(operation) == request.context.span_id
    assert dict(operation.attributes or {}) == {
        "gen_ai.operation.name": "score",
        "gen_ai.provider.name": "demur",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": answer["id"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "demur.weights_version": "fake-1",
        "demur.epistemic_mean": answer["sequence"]["epistemic_mean"],
    }
    for stage in ("tokenise", "engine", "measure"):
        assert parent_of(named(spans, stage)) == operation.context.span_id
    assert parent_of(named(spans, "respond")) == request.context.span_id
    for span in spans.get_finished_spans():
        assert SAID not in span.to_json()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat(service: Service, spans: InMemorySpanExporter, stream: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": SAID}],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stream": stream,
    }
    assert (await service.client.post("/v1/chat/completions", json=body)).status_code == 200
    operation = named(spans, "chat tiny")
    found = dict(operation.attributes or {})
    assert found.pop("gen_ai.usage.input_tokens") > 0  # type: ignore[operator]
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "demur",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.output_tokens": 6,
    }
    firsts = [span for span in spans.get_finished_spans() if span.name == "first_token"]
    assert operation.context is not None
    assert [parent_of(span) for span in firsts] == [operation.context.span_id] * 2
    for span in spans.get_finished_spans():
        assert SAID not in span.to_json()


async def test_an_error_is_told_by_its_code(
    service: Service, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError(SAID)

    service.engine.broken_numbers = True
    error_of(await service.score(**GOOD), 500)
    operation = named(spans, "score tiny")
    assert (operation.attributes or {})["error.type"] == "not_finite"
    assert operation.status.status_code == StatusCode.ERROR
    assert named(spans, "POST /v1/score").status.status_code == StatusCode.ERROR
    spans.clear()
    service.engine.broken_numbers = False
    monkeypatch.setattr("server.scoring.find_spans", explode)
    error_of(await service.score(**GOOD), 500)
    assert (named(spans, "score tiny").attributes or {})["error.type"] == "RuntimeError"
    for span in spans.get_finished_spans():
        assert SAID not in span.to_json()


@pytest.mark.parametrize(
    ("setting", "code"), [({}, "not_finite"), ({"request_timeout_s": 0.05}, "deadline_exceeded")]
)
async def test_an_error_of_a_generation_too(
    encoder: TextEncoder, spans: InMemorySpanExporter, setting: dict[str, float], code: str
) -> None:
    async for service in run_service(encoder, **setting):
        if setting:
            service.engine.release.clear()
        service.engine.broken_numbers = True
        answer = await service.client.post("/v1/completions", json={"prompt": SAID})
        assert answer.json()["error"]["code"] == code
        assert (named(spans, "text_completion tiny").attributes or {})["error.type"] == code


async def test_a_log_line_names_its_request_and_its_trace(
    service: Service, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(_Context())
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    await service.client.post("/v1/score", json=GOOD, headers=headers)
    [record] = [record for record in caplog.records if record.name == "server.middleware"]
    line = json.loads(formatter("json").format(record))
    assert line["request_id"] == "mine"
    assert line["trace_id"] == TRACE
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/score", 200)
    assert line["level"] == "INFO"
    assert line["seconds"] > 0


def test_tracing_is_off_unless_the_environment_says_where_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in tracing._ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    providers: list[TracerProvider] = []
    monkeypatch.setattr(tracing.trace, "set_tracer_provider", providers.append)
    tracing.configure_tracing()()
    assert not providers
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, environment in (
        ("demur", {}),
        ("ours", {"OTEL_SERVICE_NAME": "ours"}),
        ("demur", {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}),
    ):
        with monkeypatch.context() as patched:
            for variable, value in environment.items():
                patched.setenv(variable, value)
            end = tracing.configure_tracing()
            resource = providers[-1].resource.attributes
            assert resource["service.name"] == name
            assert ("deployment.environment" in resource) == (
                "OTEL_RESOURCE_ATTRIBUTES" in environment
            )
            end()


async def test_clients_cannot_make_new_time_series(encoder: TextEncoder) -> None:
    """What they choose (paths, models, ids, keys, methods) is in no label."""

    def series() -> set[tuple[str, str]]:
        return {
            (sample.name, json.dumps(sample.labels, sort_keys=True))
            for family in REGISTRY.collect()
            if family.name.startswith("demur")
            for sample in family.samples
        }

    async def ask(service: Service, name: str) -> None:
        headers = {"Authorization": f"Bearer {name}", "X-Request-Id": name}
        good = {"Authorization": "Bearer key", "X-Request-Id": name}
        for path in (f"/{name}", f"/v1/models/{name}", f"/v1/score?{name}={name}"):
            await service.client.get(path, headers=headers)
            await service.client.get(path, headers=good)
            await service.client.request("DELETE", path, headers=good)
            await service.client.post(path, headers=good, json=GOOD | {"model": name})
            await service.client.post(path, headers=good, json=GOOD | {name: name})
        await service.client.post("/v1/score", headers=good, json=GOOD)

    async for service in run_service(encoder, api_keys=["key"]):
        await ask(service, "warm")
        before = series()
        for _ in range(50):
            await ask(service, uuid.uuid4().hex)
        assert series() == before
