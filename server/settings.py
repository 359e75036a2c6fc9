"""Settings of the service: `DEMUR_*` environment variables over a TOML file over the defaults.

The file is `demur.toml` in the working folder, or whatever `DEMUR_CONFIG` names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from drafts.engine import EngineConfig
from drafts.init import default_folder


class Settings(BaseSettings):
    """Every setting, with its default; unknown keys in the file are refused."""

    model_config = SettingsConfigDict(env_prefix="DEMUR_", extra="forbid")

    ensemble: Path = Field(default_factory=default_folder, description="folder with demur.json")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys: list[SecretStr] = Field(
        default=[], description="bearer keys that may score; none means that everybody may"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="of weights and activations in the engine"
    )
    max_model_len: int = Field(default=4096, gt=1, description="tokens of prompt and response")
    max_num_batched_tokens: int = Field(default=1024, gt=0, description="tokens of one engine step")
    max_num_seqs: int = Field(default=64, gt=0, description="requests in one engine step")
    kv_cache_gib: float | None = Field(default=1.0, gt=0, description="KV cache, GiB")
    enforce_eager: bool = True

    max_body_bytes: int = Field(default=4 * 2**20, gt=0, description="a larger body gets a 413")
    max_batch_items: int = Field(default=1000, gt=0, description="items of one list")
    batch_concurrency: int = Field(
        default=32, gt=0, description="items of one list in the engine at once"
    )
    max_pending: int = Field(
        default=2000, gt=0, description="items waiting or under way; beyond it a 429"
    )
    request_timeout_s: float = Field(default=300.0, gt=0, description="an item's deadline")
    shutdown_grace_s: int = Field(default=30, ge=0, description="wait for requests under way")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = TomlConfigSettingsSource(
            settings_cls, Path(os.environ.get("DEMUR_CONFIG", "demur.toml"))
        )
        return init_settings, env_settings, file

    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings."""
        shared = EngineConfig.model_fields.keys() & Settings.model_fields.keys()
        return EngineConfig(**{name: getattr(self, name) for name in shared})
