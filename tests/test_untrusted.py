"""Files that somebody else wrote: none leads elsewhere, runs, or takes what it is not given.

What each of them could do is in docs/security.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drafts.errors import DraftsError, ManifestError, StoreError, WeightsError
from drafts.manifest import Member, load_ensemble
from drafts.reference import Reference
from drafts.residual import ResidualConfig
from drafts.shipped import ship
from drafts.store import DraftsStore, Version
from drafts.text import TextEncoder, TextError
from drafts.untrusted import inside, transformers_config, weight_files
from drafts.weights import check_shapes, check_target, read_member
from osd import checkpoint
from osd.corpus import Corpus, Text
from osd.errors import CheckpointError, CorpusError, SpoolError
from osd.publish import open_version, stage
from osd.spool import MAX_TOKENS, START, open_spool
from osd.spool_redis import _entries
from tests.tiny import edit_manifest, mixed_ensemble, save_lm


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_ensemble(tmp_path_factory.mktemp("untrusted") / "ensemble")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """An ensemble of all kinds of draft, and its target beside it."""
    shutil.copytree(made.parent / "target-llama", tmp_path / "target-llama")
    folder = shutil.copytree(made, tmp_path / "ensemble")
    edit_manifest(folder, target={"source": str(tmp_path / "target-llama")})
    return folder


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def member(folder: Path, name: str) -> Member:
    return next(m for m in load_ensemble(folder).members if m.draft.name == name)


def pin(folder: Path, name: str, sha256: dict[str, str]) -> None:
    """Pin a draft's files, or the target's, in the manifest."""
    manifest = json.loads((folder / "demur.json").read_text())
    entries = [manifest["target"], *manifest["drafts"]]
    next(entry for entry in entries if entry.get("name", "target") == name)["sha256"] = sha256
    (folder / "demur.json").write_text(json.dumps(manifest))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Names that others chose.

PARTS = st.sampled_from(
    ["..", ".", "", "a", "link", "file", "~", "~root", "a b", "\x00", "…", "C:"]
)
NAMES = st.one_of(
    st.lists(PARTS, max_size=6).map("/".join),
    st.text(max_size=20),
    st.sampled_from(["/etc/passwd", "/dev/zero", "demur.json/../..", "x" * 5000, "~/x", "link/x"]),
)


@hypothesis.given(name=NAMES)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_no_name_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    if not folder.exists():
        (folder / "a").mkdir(parents=True)
        (folder / "file").write_text("")
        (folder / "link").symlink_to(tmp_path)
    try:
        path = inside(folder, name)
    except ManifestError:
        return
    assert os.path.realpath(path).startswith(f"{folder.resolve()}/")


@hypothesis.given(name=NAMES)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_an_index_names_weights_beside_it_or_none(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir(exist_ok=True)
    for decoy in (tmp_path / "x.safetensors", tmp_path / "a.safetensors"):
        decoy.write_bytes(b"")
    for given in (name, f"{name}.safetensors", f"../{name}.safetensors"):
        index = {"weight_map": {"w": given}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ManifestError):
            weight_files(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"weight_map": {"w": "/etc/passwd"}}',
        '{"weight_map": {"w": "../model.safetensors"}}',
        '{"weight_map": {"w": "model.bin"}}',
        '{"weight_map": {"w": ["model.safetensors"]}}',
        '{"weight_map": {}}',
        '{"weight_map": 7}',
        "[]",
        "[" * 100_000,
        "nonsense",
    ],
)
def test_an_index_that_is_none(folder: Path, content: str) -> None:
    shutil.copy(folder / "model_a/model.safetensors", folder)
    (folder / "model_a/model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"'model_a'.*index\.json cannot be read"):
        check_shapes(member(folder, "model_a"))


def shard(folder: Path) -> None:
    """Cut a checkpoint in two, as large ones are."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file)
    where = {name: file for file, own in parts.items() for name in own}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()


def test_weights_in_several_files(folder: Path) -> None:
    before = read_member(member(folder, "model_a"))
    shard(folder / "model_a")
    after = read_member(member(folder, "model_a"))
    assert all(bool((after[name] == tensor).all()) for name, tensor in before.items())
    # Of two tensors of one name, which is read?
    twice = load_file(folder / "model_a/model-1.safetensors")
    save_file(twice, folder / "model_a/model-2.safetensors")
    with pytest.raises(WeightsError, match="two files hold"):
        check_shapes(member(folder, "model_a"))


