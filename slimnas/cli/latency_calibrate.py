"""`slimnas latency calibrate`: an estimated table from whole-network latencies."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, note, print_json, shown_path

if TYPE_CHECKING:
    from slimnas.latency.calibrate import Calibrated
    from slimnas.latency.features import Features
    from slimnas.latency.table import FitInfo


class Model(str, Enum):
    """Device models to fit."""

    ACCELERATOR = "accelerator"
    PROCESSOR = "processor"


def calibrate(
    points: Annotated[
        Path, typer.Option(help="CSV file: network,latency_ms and, if you like, source, weight.")
    ],
    device: Annotated[str, typer.Option(help="Name for the new table.")],
    output: Annotated[
        Path | None, typer.Option(help="The table's folder; else lookup_tables/DEVICE.")
    ] = None,
    model: Annotated[
        Model | None,
        typer.Option(
            help="accelerator: a GPU or NPU; processor: CPU cores.",
            show_default="the prior's, else accelerator",
        ),
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="A similar device's estimated table to stay close to.")
    ] = None,
    strength: Annotated[float, typer.Option(min=0, help="How close to the prior.")] = 0.1,
    description: Annotated[str, typer.Option(help="The device in words.")] = "",
    runtime: Annotated[str, typer.Option(help="Runtime the latencies were taken with.")] = "",
    protocol: Annotated[str, typer.Option(help="How they were taken, in words.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the table there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate a device's latency table from latencies of whole networks.

    A network is a zoo name, an architecture file or a run folder. Every point is left out once;
    the errors of that are printed and stay in the table's folder.

    Example: slimnas latency calibrate --points points.csv --device phone --prior iphone12-ios16
    """
    from slimnas.latency.calibrate import calibrate_device, save_calibrated
    from slimnas.latency.devices import table_folders
    from slimnas.latency.points import load_points

    info = _fit_info(model, prior, strength)
    calibrated = calibrate_device(
        load_points(points, resolve=_features),
        device,
        info,
        device=description,
        runtime=runtime,
        protocol=protocol,
    )
    folder = output or table_folders()[0] / device
    save_calibrated(calibrated, folder, force=force)
    if calibrated.flat:
        note(
            f"the points do not tell what width costs in: {', '.join(calibrated.flat)}; a search "
            "on this table will not narrow them"
        )
    if as_json:
        print_json(_summary(calibrated, folder))
    else:
        _print(calibrated, folder)


def _fit_info(model: Model | None, prior: str | None, strength: float) -> FitInfo:
    from slimnas.errors import LatencyTableError
    from slimnas.latency.devices import find_device
    from slimnas.latency.table import FitInfo

    if prior is None:
        return FitInfo(model=(model or Model.ACCELERATOR).value)
    held = find_device(prior).device
    if held.fit is None:
        raise LatencyTableError(
            f"--prior {prior}: must be a fitted table, is a {held.kind} one without a model"
        )
    if model is not None and model.value != held.fit.model:
        raise LatencyTableError(
            f"--prior {prior}: its model is {held.fit.model}, --model asks for {model.value}"
        )
    return FitInfo(model=held.fit.model, prior=held.name, strength=strength, held_to=held.model)


def _features(network: str) -> Features:
    from slimnas.errors import LatencyTableError
    from slimnas.latency.features import network_features
    from slimnas.zoo.registry import get

    try:
        return network_features(get(network).architecture)
    except TypeError as error:
        raise LatencyTableError(f"{network}: {error}; leave its point out until then") from error


def _summary(calibrated: Calibrated, folder: Path) -> dict[str, Any]:
    device = calibrated.table.device
    return {
        "device": {"name": device.name, "kind": device.kind},
        "path": shown_path(folder),
        "rows": len(calibrated.table.rows),
        "errors": [figure.model_dump(mode="json") for figure in device.errors],
        "model": dict(device.model),
        "flat": list(calibrated.flat),
        "points": [
            {
                "network": error.point.name,
                "used": error.point.used,
                "latency_ms": error.point.latency_ms,
                "fitted_ms": error.fitted_ms,
                "left_out_ms": error.left_out_ms,
            }
            for error in calibrated.fit.errors()
        ],
    }


def _print(calibrated: Calibrated, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from slimnas.latency.devices import provenance_line

    shown = Table("network", box=None, pad_edge=False)
    for header in ("given ms", "fitted ms", "error", "left out ms", "error"):
        shown.add_column(header, justify="right")
    for error in calibrated.fit.errors():
        fitted = error.fitted_error
        shown.add_row(
            error.point.name,
            f"{error.point.latency_ms:.3f}",
            "not used" if error.fitted_ms is None else f"{error.fitted_ms:.3f}",
            "" if fitted is None else f"{100 * fitted:+.1f} %",
            f"{error.left_out_ms:.3f}",
            f"{100 * error.left_out_error:+.1f} %",
        )
    Console().print(shown)
    typer.echo(provenance_line(calibrated.table))
    typer.echo(f"{len(calibrated.table.rows)} rows written to {shown_path(folder)}")
