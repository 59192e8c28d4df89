"""What every command shares: options, JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from slimnas.cli.processes import is_main_process

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def print_json(body: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(body, allow_nan=False))


def note(message: str) -> None:
    """Print a line for people on stderr, of several processes once."""
    if is_main_process():
        typer.echo(message, err=True)


def shown_path(path: Path) -> str:
    """The path relative to the working directory, if it lies in it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
