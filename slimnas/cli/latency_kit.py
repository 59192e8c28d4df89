"""`slimnas latency kit`: everything a device that cannot be reached from here has to time."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from slimnas.cli.latency_options import chosen_scope, progress_bar
from slimnas.cli.output import JsonOption, print_json, shown_path
from slimnas.cli.seeds import seed_option


class Format(str, Enum):
    """File formats of a kit."""

    ONNX = "onnx"
    COREML = "coreml"
    EXECUTORCH = "executorch"


def kit(
    device: Annotated[str, typer.Option(help="Name for the table that its results become.")],
    output: Annotated[Path, typer.Option(help="The kit's folder, not there yet.")],
    file_format: Annotated[
        Format,
        typer.Option(
            "--format", help="onnx: any computer; coreml: iPhone, Mac; executorch: Android."
        ),
    ] = Format.ONNX,
    space: Annotated[
        str | None, typer.Option(help="Search space to cover: a shipped name or a .yaml file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Cover all that this zoo name or file can be pruned to, not a space."),
    ] = None,
    networks: Annotated[int, typer.Option(min=0, help="Whole networks to calibrate with.")] = 20,
    held_out: Annotated[
        int, typer.Option(min=0, help="Whole networks for the stated error alone.")
    ] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or int8.", show_default="the format's"),
    ] = None,
    own_weights: Annotated[
        bool,
        typer.Option("--own-weights", help="Weights inside every ONNX file, for upload services."),
    ] = False,
    seed: Annotated[int, seed_option("Seed of orders and of the random networks.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a kit that times a table's networks on a device elsewhere.

    Copy the folder to the device, or to the computer it is connected to, follow its README, and
    read the results with 'slimnas latency import'.

    Example: slimnas latency kit --device pi5 --space efficientformer_tiny --output pi5-kit
    """
    from slimnas.measure.kit import KitJob, kit_runtime, make_kit
    from slimnas.measure.timing import Protocol

    job = KitJob(
        output=output,
        device=device,
        scope=chosen_scope(space, model),
        file_format=file_format.value,
        protocol=Protocol(seed=seed),
        batch=batch,
        calibration=networks,
        held_out=held_out,
        shared_weights=not own_weights,
    )
    with progress_bar("writing") as progress:
        made = make_kit(job, kit_runtime(file_format.value, dtype), progress)
    if as_json:
        print_json(
            {
                "path": shown_path(output),
                "kit": made.digest,
                "files": len(made.files),
                "entries": len(made.entries),
                "bytes": made.size,
                "checked": made.checked,
            }
        )
        return
    typer.echo(
        f"{made.title}: {len(made.files)} networks, {made.size / 1e6:.1f} MB; {made.checked}"
    )
    typer.echo(f"written to {shown_path(output)}; its README.md says what to do with it")
