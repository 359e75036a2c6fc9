"""Read a draft's weights whole, and refuse what is broken, wrongly shaped or not finite.

Everything is read and checked before anything is put to use, so that a bad file never leaves a
draft half loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from drafts.errors import WeightsError
from drafts.manifest import ExitDraft, Member, ResidualDraft
from drafts.residual import ResidualHead

_INDEX_NAME = "model.safetensors.index.json"

Shapes = dict[str, list[int]]


def read_member(member: Member) -> dict[str, Tensor]:
    """All tensors of a draft, by checkpoint name, on the CPU.

    Raises:
        WeightsError: naming the draft and what is wrong with its files.
    """
    check_shapes(member)
    weights: dict[str, Tensor] = {}
    for file in _files(member):
        weights.update(load_file(file))
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"draft '{member.draft.name}': {name} holds NaN or infinity")
    return weights


def check_shapes(member: Member) -> None:
    """Compare the files' headers with what the draft's config asks for, reading no weights.

    Raises:
        WeightsError: naming the draft and the first tensor that is missing, extra or misshapen.
    """
    expected = _expected_shapes(member)
    found = _found_shapes(member)
    label = f"draft '{member.draft.name}' ({member.path.name})"
    if missing := sorted(expected.keys() - found.keys()):
        raise WeightsError(f"{label}: {len(missing)} tensors are missing, {missing[0]} among them")
    # A hub checkpoint of kind `model` may carry what no model reads (rotary tables, a tied head).
    extra = sorted(found.keys() - expected.keys())
    if extra and isinstance(member.draft, ExitDraft | ResidualDraft):
        raise WeightsError(f"{label}: {len(extra)} tensors are unknown, {extra[0]} among them")
    for name, shape in expected.items():
        if found[name] != shape:
            raise WeightsError(f"{label}: {name} has shape {found[name]}, expected {shape}")


def _expected_shapes(member: Member) -> Shapes:
    with torch.device("meta"):
        module = (
            ResidualHead(member.config)
            if isinstance(member.draft, ResidualDraft)
            else _causal_lm(member.config)
        )
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    if isinstance(member.draft, ResidualDraft):
        return shapes
    shared = {"lm_head.weight"} if member.config.tie_word_embeddings else set()
    if isinstance(member.draft, ExitDraft):
        # The target's own are used in their place.
        shared = {"lm_head.weight", f"{module.base_model_prefix}.embed_tokens.weight"}
    return {name: shape for name, shape in shapes.items() if name not in shared}


def _causal_lm(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _found_shapes(member: Member) -> Shapes:
    shapes: Shapes = {}
    for file in _files(member):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    shapes[name] = list(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"draft '{member.draft.name}': {file.name} cannot be read ({error})"
            ) from error
    return shapes


def _files(member: Member) -> list[Path]:
    index = member.path / _INDEX_NAME
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [member.path / name for name in sorted(names)]
    single = member.path / "model.safetensors"
    if not single.exists():
        raise WeightsError(f"draft '{member.draft.name}': {member.path} has no model.safetensors")
    return [single]
