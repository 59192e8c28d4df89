"""`slimnas latency devices`: every latency table, with what it is and how far off it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slimnas.cli.output import JsonOption, note, print_json, shown_path

if TYPE_CHECKING:
    from slimnas.latency.table import LatencyTable


def devices(as_json: JsonOption = False) -> None:
    """List the devices that have a latency table: your own and the shipped ones.

    The error is the table's first figure: of measured networks that it had not seen.
    """
    from slimnas.errors import LatencyTableError
    from slimnas.latency.devices import known_devices
    from slimnas.latency.table import LatencyTable

    found = []
    for folder in known_devices().values():
        try:
            found.append(LatencyTable.load(folder))
        except LatencyTableError as error:
            note(f"skipped {folder}: {error}")
    if as_json:
        print_json({"devices": [_summary(table) for table in found]})
    else:
        _print(found)


def _summary(table: LatencyTable) -> dict[str, Any]:
    device = table.device
    return {
        "name": device.name,
        "kind": device.kind,
        "device": device.device,
        "runtime": _runtime(table),
        "compute_unit": device.compute_unit,
        "date": device.date,
        "errors": [figure.model_dump(mode="json") for figure in device.errors],
        "rows": len(table.rows),
        "path": shown_path(Path(table.source)),
    }


def _runtime(table: LatencyTable) -> str:
    runtime = table.device.runtime
    return f"{runtime.name} {runtime.version}".removesuffix(" unknown")


def _print(found: list[LatencyTable]) -> None:
    """One line per table, as wide as it needs: a pipe or a narrow terminal loses nothing."""
    lines = [("name", "kind", "device", "runtime", "date", "error", "networks")]
    for table in found:
        device = table.device
        figure = device.errors[0] if device.errors else None
        error = "unknown" if figure is None else f"{figure.mape_percent:.1f} %"
        networks = "" if figure is None else str(figure.networks)
        runtime = f"{_runtime(table)}, {device.compute_unit}"
        lines.append(
            (device.name, device.kind, device.device, runtime, device.date, error, networks)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
    note("error: mean over networks the table had not seen; 'slimnas latency show NAME' says more")
