"""The calibration of a new version: kept, fitted again, or withheld; never left as it was."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from drafts.calibration import CALIBRATION_NAME, load_calibration, save_calibration
from drafts.calibration_fit import fit
from drafts.calibration_parts import FittedTask, Origin
from drafts.errors import CalibrationError
from drafts.features import claim_of
from drafts.labelled import TEXTS_NAME, LabelledText, read_texts, write_texts
from drafts.manifest import Ensemble, load_ensemble
from drafts.reference import Reference
from drafts.text import TextEncoder
from osd.build import open_teacher
from osd.posterior import PosteriorConfig
from osd.recalibrate import Recalibrator
from osd.states import FreshStates
from osd.students import Trainee
from osd.teacher import Teacher
from osd.warm_start import students_of
from tests.online_world import EXIT, RESIDUAL, make_world, online

WORDS = ["the", "capital", "of", "Japan", "is", "Tokyo", "She", "gets", "Paris", "4", "15", "60"]


@pytest.fixture(scope="module", params=["exit", "residual"])
def ensemble(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    """Calibrated on answers that are the likelier wrong, the more its drafts doubt them."""
    folder = tmp_path_factory.mktemp(request.param)
    world = make_world(folder, EXIT if request.param == "exit" else RESIDUAL, steps=10)
    loaded = load_ensemble(world.places.ensemble)
    encoder, reference = TextEncoder(loaded.target_path), Reference(loaded)
    rng, noise = random.Random(1), np.random.default_rng(1)
    texts, scores, claims = [], [], []
    for _ in range(240):
        prompt = " ".join(rng.choices(WORDS, k=4))
        response = " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))
        rendered = encoder.render([{"role": "user", "content": prompt}])
        encoded = encoder.encode(rendered, response, rendered=True)
        score = reference.score(encoded.token_ids, encoded.response_start)
        pieces = [response[token.start : token.end] for token in encoded.tokens]
        scores.append(score)
        claims.append(claim_of(pieces, prompt))
        texts.append((prompt, response))
    doubt = np.array([float(score.total.mean()) for score in scores])
    doubt = (doubt - doubt.mean()) / doubt.std()
    wrong = [bool(w) for w in 2 * doubt + noise.normal(size=len(doubt)) > 0]
    groups = [str(number) for number in range(len(texts))]
    manifest = loaded.manifest
    origin = Origin(
        tasks=[FittedTask(task="words", mode="score", n=len(texts), wrong=float(np.mean(wrong)))],
        half="dev",
        model=manifest.name,
        weights_version=manifest.weights_version,
        date="2026-11-23T00:00:00+00:00",
        seed=0,
        demur="0.1.0",
        command="a test",
    )
    calibration = fit(scores, claims, wrong, groups, ["total_mean", "jsd_mean"], "logistic", origin)
    save_calibration(calibration, loaded.folder / CALIBRATION_NAME)
    labelled = [
        LabelledText(
            prompt=prompt,
            response=response,
            wrong=is_wrong,
            group=group,
            task="words",
            mode="score",
        )
        for (prompt, response), is_wrong, group in zip(texts, wrong, groups, strict=True)
    ]
    write_texts(labelled, loaded.folder)
    assert read_texts(loaded.folder) == labelled
    return loaded


@pytest.fixture(scope="module")
def teacher(ensemble: Ensemble, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    cache = tmp_path_factory.mktemp("svd")
    return open_teacher(ensemble.target_path, PosteriorConfig(), "float32", "cpu", cache)


def students(ensemble: Ensemble, teacher: Teacher, moved: float = 0.0) -> list[Trainee]:
    found = students_of(ensemble, online(), teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for student in found:
            for parameter in student.module.parameters():
                parameter.add_(moved * torch.randn_like(parameter))
    return found


def recalibrator(ensemble: Ensemble, teacher: Teacher) -> Recalibrator:
    return Recalibrator(ensemble, teacher, FreshStates(teacher, ensemble.hidden_layers))


def test_it_measures_what_the_reference_does(ensemble: Ensemble, teacher: Teacher) -> None:
    made = recalibrator(ensemble, teacher)
    scores = made._measure(students(ensemble, teacher), "v")
    reference = Reference(ensemble)
    for text, score in list(zip(made._texts, scores, strict=True))[::20]:
        expected = reference.score(text.token_ids, text.response_start)
        for name in ("logprob", "entropy", "total", "jsd", "kl"):
            np.testing.assert_allclose(
                getattr(score, name), getattr(expected, name), atol=2e-4, err_msg=name
            )


def test_a_calibration_that_holds_is_kept_for_the_new_version(
    ensemble: Ensemble, teacher: Teacher, tmp_path: Path
) -> None:
    same = students(ensemble, teacher)
    told = recalibrator(ensemble, teacher).calibrate(tmp_path, "v2", same, same)
    assert told.startswith("kept: Brier 0.")
    kept, original = load_calibration(tmp_path), load_calibration(ensemble.folder)
    assert kept is not None
    assert original is not None
    assert kept.origin.weights_version == "v2"  # so that no answer is warned of it
    assert kept.estimator == original.estimator


def test_one_that_no_longer_holds_is_fitted_again_or_withheld(
    ensemble: Ensemble, teacher: Teacher, tmp_path: Path
) -> None:
    made = recalibrator(ensemble, teacher)
    first = students(ensemble, teacher)
    told = {}
    for moved in (0.1, 0.5, 2.0):
        folder = tmp_path / str(moved)
        folder.mkdir()
        (folder / CALIBRATION_NAME).write_text("of another version")
        told[moved] = made.calibrate(folder, "v2", students(ensemble, teacher, moved), first)
        found = load_calibration(folder)
        if told[moved].startswith("withheld"):
            assert found is None
            continue
        assert found is not None
        assert found.origin.weights_version == "v2"
        original = load_calibration(ensemble.folder)
        assert original is not None
        is_new = found.estimator != original.estimator
        assert told[moved].startswith("fitted again" if is_new else "kept")
        if is_new:
            assert found.held_out.brier <= (made._brier or 0) + 0.01
    assert not all(said.startswith("kept") for said in told.values()), told


def test_without_labelled_answers_it_is_withheld(
    ensemble: Ensemble, teacher: Teacher, tmp_path: Path
) -> None:
    aside = (ensemble.folder / TEXTS_NAME).rename(tmp_path / "aside")
    try:
        same = students(ensemble, teacher)
        told = recalibrator(ensemble, teacher).calibrate(tmp_path, "v2", same, same)
    finally:
        aside.rename(ensemble.folder / TEXTS_NAME)
    assert told.startswith("withheld: there are no labelled answers")
    assert load_calibration(tmp_path) is None


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / TEXTS_NAME).write_text('\n{"prompt": "a"}\n')
    with pytest.raises(CalibrationError, match=r"calibration_texts.jsonl, line 2"):
        read_texts(tmp_path)
