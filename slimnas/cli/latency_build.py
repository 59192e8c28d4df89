"""`slimnas latency build`: measure the latency table of this machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.latency_options import Clock, chosen_scope, progress_bar
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from slimnas.measure.build import BuiltShard, BuiltTable
    from slimnas.measure.schedule import Shard


DEFAULT_SPACE = "efficientformer_tiny"


class Backend(str, Enum):
    """Runtimes a table can be measured with."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    TORCH = "torch"
    COREML = "coreml"


def build(
    device: Annotated[str, typer.Option(help="Name for this machine's table.")] = "local",
    backend: Annotated[Backend, typer.Option(help="Inference runtime.")] = Backend.ONNXRUNTIME,
    space: Annotated[
        str | None,
        typer.Option(
            help="Search space to cover: a shipped name or a .yaml file.",
            show_default=DEFAULT_SPACE,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Cover all that this zoo name or file can be pruned to, not a space."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The table's folder; else lookup_tables/DEVICE.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads per call.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16, fp16 or int8.", show_default="the runtime's"),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="Compute unit, such as cpu or cuda.", show_default="the runtime's"),
    ] = None,
    runtime_option: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime-option",
            help="Once per option; torch has compile, channels-last, cuda-graph.",
        ),
    ] = None,
    networks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Whole networks to calibrate with.",
            show_default="until they no longer help",
        ),
    ] = None,
    held_out: Annotated[
        int, typer.Option(min=0, help="Whole networks for the stated error alone.")
    ] = 20,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="This host's part; join them with 'latency merge'."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Accepted rounds per entry and pass.")] = 6,
    precision: Annotated[
        float,
        typer.Option(
            min=0.1, help="Standard error of a price in percent, above which it is timed again."
        ),
    ] = 3.0,
    clock: Annotated[
        Clock, typer.Option(help="cpu: for one thread on a machine that is never idle.")
    ] = Clock.WALL,
    seed: Annotated[int, seed_option("Seed of orders and of the random networks.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a latency table on this machine, some minutes for efficientformer_tiny.

    Interrupted, even killed, the same command goes on where it stopped.

    For search, cover a space; to prune a model, cover the model.

    Example: slimnas latency build --device local --backend onnxruntime
    """
    from slimnas.latency.devices import table_folders
    from slimnas.measure.build import BuildJob, build_shard, build_table
    from slimnas.measure.machine import load_average, this_machine
    from slimnas.measure.schedule import Networks
    from slimnas.measure.timing import Protocol
    from slimnas.runtimes.registry import get_runtime

    job = BuildJob(
        output=output or table_folders()[0] / device,
        scope=chosen_scope(space or (None if model else DEFAULT_SPACE), model),
        protocol=Protocol(clock=clock.value, rounds=rounds, precision=precision / 100, seed=seed),
        batch=batch,
        networks=Networks(networks, held_out),
        shard=_shard(shard),
        force=force,
    )
    runtime = get_runtime(
        backend.value,
        threads=threads,
        dtype=dtype,
        unit=unit,
        options=tuple(runtime_option or ()),
    )
    load, cores = load_average(), this_machine().cores
    if clock is Clock.WALL and load is not None and load + threads > cores:
        note(
            f"load average {load:.1f} on {cores} cores: others take turns on them, which a wall "
            "clock counts; free the machine, or measure one thread with --clock cpu"
        )
    try:
        with progress_bar("measuring") as progress:
            if job.shard is not None:
                _print_shard(build_shard(job, runtime, progress=progress), as_json)
                return
            built = build_table(job, runtime, progress=progress)
    except KeyboardInterrupt:
        note(f"what was timed is kept in {job.output}; the same command goes on there")
        raise
    if as_json:
        print_json(built_summary(built))
    else:
        print_built(built)


def _shard(text: str | None) -> Shard | None:
    from slimnas.measure.schedule import Shard

    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise typer.BadParameter(f"must be i/n, such as 1/3, got {text!r}", param_hint="'--shard'")
    return Shard(int(number), int(of))


def _print_shard(built: BuiltShard, as_json: bool) -> None:
    if as_json:
        path = shown_path(built.path)
        print_json({"shard": str(built.shard), "visits": built.visits, "path": path})
        return
    if built.resumed:
        note(f"went on after {built.resumed} visits of an interrupted build")
    typer.echo(f"shard {built.shard}: {built.visits} visits in {shown_path(built.path)}")
    typer.echo("when all are done: slimnas latency merge FOLDER FOLDER ... --device NAME")


def built_summary(built: BuiltTable) -> dict[str, Any]:
    """A built table for --json."""
    info = built.table.device
    figure = info.errors[0].model_dump() if info.errors else {}
    networks = [
        {
            "architecture": check.architecture.digest,
            "predicted_ms": check.predicted_ms,
            "measured_ms": check.measured_ms,
        }
        for check in built.held_out
    ]
    return {
        "device": {"name": info.name, "kind": info.kind},
        "rows": len(built.table.rows),
        "path": shown_path(built.path),
        "held_out": {**figure, "architectures": networks},
    }


def print_built(built: BuiltTable) -> None:
    """Print a built table: its held-out networks, its error, where it is."""
    from slimnas.latency.devices import provenance_line
    from slimnas.latency.regime import regimes

    if built.resumed:
        note(f"went on after {built.resumed} visits of an interrupted build")
    for check in built.held_out:
        low_ms, high_ms = check.interval_ms or (float("nan"), float("nan"))
        typer.echo(
            f"held-out network: predicted {check.predicted_ms:.3f} ms ({low_ms:.3f} to "
            f"{high_ms:.3f}), measured {check.measured_ms:.3f} ms ({100 * check.error:+.1f} %)"
        )
    for regime in regimes(built.table):
        typer.echo(regime.sentence)
    typer.echo(provenance_line(built.table))
    typer.echo(f"{len(built.table.rows)} rows written to {shown_path(built.path)}")
