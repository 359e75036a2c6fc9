"""Settings of the service: `DEMUR_*` environment variables over a TOML file over the defaults.

The file is `demur.toml` in the working folder, or whatever `DEMUR_CONFIG` names.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from drafts.init import default_folder
from drafts.launch import EngineConfig
from drafts.shipped import REFERENCE_NAME

_NO_HASH = re.compile(r"sha256:(?![0-9a-f]{64}$)")


class Settings(BaseSettings, EngineConfig):
    """Every setting, the engine's included; unknown keys in the file are refused."""

    # Values are not repeated in errors: one of them may be a key.
    model_config = SettingsConfigDict(
        env_prefix="DEMUR_", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    ensemble: Path = Field(default_factory=default_folder, description="folder with demur.json")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    keys_file: Path | None = Field(
        default=None, description="hashed keys with scopes and budgets, as `demur keys` writes them"
    )
    api_keys: list[SecretStr] = Field(
        default=[], description="keys that may score and generate, plain or as sha256:<hash>"
    )
    admin_keys: list[SecretStr] = Field(
        default=[], description="keys that may see and change the drafts too"
    )
    allow_no_keys: bool = Field(
        default=False, description="serve whoever reaches it, on a public address too"
    )
    budgets_store: str | None = Field(
        default=None, description="redis:// URL by which several services share keys' budgets"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    max_connections: int = Field(default=4096, gt=0, description="open ones; more are closed")
    header_timeout_s: float = Field(default=10.0, gt=0, description="to send a request's headers")
    body_timeout_s: float = Field(default=60.0, gt=0, description="to send a body; then a 408")
    max_body_bytes: int = Field(default=4 * 2**20, gt=0, description="a larger body gets a 413")
    max_batch_items: int = Field(default=1000, gt=0, description="items of one list")
    batch_concurrency: int = Field(
        default=32, gt=0, description="items of one list in the engine at once"
    )
    max_pending: int = Field(
        default=2000, gt=0, description="items waiting or under way; beyond it a 429"
    )
    request_timeout_s: float = Field(default=300.0, gt=0, description="an item's deadline")
    drain_s: float = Field(
        default=2.0,
        ge=0,
        allow_inf_nan=False,
        description="after SIGTERM, how long /ready says 503 before connections are refused",
    )
    shutdown_grace_s: int = Field(default=30, ge=0, description="wait for requests under way")
    engine_hang_s: float = Field(
        default=60.0, gt=0, description="an engine that is silent for so long is started again"
    )

    osd: Literal["off", "capture", "train"] = Field(
        default="off",
        description="capture: keep conversations for distillation; train: and start the trainer",
    )
    osd_folder: Path | None = Field(
        default=None,
        description="where the spool, the drafts store and the trainer's files are by default",
    )
    osd_config: Path | None = Field(default=None, description="YAML file of the trainer")
    osd_corpus: Path | None = Field(
        default=None, description="replay and reference set; default: `reference` of the ensemble"
    )
    spool: str | None = Field(default=None, description="path of the spool, or a redis:// URL")
    spool_max_bytes: int = Field(default=256 * 2**20, gt=0, description="the oldest go beyond it")
    spool_max_age_s: float = Field(
        default=7 * 24 * 3600.0, gt=0, allow_inf_nan=False, description="older ones go"
    )
    spool_queue: int = Field(
        default=10_000, gt=0, description="conversations that wait for the spool; then some drop"
    )
    drafts_store: str | None = Field(
        default=None,
        description="versions of the drafts, a folder or a URL; followed wherever it is set",
    )
    follow_every_s: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="how often the store is looked at"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        named = os.environ.get("DEMUR_CONFIG")
        if named is not None and not Path(named).is_file():
            # Going on without it would drop the keys that it may hold.
            raise ValueError(f"DEMUR_CONFIG names {named}, which is no file")
        path = Path(named or "demur.toml")
        try:
            file = TomlConfigSettingsSource(settings_cls, path)
        except (tomllib.TOMLDecodeError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        return init_settings, env_settings, file

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _no_empty_key(cls, keys: list[SecretStr]) -> list[SecretStr]:
        # An empty one, as an unset variable leaves it, would fit a request without any key.
        if any(not key.get_secret_value().strip() for key in keys):
            raise ValueError("a key is empty")
        if any(_NO_HASH.match(key.get_secret_value()) for key in keys):
            raise ValueError("what follows sha256: must be 64 hex digits, in lower case")
        return keys

    @field_validator("budgets_store")
    @classmethod
    def _is_redis(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("a redis://, rediss:// or unix:// URL is needed")
        return url

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower_case(cls, level: Any) -> Any:
        return level.lower() if isinstance(level, str) else level

    @model_validator(mode="after")
    def _a_list_fits_the_queue(self) -> Settings:
        if self.max_batch_items > self.max_pending:
            raise ValueError("max_batch_items is over max_pending: a full list would never fit")
        return self

    @property
    def has_keys(self) -> bool:
        """Is anything guarded?"""
        return bool(self.api_keys or self.admin_keys or self.keys_file)

    def check_reachable(self) -> None:
        """Raise `ValueError` if others could reach the service, and nothing asks who they are."""
        if self.has_keys or self.allow_no_keys or is_loopback(self.host):
            return
        raise ValueError(
            f"host {self.host} can be reached from other machines and no keys are set: make some "
            "with `demur keys NAME --file keys.toml` and set keys_file, listen on 127.0.0.1, or "
            "set allow_no_keys"
        )

    @property
    def osd_place(self) -> Path:
        """`osd_folder`; by default one of this ensemble's in the user's cache."""
        named = self.osd_folder or default_folder().parent / "osd" / self.ensemble.name
        return named.expanduser()

    @property
    def store(self) -> str | None:
        """Where versions of the drafts are; None if nothing is followed."""
        if self.drafts_store is None and self.osd != "off":
            return str(self.osd_place / "drafts")
        return self.drafts_store

    @property
    def spool_place(self) -> str:
        """Where conversations go."""
        return self.spool or str(self.osd_place / "spool.sqlite")

    @property
    def corpus(self) -> Path:
        """The target's own answers."""
        return (self.osd_corpus or self.ensemble / REFERENCE_NAME).expanduser()

    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.model_fields})


def is_loopback(host: str) -> bool:
    """Does only this machine reach it?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_settings(**given: Any) -> Settings:
    """The settings, with those `given` over all others that are not None.

    Raises:
        ValueError: a sentence for each setting that cannot be used.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = []
        for found in error.errors(include_url=False, include_input=False):
            name = ".".join(str(part) for part in found["loc"])
            message = str(found["msg"]).removeprefix("Value error, ")
            lines.append(f"{name}: {message}" if name else message)
        raise ValueError("; ".join(lines)) from error
    except SettingsError as error:  # only lists are parsed before they are validated
        raise ValueError(
            "DEMUR_API_KEYS and DEMUR_ADMIN_KEYS must be JSON lists, as in "
            """'["first-key", "second-key"]'"""
        ) from error
