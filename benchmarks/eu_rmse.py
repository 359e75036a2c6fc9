"""How well do estimators estimate epistemic uncertainty? Against EU* of many posterior draws.

    python benchmarks/eu_rmse.py --texts CORPUS --draws 64 \
        --ensemble "osd+ddd exit=runs/exit/ensemble" --ensemble "residual=runs/residual/ensemble"

CORPUS is a folder that `demur synthesize` wrote: the target's own answers to questions that no
draft was trained on. On the same tokens, every estimator is compared with EU*: root mean squared
error, the same after the best single scale (fitted on the other half of the texts), bias, Pearson
and Spearman correlation, with bootstrap intervals over texts. Trivial estimators stand in the table
too: a constant, the target's entropy.

Costs are operations of one scored token over those of the target, attention and norms left out; LM-
head products stand apart, since on a target this small they weigh most.

Writes benchmarks/results/eu_rmse.json and a scatter plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from drafts.divergence import measures
from drafts.init import default_folder
from drafts.manifest import Ensemble, ExitDraft, ResidualDraft, load_ensemble
from drafts.reference import Reference
from osd.corpus import Corpus, Text
from osd.posterior import PosteriorConfig, WeightPosterior, tokur_states
from osd.schedule import derived_seed
from osd.teacher import Teacher
from osd.true_eu import true_eu

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/eu_rmse.json"
MAX_TOKENS = 512
TOKUR_SAMPLES = (2, 5, 10)

Floats = NDArray[np.float64]


@dataclass
class Estimate:
    """An estimator's values on the response tokens of each text, and what they cost."""

    name: str
    values: list[Floats]
    cost: float  # operations over the target's, without LM heads
    heads: float  # LM-head products beyond the target's own, in the same unit
    seconds: float  # beyond the target's own pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="corpus of held-out texts")
    parser.add_argument("--target", type=Path, default=default_folder() / "target")
    parser.add_argument("--draws", type=int, default=64, help="M of the reference")
    parser.add_argument("--limit", type=int, default=200, help="texts")
    parser.add_argument("--ensemble", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--cache", type=Path, default=default_folder().parent / "true_eu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.bfloat16)
    posterior = WeightPosterior(model, PosteriorConfig(), cache=arguments.cache)
    teacher = Teacher(model, posterior)
    corpus = Corpus(arguments.texts)
    texts = corpus.read(model.config.vocab_size)[: arguments.limit]
    name = f"{arguments.texts.name}-{len(texts)}-M{arguments.draws}-s{arguments.seed}"
    reference = true_eu(
        teacher,
        texts,
        draws=arguments.draws,
        max_tokens=MAX_TOKENS,
        seed=derived_seed(arguments.seed, "reference"),
        cache=arguments.cache / name,
    )
    truth = [eu.whole for eu in reference]
    estimates = trivial(teacher, texts, truth)
    for samples in TOKUR_SAMPLES:
        estimates.append(posterior_samples(teacher, texts, samples, arguments.seed))
        estimates.append(tokur(teacher, texts, samples, arguments.seed))
    for entry in arguments.ensemble:
        label, _, folder = entry.partition("=")
        estimates += of_ensemble(label, load_ensemble(folder), texts)
    rows = [row(estimate, truth) for estimate in tqdm(estimates, desc="bootstrap")]
    halves = np.concatenate([eu.first - eu.second for eu in reference])
    result = {
        "benchmark": "eu_rmse",
        "command": "python benchmarks/eu_rmse.py " + " ".join(os.sys.argv[1:]),  # type: ignore[attr-defined]
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "texts": corpus.about | {"scored": len(texts)},
        "reference": {
            "draws": arguments.draws,
            "tokens": int(sum(map(len, truth))),
            "mean": float(np.concatenate(truth).mean()),
            "standard_deviation": float(np.concatenate(truth).std()),
            # Each half has twice the variance of the whole, their difference four times.
            "noise_rms": float(np.sqrt(np.mean(halves**2)) / 2),
            "shift_mean": float(np.concatenate([eu.shift for eu in reference]).mean()),
        },
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for values in rows:
        print(line(values))


def line(values: dict[str, Any]) -> str:
    """A row of the table for the terminal."""
    names = ("rmse", "rmse_scaled", "bias", "pearson", "spearman")
    numbers = "  ".join(f"{name} {values[name][0]:+.4f}" for name in names)
    return f"{values['name']:40} {numbers}  cost {values['cost']:.3f} + {values['heads']:.3f}"


# Estimators.


def trivial(teacher: Teacher, texts: list[Text], truth: list[Floats]) -> list[Estimate]:
    """What needs no estimator: one number for all tokens, and the target's own entropy."""
    mean = float(np.concatenate(truth[1::2]).mean())  # of the calibration half

    def entropy(text: Text) -> Tensor:
        logp_TV = torch.log_softmax(logits_of(teacher, states_of(teacher, text)), -1)
        return -(logp_TV.exp() * logp_TV).sum(-1)

    values, _ = each(texts, entropy, "target entropy")
    return [
        Estimate("constant", [np.full(len(eu), mean) for eu in truth], 0, 0, 0),
        Estimate("target entropy", values, 0, 0, 0),
    ]


def posterior_samples(teacher: Teacher, texts: list[Text], samples: int, seed: int) -> Estimate:
    """As the reference, with few draws that it does not hold, and uncorrected as TokUR is."""

    def eu(text: Text) -> Tensor:
        logits = []
        for sample in range(samples):
            with teacher.posterior.sampled(derived_seed(seed, "rival", text.key, sample)):
                logits.append(logits_of(teacher, states_of(teacher, text)))
        return measures(torch.stack(logits), logits[0]).jsd

    values, seconds = each(texts, eu, f"{samples} posterior samples")
    heads = (samples - 1) * head_share(teacher)
    name = f"posterior samples, M = {samples}"
    return Estimate(name, values, samples - 1 - heads, heads, seconds * (samples - 1) / samples)


def tokur(teacher: Teacher, texts: list[Text], samples: int, seed: int) -> Estimate:
    """TokUR's own protocol: noise per token, clean cache, first sample unperturbed."""

    def eu(text: Text) -> Tensor:
        ids = text.token_ids[:MAX_TOKENS]
        key = derived_seed(seed, "tokur", text.key)
        states = tokur_states(teacher.model, teacher.posterior, ids, samples, key)
        logits = F.linear(states[:, rows_of(text)].float(), teacher.head_Vd)
        return measures(logits, logits[0]).jsd

    values, seconds = each(texts, eu, f"TokUR, {samples} samples")
    heads = (samples - 1) * head_share(teacher)
    name = f"TokUR, M = {samples}"
    return Estimate(name, values, samples - 1 - heads, heads, seconds * (samples - 1) / samples)


def of_ensemble(label: str, ensemble: Ensemble, texts: list[Text]) -> list[Estimate]:
    """jsd + kl of an ensemble, and each alone."""
    oracle = Reference(ensemble)
    parts: list[list[Floats]] = [[], [], []]
    started = time.perf_counter()
    for text in tqdm(texts, desc=label, unit="text"):
        scores = oracle.score(text.token_ids[:MAX_TOKENS], text.response_start)
        for part, values in zip(parts, (scores.epistemic, scores.jsd, scores.kl), strict=True):
            part.append(values)
    seconds = time.perf_counter() - started
    cost, heads = ensemble_cost(ensemble)
    names = (f"{label}: jsd + kl", f"{label}: jsd only", f"{label}: kl only")
    return [
        Estimate(name, part, cost, heads, seconds) for name, part in zip(names, parts, strict=True)
    ]


def each(
    texts: list[Text], estimator: Callable[[Text], Tensor], name: str
) -> tuple[list[Floats], float]:
    """An estimator's values on each text, and the seconds that they took."""
    started = time.perf_counter()
    with torch.inference_mode():
        values = [estimator(text).double().numpy() for text in tqdm(texts, desc=name, unit="text")]
    return values, time.perf_counter() - started


def rows_of(text: Text) -> slice:
    return slice(text.response_start - 1, min(len(text.token_ids), MAX_TOKENS) - 1)


def states_of(teacher: Teacher, text: Text) -> Tensor:
    ids = torch.tensor([text.token_ids[:MAX_TOKENS]])
    states: Tensor = teacher.model.base_model(ids).last_hidden_state[0, rows_of(text)]
    return states.float()


def logits_of(teacher: Teacher, states: Tensor) -> Tensor:
    return F.linear(states, teacher.head_Vd)


# Costs, in units of the target's multiply-adds for one token.


def layers_cost(config: Any) -> float:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    attention = config.hidden_size * head_dim * heads
    return float(
        config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    )


def head_cost(config: Any) -> float:
    return float(config.hidden_size * config.vocab_size)


def head_share(teacher: Teacher) -> float:
    config = teacher.model.config
    return head_cost(config) / (layers_cost(config) + head_cost(config))


def ensemble_cost(ensemble: Ensemble) -> tuple[float, float]:
    """Of the drafts without LM heads, and of their LM heads."""
    target = ensemble.target_config
    unit = layers_cost(target) + head_cost(target)
    own, heads = 0.0, 0.0
    for member in ensemble.members:
        if isinstance(member.draft, ResidualDraft):
            own += member.config.hidden_size * member.config.rank
            heads += head_cost(target)
        else:
            own += layers_cost(member.config)
            heads += head_cost(target if isinstance(member.draft, ExitDraft) else member.config)
    for student, draws in ensemble.students():
        inputs = student.hidden_size * (1 + len(student.taps))
        own += inputs * student.width + student.width * student.rank * (student.factors + 2)
        own += len(draws) * student.rank * student.factors
    return own / unit, heads / unit


# Comparison with the reference.


def row(estimate: Estimate, truth: list[Floats], resamples: int = 500) -> dict[str, Any]:
    """One line of the table: value and 95% interval, bootstrapped over texts."""
    scale = best_scale(estimate.values[1::2], truth[1::2])
    pairs = list(zip(estimate.values[0::2], truth[0::2], strict=True))
    whole = compared(pairs, scale)
    rng = np.random.default_rng(0)
    resampled = [
        compared([pairs[i] for i in rng.integers(0, len(pairs), len(pairs))], scale)
        for _ in range(resamples)
    ]
    values: dict[str, Any] = {"name": estimate.name}
    for key, value in whole.items():
        low, high = np.nanquantile([one[key] for one in resampled], [0.025, 0.975])
        values[key] = [value, float(low), float(high)]
    return values | {
        "scale": scale,
        "cost": estimate.cost,
        "heads": estimate.heads,
        "seconds": estimate.seconds,
    }


def best_scale(values: list[Floats], truth: list[Floats]) -> float:
    """The factor that minimises the squared error on the calibration half."""
    x, y = np.concatenate(values), np.concatenate(truth)
    return float(x @ y / (x @ x))


def compared(pairs: list[tuple[Floats, Floats]], scale: float) -> dict[str, float]:
    """Errors and correlations over all tokens of some texts."""
    x = np.concatenate([values for values, _ in pairs])
    y = np.concatenate([truth for _, truth in pairs])
    constant = bool((x == x[0]).all())
    return {
        "rmse": float(np.sqrt(np.mean((x - y) ** 2))),
        "rmse_scaled": float(np.sqrt(np.mean((scale * x - y) ** 2))),
        "bias": float(np.mean(x - y)),
        "pearson": 0.0 if constant else float(pearsonr(x, y).statistic),
        "spearman": 0.0 if constant else float(spearmanr(x, y).statistic),
    }


if __name__ == "__main__":
    main()
