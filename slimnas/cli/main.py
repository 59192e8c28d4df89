"""The `slimnas` command: joins the command groups and turns errors into exit codes.

Exit codes: 0 ok, 1 `SlimnasError` (one line on stderr), 2 usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slimnas import __version__
from slimnas.cli.analyze import app as analyze
from slimnas.cli.evaluate import evaluate
from slimnas.cli.latency import app as latency
from slimnas.cli.prune import app as prune
from slimnas.cli.search import search
from slimnas.cli.space import app as space
from slimnas.cli.train import train
from slimnas.cli.zoo import app as zoo
from slimnas.errors import SlimnasError

DEBUG = "--debug"
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(search)
app.command()(train)
app.command()(evaluate)
app.add_typer(prune, name="prune")
app.add_typer(space, name="space")
app.add_typer(latency, name="latency")
app.add_typer(zoo, name="zoo")
app.add_typer(analyze, name="analyze")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slimnas {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks of errors.")] = False,
) -> None:
    """Vision transformers that run in N milliseconds on your device."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app([word for word in given if word != DEBUG], prog_name="slimnas")
    except SystemExit as ended:  # how typer reports usage errors and interrupts
        code = ended.code if isinstance(ended.code, int) else 0
        if code == INTERRUPTED:
            typer.echo("interrupted", err=True)
        return code
    except SlimnasError as error:
        if DEBUG in given:
            raise
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        return 1
    except OSError as error:  # what no message of ours covers, such as a full disk behind stdout
        if DEBUG in given:
            raise
        typer.echo(f"error: {error}", err=True)
        return 1
    return 0
