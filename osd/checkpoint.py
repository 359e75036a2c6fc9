"""Training checkpoints: written whole, read back exactly, no pickle.

A folder `checkpoint-000000200` holds, for each student, its trained weights and its optimiser's
moments as safetensors, and `state.json` with the step and the configuration. It is written under
another name and renamed, so a killed trainer leaves the last whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osd.errors import CheckpointError, OtherRunError

Tensors = dict[str, Tensor]

_KEPT = 2


def save(
    run: Path,
    step: int,
    config: dict[str, Any],
    modules: Sequence[nn.Module],
    optimisers: Sequence[torch.optim.Optimizer],
    progress: dict[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of `step` and drop all but the last two.

    Args:
        config: what a run that goes on must share.
        progress: what else belongs to these weights; `read_progress` gives it back.
    """
    folder = run / f"checkpoint-{step:09d}"
    partial = run / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, (module, optimiser) in enumerate(zip(modules, optimisers, strict=True)):
        weights, moments = pack(module, optimiser)
        save_file(weights, partial / f"student-{number}.safetensors")
        save_file(moments, partial / f"optimiser-{number}.safetensors")
    state = {"step": step, "config": config, "progress": progress or {}}
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in _all(run)[:-_KEPT]:
        shutil.rmtree(old)
    return folder


def load_last(
    run: Path,
    config: dict[str, Any],
    modules: Sequence[nn.Module],
    optimisers: Sequence[torch.optim.Optimizer],
) -> int:
    """Put the last checkpoint into modules and optimisers; return its step, or 0 without one.

    Raises:
        CheckpointError: if it is broken, or of a run with another configuration.
    """
    folders = _all(run)
    if not folders:
        return 0
    folder = folders[-1]
    try:
        state = json.loads((folder / "state.json").read_text())
        step, stored = int(state["step"]), dict(state["config"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: state.json cannot be read ({error})") from error
    if stored != config:
        changed = sorted(
            name for name in stored.keys() | config.keys() if stored.get(name) != config.get(name)
        )
        raise OtherRunError(
            f"{folder} is of a run with another {', '.join(changed)}; "
            "restore the configuration, or choose another run folder"
        )
    for number, (module, optimiser) in enumerate(zip(modules, optimisers, strict=True)):
        unpack(
            module,
            optimiser,
            _read(folder / f"student-{number}.safetensors"),
            _read(folder / f"optimiser-{number}.safetensors"),
        )
    return step


def _all(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(run.glob("checkpoint-" + "?" * 9))


def drop_last(run: Path) -> bool:
    """Remove the last checkpoint, if there is one."""
    folders = _all(run)
    for folder in folders[-1:]:
        shutil.rmtree(folder)
    return bool(folders)


def read_progress(run: Path) -> dict[str, Any]:
    """The `progress` of the last checkpoint, which `load_last` has found to be whole."""
    folders = _all(run)
    return dict(json.loads((folders[-1] / "state.json").read_text())["progress"]) if folders else {}


def pack(module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """Trained weights, and the optimiser's moments."""
    return _trained(module), _moments(module, optimiser)


def unpack(
    module: nn.Module, optimiser: torch.optim.Optimizer, weights: Tensors, moments: Tensors
) -> None:
    """Put what `pack` gave back into place.

    Raises:
        CheckpointError: if it is of another student.
    """
    _restore(module, weights)
    _restore_moments(module, optimiser, moments)


def _trained(module: nn.Module) -> Tensors:
    """Trained parameters and persistent buffers."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    # Parameters that are tied have one name here, and the others in `state_dict` are left out.
    names = {name for name, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in module.state_dict().items()
        if name in names and name not in frozen
    }


def _moments(module: nn.Module, optimiser: torch.optim.Optimizer) -> Tensors:
    moments = {}
    for name, parameter in module.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            moments[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return moments


def _read(file: Path) -> Tensors:
    try:
        tensors: Tensors = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); remove its folder to go on from the one before"
        ) from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity")
    return tensors


def _restore(module: nn.Module, tensors: Tensors) -> None:
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # of other shapes
        raise CheckpointError(f"a checkpoint is of another student ({error})") from error
    wanted = set(_trained(module))
    if unexpected or wanted & set(missing):
        raise CheckpointError("a checkpoint holds other tensors than this student has")


def _restore_moments(module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Tensors) -> None:
    for name, parameter in module.named_parameters():
        own = {
            key.rpartition("/")[2]: tensor
            for key, tensor in tensors.items()
            if key.rpartition("/")[0] == name
        }
        if any(t.ndim and t.shape != parameter.shape for t in own.values()):
            raise CheckpointError(f"a checkpoint's moments of {name} are of another shape")
        if own:
            optimiser.state[parameter] = {
                key: tensor if key == "step" else tensor.to(parameter.device)
                for key, tensor in own.items()
            }
