"""Distilled drafts in a form that travels, to be put beside a target that every machine has.

    python -m drafts.shipped ~/.cache/demur/runs/residual/ensemble drafts/trained/residual --draws 1
    python -m drafts.shipped ~/.cache/demur/runs/exit/ensemble drafts/trained/exit --rank 16

`residual` students travel whole, in bfloat16; `exit` drafts as low-rank differences from the layers
that they started from. `drafts/trained/` holds the default's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from drafts.calibration import CALIBRATION_NAME
from drafts.errors import ManifestError
from drafts.exits import apply_delta, copy_exit, split_delta
from drafts.labelled import TEXTS_NAME
from drafts.manifest import MANIFEST_NAME, Ensemble, ExitDraft, ResidualDraft, load_ensemble
from drafts.weights import open_to_readers

SHIPPED = Path(__file__).with_name("trained")
TRAINING_NAME = "training.json"  # what the trainer says of how drafts were made
# The target's own answers to everyday questions, for online distillation: a corpus of `osd`.
REFERENCE_NAME = "reference"
_DELTA_NAME = "delta.safetensors"


def add_shipped(shipped: Path, folder: Path) -> None:
    """Put drafts as `ship` wrote them, and their calibration, beside `folder/target`."""
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
    for name in (MANIFEST_NAME, CALIBRATION_NAME):
        if (shipped / name).exists():
            shutil.copy(shipped / name, folder)
    add_texts(shipped, folder)


def add_texts(shipped: Path, folder: Path) -> None:
    """Put what online distillation starts from into an ensemble, if it is not there.

    That is the target's own answers, and those that the calibration was fitted to, if the folder
    has that calibration.
    """
    if not (folder / REFERENCE_NAME).exists():
        shutil.copytree(SHIPPED / REFERENCE_NAME, folder / REFERENCE_NAME)
    own, ours = folder / CALIBRATION_NAME, shipped / CALIBRATION_NAME
    if ours.exists() and own.exists() and own.read_bytes() == ours.read_bytes():
        shutil.copy(shipped / TEXTS_NAME, folder)


def ship(ensemble: Ensemble, out: Path, rank: int, name: str, draws: int | None = None) -> None:
    """Write the shipped form of an ensemble's drafts, in place of an earlier one.

    Their version is the ensemble's with a hash of what was written: these are other numbers. A
    calibration of the earlier form goes with it.

    Args:
        rank: of the differences of `exit` drafts.
        name: of the ensemble.
        draws: how many of a residual student's draws the manifest lists, if not all; the weights
            hold the others too.

    Raises:
        ManifestError: if `out` holds something else.
    """
    if out.exists() and not (out / MANIFEST_NAME).exists() and any(out.iterdir()):
        raise ManifestError(f"{out} is not empty and holds no drafts; choose another folder")
    place, out = out, out.with_name(f"{out.name}.partial")
    if place.resolve() == ensemble.folder:
        raise ManifestError(f"{place} is the ensemble itself; choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    entries = []
    for member in ensemble.members:
        if isinstance(member.draft, ResidualDraft) and member.draft.draw >= (draws or math.inf):
            continue
        folder = out / member.path.name
        # What pins the weights that these are made of does not pin these.
        entry = member.draft.model_dump(exclude_none=True, exclude={"revision", "sha256"})
        entry["source"] = folder.name
        entries.append(entry)
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        shutil.copy(member.path / "config.json", folder)
        weights = load_file(member.path / "model.safetensors")
        if isinstance(member.draft, ExitDraft):
            with tempfile.TemporaryDirectory() as work:
                start = Path(work) / "start"
                layers = member.config.num_hidden_layers
                copy_exit(ensemble.target_path, start, layers, member.draft.layer)
                delta = split_delta(load_file(start / "model.safetensors"), weights, rank)
            save_file(delta, folder / _DELTA_NAME)
        else:
            narrow = {key: tensor.bfloat16() for key, tensor in weights.items()}
            save_file(narrow, folder / "model.safetensors")
    digest = hashlib.sha256(json.dumps(entries).encode())
    for file in sorted(out.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    trained = ensemble.manifest.weights_version.rpartition("-")[0] or name
    manifest = {
        "format": 1,
        "name": name,
        "weights_version": f"{trained}-{digest.hexdigest()[:8]}",
        "target": {"source": "target"},
        "drafts": entries,
    }
    (out / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    if (ensemble.folder / TRAINING_NAME).exists():
        shutil.copy(ensemble.folder / TRAINING_NAME, out)
    open_to_readers(out)
    shutil.rmtree(place, ignore_errors=True)
    out.rename(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("out", type=Path, help="folder of the shipped form")
    parser.add_argument("--rank", type=int, default=16, help="of the differences")
    parser.add_argument("--draws", type=int, help="listed of each residual student; default: all")
    parser.add_argument("--name", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    out = arguments.out
    ensemble = load_ensemble(arguments.ensemble)
    ship(ensemble, out, arguments.rank, arguments.name, arguments.draws)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    print(f"{out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
