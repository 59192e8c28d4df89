"""`slimnas latency build`: measure the latency table of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, note, print_json, shown_path

if TYPE_CHECKING:
    from slimnas.measure.build import BuiltTable, Progress
    from slimnas.measure.scope import Scope


DEFAULT_SPACE = "efficientformer_tiny"


class Backend(str, Enum):
    """Runtimes a table can be measured with."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    TORCH = "torch"


class Clock(str, Enum):
    """What tells the time."""

    WALL = "wall"
    CPU = "cpu"


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
    rounds: Annotated[int, typer.Option(min=1, help="Accepted rounds per entry and pass.")] = 6,
    clock: Annotated[
        Clock, typer.Option(help="cpu: for one thread on a machine that is never idle.")
    ] = Clock.WALL,
    seed: Annotated[int, typer.Option(help="Seed of orders and of the random networks.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a latency table on this machine, some minutes for efficientformer_tiny.

    Interrupted, even killed, the same command goes on where it stopped.

    For search, cover a space; to prune a model, cover the model.

    Example: slimnas latency build --device local --backend onnxruntime
    """
    from slimnas.latency.devices import table_folders
    from slimnas.measure.build import BuildJob, build_table
    from slimnas.measure.machine import load_average, this_machine
    from slimnas.measure.timing import Protocol
    from slimnas.runtimes.registry import get_runtime

    job = BuildJob(
        output=output or table_folders()[0] / device,
        scope=_scope(space, model),
        protocol=Protocol(clock=clock.value, rounds=rounds, seed=seed),
        force=force,
    )
    runtime = get_runtime(backend.value, threads=threads)
    load, cores = load_average(), this_machine().cores
    if clock is Clock.WALL and load is not None and load + threads > cores:
        note(
            f"load average {load:.1f} on {cores} cores: others take turns on them, which a wall "
            "clock counts; free the machine, or measure one thread with --clock cpu"
        )
    try:
        with _progress_bar() as progress:
            built = build_table(job, runtime, progress=progress)
    except KeyboardInterrupt:
        note(f"what was timed is kept in {job.output}; the same command goes on there")
        raise
    if as_json:
        print_json(_summary(built))
    else:
        _print_table(built)


def _scope(space: str | None, model: str | None) -> Scope:
    from slimnas.arch.space import SearchSpace
    from slimnas.measure.model_scope import ModelScope
    from slimnas.measure.scope import SpaceScope
    from slimnas.zoo.registry import get

    if model is None:
        return SpaceScope(SearchSpace.load(space or DEFAULT_SPACE))
    if space is not None:
        raise typer.BadParameter("give --space or --model, not both", param_hint="'--model'")
    return ModelScope(get(model).architecture)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar with the remaining time on a terminal, a line every tenth in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("measuring"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, planned: int, what: str) -> None:
            bar.update(task, completed=done, total=planned, description=what)
            if not console.is_terminal and done % max(planned // 10, 1) == 0:
                note(f"measuring {done}/{planned}: {what}")

        yield show


def _summary(built: BuiltTable) -> dict[str, Any]:
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


def _print_table(built: BuiltTable) -> None:
    from slimnas.latency.devices import provenance_line

    if built.resumed:
        note(f"went on after {built.resumed} visits of an interrupted build")
    for check in built.held_out:
        typer.echo(
            f"held-out network: predicted {check.predicted_ms:.3f} ms, measured "
            f"{check.measured_ms:.3f} ms ({100 * check.error:+.1f} %)"
        )
    typer.echo(provenance_line(built.table))
    typer.echo(f"{len(built.table.rows)} rows written to {shown_path(built.path)}")
