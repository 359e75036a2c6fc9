"""What a validated request of OpenAI's contracts asks of the engine."""

from __future__ import annotations

import asyncio
from typing import Literal

from drafts.scores import Sampling
from osd.shards import conversation_key
from server import schemas
from server.choice import Job, Prompt
from server.errors import BadRequest, TooLarge
from server.openai_schemas import ChatRequest, CompletionRequest, GenerationBody
from server.served import Served, told_to_clients
from server.settings import Settings

# OpenAI's, for /v1/completions; a chat goes on for as long as there is room.
_COMPLETION_TOKENS = 16
# Of one answer: they are held in memory until it is sent.
_MAX_LOGPROBS = 250_000


def n_choices(body: ChatRequest | CompletionRequest, settings: Settings) -> int:
    """How many choices are asked for.

    Raises:
        BadRequest: if they are too many.
    """
    prompts = 1
    if isinstance(body, CompletionRequest) and not isinstance(body.prompt, str):
        prompts = 1 if isinstance(body.prompt[0], int) else len(body.prompt)
    count = prompts * (body.n or 1)
    if count > settings.max_batch_items:
        raise BadRequest(
            f"{count} choices; a request takes at most {settings.max_batch_items}",
            code="too_many_items",
        )
    return count


async def chat_job(body: ChatRequest, served: Served) -> Job:
    """The job of a conversation.

    Raises:
        ApiError: if the engine cannot do what is asked.
    """
    served.check_model(body.model)
    with told_to_clients():
        prompt = await asyncio.to_thread(
            lambda: served.encoder.token_ids(served.render(body.messages), rendered=True)
        )
    given = body.max_completion_tokens or body.max_tokens
    room = served.engine.max_tokens + 1 - len(prompt)
    top = body.top_logprobs or 0
    key = conversation_key(messages=[message.turn for message in body.messages])
    prompts = [Prompt(prompt, schemas.said(body.messages), key)]
    return _job("chat", body, prompts, given or max(room, 1), bool(body.logprobs), top, served)


async def completion_job(body: CompletionRequest, served: Served) -> Job:
    """The job of raw prompts. Errors as in `chat_job`."""
    served.check_model(body.model)
    with told_to_clients():
        prompts = await asyncio.to_thread(_prompts, body.prompt, served)
    max_new = body.max_tokens or _COMPLETION_TOKENS
    logprobs = body.logprobs is not None
    return _job("text_completion", body, prompts, max_new, logprobs, body.logprobs or 0, served)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]], served: Served) -> list[Prompt]:
    texts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    prompts: list[Prompt] = []
    for text in texts:
        if isinstance(text, str):
            ids = served.encoder.token_ids(text, rendered=False)
            prompts.append(Prompt(ids, text, conversation_key(prompt=text)))
        elif isinstance(text, list):
            if any(token_id >= served.engine.vocab_size for token_id in text):
                raise BadRequest(
                    f"prompt: token ids must be below {served.engine.vocab_size}", param="prompt"
                )
            words = "".join(map(served.encoder.token_text, text))
            prompts.append(Prompt(text, words, conversation_key(prompt=words)))
    return prompts


def _job(
    operation: Literal["chat", "text_completion"],
    body: GenerationBody,
    prompts: list[Prompt],
    max_new_tokens: int,
    logprobs: bool,
    top: int,
    served: Served,
) -> Job:
    n = body.n or 1
    for prompt in prompts:
        _check_length(len(prompt.token_ids), max_new_tokens, served)
    logprobs = logprobs or bool(body.uncertainty)
    if logprobs:
        _check_logprobs(n * len(prompts), max_new_tokens, top)
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=_seed(body.seed, temperature, served),
        measured=logprobs or body.uncertainty_stop is not None,
        top=top,
    )
    return Job(
        operation=operation,
        prompts=prompts,
        n=n,
        sampling=sampling,
        stop=body.stop_strings,
        early=body.uncertainty_stop,
        logprobs=logprobs,
        uncertainty=bool(body.uncertainty),
        store=body.store is not False,
    )


def _seed(seed: int | None, temperature: float, served: Served) -> int | None:
    if temperature == 0:
        return None  # greedy: the same answer whatever the seed
    if seed is not None and not served.engine.takes_seed:
        raise BadRequest(
            "seed: this engine cannot sample by a seed; send temperature: 0 for an answer that "
            "can be repeated, or leave seed out",
            param="seed",
            code="unsupported_parameter",
        )
    return seed


def _check_logprobs(n_choices: int, max_new_tokens: int, top: int) -> None:
    if n_choices * max_new_tokens * (1 + top) > _MAX_LOGPROBS:
        raise BadRequest(
            f"{n_choices} choices of up to {max_new_tokens} tokens with {1 + top} log-probs each "
            f"are over {_MAX_LOGPROBS}; ask for fewer choices, tokens or top_logprobs",
            code="too_many_items",
        )


def _check_length(n_prompt: int, max_new_tokens: int, served: Served) -> None:
    # `max_tokens` leaves room for one token after the text.
    limit = served.engine.max_tokens + 1
    if n_prompt >= limit:
        raise TooLarge(
            f"the prompt's {n_prompt} tokens leave no room: this model takes {limit} tokens, "
            "prompt and answer",
            code="context_length_exceeded",
        )
    if n_prompt + max_new_tokens > limit:
        raise TooLarge(
            f"{n_prompt} prompt tokens and max_tokens {max_new_tokens} are over the {limit} that "
            f"this model takes; ask for at most {limit - n_prompt}",
            param="max_tokens",
            code="context_length_exceeded",
        )
