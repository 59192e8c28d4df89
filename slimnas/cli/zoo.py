"""`slimnas zoo`: list, show, add and export models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from slimnas.zoo.entry import Entry

app = typer.Typer(no_args_is_help=True, help="Models: published ones and your own.")

ZooOption = Annotated[
    Path | None, typer.Option("--zoo", help="Your zoo; else $SLIMNAS_ZOO, else ./model_zoo.")
]
ModelArgument = Annotated[
    str, typer.Argument(help="Zoo name, architecture file, run folder or zoo entry folder.")
]


class Format(str, Enum):
    """File formats a model can be exported to."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    COREML = "coreml"


@app.command("list")
def list_models(
    pattern: Annotated[
        str, typer.Argument(help="Only names that match, with wildcards: 'efficient*'.")
    ] = "*",
    family: Annotated[
        str | None, typer.Option(help="Only this family: deit, efficientvit, ...")
    ] = None,
    zoo: ZooOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the published models and those of your zoo, with published accuracy and speed."""
    from slimnas.zoo.registry import list_entries

    listing = list_entries(zoo, pattern=pattern, family=family)
    for folder, reason in listing.damaged:
        note(f"skipped {folder}: {reason}")
    rows = [_summary(entry) for entry in listing.entries]
    if as_json:
        damaged = [{"folder": shown_path(path), "error": why} for path, why in listing.damaged]
        print_json({"entries": rows, "damaged": damaged})
        return
    if not rows:
        note(f"no model matches {pattern!r}; slimnas zoo list shows all")
        return
    typer.echo("\n".join(_table(rows)))


@app.command()
def show(model: ModelArgument, zoo: ZooOption = None, as_json: JsonOption = False) -> None:
    """Show one model: its architecture, its cost and its numbers with their provenance."""
    from slimnas.zoo.registry import get

    entry = get(model, zoo=zoo)
    metrics = {
        name: {"value": metric.value, "provenance": metric.provenance}
        for name, metric in entry.metrics.items()
    }
    if as_json:
        architecture = entry.architecture.to_dict()
        print_json({**_summary(entry), "metrics": metrics, "architecture": architecture})
        return
    row = _summary(entry)
    typer.echo(entry.architecture.to_yaml().rstrip())
    typer.echo(f"params: {row['params']:,}\nmacs: {row['macs']:,}\nweights: {row['weights']}")
    for name, metric in metrics.items():
        typer.echo(f"{name}: {metric['value']:g} ({metric['provenance']})")


@app.command()
def add(
    run: Annotated[Path, typer.Argument(help="Run folder, found/<target> in it, or zoo entry.")],
    name: Annotated[str | None, typer.Option(help="Name; else the architecture's.")] = None,
    zoo: ZooOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the model of a run into your zoo."""
    from slimnas.zoo import registry

    folder = registry.add(run, name=name, zoo=zoo)
    if as_json:
        print_json({"name": folder.name, "folder": shown_path(folder)})
    else:
        typer.echo(f"added {folder.name} in {shown_path(folder)}")


@app.command()
def export(
    model: ModelArgument,
    file_format: Annotated[Format, typer.Option("--format", help="File format.")] = Format.ONNX,
    output: Annotated[
        Path | None, typer.Option(help="File to write; else exports/ of the entry, else here.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights file, in place of the entry's own.")
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Fresh weights, to measure latency only.")
    ] = False,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Any batch size instead of one image.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="coreml: fp16 (default) or fp32; the others are fp32.")
    ] = None,
    seed: Annotated[int, seed_option("Seed of the image it is checked on.")] = 0,
    zoo: ZooOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model for deployment, BN folded, and check the file against PyTorch."""
    from slimnas.zoo.create import create_model
    from slimnas.zoo.export import export_network
    from slimnas.zoo.registry import get

    if untrained and weights is not None:
        raise typer.BadParameter("--untrained and --weights exclude each other")
    entry = get(model, zoo=zoo)
    pretrained = False if untrained else weights or True
    network = create_model(model, pretrained=pretrained, zoo=zoo, seed=seed)
    path = output or _export_path(entry, file_format)
    difference = export_network(
        network,
        path,
        format=file_format.value,
        dynamic_batch=dynamic_batch,
        dtype=dtype,
        seed=seed,
    )
    if as_json:
        print_json(
            {
                "model": entry.name,
                "format": file_format.value,
                "file": shown_path(path),
                "trained": not untrained,
                "max_abs_difference": difference,
            }
        )
    elif difference is None:
        typer.echo(f"ok: {shown_path(path)}; converted, not run: Core ML runs on macOS only")
    else:
        typer.echo(f"ok: {shown_path(path)}; differs from PyTorch by at most {difference:.2g}")


def _export_path(entry: Entry, file_format: Format) -> Path:
    from slimnas.zoo.export import FILE_SUFFIXES

    file = f"{entry.name}{FILE_SUFFIXES[file_format.value]}"
    return Path(file) if entry.folder is None else entry.folder / "exports" / file


def _summary(entry: Entry) -> dict[str, Any]:
    from slimnas.arch.cost import cost
    from slimnas.zoo.create import published_weights
    from slimnas.zoo.metrics import TEST_TOP1, TOP1, speeds
    from slimnas.zoo.registry import family_of

    counted = cost(entry.architecture)
    on_hub = "repository" in (published_weights(entry) or {})
    top1 = entry.metrics.get(TOP1) or entry.metrics.get(TEST_TOP1)
    speed = next(iter(speeds(entry.metrics)), None)
    return {
        "name": entry.name,
        "family": family_of(entry.name),
        "params": counted.params,
        "macs": counted.macs,
        "top1": None if top1 is None else asdict(top1),
        "latency": None
        if speed is None
        else {
            "metric": speed.name,
            "device": speed.device,
            "unit": speed.unit,
            **asdict(speed.metric),
        },
        "source": entry.source,
        "weights": shown_path(entry.weights) if entry.weights else "download" if on_hub else None,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines: one model each, then where the published numbers come from."""
    notes: dict[str, int] = {}

    def noted(number: Mapping[str, Any] | None, unit: str) -> str:
        if number is None:
            return "-"
        mark = notes.setdefault(number["provenance"], len(notes) + 1)
        value = number["value"]
        shown = f"{value:.4g}" if value < 10 else f"{value:,g}"  # no digits that mean nothing
        return f"{shown}{unit} [{mark}]"

    cells = [("name", "params", "MACs", "top-1", "latency or throughput", "source")]
    for row in rows:
        speed = row["latency"]
        unit = "" if speed is None else f" {speed['unit']} {speed['device']}".rstrip()
        published = noted(row["top1"], ""), noted(speed, unit)
        cells.append(
            (row["name"], f"{row['params']:,}", f"{row['macs']:,}", *published, row["source"])
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = ("<", ">", ">", ">", "<", "<")
    for line in cells:
        parts = zip(line, aligned, widths, strict=True)
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in parts).rstrip()
    if notes:
        yield ""
    for text, mark in notes.items():
        yield f"[{mark}] {text}"
