"""`slimnas search`: from a target latency and a device to networks that meet it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.processes import is_main_process
from slimnas.cli.runs import RUNS, RunOn, no_empty_folder, says_how_to_go_on
from slimnas.cli.search_record import inputs_from_record, refuse_unused, run_record
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from slimnas.arch.space import SearchSpace
    from slimnas.data.splits import DataSplits
    from slimnas.latency.table import LatencyTable
    from slimnas.measure.local import LocalDevice
    from slimnas.search.config import SearchConfig
    from slimnas.search.record import SearchRecord
    from slimnas.supernet.train import TrainedSupernet

DEFAULT_SPACE = "efficientformer_tiny"


class Mixing(str, Enum):
    """How a MetaPath runs its choices."""

    SAMPLED = "sampled"
    SOFT = "soft"


class Noise(str, Enum):
    """What is added to the architecture parameters."""

    GUMBEL = "gumbel"
    UNIFORM = "uniform"


class Gradient(str, Enum):
    """What of a sampled choice teaches its architecture parameter."""

    OUTPUT = "output"
    CHANGE = "change"


class FrontierChoice(str, Enum):
    """Which actions a slimming step weighs."""

    PER_STAGE = "per_stage"
    PAPER = "paper"


@dataclass(frozen=True)
class SearchInputs:
    """What the command line named, opened and checked.

    Attributes:
        config: the settings.
        space: the search space, as it was given.
        table: the latency table.
        supernet: a trained one; None trains it.
        meter: measures found networks on the table's device; or why nothing can.
        record: what stands in for a supernet.
    """

    config: SearchConfig
    space: SearchSpace
    table: LatencyTable
    supernet: TrainedSupernet | None
    meter: LocalDevice | str
    record: SearchRecord | None = None


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
        str | None,
        typer.Option(
            help="Instead of training: a trained supernet of another run, or what one said about "
            "the space: 'shipped', or a record file (.yaml)."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    alpha_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the architecture parameters.")
    ] = None,
    tau_start: Annotated[float | None, typer.Option(help="First temperature.")] = None,
    tau_end: Annotated[float | None, typer.Option(help="Last temperature.")] = None,
    alpha_gradient: Annotated[
        Gradient | None, typer.Option(help="A choice learns by its output, or by what it changes.")
    ] = None,
    alpha_warmup: Annotated[
        float | None,
        typer.Option(help="Share of the training before architecture parameters move."),
    ] = None,
    sandwich: Annotated[
        int | None,
        typer.Option(help="Networks trained beside the sampled one: largest, smallest, random."),
    ] = None,
    mixing: Annotated[
        Mixing | None, typer.Option(help="sampled (one path runs) or soft (all do).")
    ] = None,
    noise: Annotated[Noise | None, typer.Option(help="gumbel, or uniform as the paper.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of training images; else the space's.")
    ] = None,
    frontier: Annotated[
        FrontierChoice, typer.Option(help="Actions weighed per step: per_stage, or paper's three.")
    ] = FrontierChoice.PER_STAGE,
    fill: Annotated[
        float, typer.Option(min=0, max=0.999, help="Least share of the target to use; 0: any.")
    ] = 0.97,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Measure what is found, if the table is this machine's, until it is on target.",
        ),
    ] = True,
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
    seed: Annotated[int, seed_option("Seed of everything random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Find networks that meet a target latency on a device.

    Trains a supernet once, then slims it: each step takes the action with the smallest accuracy
    drop per millisecond saved, by the device's latency table. With a table of this machine, found
    networks are measured, and the search goes on until they are on target. Stop it at any moment
    and give the same command again: it goes on.

    Example: slimnas search --target-latency 1.6ms --device iphone12
    """
    # Read by OpenMP when torch loads it: threads that wait sleep instead of spinning, which on
    # cores shared with other work is several times faster and on free cores costs little.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from slimnas.latency.target import parse_latency_ms
    from slimnas.search.record import is_record

    recipe = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "alpha_lr": alpha_lr,
        "tau_start": tau_start,
        "tau_end": tau_end,
        "alpha_gradient": alpha_gradient and alpha_gradient.value,
        "alpha_warmup": alpha_warmup,
        "sandwich": sandwich,
        "mixing": mixing and mixing.value,
        "noise": noise and noise.value,
    }
    settings = {
        "data": data,
        "frontier": frontier.value,
        "fill": fill,
        "measure": measure,
        "search_images": search_images,
        "max_images": max_images,
        "skip_bad_images": skip_bad_images,
        "seed": seed,
        **({} if resolution is None else {"resolution": resolution}),
    }
    targets_ms = sorted({parse_latency_ms(text) for text in target_latency})
    given = {key: value for key, value in recipe.items() if value is not None}
    if supernet is not None and is_record(supernet):
        refuse_unused(settings, given)
        inputs = inputs_from_record(supernet, space, device, targets_ms, settings)
    else:
        inputs = _open_inputs(space, supernet, device, targets_ms, settings, given)
    folder = output or RUNS / _run_name(inputs)
    if inputs.record is None:
        _run(inputs, folder, train_on.value, as_json)
    elif is_main_process():
        run_record(inputs, inputs.record, folder, as_json)


