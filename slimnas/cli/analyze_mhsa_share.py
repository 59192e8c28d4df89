"""`slimnas analyze mhsa-share`: sub-networks of equal speed with different shares of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.analyze_network import SkipOption
from slimnas.cli.analyze_training import (
    JOURNAL,
    AskedBudget,
    FirstSeedOption,
    LrOption,
    MaxImagesOption,
    SeedsOption,
    StepImagesOption,
    StudyProgress,
    TrainDataOption,
    TrainOnOption,
    numbers,
    open_budget,
    print_table,
    quiet_threads,
)
from slimnas.cli.latency_options import Clock
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import RUNS, RunOn, no_empty_folder, says_how_to_go_on

if TYPE_CHECKING:
    from slimnas.analysis.budget import TrainingBudget
    from slimnas.analysis.finished import Finished
    from slimnas.analysis.share_run import Instruments, ShareResult, ShareStudy
    from slimnas.arch.architecture import Architecture
    from slimnas.measure.timing import Protocol
    from slimnas.runtimes.base import Runtime

MEMORY_ITERATIONS = 10
PROFILED_ON = ("cpu", "cuda")


class Backend(str, Enum):
    """Runtimes that throughput can be measured with."""

    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


@dataclass(frozen=True)
class Bench:
    """How throughput is measured."""

    runtime: Runtime
    protocol: Protocol
    batch: int


def mhsa_share(
    model: Annotated[
        str, typer.Argument(help="ViT, DeiT or Swin: zoo name, architecture file or folder.")
    ] = "deit_tiny",
    speedups: Annotated[
        str, typer.Option(help="Throughputs over the model's, between commas.")
    ] = "1.25,1.5",
    shares: Annotated[
        str, typer.Option(help="Shares of MHSA layers in percent, between commas.")
    ] = "10,20,30,40,50,60",
    tolerance: Annotated[
        float, typer.Option(min=0.1, help="How far a speed-up may be off, in percent.")
    ] = 2.0,
    step: Annotated[int, typer.Option(min=1, help="Widths are multiples of it.")] = 4,
    trials: Annotated[
        int, typer.Option(min=1, help="Measurements per network, about, at most.")
    ] = 20,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the images; else the model's.")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What throughput is measured with.")] = (
        Backend.TORCH
    ),
    device: Annotated[RunOn, typer.Option(help="Where it is measured.")] = RunOn.CPU,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of model and network, each.")] = 8,
    clock: Annotated[
        Clock, typer.Option(help="cpu: for one thread on a machine that is never idle.")
    ] = Clock.WALL,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Profile memory-bound operators.")
    ] = True,
    train: Annotated[
        int | None,
        typer.Option("--train", min=1, metavar="EPOCHS", help="Train every network that long."),
    ] = None,
    data: TrainDataOption = "digits",
    train_resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Side of training images; else the model's, 64 for digits."),
    ] = None,
    batch_size: StepImagesOption = 32,
    lr: LrOption = 1e-3,
    seeds: SeedsOption = 1,
    max_images: MaxImagesOption = None,
    skip_bad_images: SkipOption = False,
    train_on: TrainOnOption = RunOn.AUTO,
    seed: FirstSeedOption = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder; else runs/analyze-mhsa-share-MODEL.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy and memory-bound time against the share of attention, at equal throughput.

    Leaves out attention or FFN layers of MODEL until MHSA has the given share of them, solves the
    width for each speed-up by timing network and model in turns, and optionally trains every
    network for the same budget. Stop it at any moment and give the same command again: it goes on.

    Example: slimnas analyze mhsa-share deit_tiny --train 10
    """
    quiet_threads()
    from slimnas.analysis.mhsa_share import Goal, distinct_shares
    from slimnas.analysis.share_run import ShareStudy
    from slimnas.errors import AnalysisError
    from slimnas.measure.timing import Protocol
    from slimnas.zoo.registry import get

    base = get(model).architecture
    if resolution is not None:
        base = base.with_resolution(resolution)
    asked_speedups = numbers(speedups, "--speedups")
    if min(asked_speedups) <= 0:
        raise AnalysisError(f"--speedups: must be above 0, got {speedups!r}")
    asked_shares = tuple(value / 100 for value in numbers(shares, "--shares"))
    study = ShareStudy(
        base=base,
        speedups=tuple(asked_speedups),
        shares=asked_shares,
        goal=Goal(1.0, tolerance / 100, step, trials),
        seeds=tuple(range(seed, seed + seeds)),
    )
    possible = distinct_shares(base, asked_shares)
    if len(possible) < len(set(asked_shares)):
        made = ", ".join(f"{100 * layers.share:.0f} %" for _, layers in possible)
        note(f"of these shares {base.name} can have {made}")
    bench = Bench(
        runtime=_runtime(backend, threads, device),
        protocol=Protocol(clock=clock.value, rounds=rounds, seed=seed),
        batch=batch,
    )
    asked = None
    if train is not None:
        asked = AskedBudget(
            data=data,
            epochs=train,
            batch_size=batch_size,
            lr=lr,
            resolution=train_resolution,
            max_images=max_images,
            skip_bad_images=skip_bad_images,
            train_on=train_on.value,
        )
    folder = output or RUNS / f"analyze-mhsa-share-{base.name}"
    result, settings = _run(study, bench, memory, asked, folder)
    _report(result, settings, folder, as_json)


