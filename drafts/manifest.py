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

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from drafts.errors import ManifestError
from drafts.residual import ResidualConfig
from drafts.untrusted import check_hashes, read_bounded, transformers_config, weight_files

MANIFEST_NAME = "demur.json"

# Architectures on which a draft that reads the target's hidden states was checked against plain
# transformers (tests/test_engine_*.py). Others may scale embeddings or cap logits on the way.
HIDDEN_STATE_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The longest that we know of has 33 MiB.
_MAX_TOKENIZER = 256 * 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        return Manifest.model_validate_json(read_bounded(path))
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
        check_hashes(who, path, source.sha256)
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