def test_links_lead_nowhere_else_but_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    file = folder / "model_a/model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(WeightsError, match=r"'model_a'.*leads out of its folder"):
        check_shapes(member(folder, "model_a"))
    snapshot = tmp_path / "hub/models--org--tiny/snapshots/0123"
    shutil.copytree(folder / "model_b", snapshot)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(snapshot.parent.parent / "blobs/abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert weight_files(snapshot) == [snapshot / "model.safetensors"]


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-2.safetensors"])
def test_weights_that_only_some_loaders_would_read(folder: Path, name: str) -> None:
    """vLLM reads all of a folder's safetensors, and Mistral's own form before others."""
    target = load_ensemble(folder).target_path
    shutil.copy(target / "model.safetensors", target / name)
    with pytest.raises(ManifestError, match=f"holds {name}, too"):
        load_ensemble(folder)


HEADERS = {
    "longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "negative": struct.pack("<q", -1) + b"{}",
    "no header": b"",
    "overlapping": b"",
    "beyond the file": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(folder: Path, case: str) -> None:
    content = HEADERS[case]
    ends = {"overlapping": [[0, 8], [4, 12]], "beyond the file": [[0, 8], [8, 2**40]]}
    if case in ends:
        tensors = {
            name: {"dtype": "F32", "shape": [2], "data_offsets": offsets}
            for name, offsets in zip("ab", ends[case], strict=True)
        }
        header = json.dumps(tensors).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(12)
    (folder / "model_a/model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"'model_a'.*model\.safetensors cannot be read"):
        check_shapes(member(folder, "model_a"))


# Nothing of a checkpoint runs.


class _Marks:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def test_pickles_are_not_read(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name in ("target-llama", "ensemble/model_a"):
        for file in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "optimizer.pt"):
            (tmp_path / name / file).write_bytes(pickle.dumps(_Marks(marker)))
    Reference(load_ensemble(folder))
    (tmp_path / "target-llama/model.safetensors").unlink()
    with pytest.raises(ManifestError, match=r"has no model\.safetensors"):
        load_ensemble(folder)
    (folder / "model_a/model.safetensors").write_bytes(pickle.dumps(_Marks(marker)))
    with pytest.raises(ManifestError):
        load_ensemble(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Marks(marker)))  # it would have
    assert marker.exists()


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_checkpoint_does_not_run_nor_is_it_asked_about(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Answered with yes on a terminal, or by what a script pipes in, it would run."""
    asked = io.StringIO("y\n" * 100)
    monkeypatch.setattr("sys.stdin", asked)
    marker = tmp_path / "ran"
    code = f"""
import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
os.makedirs({str(marker)!r}, exist_ok=True)
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
    auto_map = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": [None, "evil.Tokenizer"],
    }
    target = tmp_path / "target-llama"
    for place in (target, folder / "model_a"):
        (place / "evil.py").write_text(code)
        change(place / "config.json", model_type=model_type, auto_map=auto_map)
        change(place / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    if model_type == "evil":
        with pytest.raises(ManifestError, match="custom code"):
            load_ensemble(folder)
    else:
        ensemble = load_ensemble(folder)
        check_target(ensemble)
        Reference(ensemble)
    with pytest.raises(ValueError, match="custom code"):
        TextEncoder(target)
    assert asked.tell() == 0
    assert not marker.exists()


def test_an_adapter_leads_to_no_other_model(folder: Path) -> None:
    """peft's loader would read the model that it names."""
    target = load_ensemble(folder).target_path
    (target / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ManifestError, match="adapter of another model"):
        load_ensemble(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(10**9) }}", "too big"),
        ("{{ 1 / 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_chat_template_is_in_a_sandbox(tmp_path: Path, template: str, message: str) -> None:
    encoder = TextEncoder(save_lm(tmp_path / "target", 1, num_hidden_layers=1))
    encoder._tokenizer.chat_template = template
    with pytest.raises(TextError, match=f"template refuses these messages.*{message}"):
        encoder.render([{"role": "user", "content": "Hello"}])


# Configurations.

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 4),
    st.sampled_from([10**6, 10**9, 10**12, 10**25, 1e400, "", "llama", [], {}, [1], {"a": 1}]),
)
KEYS = st.sampled_from(
    [
        "architectures",
        "dtype",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "quantization_config",
        "rope_parameters",
        "tie_word_embeddings",
        "transformers_weights",
        "vocab_size",
    ]
)


@hypothesis.given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.example({"num_hidden_layers": 10**9})  # built one by one, it would take months
@hypothesis.example({"num_hidden_layers": 10**9, "model_type": "qwen2"})  # a list of as many
@hypothesis.example({"text_config": {"num_local_experts": 10**9}})
@hypothesis.example({"hidden_size": 10**12, "intermediate_size": 10**12})
def test_whatever_a_config_says_it_is_refused_with_a_sentence(
    made: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shutil.copytree(made, tmp_path / "ensemble", dirs_exist_ok=True)
    change(tmp_path / "ensemble/model_a/config.json", **changes)
    try:
        check_shapes(member(tmp_path / "ensemble", "model_a"))
    except DraftsError:
        return


def test_sizes_of_a_config(folder: Path) -> None:
    change(folder / "model_a/config.json", num_hidden_layers=10**9)
    with pytest.raises(ManifestError, match="num_hidden_layers is 1000000000, over 1024"):
        load_ensemble(folder)
    (folder / "model_a/config.json").write_text(" " * (64 * 2**20) + "{}")
    with pytest.raises(ManifestError, match="is over 67108864 bytes"):
        load_ensemble(folder)


def test_weights_that_a_config_names_itself(folder: Path, tmp_path: Path) -> None:
    """transformers would read them in place of those that were checked."""
    target = tmp_path / "target-llama"
    (target / "sub").mkdir()
    other = {name: tensor + 1 for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(other, target / "sub/other.safetensors", metadata={"format": "pt"})
    change(target / "config.json", transformers_weights="sub/other.safetensors")
    with pytest.raises(ManifestError, match="names weights of its own"):
        load_ensemble(folder)


@pytest.mark.parametrize("field", ["rank", "factors", "width", "draws"])
def test_sizes_of_a_residual_head(folder: Path, field: str) -> None:
    change(folder / "student/config.json", **{field: 2**18})
    with pytest.raises(WeightsError, match="shape"):  # which nothing was allocated for
        check_shapes(member(folder, "residual_a"))
    change(folder / "student/config.json", **{field: 2**62})
    with pytest.raises(ManifestError, match=f"{field}\n.*less than or equal to 262144"):
        load_ensemble(folder)


def test_a_residual_config_without_end(folder: Path) -> None:
    (folder / "student/config.json").write_bytes(b" " * 2**20 + b"{}")
    with pytest.raises(ManifestError, match=r"no usable residual config\.json"):
        ResidualConfig.read(folder / "student")


def test_a_residual_head_of_nan(folder: Path) -> None:
    file = folder / "student/model.safetensors"
    weights = load_file(file)
    weights["eps"][0, 0] = torch.nan
    save_file(weights, file)
    with pytest.raises(WeightsError, match="eps holds NaN"):
        read_member(member(folder, "residual_a"))


def test_a_tokenizer_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model_a/tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"tokenizer\.json cannot be read"):
        load_ensemble(folder)
    monkeypatch.setattr("drafts.manifest._MAX_TOKENIZER", 100)
    with pytest.raises(ManifestError, match=r"target-llama/tokenizer\.json is over 100 bytes"):
        load_ensemble(folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    for name in ("model_a/config.json", "demur.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ManifestError, match="is no file"):
            load_ensemble(folder)
        (folder / name).unlink()
        shutil.copy(folder / "exit_a/config.json", folder / name)
    with pytest.raises(ManifestError):
        transformers_config(folder / "nowhere")


# Hashes that the manifest gives.


def test_pinned_files_are_what_they_were(folder: Path, tmp_path: Path) -> None:
    target, draft = tmp_path / "target-llama", folder / "model_a"
    for name, place in (("target", target), ("model_a", draft)):
        files = ("model.safetensors", "config.json", "tokenizer.json")
        pin(folder, name, {file: sha256(place / file) for file in files})
    assert load_ensemble(folder)
    load_ensemble(folder)
    weights = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ManifestError, match=r"the target: .*is not the file that.*pins"):
        load_ensemble(folder)
    (target / "model.safetensors").write_bytes(weights)
    (draft / "tokenizer.json").unlink()
    with pytest.raises(ManifestError, match=r"'model_a': .*SHA-256 of tokenizer\.json, and"):
        load_ensemble(folder)


def test_a_long_check_is_told_and_made_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("drafts.untrusted._QUIET_S", -1.0)
    file = folder / "model_a/model.safetensors"
    pin(folder, "model_a", {file.name: sha256(file)})
    with caplog.at_level("INFO", "drafts.untrusted"):
        load_ensemble(folder)
        load_ensemble(folder)
    assert [record.message for record in caplog.records] == [f"checking the SHA-256 of {file}"]


def test_pins_name_all_weights_and_nothing_elsewhere(folder: Path) -> None:
    digest = sha256(folder / "model_a/config.json")
    pin(folder, "model_a", {"config.json": digest})
    with pytest.raises(ManifestError, match=r"holds model\.safetensors, whose SHA-256 the manif"):
        load_ensemble(folder)
    weights = sha256(folder / "model_a/model.safetensors")
    pin(folder, "model_a", {"model.safetensors": weights, "../model_b/config.json": digest})
    with pytest.raises(ManifestError, match="leads out of its folder"):
        load_ensemble(folder)
    pin(folder, "model_a", {"model.safetensors": weights.upper()})
    with pytest.raises(ManifestError, match="pattern"):
        load_ensemble(folder)


def test_pins_stay_with_what_they_pin(folder: Path, tmp_path: Path) -> None:
    """What is made of pinned weights has others."""
    for name in ("exit_a", "residual_a"):
        place = member(folder, name).path
        pin(folder, name, {"model.safetensors": sha256(place / "model.safetensors")})
    stage(load_ensemble(folder), tmp_path / "staged")
    assert all(draft.sha256 is None for draft in load_ensemble(tmp_path / "staged").manifest.drafts)
    ensemble = load_ensemble(folder)
    members = tuple(m for m in ensemble.members if m.draft.kind != "model")
    object.__setattr__(ensemble, "members", members)
    ship(ensemble, tmp_path / "shipped", 4, "shipped")
    assert "sha256" not in (tmp_path / "shipped/demur.json").read_text()


# A store that somebody else can write to.


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> DraftsStore:
    store = DraftsStore(tmp_path / "drafts")
    store.publish(folder, about={})
    return store


def forge(store: DraftsStore, change_it: Callable[[dict[str, Any]], None]) -> Version:
    """Change v1 as somebody could who writes to the bucket, hashes included."""
    files = {name: store._fs.cat_file(place(store, name)) for name in store.version("v1").files}
    manifest = json.loads(files["demur.json"])
    change_it(manifest)
    files["demur.json"] = json.dumps(manifest).encode()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in files.items():
        store._fs.pipe_file(store._at("v1", f"{name}.{digests[name]}"), content)
    change(Path(store._at("v1", "version.json")), files=digests)
    return store.version("v1")


def place(store: DraftsStore, name: str) -> str:
    return store._at("v1", f"{name}.{store.version('v1').files[name]}")


@pytest.mark.parametrize("source", ["absolute", "up", "home", "hub"])
def test_a_version_names_no_weights_but_its_own(
    store: DraftsStore, folder: Path, tmp_path: Path, source: str
) -> None:
    elsewhere = {
        "absolute": {"source": str(folder / "exit_a")},
        "up": {"source": "../../../ensemble/exit_a"},
        "home": {"source": "~/exit_a"},
        "hub": {"source": "org/tiny", "revision": "f" * 40},
    }[source]
    version = forge(store, lambda manifest: manifest["drafts"][0].update(elsewhere))
    with pytest.raises(StoreError, match=r"weights of 'exit_a' are .* none but its own"):
        store.fetch(version, tmp_path / "work/versions")
    assert list((tmp_path / "work/versions").iterdir()) == []


def test_a_version_that_was_fetched_before_is_looked_at_again(
    store: DraftsStore, folder: Path, tmp_path: Path
) -> None:
    fetched = store.fetch(store.current(), tmp_path / "work")
    evil = {"source": str(folder / "exit_a")}
    version = forge(store, lambda manifest: manifest["drafts"][0].update(evil))
    shutil.copy(place(store, "demur.json"), fetched / "demur.json")
    with pytest.raises(StoreError, match="none but its own"):
        store.fetch(version, tmp_path / "work")


def test_a_versions_target_is_not_read(store: DraftsStore, folder: Path, tmp_path: Path) -> None:
    ensemble = load_ensemble(folder)
    evil = {"source": "/etc", "sha256": {"passwd": "0" * 64}}
    version = forge(store, lambda manifest: manifest.update(target=evil))
    assert open_version(store, version, ensemble, tmp_path).target_path == ensemble.target_path


def test_a_version_is_the_one_that_it_is_called(store: DraftsStore, tmp_path: Path) -> None:
    """A service that finds another name in what it serves would swap again and again."""
    version = forge(store, lambda manifest: manifest.update(weights_version="v2"))
    with pytest.raises(StoreError, match="its manifest is of another, v2"):
        store.fetch(version, tmp_path / "work")
    shutil.copytree(Path(store._at("v1", "x")).parent, Path(store._at("v7", "x")).parent)
    with pytest.raises(StoreError, match=r"version v7: version\.json is of another, v1"):
        store.version("v7")
    assert [version.name for version in store.versions()] == ["v1"]


@hypothesis.given(name=st.one_of(NAMES, NAMES.map("{}.json".format)), digest=st.text(max_size=70))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.example(name="/proc/kcore", digest="0" * 64)  # hashed, it has no end
@hypothesis.example(name="demur.json/../../x.json", digest="0" * 64)
@hypothesis.example(name="demur.json", digest="x/../../../../../secret.json")
def test_a_versions_files_come_from_it_and_go_into_its_folder(
    tmp_path: Path, name: str, digest: str
) -> None:
    root = tmp_path / "drafts/versions/v1"
    root.mkdir(parents=True, exist_ok=True)
    described = {"name": "v1", "parent": None, "created": 0, "about": {}, "files": {name: digest}}
    (root / "version.json").write_text(json.dumps(described))
    (tmp_path / "secret.json").write_text("")
    before = {path for path in tmp_path.rglob("*") if "work" not in path.parts}
    store = DraftsStore(tmp_path / "drafts")
    with pytest.raises((DraftsError, OSError)):
        store.fetch(store.version("v1"), tmp_path / "work")
    assert {path for path in tmp_path.rglob("*") if "work" not in path.parts} == before


def test_only_what_is_read_is_copied(store: DraftsStore, folder: Path, tmp_path: Path) -> None:
    (folder / "exit_a/evil.py").write_text("")
    (folder / "exit_a/pytorch_model.bin").write_text("")
    edit_manifest(folder, weights_version="v2")
    published = store.publish(folder, about={}).files
    assert {PurePosixPath(name).suffix for name in published} <= {".json", ".safetensors", ".jinja"}
    version = store.version("v1")
    forged = version.model_copy(update={"files": version.files | {"exit_a/evil.py": "0" * 64}})
    fetched = store.fetch(forged, tmp_path / "work")  # which would not find it
    assert not (fetched / "exit_a/evil.py").exists()


def test_a_version_has_bounds(store: DraftsStore, folder: Path, tmp_path: Path) -> None:
    version, ensemble = store.current(), load_ensemble(folder)
    with pytest.raises(StoreError, match="v1 is over 10000 bytes"):
        store.fetch(version, tmp_path / "work", max_bytes=10_000)
    assert list((tmp_path / "work").iterdir()) == []
    assert open_version(store, version, ensemble, tmp_path / "other")
    huge = Path(place(store, "demur.json"))
    huge.unlink()
    with huge.open("wb") as file:
        file.truncate(2**40)  # of which the disk has nothing
    with pytest.raises(StoreError, match=r"v1 is over [0-9]+ bytes"):
        open_version(store, version, _called(ensemble, "v9"), tmp_path / "another")
    huge.unlink()
    huge.symlink_to("/dev/zero")
    with pytest.raises(StoreError, match="is no file"):
        store.fetch(version, tmp_path / "work")


def _called(ensemble: Any, name: str) -> Any:
    """An ensemble that no version of the store is."""
    manifest = ensemble.manifest.model_copy(update={"weights_version": name})
    object.__setattr__(ensemble, "manifest", manifest)
    return ensemble


@pytest.mark.parametrize(
    "name", ["..", "../../outside", "", "a/b", ".hidden", "x\n", "x" * 5000, "\x00"]
)
def test_names_of_versions(store: DraftsStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "drafts/current").write_text(name)
    (tmp_path / "outside").mkdir()
    shutil.copy(store._at("v1", "version.json"), tmp_path / "outside")
    with pytest.raises((StoreError, OSError)):
        store.current()
    with pytest.raises((StoreError, OSError)):
        store.make_current(name)


def test_notes_have_bounds(store: DraftsStore, tmp_path: Path) -> None:
    for name in ("current", "versions/v1/version.json"):
        with (tmp_path / "drafts" / name).open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(StoreError, match=f"{name} is over 4194304 bytes"):
            store.current_name() if name == "current" else store.version("v1")


# What the trainer reads.


def test_a_corpus_names_its_own_parts(tmp_path: Path) -> None:
    text = Text(key=1, response_start=1, token_ids=[1, 2])
    Corpus(tmp_path / "corpus", {}).add(0, [text])
    assert Corpus(tmp_path / "corpus").read(300) == [text]
    outside = tmp_path / "outside.jsonl"
    outside.write_text(text.model_dump_json())
    for name in ("../outside.jsonl", str(outside), "/proc/kcore"):
        change(tmp_path / "corpus/corpus.json", parts={name: sha256(outside)})
        with pytest.raises(CorpusError, match="is no part"):
            Corpus(tmp_path / "corpus")
    (tmp_path / "corpus/corpus.json").write_text("[" * 100_000)
    with pytest.raises(CorpusError, match="cannot be read"):
        Corpus(tmp_path / "corpus")


@pytest.mark.parametrize(
    ("key", "start", "ids"),
    [
        (1, 1, "text"),
        (1, 1, 7.5),
        (1, 1, b"odd"),
        ("key", 1, bytes(8)),
        (-1, 1, bytes(8)),
        (1, 2, bytes(8)),
        (1, 1, b""),
        (1, 1, bytes(4 * MAX_TOKENS + 4)),
    ],
)
def test_rows_of_the_spool_that_are_no_texts(
    tmp_path: Path, key: object, start: object, ids: object
) -> None:
    good = Text(key=1, response_start=1, token_ids=[1, 2])
    with open_spool(str(tmp_path / "spool.sqlite")) as spool:
        spool.append([good])
        with sqlite3.connect(tmp_path / "spool.sqlite") as other:
            other.execute(
                "INSERT INTO conversations (created, key, response_start, token_ids) "
                "VALUES (0, ?, ?, ?)",
                (key, start, ids),
            )
        spool.append([good])
        assert [entry.text for entry in spool.read(START, 10)] == [good, good]
        assert [entry.text for entry in spool.newest(10)] == [good, good]
    fields = {b"key": str(key).encode(), b"start": str(start).encode()}
    if isinstance(ids, bytes):
        assert _entries([(b"1-0", fields | {b"ids": ids})]) == []
    assert _entries([(b"1-0", fields)]) == []


def test_facts_of_the_spool_that_are_none(tmp_path: Path) -> None:
    with open_spool(str(tmp_path / "spool.sqlite")) as spool:
        with sqlite3.connect(tmp_path / "spool.sqlite") as other:
            other.execute("UPDATE facts SET value = 'many'")
        for ask in (spool.cleared, spool.stats, spool.trim):
            with pytest.raises(SpoolError):
                ask()


def test_checkpoints_of_another_student(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimiser.step()
    checkpoint.save(tmp_path, 1, {}, [module], [optimiser])
    own = tmp_path / "checkpoint-000000001"
    assert checkpoint.load_last(tmp_path, {}, [module], [optimiser]) == 1
    moments = load_file(own / "optimiser-0.safetensors")
    moments["weight/exp_avg"] = torch.zeros(1000)
    save_file(moments, own / "optimiser-0.safetensors")
    with pytest.raises(CheckpointError, match="moments of weight are of another shape"):
        checkpoint.load_last(tmp_path, {}, [module], [optimiser])
    save_file({"weight": torch.zeros(5, 5), "bias": torch.zeros(2)}, own / "student-0.safetensors")
    with pytest.raises(CheckpointError, match="of another student"):
        checkpoint.load_last(tmp_path, {}, [module], [optimiser])
    for state in ("[" * 100_000, '{"step": 1, "config": 7}', '{"step": [], "config": {}}', "[]"):
        (own / "state.json").write_text(state)
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
            checkpoint.load_last(tmp_path, {}, [module], [optimiser])


def test_no_module_of_ours_unpickles_or_trusts() -> None:
    """A reader of models that is added later says so, too."""
    root = Path(__file__).parents[1]
    for room in ("drafts", "server", "osd"):
        for file in (root / room).rglob("*.py"):
            source = file.read_text()
            for word in ("import pickle", "torch.load(", "yaml.load(", "trust_remote_code=True"):
                assert word not in source, f"{file} has {word}"


def test_what_transformers_would_do_without_being_told(tmp_path: Path) -> None:
    """Why it is told: of a folder with a pickle alone, it reads the pickle."""
    save_lm(tmp_path, 1, num_hidden_layers=1)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