def _runtime(backend: Backend, threads: int, device: RunOn) -> Runtime:
    import torch

    from slimnas.runtimes.registry import get_runtime

    unit = device.value
    if device is RunOn.AUTO:
        gpu = backend is Backend.TORCH and torch.cuda.is_available()
        unit = "cuda" if gpu else "cpu"
    return get_runtime(backend.value, threads=threads, unit=unit)


def _run(
    study: ShareStudy, bench: Bench, memory: bool, asked: AskedBudget | None, folder: Path
) -> tuple[ShareResult, dict[str, Any]]:
    from slimnas._lock import folder_lock
    from slimnas.analysis.finished import Finished
    from slimnas.analysis.share_run import run_share_study

    settings = _settings(study, bench)
    with (
        no_empty_folder(folder),
        folder_lock(folder),
        says_how_to_go_on(),
        StudyProgress() as progress,
    ):
        budget = None
        if asked is not None:
            budget = open_budget(asked, study.base, folder, progress, seed=study.seeds[0])
        instruments = _instruments(study, bench, memory, budget)
        finished: Finished = Finished(folder / JOURNAL, settings)
        if len(finished):
            note(f"went on after {len(finished)} finished parts of an earlier run")
        result = run_share_study(study, instruments, finished, progress.step)
    training = {} if budget is None else {"training": budget.settings()}
    return result, {**settings, **training}


def _settings(study: ShareStudy, bench: Bench) -> dict[str, Any]:
    """What must agree before results may be mixed."""
    from dataclasses import asdict

    from slimnas.measure.machine import this_machine

    runtime = bench.runtime
    goal = asdict(study.goal)
    del goal["speedup"]
    return {
        "model": study.base.name,
        "model_digest": study.base.digest,
        "machine": this_machine().cpu,
        "runtime": f"{runtime.name} {runtime.version}",
        "compute_unit": runtime.compute_unit,
        "dtype": runtime.dtype,
        "threads": runtime.threads,
        "batch": bench.batch,
        "goal": goal,
        "protocol": bench.protocol.to_dict(),
    }


def _instruments(
    study: ShareStudy, bench: Bench, memory: bool, budget: TrainingBudget | None
) -> Instruments:
    import hashlib
    import json

    from slimnas.analysis.share_run import Instruments
    from slimnas.analysis.speed import SpeedMeter

    meter = SpeedMeter(study.base, bench.runtime, bench.protocol, batch=bench.batch)
    profiled = _memory(bench) if memory else None
    if budget is None:
        return Instruments(meter, profiled)
    key = hashlib.sha256(json.dumps(budget.settings()).encode()).hexdigest()[:16]
    return Instruments(meter, profiled, budget.trained_top1, key)


def _memory(bench: Bench) -> Callable[[Architecture], float] | None:
    """The profiler's share of memory-bound operators, 0 to 1, in the same setting."""
    from slimnas.analysis.memory import profile_network
    from slimnas.analysis.recording import ProfileSettings
    from slimnas.nn.build import build

    unit = bench.runtime.compute_unit.partition(":")[0]
    if unit not in PROFILED_ON:
        note(f"no memory-bound shares: the profiler cannot see operators on {unit}")
        return None
    onnx = bench.runtime.name == "onnxruntime"
    settings = ProfileSettings(
        runtime="onnxruntime" if onnx else "torch",
        device=unit,
        batch=bench.batch,
        threads=bench.runtime.threads,
        iterations=MEMORY_ITERATIONS,
    )

    def share(architecture: Architecture) -> float:
        profile = profile_network(build(architecture), settings)
        return profile.memory_bound(nonlinear=False).share_percent / 100

    return share


def _report(result: ShareResult, settings: dict[str, Any], folder: Path, as_json: bool) -> None:
    from slimnas import __version__
    from slimnas.report.analysis_share import mhsa_share_document, write_mhsa_share

    provenance = {"tool_version": __version__, **settings}
    files = [shown_path(path) for path in write_mhsa_share(result, folder, provenance)]
    if as_json:
        print_json({**mhsa_share_document(result, provenance), "files": files})
        return
    _print(result)
    typer.echo(f"written: {', '.join(files)}")


def _print(result: ShareResult) -> None:
    from slimnas.analysis.share_run import row

    trained = any(one.top1 for one in result.networks)
    profiled = any(one.memory_share is not None for one in result.networks)
    headers = ["network", "MHSA", "layers", "widths", "speed-up", "quartiles", "params", "MACs"]
    headers += ["memory-bound"] * profiled + ["top-1"] * trained
    rows = []
    for one in (result.base, *result.networks):
        cells = row(one)
        quartiles = ""
        if one.speed is not None:
            quartiles = f"{one.speed.low:.3f} to {one.speed.high:.3f}"
        rows.append(
            [
                one.architecture.name,
                f"{100 * one.layers.share:.0f} %",
                f"{one.layers.attention}+{one.layers.ffn}",
                "/".join(map(str, one.architecture.widths)),
                f"{cells['speedup']:.3f}{'' if one.met else ' *'}",
                quartiles,
                f"{cells['params'] / 1e6:.2f} M",
                f"{cells['macs'] / 1e9:.3f} G",
            ]
        )
        if profiled:
            share = one.memory_share
            rows[-1].append("" if share is None else f"{100 * share:.1f} %")
        if trained:
            rows[-1].append("" if one.mean_top1 is None else f"{one.mean_top1:.2f} %")
    print_table(headers, rows)
    if not all(one.met for one in result.networks):
        typer.echo("* no width tried is within the tolerance; more --trials or a smaller --step")
