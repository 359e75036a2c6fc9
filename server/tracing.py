"""Traces, by OpenTelemetry and its conventions for generative AI; and how long each stage takes.

Nothing is recorded unless the standard variables say where to: OTEL_EXPORTER_OTLP_ENDPOINT (or
…_TRACES_ENDPOINT) turns it on, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES and the others work.
A trace holds sizes, settings and measures of a request, and never a text or a key.

    POST /v1/score                 the request, in the client's trace if it sent a `traceparent`
    └── score smollm2-…            gen_ai.*: one text, or all choices of a generation
        ├── tokenise
        ├── engine                 waiting for a place in a batch, and the forward passes
        └── measure                spans, aggregates, calibration
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server import metrics, schemas
from server.choice import Job
from server.errors import ApiError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_tracer = trace.get_tracer("demur", metadata.version("demur-server"))
_propagator = TraceContextTextMapPropagator()


def configure_tracing() -> Callable[[], None]:
    """Send traces to where the environment says, if it does; what is returned sends the last."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return lambda: None
    provider = TracerProvider(resource=_resource())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _resource() -> Resource:
    own = {"service.name": "demur", "service.version": metadata.version("demur-server")}
    return Resource.create(own | dict(OTELResourceDetector().detect().attributes))


@contextmanager
def http_request(method: str, headers: Mapping[str, str], request_id: str) -> Iterator[Span]:
    """The span of a request; its route and status are set when they are known."""
    with _tracer.start_as_current_span(
        method,
        context=_propagator.extract(headers),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": method, "demur.request_id": request_id},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def end_request(span: Span, method: str, route: str, status: int) -> None:
    """What is known of a request when it ends."""
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status})
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


@contextmanager
def operation(name: str, model: str) -> Iterator[Span]:
    """The span of one operation of the model; an error's code becomes its `error.type`."""
    attributes = {
        "gen_ai.operation.name": name,
        "gen_ai.provider.name": "demur",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
    }
    # Errors are recorded by their code alone: a message may quote what was sent.
    with _tracer.start_as_current_span(
        f"{name} {model}",
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            code = error.code if isinstance(error, ApiError) else type(error).__name__
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR))
            raise


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A part of an operation: its span, and its duration in `demur_stage_seconds`."""
    started = time.perf_counter()
    with _tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False):
        try:
            yield
        finally:
            metrics.STAGE_SECONDS.labels(name).observe(time.perf_counter() - started)


def describe_score(span: Span, answer: schemas.ScoreResponse) -> None:
    """What came out of a score."""
    span.set_attributes(
        {
            "gen_ai.response.id": answer.id,
            "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": answer.usage.completion_tokens,
            "demur.weights_version": answer.estimator.weights_version,
            "demur.epistemic_mean": float(answer.sequence["epistemic_mean"]),
        }
    )
    if answer.hallucination_score is not None:
        span.set_attribute("demur.hallucination_score", answer.hallucination_score)


def describe_job(span: Span, job: Job) -> None:
    """What a generation is asked for."""
    span.set_attributes(
        {
            "gen_ai.request.max_tokens": job.sampling.max_new_tokens,
            "gen_ai.request.temperature": job.sampling.temperature,
            "gen_ai.request.top_p": job.sampling.top_p,
            "gen_ai.request.choice.count": job.n_choices,
            "gen_ai.usage.input_tokens": sum(len(prompt.token_ids) for prompt in job.prompts),
        }
    )
    if job.sampling.seed is not None:
        span.set_attribute("gen_ai.request.seed", job.sampling.seed)


def describe_choices(span: Span, finish_reasons: list[str], n_generated: int) -> None:
    """What came out of a generation."""
    span.set_attribute("gen_ai.response.finish_reasons", finish_reasons)
    span.set_attribute("gen_ai.usage.output_tokens", n_generated)


def current_trace_id() -> str | None:
    """For the log."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None
