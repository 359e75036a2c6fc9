"""The keys of the service: who holds one, what it is good for, how much it may use.

    [[keys]]                            # a file that `keys_file` names; `demur keys` writes it
    name = "team-a"
    sha256 = "9f86d081…"                # of the key; the key itself is nowhere
    scopes = ["score", "generate"]      # also "admin"; [] may read /v1/models, /version, /metrics
    requests_per_minute = 600           # none if left out
    tokens_per_minute = 200000          # prompt and answer together

A key that `demur keys` makes has 256 random bits: a plain hash of it cannot be guessed back.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from server import metrics

logger = logging.getLogger(__name__)

Scope = Literal["score", "generate", "admin"]

PREFIX = "dm-"  # so that a leaked key is recognised
_HASHED = "sha256:"
_LOOK_EVERY_S = 2.0


class Key(BaseModel):
    """What is known of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(description="`admin` holds the others")
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)

    def may(self, scope: Scope) -> bool:
        """Is it good for this?"""
        return scope in self.scopes or "admin" in self.scopes


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: list[Key] = []  # nobody gets in

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: list[Key]) -> list[Key]:
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {what}")
        return keys


def new_key() -> str:
    """A key that nobody has."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        ValueError: a sentence that says what is wrong, with no value of the file in it.
    """
    try:
        return parse_keys(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"keys_file {path} cannot be read: {error}") from error


def parse_keys(text: str, path: Path) -> list[Key]:
    """The keys of what a file holds; errors as in `read_keys`."""
    try:
        return _File.model_validate(tomllib.loads(text)).keys
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"keys_file {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"keys_file {path}: {where}: {first['msg']}") from error


def keys_of(given: Sequence[SecretStr], name: str, scopes: set[Scope]) -> list[Key]:
    """Keys of a setting: each plain, or `sha256:` and its hash."""
    found = []
    for index, secret in enumerate(given, 1):
        text = secret.get_secret_value()
        hashed = text.removeprefix(_HASHED) if text.startswith(_HASHED) else digest_of(text)
        found.append(Key(name=f"{name}-{index}", sha256=hashed, scopes=frozenset(scopes)))
    return found


class Keyring:
    """All keys, by the hash of what a client sends.

    A file is read again when it has changed, so that a key can be taken back while the service
    runs. Without its file, none of its keys is good; if it cannot be read or used, those that it
    held before stay, and `demur_keys_file_usable` is 0.
    """

    def __init__(self, fixed: Sequence[Key], file: Path | None) -> None:
        self._fixed = list(fixed)
        self._file = file
        # In this order: what changes in between is read again.
        self._state = self._stat() if file is not None and file.exists() else None
        self._of_file = self._read() if file is not None else []
        self._problem = ""
        self._looked = time.monotonic()
        if self and not self._fixed + self._of_file:
            logger.warning("there is no key in %s: nobody gets in", file)

    def __bool__(self) -> bool:
        return bool(self._fixed) or self._file is not None

    def find(self, given: str) -> Key | None:
        """The key that a client sent, if it is one."""
        self._look()
        digest = digest_of(given)
        # Every key is compared, whichever fits, so that the time taken tells nothing.
        fits = [
            key for key in self._fixed + self._of_file if hmac.compare_digest(key.sha256, digest)
        ]
        return fits[-1] if fits else None

    def _look(self) -> None:
        if self._file is None or time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        try:
            state = self._stat()
            if state == self._state:
                return
            found = self._read()
        except FileNotFoundError:
            if self._state is not None:
                logger.error("keys_file %s is gone: none of its keys is good", self._file)
            self._state, found = None, []
        except (OSError, ValueError) as error:  # a disk that does not answer, say; the next look
            metrics.KEYS_USABLE.set(0)
            if str(error) != self._problem:
                logger.error("%s; the keys of before stay", error)
            self._problem = str(error)
            return
        else:
            self._state = state
            logger.warning("the keys_file has changed: %d keys", len(found))
        self._of_file, self._problem = found, ""
        metrics.KEYS_USABLE.set(1)

    def _read(self) -> list[Key]:
        assert self._file is not None
        keys = read_keys(self._file)
        # A name is what budgets are counted by.
        clash = {key.name for key in keys} & {key.name for key in self._fixed}
        if clash:
            name = clash.pop()
            raise ValueError(f"keys_file {self._file}: {name} is a key of api_keys or admin_keys")
        return keys

    def _stat(self) -> tuple[int, ...]:
        """What changes when the file, or who may read it, does; `OSError` if it cannot be told."""
        assert self._file is not None
        found = self._file.stat()
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
