"""`slimnas latency`: latency tables and what they say about a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.latency_build import build
from slimnas.cli.latency_calibrate import calibrate
from slimnas.cli.latency_devices import devices
from slimnas.cli.latency_import import import_results
from slimnas.cli.latency_kit import kit
from slimnas.cli.latency_merge import merge, recompute
from slimnas.cli.latency_validate import validate
from slimnas.cli.output import JsonOption, note, print_json

if TYPE_CHECKING:
    from slimnas.latency.estimate import Estimate
    from slimnas.latency.table import DeviceInfo, LatencyTable

app = typer.Typer(no_args_is_help=True, help="Latency tables: show, estimate, measure.")
app.command()(devices)
app.command("list", hidden=True)(devices)  # its name in the first release
app.command()(build)
app.command()(merge)
app.command()(recompute)
app.command()(calibrate)
app.command()(validate)
app.command()(kit)
app.command("import")(import_results)

DeviceName = Annotated[str, typer.Argument(help="Name of a latency table, or its folder.")]


@app.command()
def show(
    device: DeviceName,
    rows: Annotated[bool, typer.Option("--rows", help="List every row too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a latency table: the device, where its numbers come from, how far off they are."""
    from slimnas.latency.devices import find_device, provenance_line
    from slimnas.latency.regime import regimes

    table = find_device(device)
    found = regimes(table)
    counts = Counter(f"{row.key.component} {row.key.type}" for row in table.rows)
    if as_json:
        note(provenance_line(table))
        summary: dict[str, Any] = {**table.device.model_dump(mode="json"), "counts": dict(counts)}
        summary["regimes"] = [asdict(regime) for regime in found]
        if rows:
            summary["rows"] = [
                {"component": str(row.key), "latency_ms": row.latency_ms, "kind": row.kind}
                for row in table.rows
            ]
        print_json(summary)
        return
    typer.echo(provenance_line(table))
    for line in _description(table.device):
        typer.echo(line)
    for kind, count in counts.items():
        prices = [r.latency_ms for r in table.rows if f"{r.key.component} {r.key.type}" == kind]
        typer.echo(f"{count:5} x {kind}: {min(prices):.4f} to {max(prices):.4f} ms")
    for sentence in dict.fromkeys(regime.sentence for regime in found):
        typer.echo(sentence)
    if rows:
        for row in table.rows:
            spread = f"+- {row.spread_ms:.4f}"
            typer.echo(f"{row.latency_ms:10.4f} ms {spread}  {row.key} ({row.kind}, n={row.n})")


@app.command()
def estimate(
    architecture: Annotated[
        str, typer.Argument(help="Zoo name, architecture file, run folder or zoo entry folder.")
    ],
    device: Annotated[str, typer.Option(help="Name of a latency table, or its folder.")],
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Price components beyond the table's rows too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate the latency of a network, component by component.

    Example: slimnas latency estimate efficientformer_l1 --device iphone12
    """
    from slimnas.latency.devices import find_device, provenance_line
    from slimnas.latency.estimate import estimate as price
    from slimnas.zoo.registry import get

    table = find_device(device)
    result = price(get(architecture).architecture, table, allow_extrapolation=extrapolate)
    typer.echo(provenance_line(table), err=as_json)
    if as_json:
        print_json(_result(result, table))
    else:
        _print_estimate(architecture, result)


def _identity(table: LatencyTable) -> dict[str, str]:
    return {"name": table.device.name, "kind": table.device.kind}


def _result(result: Estimate, table: LatencyTable) -> dict[str, Any]:
    rows = [
        {
            "component": row.component,
            "latency_ms": row.latency_ms,
            "spread_ms": row.spread_ms,
            "kind": row.kind,
        }
        for row in result.rows
    ]
    return {
        "device": _identity(table),
        "latency_ms": result.latency_ms,
        "interval_ms": list(result.interval_ms),
        "interval_level": result.level,
        "rows": rows,
        "exact": result.exact,
        "interpolated": result.interpolated,
        "extrapolated": result.extrapolated,
    }


def _print_estimate(name: str, result: Estimate) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("component", "what", box=None, pad_edge=False)
    for header in ("ms", "spread", "share"):
        shown.add_column(header, justify="right")
    shown.add_column("price")
    for row in result.rows:
        key = row.key
        what = f"{key.type} {key.width_in}->{key.width_out}" if key.resolution else "once"
        share = f"{100 * row.latency_ms / result.latency_ms:.1f} %"
        spread = f"+- {row.spread_ms:.4f}"
        shown.add_row(row.component, what, f"{row.latency_ms:.4f}", spread, share, row.kind)
    Console().print(shown)
    low_ms, high_ms = result.interval_ms
    covers = (
        f"{100 * result.level:.0f} % interval {low_ms:.3f} to {high_ms:.3f} ms"
        if result.level is not None
        else f"{low_ms:.3f} to {high_ms:.3f} ms without the error of extrapolating"
    )
    typer.echo(f"{name}: {result.latency_ms:.3f} ms ({covers})")
    typer.echo(
        f"{result.exact} exact, {result.interpolated} interpolated, "
        f"{result.extrapolated} extrapolated"
    )


def _description(device: DeviceInfo) -> Iterable[str]:
    yield f"chip: {device.soc}"
    yield f"protocol: {device.protocol} ({device.date}, by {device.tool_version})"
    if device.threads is not None:
        yield f"threads: {device.threads}"
    for figure in device.errors:
        yield f"error, {figure.words}"
    if device.interval is not None:
        limits = f"-{device.interval.low_percent} % to +{device.interval.high_percent} %"
        yield f"{100 * device.interval.level:.0f} % interval: {limits}, {device.interval.basis}"
    if device.fit is not None:
        held = f", held to {device.fit.prior} by {device.fit.strength:g}"
        yield f"device model: {device.fit.model}{held if device.fit.prior else ''}"
    for name, value in device.model.items():
        yield f"model, {name}: {value:g}"
    for text in (*device.sources, *device.notes):
        yield f"note: {text}"
