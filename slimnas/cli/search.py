"""`slimnas search`: from a target latency and a device to networks that meet it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import RunOn, no_empty_folder, says_how_to_go_on

if TYPE_CHECKING:
    from slimnas.arch.space import SearchSpace
    from slimnas.data.splits import DataSplits
    from slimnas.latency.table import LatencyTable
    from slimnas.search.config import SearchConfig
    from slimnas.search.run import SearchResult
    from slimnas.supernet.train import TrainedSupernet

DEFAULT_SPACE = "efficientformer_tiny"
RUNS = Path("runs")


class Mixing(str, Enum):
    """How a MetaPath runs its choices."""

    SAMPLED = "sampled"
    SOFT = "soft"


class Noise(str, Enum):
    """What is added to the architecture parameters."""

    GUMBEL = "gumbel"
    UNIFORM = "uniform"


class FrontierChoice(str, Enum):
    """Which actions a slimming step weighs."""

    PER_STAGE = "per_stage"
    PAPER = "paper"


@dataclass(frozen=True)
class _Inputs:
    """What the command line named, opened and checked."""

    config: SearchConfig
    space: SearchSpace
    table: LatencyTable
    supernet: TrainedSupernet | None


def search(
    target_latency: Annotated[
        list[str],
        typer.Option(help="Target such as 1.6ms, 1600us or 0.0016s; repeat it for several."),
    ],
    device: Annotated[str, typer.Option(help="Latency table: a device's name, or a folder.")],
    space: Annotated[
        str | None, typer.Option(help=f"Search space: name or file; else {DEFAULT_SPACE}.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="digits, image folder, parquet files, webdataset tars or hub id.")
    ] = "digits",
    output: Annotated[
        Path | None, typer.Option(help="Run folder; else runs/SPACE-DATA-DEVICE-TARGET.")
    ] = None,
    supernet: Annotated[
        Path | None, typer.Option(help="Trained supernet of another run, instead of training.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    alpha_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the architecture parameters.")
    ] = None,
    tau_start: Annotated[float | None, typer.Option(help="First temperature.")] = None,
    tau_end: Annotated[float | None, typer.Option(help="Last temperature.")] = None,
    mixing: Annotated[Mixing, typer.Option(help="sampled: one path runs.")] = Mixing.SAMPLED,
    noise: Annotated[Noise, typer.Option(help="uniform: as the paper.")] = Noise.GUMBEL,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of training images; else the space's.")
    ] = None,
    frontier: Annotated[
        FrontierChoice, typer.Option(help="Actions weighed per step: per_stage, or paper's three.")
    ] = FrontierChoice.PER_STAGE,
    search_images: Annotated[
        int, typer.Option(min=1, help="SEARCH images that judge a candidate, at most.")
    ] = 1000,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many images of the data.")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded.")
    ] = False,
    train_on: Annotated[RunOn, typer.Option(help="Where the supernet trains.")] = RunOn.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Find networks that meet a target latency on a device.

    Trains a supernet once, then slims it: each step takes the action with the smallest accuracy
    drop per millisecond saved, by the device's latency table. Stop it at any moment and give the
    same command again: it goes on.

    Example: slimnas search --target-latency 1.6ms --device iphone12
    """
    # Read by OpenMP when torch loads it: threads that wait sleep instead of spinning, which on
    # cores shared with other work is several times faster and on free cores costs little.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from slimnas.latency.target import parse_latency_ms

    recipe = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "alpha_lr": alpha_lr,
        "tau_start": tau_start,
        "tau_end": tau_end,
        "mixing": mixing.value,
        "noise": noise.value,
    }
    settings = {
        "data": data,
        "frontier": frontier.value,
        "search_images": search_images,
        "max_images": max_images,
        "skip_bad_images": skip_bad_images,
        "seed": seed,
        **({} if resolution is None else {"resolution": resolution}),
    }
    targets_ms = sorted({parse_latency_ms(text) for text in target_latency})
    given = {key: value for key, value in recipe.items() if value is not None}
    inputs = _open_inputs(space, supernet, device, targets_ms, settings, given)
    folder = output or RUNS / _run_name(inputs)
    _run(inputs, folder, train_on.value, as_json)


