"""From token measures to one answer's numbers, always with the token count beside them.

Sums grow with length and means do not; a maximum grows slowly. None of them is a probability.
"""

from __future__ import annotations

from drafts.scores import TokenScores


def aggregate(scores: TokenScores) -> dict[str, float | int]:
    """Sequence statistics, in nats: n_tokens, mean, sum and max of each token measure."""
    out: dict[str, float | int] = {"n_tokens": len(scores)}
    for name in ("epistemic", "jsd", "kl", "total", "aleatoric", "entropy"):
        values = getattr(scores, name)
        out[f"{name}_mean"] = float(values.mean())
        out[f"{name}_max"] = float(values.max())
        out[f"{name}_sum"] = float(values.sum())
    out["logprob_mean"] = float(scores.logprob.mean())
    out["logprob_min"] = float(scores.logprob.min())
    out["logprob_sum"] = float(scores.logprob.sum())
    return out
