"""Data-diverse drafts: which draft a conversation belongs to (DDD, arXiv 2602.01956).

Each draft learns from one of K disjoint shards of the conversations. The same function cuts the
training data and routes live traffic, so a draft never learns from what belongs to another. All
turns of a conversation, and all answers to one question, fall to one shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def conversation_key(*, messages: Sequence[dict[str, str]] | None = None, prompt: str = "") -> int:
    """A stable 63-bit hash of a conversation: of its first user message, or of its prompt.

    Later turns do not change it, and neither does a system message that many share.
    """
    text = prompt
    if messages:
        users = [message["content"] for message in messages if message["role"] == "user"]
        text = users[0] if users else messages[0]["content"]
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # fits a signed 64-bit column


def shard_of(key: int, n_shards: int) -> int:
    """The shard of a conversation, 0 to n_shards - 1; equally likely over keys."""
    if n_shards < 1:
        raise ValueError(f"n_shards must be at least 1, got {n_shards}")
    return key % n_shards


def is_held_out(key: int, one_in: int, salt: str) -> bool:
    """Whether a conversation of the traffic is kept from all drafts, to measure them on.

    Args:
        salt: what clients do not know, or they could choose what drafts are judged on.
    """
    digest = hashlib.blake2b(f"{salt} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0
