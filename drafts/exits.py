"""Weights of `exit` drafts: copies of the target's last layers, and what training made of them.

An `exit` draft starts as layers that every machine has, so that only what training added need
travel, as a low-rank difference:

    W = W_0 + B A    for each matrix that changed; other changed tensors are kept whole
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

_A, _B, _WHOLE = ".delta_a", ".delta_b", ".whole"


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


def split_delta(start: Weights, trained: Weights, rank: int) -> Weights:
    """The difference, bfloat16, each matrix cut to its `rank` greatest directions.

    Nothing but rounding is lost where training was of that rank itself.
    """
    delta: Weights = {}
    for name, tensor in trained.items():
        move = tensor.float() - start[name].float()
        if not bool(move.any()):
            continue
        if tensor.ndim != 2:
            delta[name + _WHOLE] = tensor.bfloat16()
            continue
        u, s, vh = torch.linalg.svd(move, full_matrices=False)
        root = s[:rank].sqrt()
        delta[name + _B] = (u[:, :rank] * root).bfloat16().contiguous()
        delta[name + _A] = (root[:, None] * vh[:rank]).bfloat16().contiguous()
    return delta


def apply_delta(start: Weights, delta: Weights) -> Weights:
    """What `split_delta` was taken from, in the dtypes of `start`.

    Raises:
        KeyError: if the difference is of another checkpoint.
    """
    trained = dict(start)
    for key, tensor in delta.items():
        if key.endswith(_WHOLE):
            name = key.removesuffix(_WHOLE)
            trained[name] = tensor.to(start[name].dtype)
        elif key.endswith(_B):
            name = key.removesuffix(_B)
            move = tensor.float() @ delta[name + _A].float()
            trained[name] = (start[name].float() + move).to(start[name].dtype)
    return trained
