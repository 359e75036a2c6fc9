"""`demur keys`: makes a key and writes its hash into the file of keys, or takes one back."""

from __future__ import annotations

import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from pydantic import ValidationError

from server.keys import Key, Scope, digest_of, new_key, parse_keys, read_keys


def keys(
    name: Annotated[str, typer.Argument(help="whose key it is; it stands in metrics")],
    file: Annotated[Path, typer.Option(help="the service's `keys_file`; made if it is not there")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="score, generate, admin; several times; default: score and generate"),
    ] = None,
    metrics_only: Annotated[
        bool, typer.Option("--metrics-only", help="a key for Prometheus: no scope at all")
    ] = False,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="prompt and answer together")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="take the key of this name back")
    ] = False,
) -> None:
    """Make a key. It is printed once, and only its hash is kept.

    With --remove, take one back; a running service notices within seconds.
    """
    if remove:
        _remove(file, name)
        return
    secret = new_key()
    try:
        there = read_keys(file) if file.exists() else []
        if metrics_only and scope:
            raise ValueError("--metrics-only is a key without scopes: leave --scope out")
        if name in {key.name for key in there}:
            raise ValueError(f"{file} has a key named {name}")
        key = Key(
            name=name,
            sha256=digest_of(secret),
            scopes=_scopes([] if metrics_only else scope or ["score", "generate"]),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
        _append(file, _entry(key))
    except ValidationError as error:
        _fail(f"{name!r} is no name: {error.errors()[0]['msg']}")
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(secret)
    typer.echo(f"its hash is in {file}; the key is shown this once", err=True)


def _scopes(given: list[str]) -> frozenset[Scope]:
    if unknown := set(given) - set(get_args(Scope)):
        known = ", ".join(get_args(Scope))
        raise ValueError(f"there is no scope {', '.join(sorted(unknown))}; there are {known}")
    return frozenset(cast(list[Scope], given))


def _entry(key: Key) -> str:
    scopes = ", ".join(f'"{scope}"' for scope in sorted(key.scopes))
    lines = ["[[keys]]", f'name = "{key.name}"', f'sha256 = "{key.sha256}"', f"scopes = [{scopes}]"]
    for name in ("requests_per_minute", "tokens_per_minute"):
        if (value := getattr(key, name)) is not None:
            lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"


def _remove(file: Path, name: str) -> None:
    try:
        there = read_keys(file)
        if name not in {key.name for key in there}:
            raise ValueError(f"{file} has no key named {name}")
        # A part for each key, with the comments after it; before the first, those of the file.
        parts = re.split(r"(?m)^(?=\s*\[\[\s*keys\s*\]\])", file.read_text())
        kept = [part for part in parts if name not in _names(part)]
        text = "".join(kept)
        if parse_keys(text, file) != [key for key in there if key.name != name]:
            raise ValueError(f"{file} is not written as `demur keys` does: take {name} out by hand")
        _write(file, text)
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(f"{name} is no longer in {file}", err=True)


def _names(part: str) -> list[str]:
    return [key["name"] for key in tomllib.loads(part).get("keys", [])]


def _append(file: Path, entry: str) -> None:
    before = file.read_text() if file.exists() else ""
    _write(file, f"{before}\n{entry}" if before else entry)


def _write(file: Path, text: str) -> None:
    """Replace the file; who reads it meanwhile sees the old one or the new one."""
    # Hashes are no secrets, but nobody else needs them. A file that is there keeps its mode.
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    number, partial = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
    try:
        with open(number, "w") as out:
            os.fchmod(number, mode)
            out.write(text)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _fail(message: str) -> None:
    typer.echo(f"demur: {message}", err=True)
    raise typer.Exit(1)
