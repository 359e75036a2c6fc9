"""The estimators that benchmarks/eu_rmse.py compares, on the response tokens of given texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from eu_compare import Estimate, Floats
from eu_probe import inputs, load_probe
from torch import Tensor
from tqdm import tqdm

from drafts.divergence import measures
from drafts.manifest import Ensemble, ExitDraft, ResidualDraft
from drafts.reference import Reference
from osd.corpus import Text
from osd.posterior import tokur_states
from osd.schedule import derived_seed
from osd.states import FreshStates
from osd.teacher import Teacher, collate

MAX_TOKENS = 512
_ROWS = 16


def entropy(teacher: Teacher, texts: list[Text]) -> tuple[list[Floats], float]:
    """The target's entropy H(p), and the seconds of its plain forward passes with LM head."""
    values, seconds = [], 0.0
    with torch.inference_mode():
        for text in tqdm(texts, desc="target", unit="text"):
            started = time.perf_counter()
            logp_TV = torch.log_softmax(teacher.logits(states_of(teacher, text)), -1)
            seconds += time.perf_counter() - started
            values.append(-(logp_TV.exp() * logp_TV).sum(-1).double().numpy())
    return values, seconds


def posterior_samples(
    teacher: Teacher, texts: list[Text], counts: Sequence[int], seed: int
) -> list[Estimate]:
    """As the reference, with few draws that it does not hold, and uncorrected, as TokUR is."""

    def states(text: Text) -> Tensor:
        drawn = []
        for sample in range(max(counts)):
            with teacher.posterior.sampled(derived_seed(seed, "rival", text.key, sample)):
                drawn.append(states_of(teacher, text))
        return torch.stack(drawn)

    return _sampled("posterior samples", teacher, texts, counts, states)


def tokur(teacher: Teacher, texts: list[Text], counts: Sequence[int], seed: int) -> list[Estimate]:
    """TokUR's own protocol: noise per token, clean cache, first sample unperturbed."""

    def states(text: Text) -> Tensor:
        ids = text.token_ids[:MAX_TOKENS]
        key = derived_seed(seed, "tokur", text.key)
        drawn = tokur_states(teacher.model, teacher.posterior, ids, max(counts), key)
        return drawn[:, rows_of(text)].float()

    return _sampled("TokUR", teacher, texts, counts, states)


def _sampled(
    name: str, teacher: Teacher, texts: list[Text], counts: Sequence[int], states: Any
) -> list[Estimate]:
    """Mutual information of the first M samples, for each M."""
    values: dict[int, list[Floats]] = {count: [] for count in counts}
    started = time.perf_counter()
    with torch.inference_mode():
        for text in tqdm(texts, desc=f"{name}, M = {max(counts)}", unit="text"):
            drawn = states(text)
            parts: dict[int, list[Tensor]] = {count: [] for count in counts}
            for start in range(0, drawn.shape[1], _ROWS):
                block = drawn[:, start : start + _ROWS]
                logits = teacher.logits(block.flatten(0, 1)).unflatten(0, block.shape[:2])
                for count in counts:
                    parts[count].append(measures(logits[:count], logits[0]).jsd)
            for count in counts:
                values[count].append(torch.cat(parts[count]).double().numpy())
    seconds = (time.perf_counter() - started) / max(counts)
    head = head_share(teacher)
    # One of the M passes stands for the target's own.
    return [
        Estimate(
            f"{name}, M = {count}",
            values[count],
            flops=(count - 1) * (1 - head),
            head_flops=(count - 1) * head,
            time=(count - 1) * seconds,
        )
        for count in counts
    ]


