"""What is asked of vLLM for a request, and what is read from its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from drafts import channel
from drafts.scores import Generated, Sampling, TokenScores

if TYPE_CHECKING:
    from vllm import SamplingParams


def scoring_params(response_start: int, slot: int) -> SamplingParams:
    """One prefill, with the measures of the prompt's tokens from `response_start` on."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=channel.M,
        skip_reading_prefix_cache=False,  # see `drafts.plugin`
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={channel.SCORE_FROM: response_start, channel.SLOT: slot},
    )


def generation_params(sampling: Sampling, n_prompt: int, slot: int) -> SamplingParams:
    """A generation that hands over its tokens as they come."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = {channel.MEASURE_FROM: n_prompt, channel.SLOT: slot}
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        logprobs=channel.M + sampling.top if sampling.measured else None,
        flat_logprobs=sampling.measured,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=wanted if sampling.measured else None,
    )


def read_prompt(flat: Any, version: str) -> TokenScores:
    """Measures of a prompt's tokens, from vLLM's `FlatLogprobs`.

    Raises:
        NonFiniteError: if a forward pass gave NaN or infinity.
    """
    # Row 0 is of the first token, which nothing predicts; then the tokens that were asked for.
    begin = flat.start_indices[1]
    width = channel.M + 1
    values = np.asarray(flat.logprobs[begin:], dtype=np.float64).reshape(-1, width)
    ranks = np.asarray(flat.ranks[begin:], dtype=np.int64).reshape(-1, width)[:, 0]
    names = ("logprob", *channel.COLUMNS)
    columns = {name: values[:, i] for i, name in enumerate(names)}
    channel.check_finite(values)
    return _scores(columns, ranks, version)


def read_step(output: Any, top: int, vocab: int, version: str) -> Generated:
    """The tokens of one of vLLM's `CompletionOutput`s: one, or several if it got ahead of us.

    Args:
        top: so many likeliest tokens beside each were asked for.
    """
    ids = list(output.token_ids)
    flat = output.logprobs
    if not flat:
        return Generated(ids, None, [[] for _ in ids], output.finish_reason, version)
    values, columns, ranks, tops = [], [], [], []
    for begin, end in zip(flat.start_indices, flat.end_indices, strict=True):
        # First the token itself, then the columns, then the likeliest tokens.
        row = list(zip(flat.token_ids[begin:end], flat.logprobs[begin:end], strict=True))
        values.append(row[0][1])
        ranks.append(flat.ranks[begin])
        columns.append(sorted(pair for pair in row if pair[0] >= vocab))
        # The token itself can be among them, once or twice, or beyond them.
        own = {token: value for token, value in row if token < vocab}
        tops.append(sorted(own.items(), key=lambda pair: -pair[1])[:top])
    pairs = np.asarray(columns, dtype=np.float64).reshape(len(ids), -1, 2)
    decoded = channel.decode(
        np.asarray(values, dtype=np.float64), pairs[..., 0].astype(np.int64), pairs[..., 1], vocab
    )
    likeliest = [
        [(token, raw - log_z) for token, raw in top]
        for top, log_z in zip(tops, decoded["log_z"].tolist(), strict=True)
    ]
    # vLLM counts the metric columns too; all lie above.
    scores = _scores(decoded, np.asarray(ranks, dtype=np.int64) - channel.M, version)
    return Generated(ids, scores, likeliest, output.finish_reason, version)


def _scores(columns: dict[str, Any], ranks: Any, version: str) -> TokenScores:
    return TokenScores(
        logprob=columns["logprob"],
        rank=ranks,
        entropy=columns["entropy"],
        total=columns["total"],
        jsd=columns["jsd"],
        kl=columns["kl"],
        weights_version=version,
    )
