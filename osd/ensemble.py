"""Finished drafts as a folder that the service takes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from drafts.init import write_manifest
from drafts.manifest import load_ensemble
from drafts.shipped import TRAINING_NAME
from drafts.weights import open_to_readers
from osd.config import DistillConfig
from osd.log import read_measured
from osd.students import Trainee


def write_ensemble(
    config: DistillConfig, step: int, students: Sequence[Trainee], corpus: dict[str, Any]
) -> None:
    """Write `ensemble/` into the run's folder, in place of one from before.

    Args:
        step: how many steps the students have made.
        corpus: what their texts are of.
    """
    folder, building = config.run / "ensemble", config.run / "ensemble.partial"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    drafts: list[dict[str, object]] = []
    for student, letter in zip(students, letters(), strict=False):
        drafts += student.save(building / f"student_{letter}")
    named = [
        {"name": f"draft_{letter}", **entry}
        for entry, letter in zip(drafts, letters(), strict=False)
    ]
    digest = hashlib.sha256()
    for file in sorted(building.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    version = f"{config.drafts.kind}-{step}-{digest.hexdigest()[:8]}"
    local = Path(config.target).expanduser()
    target = str(local.resolve()) if local.is_dir() else config.target
    write_manifest(building, config.name, version, target, named, config.revision)
    training = {
        "config": training_config(config),
        "corpus": corpus,
        "held out": {step: measured._asdict() for step, measured in read_measured(config.run)},
    }
    (building / TRAINING_NAME).write_text(json.dumps(training, indent=1) + "\n")
    load_ensemble(building)
    open_to_readers(building)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def training_config(config: DistillConfig) -> dict[str, Any]:
    """What a finished ensemble says of the run that made it."""
    return config.model_dump(mode="json", exclude={"run", "corpus", "device"})


def letters() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ...: drafts' names hold no digits."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    yield from alphabet
    yield from (one + two for one in alphabet for two in alphabet)
