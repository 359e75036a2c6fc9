"""The ensemble manifest: `demur.json` in a folder beside its members' Hugging Face checkpoints.

    {
      "format": 1,
      "name": "smollm2-135m-instruct",
      "weights_version": "exit-1",
      "target": {"source": "target"},
      "drafts": [
        {"name": "draft_a", "kind": "exit", "source": "draft_a", "layer": 22},
        {"name": "draft_b", "kind": "model", "source": "org/small-model", "revision": "4f5a…"},
        {"name": "draft_c", "kind": "residual", "source": "student", "draw": 0}
      ]
    }

A `source` is a folder, relative to the manifest or absolute, or else a Hugging Face hub id with the
commit that is meant. `load_ensemble` reads it, fetches what is missing and refuses members that
cannot work together.

Whoever writes the manifest decides what is read; whoever writes the folders that it names does not
(docs/security.md). Of those only JSON and safetensors are read, within bounds, nothing in them
runs, and no name in them leads elsewhere. The `sha256` of a source pins its files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from drafts.errors import ManifestError
from drafts.residual import ResidualConfig

logger = logging.getLogger(__name__)

MANIFEST_NAME = "demur.json"
_INDEX_NAME = "model.safetensors.index.json"

# Architectures on which a draft that reads the target's hidden states was checked against plain
# transformers (tests/test_engine_*.py). Others may scale embeddings or cap logits on the way.
HIDDEN_STATE_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = re.compile(r"[\w-][\w.-]*\.safetensors")
# An index of a trillion parameters has 14 MiB, the longest tokenizer.json that we know of 33.
_MAX_JSON, _MAX_TOKENIZER = 64 * 2**20, 256 * 2**20
# Of layers, and of experts in each: to find a checkpoint's shapes each of them is built.
_MODULES, _MAX_MODULES = re.compile(r"(layer|expert)s?$"), 1024
_CHUNK = 8 * 2**20
_QUIET_S = 3.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where a member's weights come from: a folder, or a hub id and a commit of it."""

    source: str = Field(min_length=1)
    revision: str | None = None
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] | None = Field(
        default=None, description="of files of the checkpoint by name, all of its weights at least"
    )


class _Draft(Source):
    # vLLM reads a layer's number off its name and takes the first digits it meets, hence none here.
    name: str = Field(pattern=r"^[a-z]+(_[a-z]+)*$")


class ModelDraft(_Draft):
    """An independent small language model of the target's vocabulary, fed with tokens."""

    kind: Literal["model"]


class ExitDraft(_Draft):
    """Own layers on the target's hidden state after `layer` layers; shares its LM head."""

    kind: Literal["exit"]
    layer: int = Field(ge=1)


class ResidualDraft(_Draft):
    """Draw number `draw` of a head that moves the target's final hidden state."""

    kind: Literal["residual"]
    draw: int = Field(ge=0)


Draft = Annotated[ModelDraft | ExitDraft | ResidualDraft, Field(discriminator="kind")]


class Manifest(_Strict):
    """The contents of `demur.json`."""

    format: Literal[1]
    name: str = Field(min_length=1)
    weights_version: str = Field(min_length=1)
    target: Source
    drafts: list[Draft] = Field(min_length=1)

    @field_validator("drafts")
    @classmethod
    def _distinct_names(cls, drafts: list[Draft]) -> list[Draft]:
        names = [draft.name for draft in drafts]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two drafts have the same name: {', '.join(repeated)}")
        return drafts


@dataclass(frozen=True)
class Member:
    """A draft, the local folder of its weights, and its config.json (parsed for `residual`)."""

    draft: ModelDraft | ExitDraft | ResidualDraft
    path: Path
    config: Any


