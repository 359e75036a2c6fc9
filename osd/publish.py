"""Versions of an ensemble's drafts: written out of students, and put into the store."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from drafts.calibration import CALIBRATION_NAME
from drafts.errors import StoreError
from drafts.manifest import MANIFEST_NAME, Ensemble, load_ensemble
from drafts.same_shape import check_same_shape
from drafts.store import DraftsStore, Version
from drafts.weights import open_to_readers
from osd.ensemble import letters
from osd.students import Trainee
from osd.warm_start import checkpoints, widths

logger = logging.getLogger(__name__)

# A version may be stored in wider types than the ensemble's own drafts, with tokenizers beside.
_MAX_WIDER, _MAX_BESIDE = 4, 2**30


def write_version(ensemble: Ensemble, students: Sequence[Trainee], folder: Path, stem: str) -> str:
    """Write students as another version of an ensemble, in the types that its tensors have.

    Args:
        students: one for each checkpoint of the ensemble, in its order.
        folder: replaced if it is there.
        stem: of the version's name, to which a hash of the weights is added.

    Returns:
        The version's name.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    digest = hashlib.sha256()
    sources = {}
    for path, student, letter in zip(checkpoints(ensemble), students, letters(), strict=False):
        sources[path] = f"student_{letter}"
        own = folder / sources[path]
        student.save(own)
        file, types = own / "model.safetensors", widths(path)
        weights = {name: t.to(types.get(name, t.dtype)) for name, t in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        digest.update(file.read_bytes())
    version = f"{stem}-{digest.hexdigest()[:8]}"
    _write_manifest(ensemble, sources, folder, version)
    return version


def stage(ensemble: Ensemble, folder: Path) -> None:
    """Copy an ensemble as it serves into a folder that the store takes: drafts only."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sources = {}
    for path, letter in zip(checkpoints(ensemble), letters(), strict=False):
        sources[path] = f"student_{letter}"
        shutil.copytree(path, folder / sources[path])
    _write_manifest(ensemble, sources, folder, ensemble.manifest.weights_version)
    if (ensemble.folder / CALIBRATION_NAME).exists():
        shutil.copy(ensemble.folder / CALIBRATION_NAME, folder)


def first_version(store: DraftsStore, ensemble: Ensemble, work: Path) -> Version:
    """The store's current version; an ensemble becomes it if nothing was published."""
    try:
        return store.current()
    except StoreError:
        if store.versions():  # there is one, and something else is wrong
            raise
    staged = work / f"first-{uuid.uuid4().hex}"  # of replicas on one machine, each its own
    try:
        stage(ensemble, staged)
        return store.publish(staged, about={"made by": "the ensemble that the service has"})
    except StoreError:  # another replica did the same a moment ago
        return store.current()
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def open_version(store: DraftsStore, version: Version, ensemble: Ensemble, work: Path) -> Ensemble:
    """A version of an ensemble on this machine, beside the ensemble's own target.

    The version that the ensemble itself is can be damaged in the store: then it is the ensemble.

    Raises:
        StoreError: if a file is missing or not what was published, or it is far larger than the
            ensemble's drafts.
        ManifestError, WeightsError: if it is no version of this ensemble.
    """
    own = sum(
        file.stat().st_size for path in checkpoints(ensemble) for file in path.glob("*.safetensors")
    )
    try:
        folder = store.fetch(version, work / "versions", _MAX_WIDER * own + _MAX_BESIDE)
    except StoreError as error:
        if version.name != ensemble.manifest.weights_version:
            raise
        logger.warning("%s; the ensemble's own files stand in for it", error)
        return ensemble
    opened = load_ensemble(folder, ensemble.target_path)
    check_same_shape(ensemble, opened)
    return opened


def _write_manifest(
    ensemble: Ensemble, sources: dict[Path, str], folder: Path, version: str
) -> None:
    manifest: dict[str, Any] = ensemble.manifest.model_dump(exclude_none=True)
    manifest["weights_version"] = version
    if ensemble.manifest.target.revision is None:
        manifest["target"] = {"source": str(ensemble.target_path)}
    for entry, member in zip(manifest["drafts"], ensemble.members, strict=True):
        entry["source"] = sources[member.path]
        for pin in ("revision", "sha256"):  # of the weights that these began as
            entry.pop(pin, None)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    open_to_readers(folder)
