"""Distilled drafts in the form that travels, and put beside a target again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafts.errors import ManifestError
from drafts.exits import apply_delta, split_delta
from drafts.manifest import load_ensemble, read_manifest
from drafts.reference import Reference
from drafts.shipped import add_shipped, ship
from tests.tiny import edit_manifest, mixed_ensemble


@given(rank=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_low_rank_difference_gives_the_trained_weights_back(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = {"a": random(12, 9), "b": random(9, 9), "norm": random(9)}
    move = 0.1 * random(12, rank) @ random(rank, 9)
    trained = start | {"a": start["a"] + move, "norm": start["norm"] + 1}
    delta = split_delta(start, trained, rank)
    assert not any(name.startswith("b.") for name in delta)  # it did not change
    got = apply_delta(start, delta)
    assert got["b"].equal(start["b"])
    assert float((got["a"] - trained["a"]).norm() / move.norm()) < 0.01
    assert float((got["norm"] - trained["norm"]).abs().max()) < 0.02
    cut = apply_delta(start, split_delta(start, trained, 1))
    if rank > 1:
        assert float((cut["a"] - trained["a"]).norm() / move.norm()) > 0.02


def test_shipped_drafts_answer_as_those_they_were_made_of(tmp_path: Path) -> None:
    """Exit and residual drafts, through the files that travel and back."""
    folder = mixed_ensemble(tmp_path / "ensemble")
    target = load_ensemble(folder).target_path
    (folder / "target").symlink_to(target)
    ensemble = load_ensemble(folder)
    drafts = [entry.model_dump(exclude_none=True) for entry in ensemble.manifest.drafts]
    kept = [entry for entry in drafts if entry["kind"] != "model"]
    edit_manifest(folder, drafts=kept, target={"source": "target"})
    ensemble = load_ensemble(folder)
    ship(ensemble, tmp_path / "shipped", rank=64, name="tiny")
    for weights in (tmp_path / "shipped").rglob("*.safetensors"):
        assert weights.stat().st_mode == weights.with_name("config.json").stat().st_mode
    again = tmp_path / "again"
    again.mkdir()
    (again / "target").symlink_to(target)
    add_shipped(tmp_path / "shipped", again)
    made = load_ensemble(again)
    # Rounded and cut, they are other numbers, and have a name of their own.
    version = made.manifest.weights_version
    assert version.startswith("tiny-")
    assert len(version) == len("tiny-") + 8
    ids = [3, 5, 7, 9, 11, 13, 15]
    got, expected = (Reference(one).score(ids, 2) for one in (made, ensemble))
    assert abs(got.epistemic - expected.epistemic).max() < 0.05 * expected.epistemic.max()
    assert abs(got.logprob - expected.logprob).max() < 1e-6


def test_shipping_replaces_only_what_it_wrote(tmp_path: Path) -> None:
    folder = mixed_ensemble(tmp_path / "ensemble")
    drafts = [
        entry.model_dump(exclude_none=True) for entry in load_ensemble(folder).manifest.drafts
    ]
    edit_manifest(folder, drafts=[entry for entry in drafts if entry["kind"] == "residual"])
    ensemble = load_ensemble(folder)
    ship(ensemble, tmp_path / "shipped", rank=4, name="tiny")
    ship(ensemble, tmp_path / "shipped", rank=4, name="tiny", draws=1)
    assert len(read_manifest(tmp_path / "shipped").drafts) == 1
    with pytest.raises(ManifestError, match="is the ensemble itself"):
        ship(ensemble, folder, rank=4, name="tiny")
    with pytest.raises(ManifestError, match="is not empty and holds no drafts"):
        ship(ensemble, tmp_path, rank=4, name="tiny")
    assert load_ensemble(folder) == ensemble
