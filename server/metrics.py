"""Prometheus metrics of the service; vLLM's own (`vllm:*`) stand beside them at /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from server.schemas import OsdStatus

REQUESTS = Counter("demur_requests", "HTTP requests", ["route", "status"])
REQUEST_SECONDS = Histogram(
    "demur_request_seconds",
    "Duration of HTTP requests",
    ["route"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
STAGE_SECONDS = Histogram(
    "demur_stage_seconds",
    "Duration of an operation's stages: tokenise, engine, measure of a score; first_token, from "
    "the engine's side, of a generation; respond of both",
    ["stage"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
KEY_TOKENS = Counter("demur_key_tokens", "Tokens that a key was counted for", ["key"])
KEY_REFUSED = Counter("demur_key_refused", "Requests over a key's budget", ["key", "budget"])
KEYS_USABLE = Gauge(
    "demur_keys_file_usable", "0 while the keys file cannot be used and older keys hold, else 1"
)
REFUSED = Counter(
    "demur_refused",
    "Requests refused because of the load: queue (no place is left), wait (longer than the "
    "deadline allows)",
    ["reason"],
)
ENGINE_FAILURES = Counter("demur_engine_failures", "Times that the engine died or hung")
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
SPOOL_TEXTS = Gauge("demur_spool_texts", "Conversations in the traffic spool")
SPOOL_BYTES = Gauge("demur_spool_bytes", "Size of what is in the traffic spool")
SPOOL_AGE = Gauge("demur_spool_oldest_seconds", "Age of the oldest conversation in the spool")
SPOOL_QUEUED = Gauge("demur_spool_queued", "Conversations of this service that wait for the spool")
CURRENT_VERSION = Gauge(
    "demur_drafts_version", "1 for the version of the drafts' weights that serves", ["version"]
)
CURRENT_SERVED = Gauge(
    "demur_drafts_current_served", "0 while the store's current version is another than what serves"
)
SWAPS = Counter("demur_drafts_swaps", "Versions of the store swapped in: ok, failed", ["outcome"])
SWAP_SECONDS = Histogram(
    "demur_drafts_swap_seconds",
    "From seeing a version to serving with it, waiting for requests under way included",
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
STORE_UP = Gauge("demur_drafts_store_up", "0 while the drafts store cannot be read, else 1")
TRAINER_DEATHS = Counter("demur_osd_trainer_deaths", "Times that this service's trainer ended")
TRAINER_UP = Gauge("demur_osd_trainer_up", "1 while a trainer reports to the store")
OSD_PAUSED = Gauge("demur_osd_paused", "1 while the trainer is told to rest")
OSD_STUCK = Gauge("demur_osd_stuck", "1 while the trainer cannot go on (full disk, no store)")
OSD_STEPS = Gauge("demur_osd_steps", "Steps of all students, ever")
OSD_TEXTS = Gauge("demur_osd_texts", "Texts of the traffic that drafts have learned from")
OSD_WAITING = Gauge("demur_osd_waiting_texts", "Texts that wait to be learned from")
OSD_SKIPPED = Gauge("demur_osd_skipped_texts", "Texts that came too fast to be learned from")
OSD_UNUSABLE = Gauge(
    "demur_osd_unusable_texts",
    "Texts since the trainer started that are too long to learn from, or of another model",
)
OSD_LAST_STEP = Gauge("demur_osd_last_step_timestamp_seconds", "When the last step was made")
OSD_LOSS = Gauge("demur_osd_loss", "Mean loss of the last steps")
OSD_VERSIONS = Gauge(
    "demur_osd_versions", "Versions made, ever: published, refused, taken_back", ["verdict"]
)
OSD_MEASURED = Gauge(
    "demur_osd_measured_nats",
    "Of the version that serves, on held-out traffic and on the reference set: kl_mixture is "
    "KL(p_T || q_bar), jsd that among the drafts, reference EU*, rmse that of epistemic against it",
    ["on", "measure"],
)


def observe_osd(status: OsdStatus) -> None:
    """Bring the gauges of online distillation up to date."""
    if status.spool is not None:
        SPOOL_TEXTS.set(status.spool.texts)
        SPOOL_BYTES.set(status.spool.bytes)
        SPOOL_AGE.set(status.spool.oldest_age_s)
        SPOOL_QUEUED.set(status.spool.queued)
    STORE_UP.set(status.store_error is None)
    TRAINER_UP.set(status.trainer_alive)
    OSD_PAUSED.set(status.paused is not None)
    trainer = status.trainer
    if trainer is None:
        return
    OSD_STUCK.set(status.trainer_alive and trainer.activity == "stuck")
    OSD_STEPS.set(trainer.step)
    OSD_TEXTS.set(sum(trainer.texts))
    OSD_WAITING.set(sum(trainer.waiting))
    OSD_SKIPPED.set(trainer.skipped)
    OSD_UNUSABLE.set(trainer.unusable)
    OSD_LAST_STEP.set(trainer.last_step or 0)
    OSD_LOSS.set(trainer.loss or 0)
    OSD_VERSIONS.labels("published").set(trainer.published)
    OSD_VERSIONS.labels("refused").set(trainer.refused)
    OSD_VERSIONS.labels("taken_back").set(trainer.taken_back)
    for on, measured in (("traffic", trainer.traffic), ("reference", trainer.reference)):
        for name, value in (measured or {}).items():
            OSD_MEASURED.labels(on, name).set(value)


# So that the first of each is an increase, and not a series that appears.
for _outcome in ("kept", "repeated", "dropped"):
    CAPTURED.labels(_outcome)
for _outcome in ("ok", "failed"):
    SWAPS.labels(_outcome)
for _reason in ("queue", "wait"):
    REFUSED.labels(_reason)
KEYS_USABLE.set(1)
STORE_UP.set(1)
CURRENT_SERVED.set(1)
