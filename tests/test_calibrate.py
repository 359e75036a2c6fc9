"""`demur calibrate` on made-up runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from drafts.calibration import CALIBRATION_NAME, load_calibration
from drafts.features import claim_of
from drafts.init import write_manifest
from server.calibrate import calibrate
from tests.calibrations import Answers, answers

app = typer.Typer()
app.command()(calibrate)
QUICK = ("--kind", "isotonic")  # few fits; what is tested here is the same for both


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def line(made: Answers, i: int, **changes: Any) -> dict[str, Any]:
    """A line of answers.jsonl, with a field that demur does not know."""
    scores = made.scores[i]
    names = ("logprob", "entropy", "total", "jsd", "kl")
    columns = {name: getattr(scores, name).round(5).tolist() for name in names}
    fields = {
        "id": f"q{i}",
        "prompt": "Which?",
        "task": "facts/capital" if i % 4 else "facts/language",
        "group": made.groups[i],
        "half": "dev",
        "correct": not made.wrong[i],
        "weights_version": "fake-1",
        "tokens": {"text": ["x"] * len(scores)} | columns,
        "seconds": 1.5,
    }
    return fields | changes


def write_run(folder: Path, lines: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    about = {"set": "facts", "mode": "generate", "model": "tiny"} | settings
    (folder / "run.json").write_text(json.dumps(about))
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def ensemble(tmp_path: Path) -> Path:
    folder = tmp_path / "ensemble"
    folder.mkdir()
    draft = {"name": "a", "kind": "exit", "source": "a", "layer": 1}
    write_manifest(folder, "tiny", "fake-1", "target", [draft])
    return folder


MADE = answers(150, seed=6)


def test_a_run_becomes_a_calibration(tmp_path: Path, ensemble: Path) -> None:
    lines = [line(MADE, i) for i in range(120)]
    lines += [line(MADE, i, half="test") for i in range(120, 150)]
    lines.insert(0, {**line(MADE, 0), "tokens": None, "error": "413: too long"})
    lines.append({k: v for k, v in line(MADE, 0).items() if k != "tokens"})
    folder = write_run(tmp_path / "facts-generate", lines)
    done = run(folder, "--ensemble", ensemble)
    assert done.exit_code == 0, done.output
    fitted = load_calibration(ensemble)
    assert fitted is not None
    assert fitted.kind == "logistic"
    unseen = [json.loads(one) for one in (folder / "calibrated.jsonl").read_text().splitlines()]
    assert [one["id"] for one in unseen] == [f"q{i}" for i in range(120, 150)]
    claims = [claim_of(["x"] * len(MADE.scores[i]), "Which?") for i in range(120, 150)]
    for one, scores, claim in zip(unseen, MADE.scores[120:150], claims, strict=True):
        # The run has five digits of each measure.
        want = fitted.probability(scores, claim)
        assert one["hallucination_score"] == pytest.approx(want, abs=1e-3)
    assert len(fitted.features) == 10
    origin = fitted.origin
    assert [(task.task, task.mode, task.n) for task in origin.tasks] == [
        ("facts/capital", "generate", 90),
        ("facts/language", "generate", 30),
    ]
    wrong = sum(task.n * task.wrong for task in origin.tasks)
    assert wrong == pytest.approx(sum(MADE.wrong[:120]))
    assert (origin.model, origin.weights_version, origin.half) == ("tiny", "fake-1", "dev")
    assert str(folder) in origin.command
    assert "--feature=jsd_sentence" in origin.command
    assert fitted.held_out.groups == 40
    for said in (
        "120 answers of tiny, weights fake-1",
        f"{wrong / 120:.1%} wrong",
        "facts/language (generate): 30",
        "left out: 2 questions",
        "unseen: 30 answers of the test half",
        f"AUROC {fitted.held_out.auroc:.3f}",
        fitted.id,
        "restart the service",
    ):
        assert said in done.stdout
    # High is bad: what was wrong has the higher probability.
    by_label: dict[bool, list[float]] = {True: [], False: []}
    for one, is_wrong in zip(MADE.scores, MADE.wrong, strict=True):
        by_label[is_wrong].append(fitted.probability(one, claim_of(["x"] * len(one), "Which?")))
    assert sum(by_label[True]) / len(by_label[True]) > sum(by_label[False]) / len(by_label[False])


def test_the_test_half_changes_nothing(tmp_path: Path) -> None:
    dev = [line(MADE, i) for i in range(100)]
    # Labels that would turn everything round.
    test = [line(MADE, i, half="test", correct=MADE.wrong[i]) for i in range(100, 150)]
    fits = []
    for name, lines in (("dev", dev), ("both", dev + test)):
        out = tmp_path / name / CALIBRATION_NAME
        done = run(write_run(tmp_path / name / "run", lines), "--out", out, *QUICK)
        assert done.exit_code == 0, done.output
        fitted = load_calibration(out.parent)
        assert fitted is not None
        fits.append(fitted.model_dump(exclude={"origin"}))
    assert fits[0] == fits[1]
    out = tmp_path / CALIBRATION_NAME
    assert run(tmp_path / "both/run", "--out", out, "--half", "all", *QUICK).exit_code == 0
    fitted = load_calibration(tmp_path)
    assert fitted is not None
    assert (fitted.origin.n, fitted.origin.half) == (150, "all")


def test_several_runs_and_other_features(tmp_path: Path, ensemble: Path) -> None:
    runs = [
        write_run(tmp_path / f"run{k}", [line(MADE, i) for i in range(k, 150, 2)], mode=mode)
        for k, mode in enumerate(("generate", "score"))
    ]
    done = run(*runs, "--ensemble", ensemble, *QUICK, "--feature", "jsd_max")
    assert done.exit_code == 0, done.output
    fitted = load_calibration(ensemble)
    assert fitted is not None
    assert fitted.features == ["jsd_max"]
    assert {task.mode for task in fitted.origin.tasks} == {"generate", "score"}
    assert fitted.origin.n == 150


def test_a_fit_that_is_worth_nothing_says_so(tmp_path: Path) -> None:
    lines = [line(MADE, i, correct=bool(i // 3 % 2)) for i in range(150)]
    done = run(write_run(tmp_path / "run", lines), "--out", tmp_path / "c.json", *QUICK)
    assert done.exit_code == 0, done.output
    assert "no better than" in done.stderr


def broken(i: int, **changes: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(lines: list[dict[str, Any]]) -> None:
        lines[i] |= changes

    return change


def columns(i: int, **changes: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(lines: list[dict[str, Any]]) -> None:
        lines[i]["tokens"] |= changes

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (broken(3, weights_version="fake-2"), "line 4 was measured with tiny, weights fake-2"),
        (broken(2, half="train"), "line 3: half"),
        (broken(2, correct="yes"), "line 3: correct"),
        (broken(2, group=None), "line 3: group"),
        (columns(5, jsd=[0.1]), "line 6: tokens: the lists of tokens differ"),
        (columns(5, kl=[float("nan")] * len(MADE.scores[5])), "line 6: tokens.kl.0"),
        (columns(5, total="x"), "line 6: tokens.total"),
        (lambda lines: lines.clear(), "no answers"),
        (lambda lines: lines.__delitem__(slice(40, None)), "40 answers are too few"),
        (lambda lines: [one.update(correct=True) for one in lines], "answers are right"),
        (
            lambda lines: [one.update(half="test") for one in lines],
            "none of 60 answers is of the dev half",
        ),
        (lambda lines: [one.update(group="one") for one in lines], "1 groups"),
    ],
)
def test_runs_that_cannot_be_fitted(
    tmp_path: Path, ensemble: Path, change: Callable[[Any], Any], says: str
) -> None:
    lines = [line(MADE, i) for i in range(60)]
    change(lines)
    done = run(write_run(tmp_path / "run", lines), "--ensemble", ensemble, *QUICK)
    assert done.exit_code == 1
    assert says in done.stderr
    assert load_calibration(ensemble) is None


def test_folders_that_are_no_runs(tmp_path: Path, ensemble: Path) -> None:
    good = write_run(tmp_path / "good", [line(MADE, i) for i in range(60)])
    torn = write_run(tmp_path / "torn", [line(MADE, 0)])
    with (torn / "answers.jsonl").open("a") as file:
        file.write('{"id": "q1", "ta')
    unfinished = write_run(tmp_path / "unfinished", [])
    (unfinished / "answers.jsonl").unlink()
    damaged = write_run(tmp_path / "damaged", [])
    (damaged / "run.json").write_text("{")
    other = write_run(tmp_path / "other", [line(MADE, 0)], model="large")
    for folders, says in (
        ([tmp_path / "none"], "`demur eval` makes one"),
        ([damaged], "run.json"),
        ([unfinished], "let demur eval finish"),
        ([torn], "line 2"),
        ([good, good / ".." / "good"], "twice"),
        ([good, other], "measured with large"),
    ):
        done = run(*folders, "--ensemble", ensemble, *QUICK)
        assert done.exit_code == 1, done.output
        assert says in done.stderr
    assert load_calibration(ensemble) is None


def test_an_ensemble_that_did_not_measure_the_answers(tmp_path: Path, ensemble: Path) -> None:
    lines = [line(MADE, i, weights_version="fake-2") for i in range(60)]
    folder = write_run(tmp_path / "run", lines)
    done = run(folder, "--ensemble", ensemble, *QUICK)
    assert done.exit_code == 1
    assert "run demur eval with the ensemble" in done.stderr
    assert load_calibration(ensemble) is None
    assert run(folder, "--ensemble", tmp_path, *QUICK).exit_code == 1
    # A file elsewhere is nobody's yet.
    assert run(folder, "--out", tmp_path / "c.json", *QUICK).exit_code == 0


def test_features_that_cannot_be_used(tmp_path: Path, ensemble: Path) -> None:
    folder = write_run(tmp_path / "run", [line(MADE, i) for i in range(60)])
    for features, says in (
        (["--feature", "fear_mean"], "no feature; these are"),
        (["--feature", "jsd_mean", "--feature", "jsd_mean"], "has one feature"),
    ):
        done = run(folder, "--ensemble", ensemble, *QUICK, *features)
        assert done.exit_code == 1
        assert says in done.stderr
    done = run(folder, "--out", tmp_path / "no" / "such" / "folder", *QUICK)
    assert done.exit_code == 1
    assert "does not exist; make it first" in done.stderr