def _open_inputs(
    space_name: str | None,
    supernet_path: Path | None,
    device: str,
    targets_ms: list[float],
    settings: dict[str, Any],
    recipe: dict[str, Any],
) -> _Inputs:
    """Open everything the command line names and refuse what cannot end well."""
    from slimnas.arch.documents import parse_spec
    from slimnas.arch.space import SearchSpace
    from slimnas.latency.devices import find_device, provenance_line
    from slimnas.search.checks import check_before_data, space_digest, table_digest
    from slimnas.search.config import SearchConfig
    from slimnas.supernet.train import SupernetRecipe, load_supernet

    table = find_device(device)
    note(f"latency table: {provenance_line(table)}")
    trained = None
    if supernet_path is not None:
        trained = load_supernet(supernet_path)
    if space_name is None and trained is not None:
        space = trained.supernet.space
    else:
        space = SearchSpace.load(space_name or DEFAULT_SPACE)
    made = None if trained else parse_spec(SupernetRecipe, recipe, source="command line")
    defaults = {"resolution": trained.supernet.resolution if trained else space.supernet.resolution}
    config = parse_spec(
        SearchConfig,
        {
            **defaults,
            **settings,
            "space": space_name or space.name,
            "space_digest": space_digest(space),
            "device": device,
            "table_digest": table_digest(table),
            "targets_ms": targets_ms,
            "recipe": made.model_dump() if made else None,
            "supernet_digest": trained.digest if trained else None,
        },
        source="command line",
    )
    check_before_data(space, table, config)
    return _Inputs(config, space, table, trained)


def _run(inputs: _Inputs, folder: Path, train_on: str, as_json: bool) -> None:
    from slimnas._lock import folder_lock
    from slimnas.cli.progress import SearchProgress
    from slimnas.data.splits import open_data
    from slimnas.search.checks import check_search, require_fitting
    from slimnas.search.config import claim, refuse_other_run
    from slimnas.search.run import run_search
    from slimnas.train.loop import accelerator_for

    config = inputs.config
    with no_empty_folder(folder), folder_lock(folder):
        refuse_other_run(folder, config)
        data = open_data(
            config.data,
            resolution=(config.resolution, config.resolution),
            channels=inputs.space.input.channels,
            seed=config.seed,
            skip_bad_images=config.skip_bad_images,
            max_images=config.max_images,
        )
        space = inputs.space.with_classes(data.classes)
        check_search(space, inputs.table, config)
        if inputs.supernet is not None:
            require_fitting(
                inputs.supernet, space, data.for_search(), config.resolution, "--supernet"
            )
        accelerator_for(train_on)
        claim(folder, config)  # only now: a refused run leaves no settings behind
        note(f"data: {data.description}")
        note(
            f"training at {config.resolution} px, deployment at {space.input.resolution} px; "
            f"run folder {shown_path(folder)}"
        )
        with SearchProgress() as progress, says_how_to_go_on():
            result = run_search(
                config,
                space,
                inputs.table,
                data.for_search(),
                folder,
                listener=progress,
                train_on=train_on,
                supernet=inputs.supernet,
            )
        page = _report(inputs, result, data, folder)
    if as_json:
        print_json(_json_body(inputs, result, folder))
    else:
        _print_result(inputs, result, folder, page)


def _run_name(inputs: _Inputs) -> str:
    from slimnas.latency.target import latency_label

    targets = "-".join(latency_label(target_ms) for target_ms in inputs.config.targets_ms)
    data = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(inputs.config.data).name).strip("-")
    return "-".join((inputs.space.name, data, inputs.table.device.name, targets))


def _report(inputs: _Inputs, result: SearchResult, data: DataSplits, folder: Path) -> Path:
    from slimnas.report.html import write_report
    from slimnas.report.run import DataSummary, FoundNetwork, ReferenceNetwork, RunReport
    from slimnas.search.versions import versions

    config = inputs.config
    first = shown_path(result.found[0].folder)
    report = RunReport(
        name=folder.resolve().name,
        space=result.space,
        device=inputs.table.device,
        trajectory=result.trajectory,
        importance=result.importance,
        found=tuple(
            FoundNetwork(
                architecture=found.architecture,
                estimate=found.estimate,
                target_ms=found.target_ms,
                selection=found.selection,
                search_top1=found.search_top1,
                steps=found.steps,
                folder=shown_path(found.folder),
            )
            for found in result.found
        ),
        reference=None
        if result.reference is None
        else ReferenceNetwork(
            architecture=result.reference.architecture,
            estimate=result.reference.estimate,
            search_top1=result.reference.search_top1,
        ),
        data=DataSummary(
            source=config.data,
            classes=data.classes,
            images={
                "train": len(data.train),
                "search": len(data.search),
                "test": len(data.test),
            },
            resolution=config.resolution,
            evaluated_images=result.evaluated_images,
        ),
        settings={**config.model_dump(mode="json"), "supernet digest": result.trained.digest},
        training=result.training,
        command=shlex.join(["slimnas", *sys.argv[1:]]),
        versions=versions(),
        files=_files(folder, result),
        next_commands={
            "add it to your zoo": f"slimnas zoo add {first}",
            "export it to ONNX": f"slimnas zoo export {first} --format onnx",
            "price it by component": (f"slimnas latency estimate {first} --device {config.device}"),
        },
    )
    return write_report(report, folder)[0]


