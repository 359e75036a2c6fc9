"""What vLLM's V1 model runner does for the tokens of a prompt whose log-probs are asked for, made
to do what a score asks: measures of the response's tokens, and nothing for those before them.

As it comes, the runner asks for the logits of every token of a prompt, of one request after the
other, and sorts out the likeliest tokens of each. Written against vLLM 0.32.0, whose
`GPUModelRunner._get_prompt_logprobs_dict` this takes the place of: called once a step, it returns
what the requests that have now been read to their end get, and drops those from
`num_prompt_logprobs`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors

from drafts import channel


class _Span(NamedTuple):
    """Tokens of a request that are measured in this step."""

    rows_TX: Tensor
    tokens: list[int]
    slot: int
    out: LogprobsTensors  # the request's
    place: slice  # of these tokens in it


def measure_prompts(
    runner: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]
) -> dict[str, LogprobsTensors]:
    """The measures of each request whose prompt ends in this step.

    Args:
        runner: vLLM's.
        hidden_states: what the model's `forward` has returned, [T, X].
        num_scheduled_tokens: so many of them are of each request.

    Returns:
        For each request R rows, one for each token from its `channel.SCORE_FROM` on: as "log-probs"
        the token's own and the values of the metric columns, and its rank.
    """
    spans, done = [], {}
    for request_id in runner.num_prompt_logprobs:
        scheduled = num_scheduled_tokens.get(request_id)
        if scheduled is None:  # it was preempted
            continue
        request = runner.requests[request_id]
        ids = request.prompt_token_ids
        first = request.sampling_params.extra_args[channel.SCORE_FROM]
        if request.in_progress_prompt_logprobs_cpu is None:
            empty = LogprobsTensors.empty_cpu(len(ids) - first, channel.M + 1)
            request.in_progress_prompt_logprobs_cpu = empty
        out = request.in_progress_prompt_logprobs_cpu
        # Row i of a request predicts its token i + 1.
        computed = request.num_computed_tokens
        begin, end = max(first, computed + 1), min(len(ids), computed + scheduled + 1)
        if begin < end:
            place = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]].item()
            rows = hidden_states[place + begin - 1 - computed : place + end - 1 - computed]
            slot = request.sampling_params.extra_args[channel.SLOT]
            spans.append(_Span(rows, ids[begin:end], slot, out, slice(begin - first, end - first)))
        if computed + scheduled >= len(ids):
            done[request_id] = out
    spans.sort(key=lambda span: span.slot)
    for slot, group in groupby(spans, key=lambda span: span.slot):
        _measure(runner, slot, list(group))
    for request_id in done:
        del runner.num_prompt_logprobs[request_id]
        runner.requests[request_id].in_progress_prompt_logprobs_cpu = None
    if done:
        runner._sync_device()  # copies to the host that are under way
    return done


def _measure(runner: Any, slot: int, spans: list[_Span]) -> None:
    """Of all requests at once: the LM heads read their weights once a block of rows."""
    tokens = torch.tensor([token for span in spans for token in span.tokens])
    rows_TX = torch.cat([span.rows_TX for span in spans])
    values, ranks = runner.model.measure_prompt(rows_TX, tokens.to(rows_TX.device), slot)
    start = 0
    for span in spans:
        part = slice(start, start + len(span.tokens))
        span.out.logprobs[span.place].copy_(values[part], non_blocking=True)
        span.out.selected_token_ranks[span.place].copy_(ranks[part], non_blocking=True)
        span.out.logprob_token_ids[span.place] = 0  # they are not of tokens
        start = part.stop
