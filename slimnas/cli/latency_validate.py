"""`slimnas latency validate`: a table's predictions against networks measured here and now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimnas.cli.latency_options import Clock, chosen_scope, progress_bar
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from slimnas.measure.validate import Validation


def validate(
    device: Annotated[str, typer.Option(help="Name of this machine's table, or its folder.")],
    networks: Annotated[int, typer.Option(min=2, help="Random networks to measure.")] = 40,
    seed: Annotated[int, seed_option("Seed of the random networks.")] = 1,
    space: Annotated[
        str | None,
        typer.Option(
            help="Draw them from this space: a shipped name or a .yaml file.",
            show_default="what the table was built for",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Draw pruned forms of this zoo name or file, not a space.")
    ] = None,
    clock: Annotated[
        Clock | None,
        typer.Option(help="What tells the time.", show_default="what the build used"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the results.", show_default="validation in the table's"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure anew what the folder holds.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Let the table state this error too, and the wider interval of both."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure fresh random networks on this machine and compare them with a table's predictions.

    Prints and plots every network; none of them was timed when the table was built. Interrupted,
    even killed, the same command goes on where it stopped.

    Example: slimnas latency validate --device local --networks 40
    """
    from dataclasses import replace

    from slimnas.errors import LatencyTableError
    from slimnas.latency.devices import find_device, provenance_line
    from slimnas.latency.table import DEVICE_FILE
    from slimnas.measure.local import BuildRecord, require_measured_here
    from slimnas.measure.restate import restated
    from slimnas.measure.validate import ValidateJob, validate_table
    from slimnas.report.validation import validation_document, write_validation
    from slimnas.runtimes.registry import get_runtime

    table = find_device(device)
    require_measured_here(table)
    if update and (space or model):
        raise LatencyTableError(
            "--update: must validate on what the table was built for, got another --space or "
            "--model; leave that or --update out"
        )
    record = BuildRecord.load(table.source)
    if update and clock is not None and clock.value != record.protocol.clock:
        raise LatencyTableError(
            f"--update: must be timed by the build's clock, {record.protocol.clock}, got --clock "
            f"{clock.value}; leave one of both out"
        )
    protocol = replace(record.protocol, seed=seed)
    job = ValidateJob(
        table=table,
        record=record,
        scope=chosen_scope(space, model) if space or model else record.scope,
        output=output or Path(table.source) / "validation",
        protocol=protocol if clock is None else replace(protocol, clock=clock.value),
        networks=networks,
        seed=seed,
        force=force,
    )
    info = table.device
    runtime = get_runtime(
        info.runtime.name,
        threads=info.threads or 1,
        dtype=info.dtype,
        unit=info.compute_unit.partition(":")[0],
    )
    try:
        with progress_bar("validating") as progress:
            found = validate_table(job, runtime, progress=progress)
    except KeyboardInterrupt:
        note(f"what was timed is kept in {job.output}; the same command goes on there")
        raise
    files = [shown_path(path) for path in write_validation(found, table, job.output)]
    if update:
        table = restated(table, found)
        table.save(table.source)
        files.append(shown_path(Path(table.source) / DEVICE_FILE))
    typer.echo(provenance_line(table), err=as_json)
    if as_json:
        print_json({**validation_document(found, table), "files": files})
        return
    _print(found)
    if update and (stated := table.device.interval):
        typer.echo(f"the table's interval is now ± {stated.high_percent:.1f} %: {stated.basis}")
    typer.echo(f"written: {', '.join(files)}")


def _print(found: Validation) -> None:
    from rich.console import Console
    from rich.table import Table

    if found.resumed:
        note(f"went on after {found.resumed} visits of an earlier run of this command")
    shown = Table(box=None, pad_edge=False)
    for header in ("network", "predicted ms", "interval ms", "measured ms", "error"):
        shown.add_column(header, justify="left" if header == "network" else "right")
    for check in found.checks:
        low_ms, high_ms = check.interval_ms or (check.predicted_ms, check.predicted_ms)
        shown.add_row(
            check.architecture.digest[:12],
            f"{check.predicted_ms:.3f}",
            f"{low_ms:.3f} to {high_ms:.3f}",
            f"{check.measured_ms:.3f}",
            f"{100 * check.error:+.1f} %{'' if check.covered else ' *'}",
        )
    Console().print(shown)
    for line in _lines(found):
        typer.echo(line)


def _lines(found: Validation) -> list[str]:
    figure = found.figure
    rank = "" if figure.spearman is None else f", rank correlation {figure.spearman:.3f}"
    lines = [
        f"{figure.networks} {figure.what}: mean error {figure.mape_percent:.2f} %, bias "
        f"{figure.bias_percent:+.2f} %, worst {figure.max_percent:.2f} %{rank}",
        f"within 5 %: {figure.within_5_percent:.0f} %, within 10 %: "
        f"{figure.within_10_percent:.0f} %; inside their intervals: "
        f"{figure.coverage_percent:.0f} % (the others are marked *)",
    ]
    if found.repeat_percent is not None:
        lines.append(
            f"measured again in new sessions they differ by {found.repeat_percent:.2f} % on average"
        )
    change = "slower" if found.pace >= 1 else "faster"
    lines.append(
        f"the machine is {100 * abs(found.pace - 1):.1f} % {change} than during the build by "
        "networks timed then and now, for which measurements are corrected; without that: mean "
        f"error {found.unscaled.mape_percent:.2f} %"
    )
    return lines
