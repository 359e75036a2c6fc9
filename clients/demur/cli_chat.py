"""`demur chat`: answers, each token shaded by its uncertainty as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from demur._cli_common import (
    EXIT_CODES,
    AsJson,
    BaseUrl,
    MeasureOption,
    NoStore,
    outcome,
    print_json,
    usage,
)


def chat(
    question: Annotated[
        str | None,
        typer.Argument(
            help="Default: standard input; on a terminal a conversation, which Ctrl-D or /exit "
            "ends and /reset starts anew."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of each answer.")] = None,
    stop_above: Annotated[
        float | None,
        typer.Option(min=0, help="End an answer whose epistemic mean goes above this, in nats."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens that --stop-above takes the mean of.")
    ] = None,
    measure: MeasureOption = "epistemic",
    top: Annotated[
        float, typer.Option(min=0, help="The end of the scale of shades, in nats.")
    ] = 0.5,
    as_json: AsJson = False,
    no_store: NoStore = False,
    base_url: BaseUrl = None,
) -> None:
    """Ask the target, and see how sure it is of each token of its answer."""
    from demur.cli_conversation import Conversation, Show
    from demur.client import Client
    from demur.params import ChatOptions, UncertaintyStop

    if window is not None and stop_above is None:
        raise usage("--window is for --stop-above")
    stop: UncertaintyStop | None = None
    if stop_above is not None:
        stop = {"threshold": stop_above}
        if window is not None:
            stop["window"] = window
    options: ChatOptions = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "uncertainty_stop": stop,
        "store": False if no_store else None,
    }
    interactive = question is None and sys.stdin.isatty()
    if interactive and as_json:
        raise usage("--json needs a question")
    with outcome(), Client(base_url) as client:
        talk = Conversation(client, options, system, Show(measure, top))
        if interactive:
            talk.run()
        elif as_json:
            print_json(talk.answer(_asked(question)))
        else:
            talk.ask(_asked(question))


chat.__doc__ = f"{chat.__doc__}\n\n{EXIT_CODES}"


def _asked(question: str | None) -> str:
    from demur._cli_common import read_text

    asked = read_text("-") if question is None else question
    if not asked.strip():
        raise usage("there is no question: give QUESTION, or pipe one in")
    return asked
