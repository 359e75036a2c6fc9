"""The drafts store, on a disk and in a bucket (fsspec's in-memory file system)."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from drafts.errors import StoreError, WeightsError
from drafts.manifest import load_ensemble
from drafts.store import DraftsStore
from drafts.weights import read_member
from tests.tiny import edit_manifest, mixed_ensemble, perturb


@pytest.fixture(scope="module")
def ensembles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three versions of one ensemble."""
    first = mixed_ensemble(tmp_path_factory.mktemp("store") / "v1")
    folders = [first]
    for version in ("v2", "v3"):
        folder = shutil.copytree(first, first.parent / version)
        perturb(folder / "exit_a", seed=int(version[1]))
        edit_manifest(folder, weights_version=version)
        folders.append(folder)
    return folders


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "drafts")
    fsspec.filesystem("memory").store.clear()
    return "memory://drafts"


def test_versions_come_back_as_they_were_published(
    root: str, ensembles: list[Path], tmp_path: Path
) -> None:
    store = DraftsStore(root)
    assert store.versions() == []
    with pytest.raises(StoreError, match="no current version"):
        store.current()
    for folder in ensembles:
        store.publish(folder, about={"kl": 0.1})
    assert [version.name for version in store.versions()] == ["v1", "v2", "v3"]
    assert [version.parent for version in store.versions()] == [None, "v1", "v2"]
    fetched = DraftsStore(root).fetch(store.current(), tmp_path / "cache")
    got, expected = load_ensemble(fetched), load_ensemble(ensembles[2])
    assert got.manifest == expected.manifest
    for mine, theirs in zip(got.members, expected.members, strict=True):
        a, b = read_member(mine), read_member(theirs)
        assert all(bool((a[name] == b[name]).all()) for name in b)
    # A second fetch copies nothing; what was altered meanwhile is copied again.
    file = fetched / "exit_a/model.safetensors"
    before = file.stat().st_mtime_ns
    assert DraftsStore(root).fetch(store.current(), tmp_path / "cache") == fetched
    assert file.stat().st_mtime_ns == before
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert DraftsStore(root).fetch(store.current(), tmp_path / "cache") == fetched
    assert file.read_bytes() == content
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["v3"]


def test_rollback_goes_to_the_parent(root: str, ensembles: list[Path]) -> None:
    store = DraftsStore(root)
    for folder in ensembles:
        store.publish(folder, about={})
    assert store.rollback().name == "v2"
    assert store.rollback().name == "v1"
    assert DraftsStore(root).current().name == "v1"
    with pytest.raises(StoreError, match="no parent"):
        store.rollback()
    assert store.make_current("v3").name == store.current().name == "v3"
    with pytest.raises(StoreError, match="no version v9"):
        store.make_current("v9")
    assert store.current().name == "v3"


def test_half_a_version_does_not_exist(
    root: str, ensembles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DraftsStore(root)
    store.publish(ensembles[0], about={})
    fs = store._fs
    put, calls = fs.put_file, []

    def failing(*arguments: str) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise ConnectionError("gone")
        put(*arguments)

    monkeypatch.setattr(fs, "put_file", failing)
    with pytest.raises(ConnectionError):
        store.publish(ensembles[1], about={})
    monkeypatch.undo()
    assert [version.name for version in store.versions()] == ["v1"]
    assert store.current().name == "v1"
    store.publish(ensembles[1], about={})  # goes over what was left
    assert store.current().name == "v2"


def test_what_was_altered_is_refused_by_name(
    root: str, ensembles: list[Path], tmp_path: Path
) -> None:
    store = DraftsStore(root)
    version = store.publish(ensembles[0], about={})
    relative = "exit_b/model.safetensors"
    path = store._at("v1", f"{relative}.{version.files[relative]}")
    content = store._fs.cat_file(path)
    store._fs.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"exit_b/model\.safetensors is not what was published"):
        store.fetch(version, tmp_path / "cache")
    store._fs.rm(path)
    with pytest.raises(StoreError, match=r"exit_b/model\.safetensors is missing"):
        store.fetch(version, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    evil = version.model_copy(update={"files": {"../../outside": "0" * 64}})
    with pytest.raises(StoreError, match="leads out of its folder"):
        store.fetch(evil, tmp_path / "cache")


def test_what_cannot_be_served_is_not_published(
    root: str, ensembles: list[Path], tmp_path: Path
) -> None:
    store = DraftsStore(root)
    store.publish(ensembles[0], about={})
    with pytest.raises(StoreError, match="v1 exists already"):
        store.publish(ensembles[0], about={})
    named = shutil.copytree(ensembles[1], tmp_path / "named")
    edit_manifest(named, weights_version="../../elsewhere")
    with pytest.raises(StoreError, match=r"'\.\./\.\./elsewhere': a version's name"):
        store.publish(named, about={})
    broken = shutil.copytree(ensembles[1], tmp_path / "broken")
    (broken / "exit_a/model.safetensors").unlink()
    with pytest.raises(WeightsError, match="exit_a"):
        store.publish(broken, about={})
    inside = shutil.copytree(ensembles[1], tmp_path / "inside")
    shutil.copytree(ensembles[0].parent / "target-llama", inside / "target")
    edit_manifest(inside, target={"source": "target"})
    with pytest.raises(StoreError, match="the target lies inside"):
        store.publish(inside, about={})
    apart = shutil.copytree(ensembles[1], tmp_path / "apart")
    entries = [entry.model_dump() for entry in load_ensemble(apart).manifest.drafts]
    entries[0]["source"] = str(ensembles[0] / entries[0]["source"])
    edit_manifest(apart, drafts=entries)
    with pytest.raises(StoreError, match=f"'{entries[0]['name']}' lie outside"):
        store.publish(apart, about={})
    assert [version.name for version in store.versions()] == ["v1"]


def test_what_a_bucket_raises_is_told_as_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoAnswer(Exception):
        """As botocore's EndpointConnectionError: no OSError."""

    def no_answer(*arguments: object, **options: object) -> None:
        raise NoAnswer("no route to the bucket")

    store = DraftsStore("memory://drafts")
    for name in ("info", "exists", "cat_file", "ls"):
        monkeypatch.setattr(MemoryFileSystem, name, no_answer)
    for ask in (store.current_name, store.versions, store.current):
        with pytest.raises(StoreError, match="NoAnswer: no route to the bucket"):
            ask()
