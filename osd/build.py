"""What a training run is made of: its texts and shards, its teacher, its students at the start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from drafts.exits import copy_exit
from drafts.manifest import (
    ModelDraft,
    check_hidden_states,
    check_member,
    resolve_source,
)
from drafts.untrusted import transformers_config
from osd.config import DistillConfig, ExitDrafts, ModelDrafts, ResidualDrafts
from osd.corpus import Text
from osd.errors import ConfigError
from osd.objectives import MoveBasis, fisher_metric, move_basis
from osd.posterior import PosteriorConfig, WeightPosterior
from osd.schedule import batch_at, derived_seed
from osd.shards import shard_of
from osd.states import States
from osd.students import ExitStudent, ModelStudent, ResidualStudent, Trainee, places_of
from osd.teacher import Teacher, collate


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        ConfigError: saying how many there are.
    """
    if device == "cpu":
        return
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise ConfigError(
            f"device: {device}, but torch {torch.__version__} sees {count} CUDA devices"
        )


def check_fits(config: DistillConfig, target: Any) -> None:
    """Refuse drafts that the target has no room for, before anything is computed.

    Raises:
        ConfigError: naming the field.
        ManifestError: if the target is not one that such drafts can be served with.
    """
    depth, drafts = target.num_hidden_layers, config.drafts
    if not isinstance(drafts, ModelDrafts):
        check_hidden_states(f"drafts.kind: '{drafts.kind}'", target)
    # The state after the last layer is the final one, which drafts read anyway, normed.
    if beyond := [layer for layer in drafts.layers if layer >= depth]:
        field = "drafts.taps" if isinstance(drafts, ResidualDrafts) else "drafts.layer"
        raise ConfigError(f"{field}: the target has {depth} layers, and {beyond[-1]} is not inside")
    if isinstance(drafts, ExitDrafts) and drafts.own_layers > depth:
        raise ConfigError(f"drafts.own_layers: the target has {depth} layers to start from")
    if isinstance(drafts, ResidualDrafts) and drafts.rank > target.hidden_size:
        raise ConfigError(
            f"drafts.rank: the target's hidden state has {target.hidden_size} numbers"
        )


def split(texts: list[Text], held_out: int) -> tuple[list[Text], list[Text]]:
    """Held-out texts and the rest, by conversation: none has texts in both."""
    keys = sorted({text.key for text in texts}, key=lambda key: derived_seed("held out", key))
    if len(keys) <= held_out:
        raise ConfigError(f"{len(keys)} conversations are too few to hold {held_out} out")
    kept = set(keys[:held_out])
    return (
        [text for text in texts if text.key in kept],
        [text for text in texts if text.key not in kept],
    )


def shards(texts: list[Text], count: int) -> list[list[Text]]:
    """The disjoint shards that students learn from (DDD)."""
    parts: list[list[Text]] = [[] for _ in range(count)]
    for text in texts:
        parts[shard_of(text.key, count)].append(text)
    if empty := [number for number, part in enumerate(parts) if not part]:
        raise ConfigError(f"shards {empty} of {count} have no texts; the corpus is too small")
    return parts


def load_teacher(config: DistillConfig, target: Path) -> Teacher:
    """The target of a run. Errors as of `open_teacher`."""
    cache = config.run.parent / "svd"
    return open_teacher(target, config.posterior, config.dtype, config.device, cache)


def open_teacher(
    target: Path, posterior: PosteriorConfig, dtype: str, device: str, cache: Path
) -> Teacher:
    """The target, frozen, with the posterior over its weights.

    Args:
        cache: folder where singular vectors are kept.

    Raises:
        ConfigError: if the weights cannot be read or hold NaN, or the posterior's modules are not
            the target's.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            target,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        ).to(device)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the target in {target} cannot be loaded ({error})") from error
    for name, weight in model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"the target in {target}: {name} holds NaN or infinity")
    try:
        return Teacher(model, WeightPosterior(model, posterior, cache=cache))
    except ValueError as error:
        raise ConfigError(f"posterior: {error}") from error


def new_students(
    config: DistillConfig, target: Path, teacher: Teacher, states: States, texts: list[Text]
) -> list[Trainee]:
    """All students as they are before the first step."""
    drafts, dtype = config.drafts, getattr(torch, config.dtype)
    seeds = [derived_seed(config.seed, "student", number) for number in range(drafts.students)]
    if isinstance(drafts, ResidualDrafts):
        basis = _move_basis(config, drafts, teacher.head_Vd, states, texts)
        generator = torch.Generator().manual_seed(derived_seed(config.seed, "places"))
        places = places_of(drafts.students, drafts.draws, drafts.factors, drafts.rank, generator)
        return [
            ResidualStudent.new(drafts, teacher.head_Vd, basis, dtype, seed, place)
            for seed, place in zip(seeds, places, strict=True)
        ]
    if isinstance(drafts, ModelDrafts):
        source = resolve_source(Path.cwd(), drafts.source, drafts.revision)
        draft = ModelDraft(
            name="student", kind="model", source=drafts.source, revision=drafts.revision
        )
        check_member(draft, source, transformers_config(source), target, teacher.model.config)
        return [ModelStudent(drafts, source, teacher.head_Vd, dtype, seed) for seed in seeds]
    start = _exit_start(config, drafts, target)
    return [ExitStudent(drafts, start, teacher.head_Vd, dtype, seed) for seed in seeds]


def _exit_start(config: DistillConfig, drafts: ExitDrafts, target: Path) -> Path:
    folder = config.run / f"start-{drafts.own_layers}"
    if not folder.exists():
        building = config.run / f"{folder.name}.partial"
        shutil.rmtree(building, ignore_errors=True)
        copy_exit(target, building, drafts.own_layers, drafts.layer)
        building.rename(folder)
    return folder


def _move_basis(
    config: DistillConfig,
    drafts: ResidualDrafts,
    head_Vd: Tensor,
    states: States,
    texts: list[Text],
) -> MoveBasis:
    """The directions of moves, from draws of the posterior on training texts."""
    rows: list[Tensor] = []
    moves: list[Tensor] = []
    index = 0
    while sum(map(len, rows)) < drafts.basis_rows:
        chosen = batch_at(texts, index, config.texts, derived_seed(config.seed, "basis"))
        batch = collate(chosen, config.max_tokens, head_Vd.device)
        h = states.clean(chosen, batch).h_Td
        draw = states.draw(chosen, batch, index, derived_seed(config.seed, "basis", index))
        rows.append(h)
        moves.append(draw - h)
        index += 1
    return move_basis(fisher_metric(torch.cat(rows), head_Vd), torch.cat(moves), drafts.rank)
