"""Read weights whole, and refuse what is broken, wrongly shaped or not finite.

Everything is read and checked before anything is put to use, so that a bad file never leaves a
draft half loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from drafts.errors import ManifestError, WeightsError
from drafts.manifest import Ensemble, ExitDraft, Member, ResidualDraft
from drafts.residual import ResidualHead
from drafts.untrusted import weight_files

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Shapes = dict[str, list[int]]


def open_to_readers(folder: Path) -> None:
    """Give weights in `folder` the mode of the configuration beside them.

    safetensors writes files that only their owner can read, whatever the umask: a service with an
    account of its own could not load what another trained.
    """
    for file in folder.rglob("*.safetensors"):
        file.chmod(file.with_name("config.json").stat().st_mode)


def read_member(member: Member) -> dict[str, Tensor]:
    """All tensors of a draft, by checkpoint name, on the CPU.

    Raises:
        WeightsError: naming the draft and what is wrong with its files.
    """
    expected = check_shapes(member)
    weights: dict[str, Tensor] = {}
    for file in _files(member.path, _label(member)):
        weights.update(load_file(file))
    # What no model reads is left out: vLLM's loaders stop at names that they do not know.
    weights = {name: weights[name] for name in expected}
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPES:
            raise WeightsError(
                f"{_label(member)}: {name} is of {tensor.dtype}, which is not served"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{_label(member)}: {name} holds NaN or infinity")
    return weights


def check_shapes(member: Member) -> Shapes:
    """Compare the files' headers with what the draft's config asks for, reading no weights.

    Returns:
        The shapes asked for, by tensor name.

    Raises:
        WeightsError: naming the draft and the first tensor that is missing, extra or misshapen.
    """
    if isinstance(member.draft, ResidualDraft):
        with torch.device("meta"):
            expected = _shapes(ResidualHead(member.config))
    else:
        # An exit uses the target's embedding and head in place of its own.
        shared = ("lm_head", "embed_tokens") if isinstance(member.draft, ExitDraft) else ()
        expected = _causal_lm_shapes(member.config, _label(member), shared)
    # A hub checkpoint of kind `model` may carry what no model reads (rotary tables, a tied head).
    own = isinstance(member.draft, ExitDraft | ResidualDraft)
    _compare(member.path, _label(member), expected, extras_allowed=not own)
    return expected


def check_target(ensemble: Ensemble) -> None:
    """The same for the target, since vLLM misses half of a tensor that it fuses with another.

    Raises:
        WeightsError: naming the first tensor that is missing or misshapen.
    """
    expected = _causal_lm_shapes(ensemble.target_config, "the target")
    _compare(ensemble.target_path, "the target", expected, extras_allowed=True)


def _compare(path: Path, label: str, expected: Shapes, *, extras_allowed: bool) -> None:
    found = _found_shapes(path, label)
    if missing := sorted(expected.keys() - found.keys()):
        raise WeightsError(f"{label}: {len(missing)} tensors are missing, {missing[0]} among them")
    extra = sorted(found.keys() - expected.keys())
    if extra and not extras_allowed:
        raise WeightsError(f"{label}: {len(extra)} tensors are unknown, {extra[0]} among them")
    for name, shape in expected.items():
        if found[name] != shape:
            raise WeightsError(f"{label}: {name} has shape {found[name]}, expected {shape}")


def _label(member: Member) -> str:
    return f"draft '{member.draft.name}' ({member.path.name})"


def _causal_lm_shapes(config: Any, label: str, shared: Sequence[str] = ()) -> Shapes:
    """What a checkpoint must hold, without the modules named in `shared`."""
    from transformers import AutoModelForCausalLM

    if config.tie_word_embeddings:
        shared = [*shared, "lm_head"]
    try:
        with torch.device("meta"):  # whatever sizes it gives, nothing is allocated
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the model's own class says to such values
        raise WeightsError(f"{label}: no model is of this config.json ({error})") from error
    shapes = _shapes(model)
    return {name: shape for name, shape in shapes.items() if name.split(".")[-2] not in shared}


def _shapes(module: nn.Module) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def _found_shapes(path: Path, label: str) -> Shapes:
    shapes: Shapes = {}
    for file in _files(path, label):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in shapes:
                        raise WeightsError(f"{label}: two files hold {name}")
                    shapes[name] = list(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{label}: {file.name} cannot be read ({error})") from error
    return shapes


def _files(path: Path, label: str) -> list[Path]:
    try:
        return weight_files(path)
    except ManifestError as error:
        raise WeightsError(f"{label}: {error}") from error