@dataclass(frozen=True)
class Ensemble:
    """A manifest whose members are on this machine and fit each other.

    `target_config` and the configs of `model` and `exit` drafts are transformers configs, that of
    a `residual` draft is a `ResidualConfig`.
    """

    folder: Path
    manifest: Manifest
    target_path: Path
    target_config: Any
    members: tuple[Member, ...]

    @property
    def vocab_size(self) -> int:
        return int(self.target_config.vocab_size)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The target's hidden states that some draft reads, ascending, each once."""
        layers: set[int] = set()
        for member in self.members:
            if isinstance(member.draft, ExitDraft):
                layers.add(member.draft.layer)
            elif isinstance(member.config, ResidualConfig):
                layers.update(member.config.taps)
        return tuple(sorted(layers))

    @property
    def has_states(self) -> bool:
        """Does some draft keep keys and values of its own of what it has read?"""
        return not all(isinstance(member.draft, ResidualDraft) for member in self.members)

    def students(self) -> dict[Path, tuple[ResidualConfig, list[int]]]:
        """Each residual checkpoint once, with the draws that drafts take from it."""
        seen: dict[Path, tuple[ResidualConfig, list[int]]] = {}
        for member in self.members:
            if isinstance(member.draft, ResidualDraft):
                seen.setdefault(member.path, (member.config, []))[1].append(member.draft.draw)
        return seen


def read_manifest(folder: Path) -> Manifest:
    """Parse `folder/demur.json`.

    Raises:
        ManifestError: if there is none, or it does not have the manifest's form.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(_read(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(
            f"{folder} is no ensemble: it has no {MANIFEST_NAME}. `demur init` makes one."
        ) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ManifestError(f"{path}: {where}: {first['msg']}") from error


def load_ensemble(folder: str | Path, target_path: Path | None = None) -> Ensemble:
    """Read a manifest, bring its members onto this machine and check that they fit.

    Args:
        target_path: where the target is on this machine, whatever the manifest says of it.

    Raises:
        ManifestError: with a sentence that names the member and says what differs.
    """
    folder = Path(folder).expanduser().resolve()
    manifest = read_manifest(folder)
    if target_path is None:
        target_path = _checkpoint(folder, "the target", manifest.target)
    target_config = read_target(target_path)
    members = []
    for draft in manifest.drafts:
        path = _checkpoint(folder, f"draft '{draft.name}'", draft)
        config = (
            ResidualConfig.read(path)
            if isinstance(draft, ResidualDraft)
            else transformers_config(path)
        )
        _refuse_quantised(f"draft '{draft.name}'", config)
        check_member(draft, path, config, target_path, target_config)
        members.append(Member(draft, path, config))
    return Ensemble(folder, manifest, target_path, target_config, tuple(members))


def read_target(path: Path) -> Any:
    """The transformers config of a target.

    Raises:
        ManifestError: if it cannot be one.
    """
    config = transformers_config(path)
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file():
        raise ManifestError(f"the target in {path} has no tokenizer.json")
    if tokenizer.stat().st_size > _MAX_TOKENIZER:
        raise ManifestError(f"{tokenizer} is over {_MAX_TOKENIZER} bytes")
    weight_files(path)  # without them, pickled ones beside would be read
    _refuse_quantised("the target", config)
    return config


def check_hidden_states(who: str, target: Any) -> None:
    """Refuse a target whose hidden states were not checked to be what drafts take them for."""
    if _architecture(target) not in HIDDEN_STATE_ARCHITECTURES:
        raise ManifestError(
            f"{who}, which reads the target's hidden states; that was checked for "
            f"{', '.join(HIDDEN_STATE_ARCHITECTURES)} and the target is a {_architecture(target)}. "
            "Use drafts of kind 'model'."
        )


def _checkpoint(folder: Path, who: str, source: Source) -> Path:
    """The local folder of a member, whose files are those that the manifest pins."""
    path = resolve_source(folder, source.source, source.revision)
    if source.sha256 is not None:
        _check_hashes(who, path, source.sha256)
    return path


def resolve_source(folder: Path, source: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: under `folder`, absolute, or fetched from the hub.

    Raises:
        ManifestError: if it is none of these, or of the hub without a commit.
    """
    neither = f"'{source}' is neither a folder under {folder} nor"
    try:
        local = folder / Path(source).expanduser()
        if local.is_dir():
            return local.resolve()
    except (OSError, RuntimeError) as error:  # too long; nobody's home
        raise ManifestError(f"{neither} the name of a model ({error})") from error
    if not _HUB_ID.fullmatch(source):
        raise ManifestError(f"{neither} the name of a model on the Hugging Face hub")
    if revision is None or not _COMMIT.fullmatch(revision):
        raise ManifestError(
            f"{neither} a commit of a Hugging Face hub model. If that is what is meant, give the "
            'commit, too, since branches and tags can be moved to other files: "revision" with '
            f"the 40 digits that https://huggingface.co/{source}/commits/main shows"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                # No code and no pickle; `tokenizer.json` stands in for vocabularies of other forms.
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                # Other forms of the model, and Mistral's own form of it, which vLLM would prefer.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ManifestError(
            f"{neither} a model that the Hugging Face hub gives to this machine at {revision} "
            f"({type(error).__name__}: {error})"
        ) from error


