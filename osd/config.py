"""The configuration of `demur distill`: a YAML file; unknown fields are refused.

target: ~/.cache/demur/smollm2-135m-instruct/target
corpus: ~/.cache/demur/corpus
run: runs/residual
drafts: {kind: residual, students: 4, draws: 4, taps: [10, 20]}
steps: 600
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from osd.errors import ConfigError
from osd.posterior import PosteriorConfig


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResidualDrafts(_Strict):
    """Students that move the target's final hidden state; each gives `draws` drafts."""

    kind: Literal["residual"]
    students: int = Field(default=4, ge=1, description="checkpoints; with DDD one a shard")
    draws: int = Field(default=4, ge=1, description="drafts taken from each student")
    taps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="layers whose hidden states are read beside the final one"
    )
    rank: int = Field(default=256, gt=0, description="directions in which the state moves")
    factors: int = Field(default=8, gt=0, description="dimension of z")
    width: int = Field(default=512, gt=0, description="hidden units")
    shared_z: bool = Field(
        default=False, description="one z for all tokens of a text, and not one a token"
    )
    basis_rows: int = Field(
        default=8192, gt=0, description="tokens whose moves the directions are taken from"
    )
    teacher_draws: int = Field(
        default=1, ge=1, description="draws of the posterior that a step shows; 2 or more to match"
    )
    match: float = Field(
        default=0.0,
        ge=0,
        description="weight of a student's own estimate of EU*, which its drafts are scaled to; "
        "0: they are not scaled",
    )

    @model_validator(mode="after")
    def _two_draws_show_a_divergence(self) -> ResidualDrafts:
        if self.match and self.teacher_draws < 2:
            raise ValueError("match needs teacher_draws of 2 or more")
        return self

    @property
    def layers(self) -> list[int]:
        """The target's layers that are read, ascending."""
        return sorted(self.taps)


class ExitDrafts(_Strict):
    """Own layers on the target's hidden state; they start as copies of its last layers."""

    kind: Literal["exit"]
    students: int = Field(default=4, ge=1, description="K")
    layer: int = Field(ge=1, description="the target's layer whose output is read")
    own_layers: int = Field(default=3, ge=1)
    lora_rank: int | None = Field(default=None, gt=0, description="peft rank; null trains all")

    @property
    def layers(self) -> list[int]:
        """The target's layers that are read, ascending."""
        return [self.layer]


class ModelDrafts(_Strict):
    """Independent small models of the target's vocabulary."""

    kind: Literal["model"]
    students: int = Field(default=4, ge=1, description="K")
    source: str = Field(description="folder or hub id that each starts from")
    revision: str | None = None
    lora_rank: int | None = Field(default=None, gt=0, description="peft rank; null trains all")

    @property
    def layers(self) -> list[int]:
        """The target's layers that are read, ascending."""
        return []


class DistillConfig(_Strict):
    """What to train, on what, for how long."""

    target: str = Field(description="folder or hub id of the target")
    revision: str | None = Field(default=None, description="of a hub id")
    corpus: Path = Field(description="folder that `demur synthesize` wrote")
    run: Path = Field(description="folder of checkpoints, logs and the finished ensemble")
    name: str = Field(default="ensemble", min_length=1, description="of the finished ensemble")
    drafts: Annotated[ResidualDrafts | ExitDrafts | ModelDrafts, Field(discriminator="kind")]

    posterior: PosteriorConfig = PosteriorConfig()
    teacher: Literal["posterior", "clean"] = Field(
        default="posterior",
        description="posterior: a fresh draw each step (OSD); clean: the target itself (KD)",
    )
    diverse: bool = Field(
        default=True, description="each student sees its own shard (DDD); false: all texts"
    )

    draws_per_text: int | None = Field(
        default=None,
        ge=1,
        description="draws that are made once for each text and kept on disk, for this run and "
        "others beside it; null: a fresh draw each step",
    )

    seed: int = Field(default=0, ge=0)
    steps: int = Field(gt=0, description="optimiser steps of each student")
    texts: int = Field(default=8, gt=0, description="texts of one forward pass")
    loss_tokens: int | None = Field(
        default=None,
        gt=0,
        description="response tokens of a pass, chosen at random, on which divergences over the "
        "vocabulary are taken; null: all",
    )
    accumulate: int = Field(default=1, gt=0, description="forward passes of one step")
    max_tokens: int = Field(default=512, ge=2, description="longer texts are cut")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak of the cosine")
    warmup: int = Field(default=20, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0, description="greatest norm of a step's gradient")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of forward passes; weights are kept in float32"
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda, cuda:1"
    )

    held_out: int = Field(default=24, ge=1, description="texts that no student trains on")
    held_out_draws: int = Field(default=8, ge=2, description="draws that make their p_T")
    evaluate_every: int = Field(default=100, gt=0, description="steps")
    checkpoint_every: int = Field(default=100, gt=0, description="steps")

    @model_validator(mode="after")
    def _moves_need_a_posterior(self) -> DistillConfig:
        if self.drafts.kind == "residual" and self.teacher == "clean":
            raise ValueError("residual drafts learn moves, and a clean teacher makes none")
        return self

    @model_validator(mode="after")
    def _a_step_shows_different_draws(self) -> DistillConfig:
        shown = getattr(self.drafts, "teacher_draws", 1)
        if self.draws_per_text is not None and self.draws_per_text < shown:
            raise ValueError(f"draws_per_text: a step shows {shown} (drafts.teacher_draws)")
        return self


def read_config(file: Path) -> DistillConfig:
    """Parse a YAML file; paths in it are relative to the working folder.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no fields")
    try:
        config = DistillConfig.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in found['loc'])}: "
            + ("unknown field" if found["type"] == "extra_forbidden" else found["msg"])
            for found in error.errors()
        ]
        raise ConfigError(
            f"{file}: {'; '.join(lines)} (docs/distillation.md has all fields)"
        ) from error
    paths = {name: getattr(config, name).expanduser() for name in ("corpus", "run")}
    return config.model_copy(update=paths)
