"""Can an ensemble's members be shared out over several devices?

Tensor parallelism gives each device an equal share of every layer's attention heads, of its MLP and
of the LM head. All members have to divide, since they run in the same step on the same devices.
Residual students are small and whole on each device.
"""

from __future__ import annotations

from typing import Any

from drafts.errors import ManifestError
from drafts.manifest import Ensemble, ResidualDraft

# vLLM fills the vocabulary up to a multiple of it before it is cut.
_VOCABULARY_STEP = 64


def check_divides(ensemble: Ensemble, ranks: int) -> None:
    """Raise `ManifestError` if `ranks` devices cannot share the target or a draft equally."""
    members = {"the target": ensemble.target_config}
    for member in ensemble.members:
        if not isinstance(member.draft, ResidualDraft):
            members[f"draft '{member.draft.name}'"] = member.config
    for name, config in members.items():
        for what, count in _shared(config).items():
            if count % ranks:
                raise ManifestError(
                    f"tensor_parallel_size is {ranks}, and {name} has {count} {what}, which "
                    f"{ranks} devices cannot share equally"
                )
        pairs = _kv_heads(config)
        # Fewer than devices are copied, more are shared out.
        if max(pairs, ranks) % min(pairs, ranks):
            raise ManifestError(
                f"tensor_parallel_size is {ranks}, and {name} has {pairs} heads of keys and "
                "values: the one must be a multiple of the other"
            )


def _shared(config: Any) -> dict[str, int]:
    """What each device gets an equal part of."""
    padded = -(-config.vocab_size // _VOCABULARY_STEP) * _VOCABULARY_STEP
    return {
        "attention heads": config.num_attention_heads,
        "columns in its MLP (intermediate_size)": config.intermediate_size,
        "tokens (vocab_size, filled up to a multiple of 64)": padded,
    }


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