def _files(folder: Path, result: SearchResult) -> dict[str, str]:
    from slimnas.search import run
    from slimnas.search.config import FILE

    named = {
        FILE: "settings",
        run.SUPERNET: "trained supernet",
        run.METRICS_LOG: "training, one line per epoch",
        run.IMPORTANCE: "architecture parameters and importance",
        run.TRAJECTORY: "every step with every candidate",
    }
    files = {
        shown_path(folder / name): what for name, what in named.items() if (folder / name).is_file()
    }
    for found in result.found:
        for name, what in (
            ("architecture.yaml", "found network"),
            ("weights.safetensors", "its inherited weights"),
            ("metrics.json", "its figures with provenance"),
        ):
            files[shown_path(found.folder / name)] = f"{what}, target {found.target_ms:g} ms"
    return files


def _json_body(inputs: _Inputs, result: SearchResult, folder: Path) -> dict[str, Any]:
    device = inputs.table.device
    return {
        "run": shown_path(folder),
        "device": {"name": device.name, "kind": device.kind},
        "supernet_digest": result.trained.digest,
        "reference": None
        if result.reference is None
        else {
            "name": result.reference.architecture.name,
            "latency_ms": result.reference.estimate.latency_ms,
            "interval_ms": list(result.reference.estimate.interval_ms),
            "search_top1": result.reference.search_top1,
        },
        "found": [
            {
                "target_ms": found.target_ms,
                "latency_ms": found.estimate.latency_ms,
                "interval_ms": list(found.estimate.interval_ms),
                "measured_ms": None,
                "params": found.cost.params,
                "macs": found.cost.macs,
                "search_top1": found.search_top1,
                "steps": found.steps,
                "widths": list(found.architecture.widths),
                "depths": list(found.architecture.depths),
                "architecture_digest": found.architecture.digest,
                "architecture": shown_path(found.folder / "architecture.yaml"),
                "weights": shown_path(found.folder / "weights.safetensors"),
            }
            for found in result.found
        ],
    }


def _print_result(inputs: _Inputs, result: SearchResult, folder: Path, page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from slimnas.arch.cost import cost

    table = Table(box=None, pad_edge=False)
    for heading in ("network", "widths", "depths", "MB3D"):
        table.add_column(heading, no_wrap=True)
    for heading in ("params M", "GMACs", "latency ms", "interval", "search top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: list[tuple[str, Any, str]] = [
        (f"found for {found.target_ms:g} ms", found, f"{found.search_top1:.1f} %")
        for found in result.found
    ]
    reference = result.reference
    if reference is not None:
        top1 = "-" if reference.search_top1 is None else f"{reference.search_top1:.1f} %"
        rows.append(("EfficientFormer-L1", reference, top1))
    for name, row, top1 in rows:
        low, high = row.estimate.interval_ms
        counted = cost(row.architecture)
        table.add_row(
            name,
            "-".join(map(str, row.architecture.widths)),
            "-".join(map(str, row.architecture.depths)),
            str(row.architecture.count("mb3d")),
            f"{counted.params / 1e6:.2f}",
            f"{counted.macs / 1e9:.3f}",
            f"{row.estimate.latency_ms:.3f}",
            f"{low:.2f}-{high:.2f}",
            top1,
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"latency by the {inputs.table.device.kind} table {inputs.table.device.name}; top-1 on "
        f"{result.evaluated_images} SEARCH images of {inputs.config.data} at "
        f"{inputs.config.resolution} px, inherited weights",
        highlight=False,
    )
    console.print(f"supernet digest {result.trained.digest[:16]}", highlight=False)
    for path in (page, *(Path(name) for name in _files(folder, result))):
        typer.echo(shown_path(path))
