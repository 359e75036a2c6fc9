"""The measures of a token that can be shown, all in nats."""

from __future__ import annotations

from typing import Literal, get_args

Measure = Literal["epistemic", "jsd", "kl", "total", "aleatoric", "entropy", "surprisal"]

MEASURES: tuple[Measure, ...] = get_args(Measure)

# Those of the distribution that predicts a token; surprisal is the token's own.
DISTRIBUTION_MEASURES = MEASURES[:-1]

# What each says, in a few words. Surprisal is -logprob of the token itself.
MEANINGS: dict[Measure, str] = {
    "epistemic": "jsd + kl: the model does not know",
    "jsd": "the drafts disagree with each other",
    "kl": "the drafts' mixture misses the target",
    "total": "entropy of the drafts' mixture",
    "aleatoric": "mean entropy of the drafts",
    "entropy": "entropy of the target",
    "surprisal": "−logprob: the target did not expect this token",
}