def of_ensemble(
    name: str, teacher: Teacher, ensemble: Ensemble, texts: list[Text], counts: Sequence[int] = ()
) -> list[Estimate]:
    """jsd + kl of an ensemble, and each alone; of its first K drafts too, for K in `counts`.

    Drafts are taken in turn from each student: K = 4 of four students is one of each.
    """
    reference = Reference(ensemble, teacher.model.dtype, target=teacher.model)
    order = sorted(
        range(len(ensemble.members)),
        key=lambda i: (getattr(ensemble.members[i].draft, "draw", 0), i),
    )
    counts = counts or (len(order),)
    values: dict[tuple[int, str], list[Floats]] = {}
    started = time.perf_counter()
    with torch.inference_mode():
        for text in tqdm(texts, desc=name, unit="text"):
            drafts, h_Td = reference.states(text.token_ids[:MAX_TOKENS])
            rows = rows_of(text)
            drawn = [(drafts[i][0][rows].float(), drafts[i][1].float()) for i in order]
            parts: dict[tuple[int, str], list[Tensor]] = {}
            h_Td = h_Td[rows].float()
            for start in range(0, len(h_Td), _ROWS):
                block = slice(start, start + _ROWS)
                logits = torch.stack([F.linear(h[block], head) for h, head in drawn])
                logp_TV = teacher.logits(h_Td[block])
                for count in counts:
                    found = measures(logits[:count], logp_TV)
                    for part in ("epistemic", "jsd", "kl"):
                        parts.setdefault((count, part), []).append(getattr(found, part))
            for key, tensors in parts.items():
                values.setdefault(key, []).append(torch.cat(tensors).double().numpy())
    seconds = time.perf_counter() - started
    estimates = []
    for count in counts:
        flops, head_flops = ensemble_cost(ensemble, order[:count])
        for part, label in (("epistemic", "jsd + kl"), ("jsd", "jsd only"), ("kl", "kl only")):
            if count == 1 and part == "jsd":
                continue
            estimates.append(
                Estimate(
                    f"{name}, K = {count}: {label}",
                    values[count, part],
                    flops,
                    head_flops,
                    seconds * count / len(order),
                )
            )
    return estimates


def probe(teacher: Teacher, texts: list[Text], file: Path) -> Estimate:
    """A network regressed onto EU* (benchmarks/eu_probe.py)."""
    network = load_probe(file)
    states = FreshStates(teacher, network.layers)
    values = []
    started = time.perf_counter()
    with torch.inference_mode():
        for text in tqdm(texts, desc="probe", unit="text"):
            batch = collate([text], MAX_TOKENS)
            clean = states.clean([text], batch)
            values.append(network(inputs(clean, batch)).double().numpy())
    seconds = time.perf_counter() - started
    weights = network.up.weight.numel() + network.down.weight.numel()
    config = teacher.model.config
    flops = weights / (layers_cost(config) + head_cost(config))
    return Estimate("probe on EU*", values, flops, 0.0, seconds)


def rows_of(text: Text) -> slice:
    """The places of a text that predict its response tokens."""
    return slice(text.response_start - 1, min(len(text.token_ids), MAX_TOKENS) - 1)


def states_of(teacher: Teacher, text: Text) -> Tensor:
    """The target's final states [T, d] of the rows, float32, at the weights it has now."""
    ids = torch.tensor([text.token_ids[:MAX_TOKENS]])
    states: Tensor = teacher.model.base_model(ids).last_hidden_state[0, rows_of(text)]
    return states.float()


# Operations, in units of the target's for one token; attention and norms left out.


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
    """The LM head's share of the target's operations."""
    config = teacher.model.config
    return head_cost(config) / (layers_cost(config) + head_cost(config))


def ensemble_cost(ensemble: Ensemble, chosen: Sequence[int]) -> tuple[float, float]:
    """Of some drafts of an ensemble without LM heads, and of their LM heads."""
    target = ensemble.target_config
    unit = layers_cost(target) + head_cost(target)
    own, heads = 0.0, 0.0
    students: dict[Any, Any] = {}
    for member in (ensemble.members[i] for i in chosen):
        if isinstance(member.draft, ResidualDraft):
            students[member.path] = member.config
            own += member.config.hidden_size * member.config.rank
            own += member.config.rank * member.config.factors
            heads += head_cost(target)
        else:
            own += layers_cost(member.config)
            heads += head_cost(target if isinstance(member.draft, ExitDraft) else member.config)
    for student in students.values():
        inputs = student.hidden_size * (1 + len(student.taps))
        own += inputs * student.width + student.width * student.rank * (student.factors + 2)
    return own / unit, heads / unit


def constant(truth: list[Floats]) -> Estimate:
    """The mean of EU* over the calibration texts, for every token."""
    mean = float(np.concatenate(truth[1::2]).mean())
    return Estimate("constant", [np.full(len(eu), mean) for eu in truth])
