"""Multiply-adds for one token; attention scores, norms and softmaxes left out."""

from __future__ import annotations

from typing import Any

from drafts.manifest import Ensemble, ModelDraft, ResidualDraft
from drafts.residual import LOCAL_STEPS, LOCAL_TOKENS, N_CONFIDENCE, ResidualConfig


def layers_cost(config: Any) -> float:
    """Multiply-adds of all layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    attention = config.hidden_size * head_dim * heads
    return float(
        config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    )


def head_cost(config: Any) -> float:
    """Multiply-adds of the LM head."""
    return float(config.hidden_size * config.vocab_size)


def unit(config: Any) -> float:
    """Multiply-adds of a target, LM head included."""
    return layers_cost(config) + head_cost(config)


def ensemble_cost(ensemble: Ensemble) -> tuple[float, float]:
    """Of all drafts without LM heads, and of their LM heads, in units of the target's."""
    own = draft_layers_cost(ensemble) + students_cost(ensemble)
    whole = unit(ensemble.target_config)
    return own / whole, draft_heads_cost(ensemble) / whole


def draft_layers_cost(ensemble: Ensemble) -> float:
    """Multiply-adds of the layers of `model` and `exit` drafts."""
    drafts = [m for m in ensemble.members if not isinstance(m.draft, ResidualDraft)]
    return sum(layers_cost(member.config) for member in drafts)


def students_cost(ensemble: Ensemble) -> float:
    """Multiply-adds of residual students, and of what they read of the target's distribution."""
    confidence = 2 * ensemble.vocab_size
    return sum(
        student_cost(config, len(draws)) + confidence
        for config, draws in ensemble.students().values()
    )


def draft_heads_cost(ensemble: Ensemble) -> float:
    """Multiply-adds of the drafts' LM heads."""
    own = [member.config for member in ensemble.members if isinstance(member.draft, ModelDraft)]
    shared = len(ensemble.members) - len(own)
    return shared * head_cost(ensemble.target_config) + sum(head_cost(config) for config in own)


def student_cost(config: ResidualConfig, draws: int) -> float:
    """Of one residual student: the network, its draws, and their scale (`draw_scale`)."""
    inputs = config.hidden_size * (1 + len(config.taps)) + N_CONFIDENCE
    network = inputs * config.width + config.width * (config.rank * (config.factors + 2) + 1)
    drawn = draws * config.rank * (config.factors + config.hidden_size)
    # Changes of the likeliest tokens' logits, and of those some sums at each step of Newton's.
    scale = LOCAL_TOKENS * draws * (config.rank + 4 * LOCAL_STEPS) if config.scaled else 0
    return float(network + drawn + scale)
