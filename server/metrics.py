"""Prometheus metrics of the service; vLLM's own (`vllm:*`) stand beside them at /metrics."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("demur_requests", "HTTP requests", ["route", "status"])
REQUEST_SECONDS = Histogram(
    "demur_request_seconds",
    "Duration of HTTP requests",
    ["route"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
PENDING = Gauge("demur_pending_items", "Items waiting for the engine or in it")
ITEMS = Counter("demur_items", "Items of scoring requests", ["outcome"])
TOKENS = Counter("demur_tokens", "Tokens through the engine", ["part"])
EPISTEMIC = Histogram(
    "demur_epistemic_mean_nats",
    "Mean epistemic uncertainty of scored responses",
    buckets=(0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 4, 8),
)
JSD = Histogram(
    "demur_jsd_mean_nats",
    "Mean disagreement among the drafts of scored responses; near zero, the drafts have collapsed",
    buckets=(0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1),
)
HALLUCINATION = Histogram(
    "demur_hallucination_score",
    "Calibrated probability that a scored response is wrong, where a calibration is loaded",
    buckets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
)
DOUBTED = Counter(
    "demur_score_warnings", "Responses whose probability should be doubted, by reason", ["code"]
)
GENERATIONS = Counter("demur_generations", "Generated choices", ["finish_reason"])
READY = Gauge("demur_ready", "1 while the engine answers")

# Online distillation.
CAPTURED = Counter(
    "demur_spool_captured",
    "Conversations offered to the traffic spool: kept, repeated (it came before), dropped",
    ["outcome"],
)
SPOOL_ERRORS = Counter("demur_spool_errors", "Failed attempts to write to the traffic spool")
