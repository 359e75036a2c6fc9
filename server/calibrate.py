"""`demur calibrate`: fits the probability that an answer is wrong to labelled answers."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from drafts.errors import CalibrationError, DraftsError
from drafts.init import default_folder
from drafts.manifest import read_manifest

if TYPE_CHECKING:
    from drafts.calibration import Calibration
    from server.labelled_runs import Labelled

# The first ten of a forward selection by grouped cross-validation, on the dev half of facts and
# sums that the default target answered: what a fit to those says of itself (`held_out`) is a little
# too good, and the test half tells.
LOGISTIC = (
    "jsd_sentence",
    "surprisal_name",
    "jsd_mean",
    "log_sentence",
    "kl_sentence",
    "kl_name",
    "entropy_mean",
    "aleatoric_mean",
    "kl_mean",
    "total_mean",
)
ISOTONIC = ("total_mean",)
UNSEEN = "calibrated.jsonl"


def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs that `demur eval` made")],
    ensemble: Annotated[
        Path | None, typer.Option(help="folder with demur.json; default: the one of `demur init`")
    ] = None,
    kind: Annotated[
        Literal["logistic", "isotonic"],
        typer.Option(help="logistic: of several features; isotonic: growing with one"),
    ] = "logistic",
    feature: Annotated[
        list[str] | None,
        typer.Option(help=f"may be given several times; default: {', '.join(LOGISTIC)}"),
    ] = None,
    half: Annotated[
        Literal["dev", "all"],
        typer.Option(help="dev leaves the test half unseen, so that it can judge the fit"),
    ] = "dev",
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: beside the ensemble's demur.json")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="of the cross-validation")] = 0,
) -> None:
    """Fit the probability that an answer is wrong to answers of which it is known."""
    from drafts.calibration import CALIBRATION_NAME, save_calibration
    from drafts.calibration_fit import fit
    from drafts.calibration_parts import Origin
    from drafts.labelled import TEXTS_NAME, write_texts
    from server.labelled_runs import read_runs

    names = feature or list(LOGISTIC if kind == "logistic" else ISOTONIC)
    try:
        if out is not None and not out.parent.is_dir():
            raise CalibrationError(f"the folder {out.parent} does not exist; make it first")
        labelled = read_runs(runs, half)
        if out is None:
            folder = (ensemble or default_folder()).expanduser()
            _check_ensemble(folder, labelled)
            out = folder / CALIBRATION_NAME
        origin = Origin(
            tasks=labelled.by_task(),
            half=half,
            model=labelled.model,
            weights_version=labelled.weights_version,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=seed,
            demur=metadata.version("demur-server"),
            command=_command(runs, kind, names, half, seed),
        )
        calibration = fit(
            labelled.scores, labelled.claims, labelled.wrong, labelled.groups, names, kind, origin
        )
        save_calibration(calibration, out)
        write_texts(labelled.texts, out.parent)
        _judge_unseen(calibration, labelled, runs)
    except (DraftsError, ValueError, OSError) as error:
        typer.echo(f"demur: {error}", err=True)
        raise typer.Exit(1) from error
    _report(calibration, labelled)
    typer.echo(f"wrote {out}, id {calibration.id}; restart the service to load it")
    typer.echo(f"and the answers beside it, {TEXTS_NAME}: demur osd checks it with them")


def _judge_unseen(calibration: Calibration, labelled: Labelled, runs: list[Path]) -> None:
    """Put beside each run what the calibration says of the answers that it has not seen."""
    lines: dict[Path, list[str]] = {run: [] for run in runs}
    for one in labelled.unseen:
        score = round(calibration.probability(one.scores, one.claim), 6)
        line = {"id": one.id, "hallucination_score": score, "calibration": calibration.id}
        lines[one.run].append(json.dumps(line) + "\n")
    for run, found in lines.items():
        partial = run / f"{UNSEEN}.partial"
        partial.write_text("".join(found), encoding="utf-8")
        partial.replace(run / UNSEEN)


def _check_ensemble(folder: Path, labelled: Labelled) -> None:
    """`CalibrationError` if the ensemble is another than the one that measured the answers."""
    manifest = read_manifest(folder)
    if (manifest.name, manifest.weights_version) != (labelled.model, labelled.weights_version):
        raise CalibrationError(
            f"{folder} is {manifest.name}, weights {manifest.weights_version}, and the answers "
            f"were measured with {labelled.model}, weights {labelled.weights_version}; run demur "
            "eval with the ensemble, or name the other one (--ensemble)"
        )


def _command(runs: list[Path], kind: str, names: list[str], half: str, seed: int) -> str:
    options = [f"--kind={kind}", *(f"--feature={name}" for name in names)]
    options += [f"--half={half}", f"--seed={seed}"]
    return shlex.join(["demur", "calibrate", *map(str, runs), *options])


def _report(calibration: Calibration, labelled: Labelled) -> None:
    origin, quality = calibration.origin, calibration.held_out
    wrong = sum(task.n * task.wrong for task in origin.tasks) / origin.n
    typer.echo(
        f"{calibration.kind} on {', '.join(calibration.features)}: {origin.n} answers of "
        f"{origin.model}, weights {origin.weights_version}; {wrong:.1%} wrong"
    )
    for task in origin.tasks:
        typer.echo(f"  {task.task} ({task.mode}): {task.n}, {task.wrong:.1%} wrong")
    if labelled.n_without:
        typer.echo(f"left out: {labelled.n_without} questions without an answer")
    if labelled.unseen:
        typer.echo(
            f"unseen: {len(labelled.unseen)} answers of the test half; what it says of them is in "
            f"each run's {UNSEEN}, for the report of demur eval"
        )
    constant = wrong * (1 - wrong)
    typer.echo(
        f"held out in {quality.folds} folds of {quality.groups} groups: AUROC "
        f"{quality.auroc:.3f}, ECE {quality.ece:.3f}, Brier {quality.brier:.4f} (a constant: "
        f"{constant:.4f})"
    )
    if quality.brier >= constant:
        typer.echo("It is no better than always saying the share of wrong answers.", err=True)
