"""Multiply-adds for one token, in units of the target's; attention scores and norms left out."""

from __future__ import annotations

from typing import Any

from drafts.manifest import Ensemble, ExitDraft, ResidualDraft
from drafts.residual import LOCAL_TOKENS, N_CONFIDENCE, ResidualConfig


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
    """Of all drafts without LM heads, and of their LM heads."""
    target = ensemble.target_config
    own, heads = 0.0, 0.0
    for member in ensemble.members:
        if isinstance(member.draft, ResidualDraft):
            heads += head_cost(target)
        else:
            own += layers_cost(member.config)
            heads += head_cost(target if isinstance(member.draft, ExitDraft) else member.config)
    for config, draws in ensemble.students().values():
        own += student_cost(config, len(draws))
    return own / unit(target), heads / unit(target)


def student_cost(config: ResidualConfig, draws: int) -> float:
    """Of one residual student: the network, its draws, and their scale (`local_scale`)."""
    inputs = config.hidden_size * (1 + len(config.taps)) + N_CONFIDENCE
    network = inputs * config.width + config.width * config.rank * (config.factors + 2)
    drawn = draws * config.rank * (config.factors + config.hidden_size)
    scale = LOCAL_TOKENS * config.rank * (config.factors + 3 + draws)
    return float(network + drawn + scale)
