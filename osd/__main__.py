"""`python -m osd`: the online trainer, as `demur serve` starts it."""

import typer

from osd.online_command import osd

if __name__ == "__main__":
    typer.run(osd)
