"""The estimators that benchmarks/eu_rmse.py compares, on the response tokens of given texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from eu_compare import Estimate, Floats
from eu_probe import inputs, load_probe
from torch import Tensor
from tqdm import tqdm

from drafts.cost import ensemble_cost, head_cost, unit
from drafts.divergence import measures
from drafts.manifest import Ensemble, ResidualDraft
from drafts.reference import Reference
from osd.corpus import Text
from osd.posterior import tokur_states
from osd.precision import bfloat16_products
from osd.schedule import derived_seed
from osd.states import FreshStates
from osd.teacher import Teacher, collate
from osd.true_eu import TrueEU

MAX_TOKENS = 512
_LOGITS = 256  # rows of the vocabulary that are held at once, of all draws or drafts
_TIMED = 10  # every tenth text is

Value = TypeVar("Value")


def constant(truth: list[Floats]) -> Estimate:
    """The mean of EU*, for every token; that of each half of the texts is the other's."""
    means = [float(np.concatenate(truth[i::2]).mean()) for i in (1, 0)]
    values = [np.full(len(eu), means[i % 2]) for i, eu in enumerate(truth)]
    return Estimate("constant", values, fitted=True)


def perfect(reference: list[TrueEU]) -> Estimate:
    """KL(p_T || p) by the reference's own draws: what `jsd + kl` of drafts would be that are the
    posterior mean exactly, and so all the same. No estimator; the end that distillation moves to.
    """
    return Estimate("KL(p_T ‖ p)", [eu.shift for eu in reference], time=None)


def entropy(teacher: Teacher, texts: list[Text]) -> list[Estimate]:
    """The target's entropy H(p)."""
    values = [entropy_of(teacher, text) for text in tqdm(texts, desc="target", unit="text")]
    return [Estimate("target entropy", values)]


def posterior_samples(
    teacher: Teacher, texts: list[Text], counts: Sequence[int], seed: int
) -> list[Estimate]:
    """As the reference, with few draws that it does not hold, corrected for their number."""

    def states(text: Text, count: int) -> Tensor:
        drawn = []
        for sample in range(count):
            with teacher.posterior.sampled(derived_seed(seed, "rival", text.key, sample)):
                drawn.append(states_of(teacher, text))
        return torch.stack(drawn)

    found = _sampled("posterior samples", teacher, texts, counts, states, shared=0)
    for estimate, count in zip(found, counts, strict=True):
        estimate.values = [values * count / (count - 1) for values in estimate.values]
    return found


def tokur(teacher: Teacher, texts: list[Text], counts: Sequence[int], seed: int) -> list[Estimate]:
    """TokUR's own protocol: noise per token, clean cache, first sample unperturbed, uncorrected."""

    def states(text: Text, count: int) -> Tensor:
        ids = text.token_ids[:MAX_TOKENS]
        key = derived_seed(seed, "tokur", text.key)
        drawn = tokur_states(teacher.model, teacher.posterior, ids, count, key)
        return drawn[:, rows_of(text)].float()

    return _sampled("TokUR", teacher, texts, counts, states, shared=1)


