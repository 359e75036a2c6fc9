"""Texts to distil on, as token ids on disk: what `demur synthesize` writes and the trainer reads.

A folder of JSON-lines files and `corpus.json`, which names each file with its SHA-256, so that a
truncated or altered one is refused. A part is written beside its place and moved there whole; one
that `corpus.json` does not name does not exist.

    {"key": 8161232321, "response_start": 41, "token_ids": [1, 4093, ...]}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from osd.errors import CorpusError

INDEX_NAME = "corpus.json"
_PART = re.compile(r"part-[0-9]{5,}\.jsonl")


class Text(BaseModel):
    """A prompt and a response of the target."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    key: int = Field(ge=0, description="`osd.shards.conversation_key` of its conversation")
    response_start: int = Field(ge=1)
    token_ids: list[int]

    @model_validator(mode="after")
    def _has_a_response(self) -> Text:
        if self.response_start >= len(self.token_ids):
            raise ValueError("no token stands at or after response_start")
        if min(self.token_ids) < 0:
            raise ValueError("a token id is negative")
        return self


class Corpus:
    """A folder of texts that grows by whole parts.

    Args:
        folder: made if it is not there.
        about: what the texts are of (target, prompts, sampling). A folder made with something else
            is refused, so that two kinds of text never mix.
    """

    def __init__(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        self.folder = folder
        index = folder / INDEX_NAME
        if index.exists():
            try:
                stored = json.loads(index.read_text())
                self.about, self.parts = dict(stored["about"]), dict(stored["parts"])
                if others := [name for name in self.parts if not _PART.fullmatch(name)]:
                    raise ValueError(f"{others[0]!r} is no part")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CorpusError(f"{index} cannot be read ({error})") from error
            if about is not None and about != self.about:
                changed = sorted(
                    name
                    for name in about.keys() | self.about.keys()
                    if about.get(name) != self.about.get(name)
                )
                raise CorpusError(
                    f"{folder} holds texts made with another {', '.join(changed)}; "
                    "choose another folder"
                )
        elif about is None:
            raise CorpusError(f"{folder} holds no corpus: it has no {INDEX_NAME}")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.about, self.parts = about, {}
            self._write_index()

    def add(self, part: int, texts: Sequence[Text]) -> None:
        """Write part number `part`; a part that is there already is left alone."""
        name = _name(part)
        if name in self.parts:
            return
        lines = "".join(text.model_dump_json() + "\n" for text in texts).encode()
        _write(self.folder / name, lines)
        self.parts[name] = hashlib.sha256(lines).hexdigest()
        self._write_index()

    def __contains__(self, part: int) -> bool:
        return _name(part) in self.parts

    def read(self, vocab_size: int) -> list[Text]:
        """All texts, parts in order.

        Raises:
            CorpusError: naming the part that is missing, altered or does not fit the vocabulary.
        """
        texts = []
        for name, digest in sorted(self.parts.items()):
            file = self.folder / name
            if not file.exists():
                raise CorpusError(
                    f"{file} is missing, and {INDEX_NAME} names it: remove its entry there and run "
                    "`demur synthesize` as before to make it again"
                )
            lines = file.read_bytes()
            if hashlib.sha256(lines).hexdigest() != digest:
                raise CorpusError(
                    f"{file} is not what was written (its SHA-256 differs from {INDEX_NAME}'s): "
                    "remove its entry there and run `demur synthesize` as before to make it again"
                )
            for number, line in enumerate(lines.splitlines(), start=1):
                try:
                    text = Text.model_validate_json(line)
                except ValidationError as error:
                    raise CorpusError(f"{file}:{number}: {error.errors()[0]['msg']}") from error
                if max(text.token_ids) >= vocab_size:
                    raise CorpusError(
                        f"{file}:{number}: token {max(text.token_ids)} is beyond the vocabulary "
                        f"of {vocab_size}"
                    )
                texts.append(text)
        return texts

    def _write_index(self) -> None:
        index = {"about": self.about, "parts": self.parts}
        _write(self.folder / INDEX_NAME, json.dumps(index, indent=1).encode())


def weights_digest(target: Path) -> str:
    """SHA-256 of a target's weights: two targets may have one name."""
    digest = hashlib.sha256()
    for file in sorted(target.glob("*.safetensors")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def check_target(corpus: Corpus, target: Path) -> None:
    """Refuse another target's answers; a corpus that does not say whose they are is taken.

    Raises:
        CorpusError: if the corpus names other weights.
    """
    written_by = corpus.about.get("target_sha256")
    if written_by is not None and written_by != weights_digest(target):
        raise CorpusError(
            f"{corpus.folder} holds answers of weights with SHA-256 {written_by[:12]}…, and those "
            f"in {target} are others; let `demur synthesize` write this target's answers into "
            "another folder"
        )


def _name(part: int) -> str:
    return f"part-{part:05d}.jsonl"


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)