def inside(folder: Path, name: str) -> Path:
    """The path of `name` under a folder, be something there or not; for names that others chose.

    Raises:
        ManifestError: if it is absolute, the folder itself, or leads out of it: by `..`, by `~`, or
            because a symbolic link is on the way.
    """
    path = folder / name
    try:
        found, root = path.resolve(), _root(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a ring
        raise ManifestError(f"{name[:100]!r} is no path ({error})") from error
    asks_out = name.startswith(("/", "~")) or ".." in Path(name).parts
    if asks_out or path == folder or not found.is_relative_to(root):
        raise ManifestError(f"{name!r} leads out of its folder {folder}")
    return path


def _root(folder: Path) -> Path:
    """What a checkpoint's files must lie in: the hub's cache links from `snapshots` to `blobs`."""
    return folder.parent.parent if folder.parent.name == "snapshots" else folder


def weight_files(folder: Path) -> list[Path]:
    """The weights of a checkpoint: `model.safetensors`, or those that its index names.

    Raises:
        ManifestError: if one is missing or lies elsewhere, or there are others beside them, which
            some loaders would read in their place.
    """
    index = folder / _INDEX_NAME
    names = {"model.safetensors"}
    if index.exists():
        found = read_json(index).get("weight_map")
        values = list(found.values()) if isinstance(found, dict) else []
        for name in values:
            if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
                raise ManifestError(
                    f"{index.name} cannot be read ({str(name)[:100]!r} names no safetensors file "
                    "beside it)"
                )
        names = set(values)
        if not names:
            raise ManifestError(f"{index.name} cannot be read (it has no weight_map)")
    there = {file.name for file in folder.glob("*.safetensors")}
    if missing := sorted(names - there):
        raise ManifestError(f"{folder} has no {missing[0]}")
    if others := sorted(there - names):
        raise ManifestError(
            f"{folder} holds {others[0]}, too, which is none of the checkpoint's weights "
            f"({', '.join(sorted(names)[:3])}), and loaders differ in whether they read it: "
            "move it out of the folder"
        )
    files = [inside(folder, name) for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise ManifestError(f"{file} is no file")
    return files


def _check_hashes(who: str, folder: Path, sha256: dict[str, str]) -> None:
    """Refuse a checkpoint whose files are not those that the manifest pins."""
    unlisted = sorted({file.name for file in folder.glob("*.safetensors")} - sha256.keys())
    if unlisted:
        raise ManifestError(
            f"{who}: {folder} holds {unlisted[0]}, whose SHA-256 the manifest does not give; it "
            "must give that of each file of weights"
        )
    for name, expected in sha256.items():
        file = inside(folder, name)
        if not file.is_file():
            raise ManifestError(
                f"{who}: the manifest gives a SHA-256 of {name}, and {folder} has none"
            )
        status = file.stat()
        found = _sha256(file, status.st_ino, status.st_size, status.st_ctime_ns)
        if found != expected:
            raise ManifestError(
                f"{who}: {file} is not the file that the manifest pins: its SHA-256 is {found}, "
                f"the manifest's {expected}. Fetch it again, or pin the new one if it is yours"
            )


@lru_cache(maxsize=1024)
def _sha256(file: Path, *_: int) -> str:
    """A file's SHA-256; taken once of what has the same number, size and time of change."""
    digest, tell_at = hashlib.sha256(), time.monotonic() + _QUIET_S
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            if time.monotonic() > tell_at:
                logger.info("checking the SHA-256 of %s", file)
                tell_at = float("inf")
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that somebody else wrote; `ManifestError` if it is none or too large."""
    try:
        found = json.loads(_read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ManifestError(f"{path.name} cannot be read (it is no JSON object)")
    return found


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # to open a pipe is to wait for its writer
        raise ManifestError(f"{path} is no file")
    with path.open("rb") as file:
        content = file.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise ManifestError(f"{path} is over {_MAX_JSON} bytes")
    return content


def transformers_config(path: Path) -> Any:
    """The config of a checkpoint; `ManifestError` if there is no usable one.

    No code of the checkpoint's runs, and none of its files leads to another model.
    """
    from transformers import AutoConfig

    if (path / "adapter_config.json").exists():
        raise ManifestError(f"{path} is an adapter of another model; merge it into that one")
    try:
        _check_size(read_json(path / "config.json"))
        # Without this, code of the checkpoint's is asked about on the terminal.
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if not isinstance(getattr(config, name, None), int) or getattr(config, name) < 1:
                raise ManifestError(f"it gives no {name}, as a language model's does")
        names = config.architectures or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ManifestError("architectures is no list of names")
    except Exception as error:  # whatever the model's own class says to such values
        raise ManifestError(f"{path}: no usable config.json ({error})") from error
    return config


def _check_size(config: dict[str, Any]) -> None:
    """Refuse what takes for ever only to be looked at; sizes are held against the weights later."""
    if "transformers_weights" in config:
        raise ManifestError("it names weights of its own (transformers_weights)")
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
            for name, value in part.items():
                modules = _MODULES.search(name) and isinstance(value, int | float)
                if modules and value > _MAX_MODULES:
                    raise ManifestError(f"{name} is {value:.0f}, over {_MAX_MODULES}")
        elif isinstance(part, list):
            parts += part


def _refuse_quantised(who: str, config: Any) -> None:
    # vLLM would build every member by the target's quantisation.
    if getattr(config, "quantization_config", None):
        raise ManifestError(
            f"{who} is quantised, which ensembles do not support; use plain weights"
        )


def _architecture(config: Any) -> str:
    return str((config.architectures or ["unknown"])[0])


def check_member(
    draft: ModelDraft | ExitDraft | ResidualDraft,
    path: Path,
    config: Any,
    target_path: Path,
    target: Any,
) -> None:
    """`ManifestError` if a draft does not fit its target; it names it and says what differs."""
    if isinstance(draft, ModelDraft):
        _same(draft, "vocab_size", config.vocab_size, target.vocab_size)
        _check_vocabulary(draft, path, target_path)
        return
    check_hidden_states(f"draft '{draft.name}' is of kind '{draft.kind}'", target)
    _same(draft, "hidden_size", config.hidden_size, target.hidden_size)
    if isinstance(draft, ExitDraft):
        _same(draft, "architecture", _architecture(config), _architecture(target))
        _same(draft, "vocab_size", config.vocab_size, target.vocab_size)
        taps = [draft.layer]
    else:
        taps = config.taps
        if draft.draw >= config.draws:
            raise ManifestError(
                f"draft '{draft.name}' asks for draw {draft.draw}, but {path.name} holds "
                f"{config.draws} (0 to {config.draws - 1})"
            )
    for layer in taps:
        if layer >= target.num_hidden_layers:
            raise ManifestError(
                f"draft '{draft.name}' reads the hidden state after layer {layer}, but the target "
                f"has {target.num_hidden_layers} layers (1 to {target.num_hidden_layers - 1})"
            )


def _same(draft: Source, what: str, have: object, want: object) -> None:
    if have != want:
        name = getattr(draft, "name", draft.source)
        raise ManifestError(
            f"draft '{name}' cannot serve this target: its {what} is {have}, the target's is {want}"
        )


def _check_vocabulary(draft: ModelDraft, path: Path, target_path: Path) -> None:
    """Sizes can agree by accident: where both tokenizers are at hand, every token must."""
    files = [folder / "tokenizer.json" for folder in (path, target_path)]
    if not all(file.exists() for file in files):
        return
    have, want = (_vocabulary(file) for file in files)
    differing = [token for token, index in want.items() if have.get(token) != index]
    if differing or len(have) != len(want):
        example = min(differing, key=lambda token: want[token], default="")
        raise ManifestError(
            f"draft '{draft.name}' cannot serve this target: its vocabulary differs "
            f"({len(differing)} tokens, {len(have)} entries against {len(want)}; "
            f"{example!r} is {have.get(example)} in the draft, {want.get(example)} in the target)"
        )


def _vocabulary(file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        if file.stat().st_size > _MAX_TOKENIZER:
            raise ManifestError(f"it is over {_MAX_TOKENIZER} bytes")
        return dict(Tokenizer.from_file(str(file)).get_vocab())
    except Exception as error:  # tokenizers raises no other class
        raise ManifestError(f"{file} cannot be read ({error})") from error
