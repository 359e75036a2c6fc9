"""`demur synthesize`, `demur distill` and `demur rivals`."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from drafts.errors import DraftsError
from drafts.init import default_folder, init_default
from osd.errors import OsdError


def synthesize(
    out: Annotated[Path, typer.Option(help="folder of the corpus; run again to go on")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="JSON lines of prompts; may be given several times")
    ] = None,
    general: Annotated[
        bool, typer.Option("--general", help="add several hundred everyday and factual questions")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="take at most so many prompts of each file")
    ] = None,
    ensemble: Annotated[
        Path | None, typer.Option(help="folder with demur.json; default: the one of `demur init`")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of each answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="1 = as the target speaks")] = 1.0,
    per_part: Annotated[
        int, typer.Option(min=1, help="answers a file; what a stop can cost")
    ] = 128,
) -> None:
    """Let the target answer prompts, and write its answers for `demur distill`."""
    from osd.prompts import general_prompts, read_prompts
    from osd.synthesize import run

    try:
        if ensemble is None:
            init_default(default_folder(), typer.echo)
        chosen = [
            messages
            for file in prompts or []
            for messages, _ in zip(read_prompts(file), range(limit or 10**9), strict=False)
        ]
        chosen += general_prompts() if general else []
        if not chosen:
            raise typer.BadParameter("give --prompts, --general or both")
        corpus = asyncio.run(
            run(
                ensemble or default_folder(),
                out.expanduser(),
                chosen,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                per_part=per_part,
            )
        )
    except (DraftsError, OsdError) as error:
        _fail(error)
    except OSError as error:
        _fail_of_a_file(error)
    typer.echo(
        f"{corpus.folder} holds the answers: name it as `corpus` in a file for `demur distill`"
    )


def distill(
    config: Annotated[Path, typer.Argument(help="YAML file; docs/distillation.md has its fields")],
) -> None:
    """Distil drafts as a configuration says; run again to go on after a stop."""
    from accelerate import PartialState
    from safetensors import SafetensorError

    from osd.config import read_config
    from osd.trainer import train

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        read = read_config(config)
        result = train(read)
    except (DraftsError, OsdError, SafetensorError) as error:  # the last: a full disk
        _fail(error)
    except OSError as error:
        _fail_of_a_file(error)
    if not PartialState().is_main_process:
        return
    for when, measured in (("before", result.before), ("after", result.after)):
        if measured is not None:
            values = ", ".join(f"{name} {value:.4f}" for name, value in measured._asdict().items())
            typer.echo(f"{when}, on held-out texts, in nats: {values}")
    if read.drafts.kind == "residual":
        typer.echo("epistemic should have come near to reference, which is EU* by few draws")
    elif read.teacher == "posterior":
        typer.echo("kl_drafts, the mean KL(p_T || q_k), should have fallen")
    typer.echo(f"serve it: demur serve --ensemble {result.ensemble}")


def rivals(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs that `demur eval` made")],
    ensemble: Annotated[
        Path | None, typer.Option(help="folder with demur.json; default: the one of `demur init`")
    ] = None,
    tokur: Annotated[
        int | None,
        typer.Option(min=0, help="so many answers get TokUR's ten passes; default: all of them"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="so many answers are measured at all; default: all")
    ] = None,
    seed: Annotated[int, typer.Option(help="of TokUR's noise")] = 0,
) -> None:
    """Measure a run's answers by rivals that need the target itself, TokUR among them."""
    from drafts.manifest import load_ensemble
    from drafts.text import TextEncoder
    from osd.rivals import check_run, load_target, measure_run

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        loaded = load_ensemble(ensemble or default_folder())
        for run in runs:  # all of them, before anything is loaded or measured
            check_run(run, loaded.manifest.name)
        teacher, encoder = load_target(loaded.target_path), TextEncoder(loaded.target_path)
        for run in runs:
            name = loaded.manifest.name
            added = measure_run(
                run, teacher, encoder, model=name, with_tokur=tokur, seed=seed, limit=limit
            )
            typer.echo(f"{run}: {added} answers measured")
    except (DraftsError, OsdError) as error:
        _fail(error)
    except OSError as error:
        _fail_of_a_file(error)


def _fail_of_a_file(error: OSError) -> NoReturn:
    """A sentence for a file that cannot be written; any other error is not the user's."""
    if error.filename is None and error.errno != errno.ENOSPC:
        raise error
    _fail(error)


def _fail(error: Exception) -> NoReturn:
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(1) from error
