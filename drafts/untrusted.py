"""Reading files that somebody else wrote: names stay in their folder, and nothing in them runs.

Of a checkpoint only JSON and safetensors are read, within bounds (docs/security.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from drafts.errors import ManifestError

logger = logging.getLogger(__name__)

_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"[\w-][\w.-]*\.safetensors")
_MAX_JSON = 64 * 2**20  # an index of a trillion parameters has 14
# Of layers, and of experts in each: to find a checkpoint's shapes each of them is built.
_MODULES, _MAX_MODULES = re.compile(r"(layer|expert)s?$"), 1024
_CHUNK = 8 * 2**20
_QUIET_S = 3.0


def inside(folder: Path, name: str) -> Path:
    """The path of `name` under a folder, be something there or not; for names that others chose.

    Raises:
        ManifestError: if it is absolute, the folder itself, or leads out of it: by `..`, by `~`, or
            because a symbolic link is on the way.
    """
    path = folder / name
    try:
        found, root = path.resolve(), _root(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a ring
        raise ManifestError(f"{name[:100]!r} is no path ({error})") from error
    asks_out = name.startswith(("/", "~")) or ".." in Path(name).parts
    if asks_out or path == folder or not found.is_relative_to(root):
        raise ManifestError(f"{name!r} leads out of its folder {folder}")
    return path


def _root(folder: Path) -> Path:
    """What a checkpoint's files must lie in: the hub's cache links from `snapshots` to `blobs`."""
    return folder.parent.parent if folder.parent.name == "snapshots" else folder


def weight_files(folder: Path) -> list[Path]:
    """The weights of a checkpoint: `model.safetensors`, or those that its index names.

    Raises:
        ManifestError: if one is missing or lies elsewhere, or there are others beside them, which
            some loaders would read in their place.
    """
    index = folder / _INDEX_NAME
    names = {"model.safetensors"}
    if index.exists():
        found = read_json(index).get("weight_map")
        values = list(found.values()) if isinstance(found, dict) else []
        for name in values:
            if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
                raise ManifestError(
                    f"{index.name} cannot be read ({str(name)[:100]!r} names no safetensors file "
                    "beside it)"
                )
        names = set(values)
        if not names:
            raise ManifestError(f"{index.name} cannot be read (it has no weight_map)")
    there = {file.name for file in folder.glob("*.safetensors")}
    if missing := sorted(names - there):
        raise ManifestError(f"{folder} has no {missing[0]}")
    if others := sorted(there - names):
        raise ManifestError(
            f"{folder} holds {others[0]}, too, which is none of the checkpoint's weights "
            f"({', '.join(sorted(names)[:3])}), and loaders differ in whether they read it: "
            "move it out of the folder"
        )
    files = [inside(folder, name) for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise ManifestError(f"{file} is no file")
    return files


def check_hashes(who: str, folder: Path, sha256: dict[str, str]) -> None:
    """Refuse a checkpoint whose files are not those that the manifest pins."""
    unlisted = sorted({file.name for file in folder.glob("*.safetensors")} - sha256.keys())
    if unlisted:
        raise ManifestError(
            f"{who}: {folder} holds {unlisted[0]}, whose SHA-256 the manifest does not give; it "
            "must give that of each file of weights"
        )
    for name, expected in sha256.items():
        file = inside(folder, name)
        if not file.is_file():
            raise ManifestError(
                f"{who}: the manifest gives a SHA-256 of {name}, and {folder} has none"
            )
        status = file.stat()
        found = _sha256(file, status.st_ino, status.st_size, status.st_ctime_ns)
        if found != expected:
            raise ManifestError(
                f"{who}: {file} is not the file that the manifest pins: its SHA-256 is {found}, "
                f"the manifest's {expected}. Fetch it again, or pin the new one if it is yours"
            )


@lru_cache(maxsize=1024)
def _sha256(file: Path, *_: int) -> str:
    """A file's SHA-256; taken once of what has the same number, size and time of change."""
    digest, tell_at = hashlib.sha256(), time.monotonic() + _QUIET_S
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            if time.monotonic() > tell_at:
                logger.info("checking the SHA-256 of %s", file)
                tell_at = float("inf")
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that somebody else wrote; `ManifestError` if it is none or too large."""
    try:
        found = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ManifestError(f"{path.name} cannot be read (it is no JSON object)")
    return found


def read_bounded(path: Path) -> bytes:
    """A file that somebody else wrote; `ManifestError` if it is none or too large."""
    if path.exists() and not path.is_file():  # to open a pipe is to wait for its writer
        raise ManifestError(f"{path} is no file")
    with path.open("rb") as file:
        content = file.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise ManifestError(f"{path} is over {_MAX_JSON} bytes")
    return content


def transformers_config(path: Path) -> Any:
    """The config of a checkpoint; `ManifestError` if there is no usable one.

    No code of the checkpoint's runs, and none of its files leads to another model.
    """
    from transformers import AutoConfig

    if (path / "adapter_config.json").exists():
        raise ManifestError(f"{path} is an adapter of another model; merge it into that one")
    try:
        _check_size(read_json(path / "config.json"))
        # Without this, code of the checkpoint's is asked about on the terminal.
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if not isinstance(getattr(config, name, None), int) or getattr(config, name) < 1:
                raise ManifestError(f"it gives no {name}, as a language model's does")
        names = config.architectures or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ManifestError("architectures is no list of names")
    except Exception as error:  # whatever the model's own class says to such values
        raise ManifestError(f"{path}: no usable config.json ({error})") from error
    return config


def _check_size(config: dict[str, Any]) -> None:
    """Refuse what takes for ever only to be looked at; sizes are held against the weights later."""
    if "transformers_weights" in config:
        raise ManifestError("it names weights of its own (transformers_weights)")
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
            for name, value in part.items():
                modules = _MODULES.search(name) and isinstance(value, int | float)
                if modules and value > _MAX_MODULES:
                    raise ManifestError(f"{name} is {value:.0f}, over {_MAX_MODULES}")
        elif isinstance(part, list):
            parts += part