def _sampled(
    name: str,
    teacher: Teacher,
    texts: list[Text],
    counts: Sequence[int],
    states: Callable[[Text, int], Tensor],
    shared: int,
) -> list[Estimate]:
    """Mutual information of the first M samples, for each M; `shared` of them are the target's own
    pass, which is not counted."""

    def values_of(text: Text, chosen: Sequence[int]) -> list[Floats]:
        parts: list[list[Tensor]] = [[] for _ in chosen]
        states_MTd = states(text, max(chosen))
        for block in torch.split(states_MTd, _LOGITS // max(chosen), dim=1):
            logits = teacher.logits(block.flatten(0, 1)).unflatten(0, block.shape[:2])
            for count, part in zip(chosen, parts, strict=True):
                part.append(measures(logits[:count], logits[0]).jsd)
        return [torch.cat(part).double().numpy() for part in parts]

    label = f"{name}, M = {max(counts)}"
    with torch.inference_mode():
        found = [values_of(text, counts) for text in tqdm(texts, desc=label, unit="text")]
    head = head_cost(teacher.model.config) / unit(teacher.model.config)
    estimates = []
    for place, count in enumerate(counts):
        label = f"{name}, M = {count}"
        alone = partial(values_of, chosen=(count,))
        _, ratio = _timed(f"{label}, time", teacher, texts[:: 2 * _TIMED], alone, every=1)
        estimates.append(
            Estimate(
                label,
                [values[place] for values in found],
                flops=(count - shared) * (1 - head),
                head_flops=(count - shared) * head,
                time=ratio - shared,
            )
        )
    return estimates


def of_ensemble(teacher: Teacher, ensemble: Ensemble, texts: list[Text]) -> list[Estimate]:
    """jsd + kl of an ensemble, and each alone; `named` says whose and what they cost.

    Of some drafts of a larger ensemble, these alone must be given: residual drafts are scaled for
    being so many.
    """
    reference = Reference(ensemble, teacher.model.dtype, target=teacher.model)
    kinds = ("epistemic", "jsd", "kl")

    def values_of(text: Text) -> list[Floats]:
        drafts, h_Td = reference.states(text.token_ids[:MAX_TOKENS])
        rows = rows_of(text)
        states_KTd = torch.stack([state[rows].float() for state, _ in drafts])
        heads = [head for _, head in drafts]
        h_Td = h_Td[rows].float()
        parts: list[list[Tensor]] = [[] for _ in kinds]
        size = _LOGITS // len(drafts)
        for start in range(0, len(h_Td), size):
            block = slice(start, start + size)
            logits = _logits(teacher, states_KTd[:, block], heads)
            found = measures(logits, teacher.logits(h_Td[block]))
            for kind, part in zip(kinds, parts, strict=True):
                part.append(getattr(found, kind))
        return [torch.cat(part).double().numpy() for part in parts]

    found, ratio = _timed(f"K = {len(ensemble.members)}", teacher, texts, values_of)
    labels = ("jsd + kl", "jsd only", "kl only")
    return [
        Estimate(label, [values[i] for values in found], time=ratio - 1)
        for i, label in enumerate(labels)
        if len(ensemble.members) > 1 or label == "jsd + kl"
    ]


def named(name: str, ensemble: Ensemble, estimates: list[Estimate]) -> list[Estimate]:
    """An ensemble's estimates under a name, with what its drafts cost."""
    flops, head_flops = ensemble_cost(ensemble)
    name = f"{name}, K = {len(ensemble.members)}"
    return [
        replace(one, name=f"{name}: {one.name}", flops=flops, head_flops=head_flops)
        for one in estimates
    ]


def first_drafts(ensemble: Ensemble, count: int) -> Ensemble:
    """The first drafts, taken in turn from each student: 4 of four students are one of each."""
    turn = [
        (member.draft.draw if isinstance(member.draft, ResidualDraft) else 0, place)
        for place, member in enumerate(ensemble.members)
    ]
    chosen = [place for _, place in sorted(turn)[:count]]
    return replace(ensemble, members=tuple(ensemble.members[place] for place in chosen))


def probe(name: str, teacher: Teacher, texts: list[Text], files: list[Path]) -> list[Estimate]:
    """The mean of networks regressed onto EU* (benchmarks/eu_probe.py)."""
    networks = [load_probe(file) for file in files]
    states = FreshStates(teacher, networks[0].layers)

    def values_of(text: Text) -> Floats:
        batch = collate([text], MAX_TOKENS)
        x_TX = inputs(states.clean([text], batch), batch)
        values: Tensor = torch.stack([network(x_TX) for network in networks]).mean(0)
        return values.double().numpy()

    found, ratio = _timed(name, teacher, texts, values_of)
    weights = sum(network.up.weight.numel() + network.down.weight.numel() for network in networks)
    flops = weights / unit(teacher.model.config)
    return [Estimate(name, found, flops, 0.0, ratio - 1)]


def _timed(
    name: str,
    teacher: Teacher,
    texts: list[Text],
    values_of: Callable[[Text], Value],
    every: int = _TIMED,
) -> tuple[list[Value], float]:
    """What is made of each text, and how long that takes in units of the target's own pass with LM
    head: the median over every tenth text, each measured right after the target."""
    found, ratios = [], []
    with torch.inference_mode():
        for number, text in enumerate(tqdm(texts, desc=name, unit="text")):
            plain = 0.0
            if number % every == 0:
                started = time.perf_counter()
                entropy_of(teacher, text)
                plain = time.perf_counter() - started
            started = time.perf_counter()
            found.append(values_of(text))
            if plain:
                ratios.append((time.perf_counter() - started) / plain)
    return found, float(np.median(ratios))


def rows_of(text: Text) -> slice:
    """The places of a text that predict its response tokens."""
    return slice(text.response_start - 1, min(len(text.token_ids), MAX_TOKENS) - 1)


def states_of(teacher: Teacher, text: Text) -> Tensor:
    """The target's final states [T, d] of the rows, float32, at the weights it has now."""
    ids = torch.tensor([text.token_ids[:MAX_TOKENS]])
    states: Tensor = teacher.model.base_model(ids).last_hidden_state[0, rows_of(text)]
    return states.float()


@torch.inference_mode()
def entropy_of(teacher: Teacher, text: Text) -> Floats:
    """H(p) of the rows [T], by the target's own pass."""
    logp_TV = torch.log_softmax(teacher.logits(states_of(teacher, text)), -1)
    return -(logp_TV.exp() * logp_TV).sum(-1).double().numpy()


def _logits(teacher: Teacher, states_KTd: Tensor, heads: list[Tensor]) -> Tensor:
    """Logits [K, T, V], float32; in one product where all drafts share the target's LM head."""
    if all(head is teacher.model.get_output_embeddings().weight for head in heads):
        return teacher.logits(states_KTd.flatten(0, 1)).unflatten(0, states_KTd.shape[:2])
    with bfloat16_products(teacher.model.dtype == torch.bfloat16):
        pairs = zip(states_KTd, heads, strict=True)
        return torch.stack([F.linear(state, head.float()) for state, head in pairs])
