"""The drafts store: versions of an ensemble's drafts, and which of them is current.

    store = DraftsStore("~/.cache/demur/drafts")      # or s3://bucket/drafts, by fsspec
    store.publish(folder, about={...})                # a folder with demur.json
    store.fetch(store.current(), into)                # an ensemble folder again, hashes checked
    store.rollback()

    <root>/versions/<name>/...           the version's files, each with its SHA-256 in its name
    <root>/versions/<name>/version.json  written last: names every file with its SHA-256
    <root>/versions/<name>/withdrawn     there if it served and was taken back; says why
    <root>/current                       the name of the current version

Whoever can write there can put other versions there, with hashes that fit; so what is read is held
within bounds. Only JSON and safetensors are copied from it, into the version's own folder, and a
manifest that names weights elsewhere is refused (docs/security.md).

A version exists once its `version.json` does, and `current` is replaced in one write, so no reader
sees half of either: not on a disk, and not in a bucket, where a folder cannot be renamed. Two that
publish one name at once do not write over each other's files.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drafts.errors import ManifestError, StoreError
from drafts.manifest import load_ensemble, read_manifest
from drafts.untrusted import inside
from drafts.weights import check_shapes

logger = logging.getLogger(__name__)

_VERSION = "version.json"
_WITHDRAWN = "withdrawn"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_TYPES = (".json", ".jsonl", ".safetensors", ".jinja")  # what anything here reads
_MAX_NOTE = 4 * 2**20  # bytes of a `version.json`, and of all else that is read into memory
_MAX_FILES = 10_000

_Name = Annotated[str, Field(pattern=_NAME.pattern, max_length=200)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Version(BaseModel):
    """A published version, as its `version.json` has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name = Field(description="the weights_version")
    parent: _Name | None = Field(description="the version that it was trained from or replaced")
    created: float = Field(allow_inf_nan=False, description="seconds since 1970")
    about: dict[str, Any] = Field(description="data, configuration, metrics")
    files: dict[str, _Sha256] = Field(
        max_length=_MAX_FILES, description="SHA-256 of each file, by path"
    )