def _open_inputs(
    space_name: str | None,
    supernet_path: str | None,
    device: str,
    targets_ms: list[float],
    settings: dict[str, Any],
    recipe: dict[str, Any],
) -> SearchInputs:
    """Open everything the command line names and refuse what cannot end well."""
    from slimnas.arch.documents import parse_spec
    from slimnas.arch.space import SearchSpace
    from slimnas.latency.devices import find_device, provenance_line
    from slimnas.search.checks import check_before_data, space_digest, table_digest
    from slimnas.search.config import SearchConfig
    from slimnas.supernet.recipe import recipe_for
    from slimnas.supernet.train import load_supernet

    table = find_device(device)
    note(f"latency table: {provenance_line(table)}")
    trained = None
    if supernet_path is not None:
        trained = load_supernet(supernet_path)
    if space_name is None and trained is not None:
        space = trained.supernet.space
    else:
        space = SearchSpace.load(space_name or DEFAULT_SPACE)
    made = None if trained else recipe_for(space, recipe, source=_space_source(space_name))
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
    return SearchInputs(config, space, table, trained, meter_of(config, table, space))


def _space_source(name: str | None) -> str:
    """How messages call the file of a space."""
    name = name or DEFAULT_SPACE
    return name if name.endswith((".yaml", ".yml")) else f"search space {name}"


def meter_of(config: SearchConfig, table: LatencyTable, space: SearchSpace) -> LocalDevice | str:
    """What measures on the table's device, or why nothing can from here."""
    from slimnas.errors import LatencyTableError, RuntimeUnavailableError
    from slimnas.measure.local import open_local

    if not config.measure:
        return "--no-measure was given"
    if not is_main_process():
        return "the main process measures"
    try:
        return open_local(table, space)
    except (LatencyTableError, RuntimeUnavailableError) as error:
        return str(error)


def _run(inputs: SearchInputs, folder: Path, train_on: str, as_json: bool) -> None:
    from slimnas._lock import folder_lock
    from slimnas.cli.progress import SearchProgress
    from slimnas.cli.search_output import json_body, print_result, write_search_report
    from slimnas.search.checks import check_search, require_fitting
    from slimnas.search.config import claim, refuse_other_run
    from slimnas.search.run import RunOptions, run_search
    from slimnas.train.devices import accelerator_for

    config = inputs.config
    if not is_main_process():
        _join(inputs, folder, train_on)
        return
    with no_empty_folder(folder), folder_lock(folder):
        refuse_other_run(folder, config)
        data = _images(inputs)
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
        if isinstance(inputs.meter, str):
            note(f"found networks will not be measured: {inputs.meter}")
        with SearchProgress() as progress, says_how_to_go_on():
            result = run_search(
                config,
                space,
                inputs.table,
                data.for_search(),
                folder,
                listener=progress,
                options=RunOptions(train_on, inputs.supernet, inputs.meter),
            )
        page = write_search_report(inputs, result, data, folder)
    if as_json:
        print_json(json_body(inputs, result, folder))
    else:
        print_result(inputs, result, folder, page)


def _join(inputs: SearchInputs, folder: Path, train_on: str) -> None:
    """A process beside the main one: it takes its part in the training, and is done."""
    from slimnas.search.run import join_training

    data = _images(inputs)
    space = inputs.space.with_classes(data.classes)
    join_training(inputs.config, space, data.for_search(), folder, train_on=train_on)


def _images(inputs: SearchInputs) -> DataSplits:
    from slimnas.data.splits import open_data

    config = inputs.config
    return open_data(
        config.data,
        resolution=(config.resolution, config.resolution),
        channels=inputs.space.input.channels,
        seed=config.seed,
        skip_bad_images=config.skip_bad_images,
        max_images=config.max_images,
    )


def _run_name(inputs: SearchInputs) -> str:
    from slimnas.latency.target import latency_label

    targets = "-".join(latency_label(target_ms) for target_ms in inputs.config.targets_ms)
    if inputs.record is not None:
        return "-".join((inputs.space.name, "record", inputs.table.device.name, targets))
    data = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(inputs.config.data).name).strip("-")
    return "-".join((inputs.space.name, data, inputs.table.device.name, targets))
