"""`demur models` and `demur drafts`: what is served."""

from __future__ import annotations

from collections.abc import Iterable

from demur._cli_common import AsJson, BaseUrl, console, outcome, print_json


def models(base_url: BaseUrl = None, as_json: AsJson = False) -> None:
    """List the ensembles that are served."""
    from demur.client import Client
    from demur.types import ModelList

    with outcome(), Client(base_url) as client:
        served = client.models()
        if as_json:
            print_json(ModelList(data=served))
            return
        names = ("model", "drafts", "weights", "longest, tokens")
        _table(names, ((m.id, m.drafts, m.weights_version, m.max_model_len) for m in served))


def drafts(base_url: BaseUrl = None, as_json: AsJson = False) -> None:
    """List the drafts of the served ensemble."""
    from demur.client import Client

    with outcome(), Client(base_url) as client:
        served = client.drafts()
        if as_json:
            print_json(served)
            return
        print(f"target {served.target}, weights {served.weights_version}")
        _table(
            ("draft", "kind", "layer", "draw"),
            ((d.name, d.kind, d.layer, d.draw) for d in served.data),
        )


def _table(names: Iterable[str], rows: Iterable[tuple[object, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    console().print(table)
