"""`slimnas latency merge` and `recompute`: tables from timings that are already there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimnas.cli.latency_build import built_summary, print_built
from slimnas.cli.output import JsonOption, print_json


def merge(
    shards: Annotated[list[Path], typer.Argument(help="Output folder of every shard.")],
    device: Annotated[str, typer.Option(help="Name for the table.")] = "local",
    output: Annotated[
        Path | None, typer.Option(help="The table's folder; else lookup_tables/DEVICE.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Join what hosts with the same device measured by 'latency build --shard i/n'.

    Example: slimnas latency merge parts/1 parts/2 --device pi5
    """
    from slimnas.latency.devices import table_folders
    from slimnas.measure.shards import merge as merge_shards

    built = merge_shards(shards, output or table_folders()[0] / device, force=force)
    if as_json:
        print_json(built_summary(built))
    else:
        print_built(built)


def recompute(
    table: Annotated[Path, typer.Argument(help="Folder of a measured table.")],
    as_json: JsonOption = False,
) -> None:
    """Make a measured table anew from the samples kept beside it.

    Example: slimnas latency recompute lookup_tables/local
    """
    from slimnas.measure.shards import recompute as recompute_table

    built = recompute_table(table)
    if as_json:
        print_json(built_summary(built))
    else:
        print_built(built)