class DraftsStore:
    """Versions under one root: a folder, or whatever URL fsspec opens."""

    def __init__(self, root: str | Path) -> None:
        try:
            self._fs, path = fsspec.core.url_to_fs(os.path.expanduser(str(root)))
        except (ImportError, ValueError) as error:  # its package is missing; no such protocol
            raise StoreError(f"the drafts store {root} cannot be opened ({error})") from error
        self._fs = _Told(self._fs)
        self._root = str(path).rstrip("/")

    def publish(self, folder: Path, *, about: dict[str, Any], make_current: bool = True) -> Version:
        """Store an ensemble folder under its `weights_version`.

        The target is not stored: the manifest must name it by hub id or absolute path. Nor are
        files that nothing reads.

        Raises:
            StoreError: if the version exists, the target lies inside the folder, or a draft's
                weights do not.
            ManifestError, WeightsError: if the folder is no usable ensemble.
        """
        ensemble = load_ensemble(folder)
        for member in ensemble.members:
            check_shapes(member)
        if ensemble.target_path.is_relative_to(ensemble.folder):
            raise StoreError(
                f"the target lies inside {folder}: a version holds drafts only; name the target by "
                "hub id or absolute path"
            )
        for member in ensemble.members:
            if not member.path.is_relative_to(ensemble.folder):
                raise StoreError(
                    f"the weights of '{member.draft.name}' lie outside {folder}, and a version "
                    "holds what lies inside: copy them there"
                )
        name = ensemble.manifest.weights_version
        if not _NAME.fullmatch(name):
            raise StoreError(
                f"weights_version {name!r}: a version's name is of letters, digits, dots, dashes "
                "and underscores"
            )
        if self._fs.exists(self._at(name, _VERSION)):
            raise StoreError(f"version {name} exists already; give the new one a name of its own")
        digests = {}
        for file in sorted(ensemble.folder.rglob("*")):
            relative = file.relative_to(ensemble.folder).as_posix()
            if not file.is_file() or not relative.endswith(_TYPES):
                continue
            digests[relative] = _digest(file)
            place = self._at(name, f"{relative}.{digests[relative]}")
            self._fs.makedirs(self._parent(place), exist_ok=True)
            self._fs.put_file(str(file), place)
        current = self.current_name()
        parent = current if current != name else None
        version = Version(
            name=name,
            parent=parent if parent != name else None,
            created=time.time(),
            about=about,
            files=digests,
        )
        self._write(self._at(name, _VERSION), version.model_dump_json(indent=1))
        if make_current:
            self._write(f"{self._root}/current", name)
        return version

    def versions(self) -> list[Version]:
        """All whole versions, oldest first; one whose `version.json` is damaged is left out."""
        folder = f"{self._root}/versions"
        if not self._fs.exists(folder):
            return []
        found = []
        for path in self._fs.ls(folder, detail=False, refresh=True):
            if self._fs.exists(f"{str(path).rstrip('/')}/{_VERSION}"):
                try:
                    found.append(self.version(str(path).rstrip("/").rpartition("/")[2]))
                except StoreError as error:
                    logger.warning("%s", error)
        return sorted(found, key=lambda version: version.created)

    def version(self, name: str) -> Version:
        """One version; `StoreError` if it is not there or its `version.json` is damaged."""
        try:
            version = Version.model_validate_json(self._content(self._at(name, _VERSION)))
        except FileNotFoundError:
            raise StoreError(f"there is no version {name}") from None
        except ValidationError as error:
            told = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in told["loc"][:1]) or "the document"
            raise StoreError(
                f"version {name}: {_VERSION} is damaged ({where}: {told['msg']})"
            ) from error
        if version.name != name:
            raise StoreError(f"version {name}: {_VERSION} is of another, {version.name}")
        return version

    def current(self) -> Version:
        """The current version; `StoreError` if nothing was published."""
        name = self.current_name()
        if name is None:
            raise StoreError(f"{self._root} has no current version")
        return self.version(name)

    def rollback(self) -> Version:
        """Make the current version's parent current; `StoreError` if it has none."""
        current = self.current()
        if current.parent is None:
            raise StoreError(f"version {current.name} has no parent to go back to")
        return self.make_current(current.parent)

    def make_current(self, name: str) -> Version:
        """Point `current` at a version that is there."""
        version = self.version(name)
        self._write(f"{self._root}/current", name)
        self.remove_note(f"versions/{name}/{_WITHDRAWN}")
        return version

    def current_name(self) -> str | None:
        """The name of the current version, even if that is damaged; None if there is none."""
        return self._read(f"{self._root}/current")

    def withdraw(self, name: str, reason: str) -> None:
        """Say of a version why it no longer serves; it stays, and can be made current again."""
        self._write(self._at(name, _WITHDRAWN), reason)

    def withdrawn(self, name: str) -> str | None:
        """Why a version was withdrawn; None if it was not."""
        return self._read(self._at(name, _WITHDRAWN))

    def prune(self, keep: int, always: Iterable[str] = ()) -> list[str]:
        """Remove all but the newest `keep` versions, the current one, its parent and `always`.

        Returns:
            The names of those removed.
        """
        current = self.current()
        spared = {current.name, current.parent, *always}
        old = [version.name for version in self.versions()[:-keep] if version.name not in spared]
        for name in old:
            self._fs.rm_file(self._at(name, _VERSION))  # first: half a version is none
            self._fs.rm(f"{self._root}/versions/{name}", recursive=True)
        return old

    def write_note(self, name: str, text: str) -> None:
        """A small file beside the versions, written whole."""
        self._write(f"{self._root}/{name}", text)

    def read_note(self, name: str) -> str | None:
        """What it holds; None if it is not there."""
        return self._read(f"{self._root}/{name}")

    def remove_note(self, name: str) -> None:
        """Remove it, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def fetch(self, version: Version, into: Path, max_bytes: int | None = None) -> Path:
        """Copy a version to `into/<name>` on this machine, if it is not there as published.

        Args:
            max_bytes: of all its files together.

        Raises:
            StoreError: naming the file that is missing, not what was published, or leads out of the
                version's folder, or the draft whose weights are not in it.
        """
        folder = into / version.name
        files = _files(version, folder)
        if _holds(folder, files):
            _check_manifest(folder, version)
            return folder
        partial = into / f"{version.name}.{uuid.uuid4().hex}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._copy(version, files, partial, max_bytes)
            _check_manifest(partial, version)
            if folder.exists() and not _holds(folder, files):
                shutil.rmtree(folder)
            if not folder.exists():
                partial.rename(folder)
        except OSError:
            if not _holds(folder, files):  # it was no other reader that was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _copy(
        self, version: Version, files: dict[str, str], partial: Path, max_bytes: int | None
    ) -> None:
        """Files of a version, each checked."""
        left = math.inf if max_bytes is None else max_bytes
        for relative, digest in files.items():
            place, target = self._at(version.name, f"{relative}.{digest}"), partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                left -= self._size(place)
                if left < 0:
                    raise StoreError(f"version {version.name} is over {max_bytes} bytes")
                self._fs.get_file(place, str(target))
            except FileNotFoundError:
                raise StoreError(f"version {version.name}: {relative} is missing") from None
            if _digest(target) != digest:
                raise StoreError(f"version {version.name}: {relative} is not what was published")

    def _read(self, path: str) -> str | None:
        try:
            return self._content(path).decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise StoreError(f"{path} is damaged ({error})") from error

    def _content(self, path: str) -> bytes:
        if self._size(path) > _MAX_NOTE:
            raise StoreError(f"{path} is over {_MAX_NOTE} bytes")
        return bytes(self._fs.cat_file(path))

    def _size(self, path: str) -> int:
        """The bytes of a file; a device or a pipe, on a disk, would have no end."""
        info = self._fs.info(path, refresh=True)  # not from a listing that was kept
        if info["type"] != "file":
            raise StoreError(f"{path} is no file")
        return int(info["size"])

    def _at(self, name: str, relative: str) -> str:
        if not _NAME.fullmatch(name):  # what `current` holds, say, or what somebody asks for
            raise StoreError(f"{name[:100]!r} is no version's name")
        return f"{self._root}/versions/{name}/{relative}"

    @staticmethod
    def _parent(path: str) -> str:
        return path.rpartition("/")[0]

    def _write(self, path: str, text: str) -> None:
        """One write that readers see whole: on a disk by renaming, in a bucket by its nature."""
        self._fs.makedirs(self._parent(path), exist_ok=True)
        if "file" in self._fs.protocol:
            partial = Path(f"{path}.{uuid.uuid4().hex}.partial")
            partial.write_text(text)
            partial.replace(path)
        else:
            self._fs.pipe_file(path, text.encode())


class _Told:
    """A filesystem that raises `OSError` or `StoreError` only: a bucket's library has its own."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def told(*arguments: Any, **options: Any) -> Any:
            try:
                return found(*arguments, **options)
            except OSError:
                raise
            except Exception as error:
                raise StoreError(
                    f"the drafts store does not answer ({type(error).__name__}: {error})"
                ) from error

        return told


def _files(version: Version, folder: Path) -> dict[str, str]:
    """The files of a version that something here reads; all of them would lie in its folder."""
    for relative in version.files:
        try:
            inside(folder, relative)
        except ManifestError as error:
            raise StoreError(f"version {version.name}: {error}") from error
    return {name: digest for name, digest in version.files.items() if name.endswith(_TYPES)}


def _check_manifest(folder: Path, version: Version) -> None:
    """Refuse a version whose manifest names another version, or weights that it does not hold."""
    manifest = read_manifest(folder)
    if manifest.weights_version != version.name:
        raise StoreError(
            f"version {version.name}: its manifest is of another, {manifest.weights_version}"
        )
    for draft in manifest.drafts:
        try:
            held = inside(folder, draft.source).is_dir()
        except ManifestError:
            held = False
        if not held:
            raise StoreError(
                f"version {version.name}: the weights of '{draft.name}' are {draft.source!r}, and "
                "a version may name none but its own"
            )


def _holds(folder: Path, files: dict[str, str]) -> bool:
    """Whether all of a version's files are in a folder, as they were published."""
    return all(
        (folder / relative).is_file() and _digest(folder / relative) == digest
        for relative, digest in files.items()
    )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
