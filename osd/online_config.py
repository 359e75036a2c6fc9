"""The configuration of `demur osd`: a YAML file; unknown fields are refused, all have defaults.

    share: 0.5
    busy_share: 0.1
    replay: 0.5
    gate: {reference_margin: 0.02}

Where the traffic comes from and where versions go is not in it: the commands are told.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from osd.errors import ConfigError
from osd.posterior import PosteriorConfig


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GateConfig(_Strict):
    """What a version must keep to before it goes live. Margins are shares: 0.05 is 5%."""

    kl_margin: float = Field(
        default=0.005, ge=0, description="rise of KL(p_T || q_bar) on held-out traffic"
    )
    reference_margin: float = Field(
        default=0.03,
        ge=0,
        description="rise of that KL, and of the RMSE against EU*, on the reference set, over what "
        "they were at the start",
    )
    jsd_floor: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="share of their first JSD that the drafts must keep, or of EU* where that is "
        "less: on the reference set, and on traffic against what the first drafts have there",
    )
    norm_factor: float = Field(
        default=2.0, gt=1, description="how much a tensor's norm may grow or shrink since the start"
    )
    watch_margin: float = Field(
        default=0.02,
        ge=0,
        description="a version that goes live is taken back if its KL on traffic that came after "
        "it is over its parent's by more",
    )


class OnlineConfig(_Strict):
    """How drafts follow the traffic."""

    share: float = Field(
        default=0.5, gt=0, le=1, description="of the time of `threads` cores, while nobody waits"
    )
    busy_share: float = Field(
        default=0.1, gt=0, le=1, description="the same while the service has requests under way"
    )
    threads: int = Field(default=1, ge=1, description="of computation, on a CPU")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    dtype: str = Field(default="bfloat16", pattern="^(float32|bfloat16)$")
    seed: int = Field(default=0, ge=0)

    diverse: bool = Field(
        default=True, description="each student sees its own shard (DDD); false: all traffic"
    )
    replay: float = Field(
        default=0.25, ge=0, lt=1, description="share of the training texts that the corpus gives"
    )
    texts: int = Field(default=4, gt=0, description="of one step")
    max_tokens: int = Field(default=400, ge=2, description="longer texts are cut")
    max_backlog: int = Field(
        default=1024, ge=1, description="texts that wait for a draft; the oldest beyond are skipped"
    )

    posterior: PosteriorConfig = PosteriorConfig()
    teacher_draws: int = Field(default=3, ge=2, description="draws that a residual student sees")
    match: float = Field(default=1.0, ge=0, description="as in `demur distill`, residual only")
    lora_rank: int | None = Field(
        default=16,
        gt=0,
        description="of the updates of exit and model drafts, as in `demur distill`; null trains "
        "all their weights",
    )
    loss_tokens: int | None = Field(default=64, gt=0, description="as in `demur distill`")
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup: int = Field(default=10, ge=0, description="steps of each student after each restart")
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)

    publish_every: int = Field(
        default=80, gt=0, description="steps of all students between two versions"
    )
    checkpoint_every: int = Field(
        default=20, gt=0, description="steps of all students; what a kill can cost"
    )
    keep_versions: int = Field(default=10, ge=2, description="older ones are removed")

    held_out_one_in: int = Field(
        default=8, ge=2, description="of the traffic's conversations, one is never learned from"
    )
    held_out_texts: int = Field(default=16, ge=1, description="the latest of these are measured on")
    least_held_out: int = Field(
        default=8, ge=1, description="fewer decide nothing: no version before there are so many"
    )
    held_out_draws: int = Field(default=8, ge=2, description="that make their p_T and EU*")
    reference_texts: int = Field(default=16, ge=1, description="of the corpus, never learned from")
    reference_draws: int = Field(default=16, ge=2, description="that make their p_T and EU*")
    measured_tokens: int = Field(default=256, ge=2, description="longer texts are cut to measure")

    @model_validator(mode="after")
    def _a_step_sees_traffic(self) -> OnlineConfig:
        if self.replayed >= self.texts:
            raise ValueError("replay leaves no text of a step to the traffic; lower it")
        if self.least_held_out > self.held_out_texts:
            raise ValueError("least_held_out is over held_out_texts: there would never be so many")
        return self

    @property
    def replayed(self) -> int:
        """Texts of a step that the corpus gives."""
        return round(self.texts * self.replay)

    gate: GateConfig = GateConfig()


def read_online_config(file: Path | None) -> OnlineConfig:
    """Parse a YAML file; the defaults without one.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    if file is None:
        return OnlineConfig()
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read ({error})") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{file}: fields and values are wanted, not a {type(values).__name__}")
    try:
        return OnlineConfig.model_validate(values or {})
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in found['loc']) or 'the document'}: "
            + ("unknown field" if found["type"] == "extra_forbidden" else found["msg"])
            for found in error.errors()
        ]
        raise ConfigError(f"{file}: {'; '.join(lines)} (docs/osd.md has all fields)") from error
