"""`slimnas latency import`: a table from times that were taken elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimnas.cli.latency_build import built_summary, print_built
from slimnas.cli.output import JsonOption, print_json


def import_results(
    results: Annotated[
        list[Path], typer.Argument(help="Results of a kit or another tool; files or folders.")
    ],
    device: Annotated[str, typer.Option(help="Name for the table.")],
    kit: Annotated[
        Path | None,
        typer.Option(help="The kit's folder; a kit's own results do not need it."),
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(help="CSV with the columns result,file, where names differ from the kit's."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The table's folder; else lookup_tables/DEVICE.")
    ] = None,
    describe: Annotated[str | None, typer.Option(help="The device in words.")] = None,
    soc: Annotated[str | None, typer.Option(help="Its chip.")] = None,
    os: Annotated[str | None, typer.Option(help="Its system and version.")] = None,
    runtime: Annotated[str | None, typer.Option(help="What ran the networks.")] = None,
    runtime_version: Annotated[str | None, typer.Option(help="Its version.")] = None,
    compute_unit: Annotated[str | None, typer.Option(help="Where they ran: cpu, npu, ...")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per call.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an imported table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a latency table of what a kit's runner or another tool timed.

    Reads, by content, a kit's results.jsonl (shards too), CSV, Qualcomm AI Hub profiles, ONNX
    Runtime profiles and perf tests, and the output of LiteRT's benchmark_model. All but the
    first need --kit.

    Example: slimnas latency import results.jsonl --device pi5
    """
    from slimnas.latency.devices import table_folders
    from slimnas.measure.imported import ImportJob, Stated, read_mapping
    from slimnas.measure.imported import import_results as run

    job = ImportJob(
        results=tuple(results),
        output=output or table_folders()[0] / device,
        kit=kit,
        mapping={} if mapping is None else read_mapping(mapping),
        stated=Stated(describe, soc, os, runtime, runtime_version, compute_unit, threads),
        force=force,
    )
    built = run(job)
    if as_json:
        print_json(built_summary(built))
    else:
        print_built(built)
