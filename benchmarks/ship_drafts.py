"""Puts distilled drafts into the package: what `demur init` then makes of SmolLM2.

    python benchmarks/ship_drafts.py ~/.cache/demur/runs/residual/ensemble residual
    python benchmarks/ship_drafts.py ~/.cache/demur/runs/exit/ensemble exit --rank 16

`residual` students travel whole, in bfloat16; `exit` drafts as low-rank differences from the layers
that they started from.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

import drafts
from drafts.delta import split_delta
from drafts.init import copy_exit
from drafts.manifest import MANIFEST_NAME, Ensemble, ExitDraft, load_ensemble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("kind", choices=("residual", "exit"))
    parser.add_argument("--rank", type=int, default=16, help="of an exit draft's difference")
    parser.add_argument("--name", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    out = Path(drafts.__file__).with_name("shipped") / arguments.kind
    ship(load_ensemble(arguments.ensemble), out, arguments.rank, arguments.name)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    print(f"{out}: {size / 2**20:.1f} MiB")


def ship(ensemble: Ensemble, out: Path, rank: int, name: str) -> None:
    """Write the shipped form of an ensemble's drafts, in place of what is there."""
    shutil.rmtree(out, ignore_errors=True)
    entries = []
    for member in ensemble.members:
        folder = out / member.path.name
        entry = member.draft.model_dump(exclude_none=True) | {"source": folder.name}
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
            save_file(delta, folder / "delta.safetensors")
        else:
            narrow = {key: tensor.bfloat16() for key, tensor in weights.items()}
            save_file(narrow, folder / "model.safetensors")
    manifest = {
        "format": 1,
        "name": name,
        "weights_version": ensemble.manifest.weights_version,
        "target": {"source": "target"},
        "drafts": entries,
    }
    (out / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
