"""The metric channel: a few floats a token, carried out of vLLM as extra columns of its logits.

vLLM's model returns logits [T, V]; ours returns [T, V + M]. The target's logits are shifted so
that the greatest is 0, which changes no softmax. The M columns lie above them: asking vLLM for
the top M raw logits of a token returns exactly these columns, whatever V is.

A column holds its value + 2, all values being >= 0, so columns lie in [2, about 100] and float32
loses at most 4e-6 nats on them. NaN or infinity travels as 1, which no value can be.

    log_z     log of the sum of the shifted exponentials, in [0, ln V]; logprob = logit - log_z
    entropy, total, jsd, kl     as in `drafts.divergence`

The tokens of a prompt go another way (`drafts.vllm_prompts`): what vLLM carries as its prompt's
log-probs are their own log-prob and the plain values of the columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafts.errors import NonFiniteError

COLUMNS = ("log_z", "entropy", "total", "jsd", "kl")
M = len(COLUMNS)
# `SamplingParams.extra_args` keys: index of the first token of a prompt whose measures a request
# wants, and of the first that is sampled. What stands before goes through no LM head.
SCORE_FROM = "demur_score_from"
MEASURE_FROM = "demur_measure_from"
# The same, for which of the residual drafts' versions in memory measures a request.
SLOT = "demur_slot"
_OFFSET = 2.0
NOT_FINITE = 1.0


def encode(values_TM: Tensor) -> Tensor:
    """Column values [T, M] as float32 columns."""
    columns = values_TM.float() + _OFFSET
    return torch.where(torch.isfinite(columns), columns, NOT_FINITE)


def decode(
    logit_T: NDArray[np.float64],
    token_ids: NDArray[np.int64],
    values: NDArray[np.float64],
    vocab: int,
) -> dict[str, NDArray[np.float64]]:
    """Values [T] by column name, with "logprob", from vLLM's top M entries of each token.

    Args:
        logit_T: the raw value of each token itself.
        token_ids: ids [T, M] of the top entries, in any order; the columns are `vocab` and up.
        values: their raw values [T, M].
        vocab: V, the number of real tokens.

    Raises:
        NonFiniteError: if a forward pass gave NaN or infinity.
    """
    order = np.argsort(token_ids, axis=-1)
    if not np.array_equal(
        np.take_along_axis(token_ids, order, -1),
        np.broadcast_to(np.arange(vocab, vocab + M), token_ids.shape),
    ):
        raise NonFiniteError("the engine returned tokens where the metric columns belong")
    columns = np.take_along_axis(values, order, -1)
    check_finite(np.where(columns >= _OFFSET, columns, np.nan))
    decoded = {name: columns[:, i] - _OFFSET for i, name in enumerate(COLUMNS)}
    decoded["logprob"] = logit_T - decoded["log_z"]
    return decoded


def check_finite(values: NDArray[np.float64]) -> None:
    """`NonFiniteError` if there is NaN or infinity among them."""
    if not np.isfinite(values).all():
        raise NonFiniteError(
            "a forward pass gave NaN or infinity; a float16 overflow or damaged weights do that"
        )
