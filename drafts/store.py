"""The drafts store: versions of an ensemble's drafts, and which of them is current.

    store = DraftsStore("~/.cache/demur/drafts")      # or s3://bucket/drafts, by fsspec
    store.publish(folder, about={...})                # a folder with demur.json
    store.fetch(store.current(), into)                # an ensemble folder again, hashes checked
    store.rollback()

    <root>/versions/<name>/...           the version's files, each with its SHA-256 in its name
    <root>/versions/<name>/version.json  written last: names every file with its SHA-256
    <root>/versions/<name>/withdrawn     there if it served and was taken back; says why
    <root>/current                       the name of the current version

A version exists once its `version.json` does, and `current` is replaced in one write, so no reader
sees half of either: not on a disk, and not in a bucket, where a folder cannot be renamed. Two that
publish one name at once do not write over each other's files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drafts.errors import StoreError
from drafts.manifest import load_ensemble, read_manifest
from drafts.weights import check_shapes

logger = logging.getLogger(__name__)

_VERSION = "version.json"
_WITHDRAWN = "withdrawn"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Version(BaseModel):
    """A published version, as its `version.json` has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=_NAME.pattern, description="the weights_version")
    parent: str | None = Field(description="the version that it was trained from or replaced")
    created: float = Field(description="seconds since 1970")
    about: dict[str, Any] = Field(description="data, configuration, metrics")
    files: dict[str, str] = Field(description="SHA-256 of each file, by path")


class DraftsStore:
    """Versions under one root: a folder, or whatever URL fsspec opens."""

    def __init__(self, root: str | Path) -> None:
        try:
            self._fs, path = fsspec.core.url_to_fs(os.path.expanduser(str(root)))
        except (ImportError, ValueError) as error:  # its package is missing; no such protocol
            raise StoreError(f"the drafts store {root} cannot be opened ({error})") from error
        self._root = str(path).rstrip("/")

    def publish(self, folder: Path, *, about: dict[str, Any], make_current: bool = True) -> Version:
        """Store an ensemble folder under its `weights_version`.

        The target is not stored: the manifest must name it by hub id or absolute path.

        Raises:
            StoreError: if the version exists, or the target lies inside the folder.
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
            pinned = member.draft.revision is not None  # of a hub id
            if not pinned and not member.path.is_relative_to(ensemble.folder):
                raise StoreError(
                    f"the weights of '{member.draft.name}' lie outside {folder}, and a version "
                    "holds what lies inside: move them there, or name a hub id with its revision"
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
        for file in sorted(path for path in ensemble.folder.rglob("*") if path.is_file()):
            relative = file.relative_to(ensemble.folder).as_posix()
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
            return Version.model_validate_json(self._fs.cat_file(self._at(name, _VERSION)))
        except FileNotFoundError:
            raise StoreError(f"there is no version {name}") from None
        except ValidationError as error:
            raise StoreError(f"version {name}: {_VERSION} is damaged ({error})") from error

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

    def fetch(self, version: Version, into: Path) -> Path:
        """Copy a version to `into/<name>` on this machine, if it is not there as published.

        Raises:
            StoreError: naming the file that is missing or not what was published.
        """
        folder = into / version.name
        if _holds(folder, version):
            return folder
        partial = into / f"{version.name}.{uuid.uuid4().hex}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._copy(version, partial)
            read_manifest(partial)
            if folder.exists() and not _holds(folder, version):
                shutil.rmtree(folder)
            if not folder.exists():
                partial.rename(folder)
        except OSError:
            if not _holds(folder, version):  # it was no other reader that was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _copy(self, version: Version, partial: Path) -> None:
        """All files of a version, each checked."""
        for relative, digest in version.files.items():
            target = (partial / relative).resolve()
            if not target.is_relative_to(partial.resolve()):
                raise StoreError(f"version {version.name}: {relative} leads out of its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fs.get_file(self._at(version.name, f"{relative}.{digest}"), str(target))
            except FileNotFoundError:
                raise StoreError(f"version {version.name}: {relative} is missing") from None
            if _digest(target) != digest:
                raise StoreError(f"version {version.name}: {relative} is not what was published")

    def _read(self, path: str) -> str | None:
        try:
            return str(self._fs.cat_file(path).decode())
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise StoreError(f"{path} is damaged ({error})") from error

    def _at(self, name: str, relative: str) -> str:
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


def _holds(folder: Path, version: Version) -> bool:
    """Whether all of a version's files are in a folder, as they were published."""
    return all(
        (folder / relative).is_file() and _digest(folder / relative) == digest
        for relative, digest in version.files.items()
    )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
