"""`slimnas analyze memory`: the share of run time in memory-bound operators."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from slimnas.cli.analyze_network import (
    Device,
    DeviceOption,
    OutputOption,
    ResolutionOption,
    SeedOption,
)
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import RUNS, no_empty_folder, require_writable

if TYPE_CHECKING:
    from slimnas.analysis.memory import Profile, Row

OPERATORS_SHOWN = 12


class Runtime(str, Enum):
    """Whose profiler."""

    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"


class Dtype(str, Enum):
    """Number formats."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Attention(str, Enum):
    """How torch computes attention."""

    FUSED = "fused"
    EXPLICIT = "explicit"


def memory(
    models: Annotated[
        list[str], typer.Argument(help="Zoo names, architecture files or run folders.")
    ],
    runtime: Annotated[Runtime, typer.Option(help="Whose profiler.")] = Runtime.TORCH,
    device: DeviceOption = Device.CPU,
    dtype: Annotated[Dtype, typer.Option(help="Number format; ONNX Runtime: fp32.")] = Dtype.FP32,
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    resolution: ResolutionOption = None,
    iterations: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 10,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="As deployed, BatchNorm folded; or as trained.")
    ] = True,
    attention: Annotated[
        Attention,
        typer.Option(help="fused: one operator where torch has it; explicit: with its softmax."),
    ] = Attention.FUSED,
    seed: SeedOption = 0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Where run time goes: the share of memory-bound operators, by kind, operator and layer.

    Weights are random: no operator's time depends on them. Files of an earlier run in the same
    folder are replaced.

    Example: slimnas analyze memory deit_tiny swin_tiny --attention explicit
    """
    from slimnas.analysis.memory import profile_network
    from slimnas.analysis.recording import ProfileSettings
    from slimnas.report.analysis_memory import memory_document, write_memory
    from slimnas.zoo.create import create_model
    from slimnas.zoo.registry import get

    settings = ProfileSettings(
        runtime=runtime.value,
        device=device.value,
        dtype=dtype.value,
        batch=batch,
        threads=threads,
        iterations=iterations,
        folded=fold,
        attention=attention.value,
        seed=seed,
    )
    entries = [get(model) for model in models]
    networks = [create_model(model, resolution=resolution, seed=seed) for model in models]
    names = dict.fromkeys(entry.name for entry in entries)
    folder = output or RUNS / "-".join(["analyze-memory", *names])
    profiles = []
    with no_empty_folder(folder):
        require_writable(folder)
        for entry, network in zip(entries, networks, strict=True):
            note(f"profiling {entry.name}")
            profiles.append(profile_network(network, settings, name=entry.name))
        files = write_memory(profiles, folder)
    if as_json:
        shown = {key: shown_path(path) for key, path in files.items()}
        print_json({**memory_document(profiles), "files": shown})
        return
    for profile in profiles:
        for line in _lines(profile):
            typer.echo(line)
        typer.echo("")
    for path in files.values():
        typer.echo(shown_path(path))


def _lines(profile: Profile) -> Iterable[str]:
    from slimnas.analysis.operators import KINDS
    from slimnas.report.analysis_memory import layer_name

    settings, recording = profile.settings, profile.recording
    rows, columns = profile.resolution
    plural = "s" if settings.threads > 1 else ""
    threads = "" if settings.device == "cuda" else f", {settings.threads} thread{plural}"
    form = "folded" if settings.folded else "not folded"
    yield (
        f"{profile.model}: {settings.runtime} {recording.version} on {recording.compute_unit}"
        f"{threads}, {settings.dtype}, batch {settings.batch} of {rows}x{columns}, {form}"
    )
    yield (
        f"{profile.forward_ms:.4g} ms per run, {profile.total_ms:.4g} ms of operators under the "
        f"profiler; mean of the faster half of {settings.iterations} runs, +- half the quartiles' "
        "distance"
    )
    yield ""
    yield from _table("kind", [(KINDS[k], row) for k, row in profile.by_kind().items()])
    for words, nonlinear in (("memory-bound", False), ("with softmax, activation", True)):
        yield _row(words, profile.memory_bound(nonlinear=nonlinear), 24)
    yield ""
    operators = list(profile.by_operator().items())
    shown = [(operator.name, row) for operator, row in operators[:OPERATORS_SHOWN]]
    yield from _table("operator", shown)
    if len(operators) > len(shown):
        yield f"{len(operators) - len(shown)} more in operators.csv"
    yield ""
    layers = [(layer_name(name), row) for name, row in profile.by_layer().items()]
    yield from _table("layer", layers, bound=True)


def _table(what: str, rows: list[tuple[str, Row]], *, bound: bool = False) -> Iterable[str]:
    width = max(24, *(len(name) for name, _ in rows))
    last = "  memory-bound %" if bound else ""
    yield f"{what:<{width}}  {'ms':>8}  {'share %':>14}  {'MACs/byte':>9}{last}"
    for name, row in rows:
        end = f"  {row.memory_bound_percent:14.1f}" if bound else ""
        yield f"{_row(name, row, width)}{end}"


def _row(name: str, row: Row, width: int) -> str:
    intensity = "" if row.intensity is None else f"{row.intensity:.1f}"
    spread = f"+- {row.spread_percent / 2:.1f}"
    return f"{name:<{width}}  {row.ms:8.3f}  {row.share_percent:6.1f} {spread:<7}  {intensity:>9}"
