"""The target's own answers to prompts, written as token ids: what drafts are distilled on.

    demur synthesize --prompts train.jsonl --general --out ~/.cache/demur/corpus

Answers are sampled at temperature 1, since a draft has to know the target where the target goes.
What was written stays: the command run again goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from drafts.engine import Engine, EngineConfig
from drafts.manifest import Ensemble, load_ensemble
from drafts.text import TextEncoder
from osd.alone import alone
from osd.corpus import Corpus, Text, weights_digest
from osd.prompts import Messages
from osd.shards import conversation_key

_PARTS_AT_ONCE = 3


async def run(
    ensemble: Path,
    out: Path,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    temperature: float,
    per_part: int,
) -> Corpus:
    """Answer the prompts into `out` by an engine of its own; without one if all are answered.

    Raises:
        CorpusError: if `out` holds answers made otherwise.
        OsdError: if another command writes there.
    """
    loaded = load_ensemble(ensemble)
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    about = {
        "target": loaded.manifest.name,
        "target_sha256": weights_digest(loaded.target_path),
        "prompts": len(prompts),
        "prompts_sha256": digest,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "per_part": per_part,
    }
    with alone(out, "synthesize"):
        corpus = Corpus(out, about)
        if not all(part in corpus for part, _ in _parts(prompts, per_part)):
            await _with_engine(ensemble, loaded, corpus, prompts)
    return corpus


async def _with_engine(
    folder: Path, ensemble: Ensemble, corpus: Corpus, prompts: Sequence[Messages]
) -> None:
    encoder = TextEncoder(ensemble.target_path)
    length = min(4096, ensemble.target_config.max_position_embeddings)
    task = asyncio.current_task()
    assert task is not None
    # As SIGINT does: the engine's processes are stopped on the way out.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    engine = await Engine.start(
        EngineConfig(ensemble=folder, max_num_seqs=128, max_model_len=length, kv_cache_gib=2.0)
    )
    try:
        await synthesize(engine, encoder, corpus, prompts)
    finally:
        await engine.shutdown()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


def _parts(prompts: Sequence[Messages], size: int) -> Iterator[tuple[int, Sequence[Messages]]]:
    """Numbered runs of prompts, a file's each."""
    for part, start in enumerate(range(0, len(prompts), size)):
        yield part, prompts[start : start + size]


async def synthesize(
    engine: Engine, encoder: TextEncoder, corpus: Corpus, prompts: Sequence[Messages]
) -> int:
    """Answer each prompt once and add the texts to the corpus, part by part.

    Returns:
        The number of texts written now; parts that were there are not made again.
    """
    about = corpus.about
    size, limits = int(about["per_part"]), (about["max_new_tokens"], about["temperature"])
    written = 0
    # A part ends with its longest answers; others fill the engine meanwhile.
    room = asyncio.Semaphore(_PARTS_AT_ONCE)

    async def make(part: int, chunk: Sequence[Messages]) -> None:
        nonlocal written
        async with room:
            texts = await asyncio.gather(
                *(_answer(engine, encoder, messages, *limits) for messages in chunk)
            )
            corpus.add(part, [text for text in texts if text is not None])
            written += len(chunk)
            bar.update(len(chunk))

    with tqdm(total=len(prompts), desc="synthesize", unit="text") as bar:
        tasks = []
        for part, chunk in _parts(prompts, size):
            if part in corpus:
                bar.update(len(chunk))
            else:
                tasks.append(asyncio.create_task(make(part, chunk)))
        try:
            await asyncio.gather(*tasks)
        finally:
            # If one part failed, the engine may be dead: none of the others goes on.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return written


async def _answer(
    engine: Engine,
    encoder: TextEncoder,
    messages: Messages,
    max_new_tokens: int,
    temperature: float,
) -> Text | None:
    """A text, or None if the prompt leaves no room for an answer."""
    prompt = encoder.token_ids(encoder.render(messages), rendered=True)
    room = min(max_new_tokens, engine.max_tokens - len(prompt))
    if room < 1:
        return None
    response = await engine.generate(prompt, max_new_tokens=room, temperature=temperature)
    if not response:
        return None
    return Text(
        key=conversation_key(messages=messages),
        response_start=len(prompt),
        token_ids=[*prompt, *response],
    )
