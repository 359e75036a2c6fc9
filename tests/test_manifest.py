"""Ensembles that cannot work are refused with a sentence that says what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from drafts.calibration import CALIBRATION_NAME, load_calibration
from drafts.errors import ManifestError, WeightsError
from drafts.exits import copy_exit
from drafts.init import default_folder, init_default, write_manifest
from drafts.manifest import load_ensemble, read_manifest
from drafts.shipped import SHIPPED, add_shipped
from drafts.weights import check_shapes, read_member
from tests.tiny import byte_level_tokenizer, edit_manifest, mixed_ensemble, save_lm, save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mixed_ensemble(tmp_path / "ensemble")


def change_draft(folder: Path, index: int, **changes: Any) -> None:
    drafts = json.loads((folder / "demur.json").read_text())["drafts"]
    drafts[index] |= changes
    edit_manifest(folder, drafts=drafts)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_good_one(folder: Path) -> None:
    ensemble = load_ensemble(folder)
    kinds = [member.draft.kind for member in ensemble.members]
    assert kinds == ["exit", "exit", "model", "model", "residual", "residual"]
    assert ensemble.hidden_layers == (1, 2, 3)
    assert [draws for _, draws in ensemble.students().values()] == [[0, 3]]
    for member in ensemble.members:
        assert read_member(member)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no ensemble.*demur init"):
        load_ensemble(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ManifestError, match=r"file is no ensemble"):
        load_ensemble(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format"),
        ({"drafts": []}, "drafts.*at least 1"),
        ({"surprise": 1}, "surprise.*not permitted"),
        ({"target": {"source": "no-org/no-model-at-all"}}, "neither a folder"),
        ({"target": {"source": "student"}}, "no usable config.json"),
    ],
)
def test_manifests_that_are_none(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(ManifestError, match=message):
        load_ensemble(folder)


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"kind": "oracle"}, "oracle"),
        (0, {"name": "draft_1"}, "name.*pattern"),
        (0, {"name": "exit_b"}, "same name: exit_b"),
        (0, {"layer": 0}, "greater than or equal to 1"),
        (0, {"layer": 4}, "layer 4.*has 4 layers"),
        (0, {"source": "nowhere"}, "neither a folder"),
        (4, {"draw": 4}, "draw 4.*holds 4"),
        (4, {"source": "exit_a"}, "no usable residual config.json"),
    ],
)
def test_drafts_that_do_not_fit(
    folder: Path, index: int, changes: dict[str, Any], message: str
) -> None:
    change_draft(folder, index, **changes)
    with pytest.raises(ManifestError, match=message):
        load_ensemble(folder)


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        ("model_a", {"vocab_size": 321}, "'model_a'.*vocab_size is 321, the target's is 320"),
        ("exit_a", {"hidden_size": 128}, "'exit_a'.*hidden_size is 128, the target's is 64"),
        ("exit_a", {"architectures": ["OtherLM"]}, "architecture is OtherLM.*is LlamaForCausalLM"),
        ("student", {"hidden_size": 32}, "hidden_size is 32, the target's is 64"),
        ("student", {"taps": [-1]}, "greater than or equal to 1"),
        ("model_a", {"quantization_config": {"quant_method": "fp8"}}, "'model_a' is quantised"),
        ("student", {"taps": [9]}, "layer 9.*has 4 layers"),
        ("student", {"depth": 3}, "depth"),
    ],
)
def test_configs_that_do_not_fit(
    folder: Path, draft: str, changes: dict[str, Any], message: str
) -> None:
    change_config(folder / draft, **changes)
    with pytest.raises(ManifestError, match=message):
        load_ensemble(folder)


def test_a_vocabulary_of_the_same_size_but_other_tokens(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    document = json.loads(tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    save_tokenizer(folder / "model_a", type(tokenizer).from_str(json.dumps(document)))
    with pytest.raises(ManifestError, match=r"'model_a'.*vocabulary differs \(2 tokens.*'a' is"):
        load_ensemble(folder)


def test_hidden_states_of_an_unchecked_architecture(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "ensemble")
    change_config(tmp_path / "target-llama", architectures=["GemmaForCausalLM"])
    with pytest.raises(ManifestError, match=r"GemmaForCausalLM. Use drafts of kind 'model'"):
        load_ensemble(folder)


def test_shapes_are_checked_by_header(folder: Path) -> None:
    shutil.copy(folder / "model_a/model.safetensors", folder / "model_b/model.safetensors")
    member = next(m for m in load_ensemble(folder).members if m.draft.name == "model_b")
    with pytest.raises(WeightsError, match=r"'model_b'.*missing"):
        check_shapes(member)


def test_a_hub_id_is_found_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own code path, offline: its cache layout filled from a local folder."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--org--tiny"
    save_lm(repository / "snapshots" / revision, seed=3)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "ensemble"
    draft = copy_exit(repository / "snapshots" / revision, folder / "exit_a", 1, 2)
    write_manifest(folder, "hub", "v1", "org/tiny", [draft])
    edit_manifest(folder, target={"source": "org/tiny", "revision": revision})
    assert load_ensemble(folder).target_path.name == revision
    # A branch or a tag can be moved to other files.
    for unpinned in (None, "main", "v1.0", revision[:12]):
        edit_manifest(folder, target={"source": "org/tiny", "revision": unpinned})
        with pytest.raises(ManifestError, match=r"'org/tiny'.*40 digits.*org/tiny/commits/main"):
            load_ensemble(folder)
    edit_manifest(folder, target={"source": "org/tiny", "revision": "f" * 40})
    with pytest.raises(ManifestError, match="org/tiny"):
        load_ensemble(folder)


def test_init_makes_the_default_once(tmp_path: Path) -> None:
    init_default(default_folder())
    ensemble = load_ensemble(default_folder())
    assert {member.draft.kind for member in ensemble.members} == {"residual"}
    assert len(ensemble.students()) == 4  # one a shard
    before = (default_folder() / "demur.json").stat().st_mtime_ns
    init_default(default_folder())
    assert (default_folder() / "demur.json").stat().st_mtime_ns == before


def test_init_does_not_touch_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ManifestError, match="not empty"):
        init_default(tmp_path)
    assert read_names(tmp_path) == ["thesis.txt"]


def test_an_older_default_is_made_again(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "ensemble")
    edit_manifest(folder, weights_version="exit-untrained-1")
    # What was fitted with the old drafts does not stay with the new ones, nor go unsaid.
    (folder / CALIBRATION_NAME).write_text("{}")
    lines: list[str] = []
    init_default(folder, lines.append)
    assert "is of an earlier version" in lines[0]
    assert CALIBRATION_NAME in lines[1]
    ensemble = load_ensemble(folder)
    calibration = load_calibration(folder)
    assert calibration == load_calibration(SHIPPED / "residual")
    assert calibration is not None
    fitted = (calibration.origin.model, calibration.origin.weights_version)
    assert fitted == (ensemble.manifest.name, ensemble.manifest.weights_version)
    assert calibration.origin.half == "dev"
    shipped = read_manifest(SHIPPED / "residual")
    assert ensemble.manifest == shipped
    assert ensemble.target_config.num_hidden_layers == 30
    assert read_names(tmp_path) == ["ensemble", "target-llama"]
    # As if this package had been upgraded since; then, as if somebody had put other drafts there.
    marker = folder / "made-by-demur-init"
    assert marker.read_text() == f"residual {shipped.weights_version}"
    marker.write_text("residual residual-1")
    edit_manifest(folder, weights_version="residual-2")
    init_default(folder, lines.append)
    assert read_manifest(folder).weights_version == "residual-2"
    edit_manifest(folder, weights_version="residual-1")
    with pytest.raises(ManifestError, match="of residual drafts; choose another folder for exit"):
        init_default(folder, kind="exit")
    init_default(folder, lines.append)
    assert read_manifest(folder) == shipped


def test_outdated_exit_drafts_are_made_again_as_exit_drafts(tmp_path: Path) -> None:
    init_default(tmp_path, kind="exit")
    (tmp_path / "made-by-demur-init").write_text("exit exit-1")
    edit_manifest(tmp_path, weights_version="exit-1")
    init_default(tmp_path)
    assert read_manifest(tmp_path) == read_manifest(SHIPPED / "exit")


def test_two_inits_at_once_leave_one_ensemble(tmp_path: Path) -> None:
    folder = tmp_path / "ensemble"

    def meanwhile(line: str) -> None:
        if line.startswith("adding"):
            mixed_ensemble(folder)

    init_default(folder, meanwhile)
    assert load_ensemble(folder).manifest.weights_version == "v1"
    assert read_names(tmp_path) == ["ensemble", "target-llama"]


def test_init_does_not_pass_one_kind_of_drafts_off_as_another(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "ensemble")
    init_default(folder)
    with pytest.raises(ManifestError, match="of exit and model and residual drafts; choose"):
        init_default(folder, kind="exit")


@pytest.mark.parametrize("kind", ["residual", "exit"])
def test_the_drafts_that_ship_fit_the_default_target(tmp_path: Path, kind: str) -> None:
    init_default(default_folder())
    (tmp_path / "target").symlink_to(default_folder() / "target")
    add_shipped(SHIPPED / kind, tmp_path)
    ensemble = load_ensemble(tmp_path)
    assert {member.draft.kind for member in ensemble.members} == {kind}
    for member in ensemble.members:
        check_shapes(member)
        assert all(bool(tensor.isfinite().all()) for tensor in read_member(member).values())


def test_what_ships_is_small() -> None:
    files = list(SHIPPED.rglob("*.safetensors"))
    assert len(files) == 8  # four students, four exits
    assert sum(file.stat().st_size for file in files) < 32 * 2**20


def read_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_manifest_is_read_without_its_members(folder: Path) -> None:
    edit_manifest(folder, target={"source": "org/somewhere"})
    assert read_manifest(folder).target.source == "org/somewhere"


def test_init_says_what_is_wrong_with_the_ensemble_that_is_there(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "ensemble")
    init_default(folder)
    file = folder / "exit_a/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ManifestError, match=r"draft 'exit_a'.*cannot be read.*Remove .* to make"):
        init_default(folder)


def test_a_target_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "ensemble")
    (tmp_path / "target-llama/tokenizer.json").unlink()
    with pytest.raises(ManifestError, match=r"has no tokenizer\.json"):
        load_ensemble(folder)
