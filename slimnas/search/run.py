"""A whole search: supernet, importance, slimming, measuring, found networks; all resumable.

Each step leaves one file in the run folder and is skipped when the file is there, so a run that
was stopped goes on where it was and ends with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from slimnas._files import remove_leftovers
from slimnas._settings import flat_settings, shown_setting
from slimnas.arch.space import SearchSpace, Selection
from slimnas.data.batches import ImageSet
from slimnas.data.splits import SearchData
from slimnas.errors import RunFolderError
from slimnas.latency.table import LatencyTable
from slimnas.search.checks import pricer, require_fitting
from slimnas.search.closing import Answer, Loop, MeasuringListener, Meter
from slimnas.search.config import SearchConfig
from slimnas.search.evaluator import SelectionEvaluator
from slimnas.search.found import (
    Found,
    Origin,
    Reference,
    found_folder,
    price_reference,
    save_found,
)
from slimnas.search.importance import ImportanceRecord
from slimnas.search.measurements import FILE as MEASUREMENTS
from slimnas.search.measurements import MeasurementLog
from slimnas.search.record import SearchRecord
from slimnas.search.slimming import Slimmer, Walk
from slimnas.search.trajectory import Trajectory
from slimnas.supernet.channel_order import taylor_order
from slimnas.supernet.inherit import ChannelOrder, Inheritance
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import (
    Progress,
    TrainedSupernet,
    load_supernet,
    save_supernet,
    train_supernet,
)
from slimnas.train.checkpoint import require_space_on_disk
from slimnas.train.devices import accelerator_for
from slimnas.train.history import FILE as METRICS_LOG
from slimnas.train.history import Row, append_row, read_history

SUPERNET = "supernet.safetensors"
TRAINING_STATE = "training.safetensors"
IMPORTANCE = "importance.json"
TRAJECTORY = "trajectory.jsonl"
CORRECTED_TABLE = "corrected_table"
TAYLOR_BATCHES, TAYLOR_BATCH = 4, 64


class Listener(MeasuringListener, Protocol):
    """Is told how a search goes."""

    def training(self, progress: Progress) -> None:
        """After every training step and epoch."""

    def slimming(self, trajectory: Trajectory, target_ms: float) -> None:
        """After every slimming step; the target is the lowest one."""

    def evaluated(self, selection: Selection, top1: float) -> None:
        """After every candidate."""


@dataclass(frozen=True)
class RunOptions:
    """What a run is made with, beside the settings that decide its result.

    Attributes:
        train_on: auto, cpu, cuda or mps.
        supernet: a trained one; None trains it in the run.
        meter: measures the networks found; or why nothing can.
    """

    train_on: str = "auto"
    supernet: TrainedSupernet | None = None
    meter: Meter | str = "not asked for"


@dataclass(frozen=True)
class SearchResult:
    """What a search gives.

    Attributes:
        space: with the data's classes.
        trained: the supernet; none where the search started from a record.
        importance: of its MetaPaths.
        trajectory: every step.
        found: one network per target, in the order of the targets.
        table: as corrected by everything measured.
        unmeasured: why nothing more was measured; none where all was.
        reference: EfficientFormer-L1 beside them; None where the table cannot price it.
        evaluated_images: SEARCH images behind every top-1.
        training: one mapping per epoch, as in `metrics.jsonl`.
        record: what the search started from instead of a supernet.
    """

    space: SearchSpace
    trained: TrainedSupernet | None
    importance: ImportanceRecord
    trajectory: Trajectory
    found: tuple[Found, ...]
    table: LatencyTable
    unmeasured: str | None
    reference: Reference | None
    evaluated_images: int
    training: tuple[Row, ...]
    record: SearchRecord | None = None


def run_search(
    config: SearchConfig,
    space: SearchSpace,
    table: LatencyTable,
    data: SearchData,
    folder: Path,
    *,
    listener: Listener,
    options: RunOptions | None = None,
) -> SearchResult:
    """Search `space` for networks that meet the targets, in a folder claimed for `config`.

    Args:
        config: the settings; `claim` has tied the folder to them.
        space: the search space, for the data's number of classes.
        table: the latency table.
        data: TRAIN and SEARCH at `config.resolution`.
        folder: the run folder, locked by the caller.
        listener: told how it goes.
        options: where it trains, with which supernet, and what measures.

    Raises:
        UnreachableTargetError: greedy found no way to a target.
        LatencyTableError: the machine is too busy to measure.
        ExportError: the table's runtime cannot run a found network.
        SpecError: the supernet was trained for another space, head, resolution or data.
        WeightsError, RunFolderError: a damaged or foreign file in the folder.
        RuntimeUnavailableError: this machine lacks `options.train_on`.
    """
    options = options or RunOptions()
    remove_leftovers(folder)
    accelerator = accelerator_for(options.train_on)
    trained = options.supernet or _supernet(
        config, space, data, folder, accelerator, listener.training
    )
    leave_others(accelerator)
    require_fitting(trained, space, data, config.resolution)
    trained.supernet.to(accelerator.device)
    provenance = {
        "seed": config.seed,
        "space": space.name,
        "space_digest": config.space_digest,
        "table_digest": config.table_digest,
        "supernet_digest": trained.digest,
        "data_digest": data.digest,
    }
    importance = ImportanceRecord(trained.supernet.alphas(), provenance)
    importance.save(folder / IMPORTANCE)
    evaluator = open_evaluator(
        config, trained.supernet, importance, data, order=trained.channel_order()
    )
    images = min(config.search_images, len(data.search))

    def evaluate(selection: Selection) -> float:
        top1 = evaluator.top1(selection)
        listener.evaluated(selection, top1)
        return top1

    slimmer = Slimmer(
        space, importance, pricer(space, table), evaluate, config.frontier, config.fill
    )
    walked = answer_targets(
        config,
        slimmer,
        table,
        folder,
        {**provenance, "search_images": images},
        listener=listener,
        meter=options.meter,
        on_state=evaluator.move_to,
    )
    normalisation = (data.train.mean, data.train.std)
    origin = Origin(config, space, table, trained, evaluator, images, normalisation)
    found = tuple(
        save_found(origin, walked.trajectory, one, found_folder(folder, config, one.target_ms))
        for one in walked.answers
    )
    return SearchResult(
        space=space,
        trained=trained,
        importance=importance,
        trajectory=walked.trajectory,
        found=found,
        table=walked.table,
        unmeasured=walked.unmeasured,
        reference=price_reference(origin),
        evaluated_images=images,
        training=read_history(folder / METRICS_LOG),
    )


@dataclass(frozen=True)
class Walked:
    """What slimming to every target gave.

    Attributes:
        trajectory: every step.
        answers: one per target, in the order of the targets.
        table: as corrected by everything measured.
        unmeasured: why nothing more was measured; none where all was.
    """

    trajectory: Trajectory
    answers: tuple[Answer, ...]
    table: LatencyTable
    unmeasured: str | None


def answer_targets(
    config: SearchConfig,
    slimmer: Slimmer,
    table: LatencyTable,
    folder: Path,
    provenance: Mapping[str, Any],
    *,
    listener: Listener,
    meter: Meter | str,
    on_state: Callable[[Selection], None] = lambda selection: None,
) -> Walked:
    """Slim until every target is answered, going on from what `folder` holds.

    Args:
        config: the settings.
        slimmer: with the prices of `table`.
        table: the latency table.
        folder: the run folder; trajectory, measurements and corrected table go there.
        provenance: what the trajectory is made from; one of something else is refused.
        listener: told how it goes.
        meter: measures the networks found; or why nothing can.
        on_state: told where the trajectory has got to.

    Raises:
        UnreachableTargetError, LatencyTableError, ExportError, RunFolderError: see `run_search`.
    """
    trajectory = _begin(slimmer, folder / TRAJECTORY, provenance)
    on_state(trajectory.states[-1][0])

    def on_step(longer: Trajectory) -> None:
        longer.save(folder / TRAJECTORY)
        on_state(longer.states[-1][0])
        listener.slimming(longer, min(config.targets_ms))

    log, meter = _measuring(folder / MEASUREMENTS, meter)
    walk = Walk(trajectory, on_step)
    loop = Loop(slimmer, walk, table, log, None if isinstance(meter, str) else meter, listener)
    answers = loop.run(config.targets_ms)
    if any(answer.rounds for answer in answers):
        loop.table.save(folder / CORRECTED_TABLE)
    return Walked(walk.trajectory, answers, loop.table, meter if isinstance(meter, str) else None)


def join_training(
    config: SearchConfig, space: SearchSpace, data: SearchData, folder: Path, *, train_on: str
) -> None:
    """What a search is to every process but the main one: its part of the training.

    The main process calls `run_search` with a folder that all of them see.

    Args:
        config, space, data, folder: as the main process has them.
        train_on: see `RunOptions`.

    Raises:
        WeightsError, TrainingError, RunFolderError, RuntimeUnavailableError: see `run_search`.
    """
    accelerator = accelerator_for(train_on)
    if config.recipe is not None:
        _supernet(config, space, data, folder, accelerator, lambda progress: None)
    leave_others(accelerator)


def leave_others(accelerator: Accelerator) -> None:
    """End what connects this process to the others, after the last thing they do together."""
    if accelerator.num_processes > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _supernet(
    config: SearchConfig,
    space: SearchSpace,
    data: SearchData,
    folder: Path,
    accelerator: Accelerator,
    on_progress: Callable[[Progress], None],
) -> TrainedSupernet:
    assert config.recipe is not None
    accelerator.wait_for_everyone()  # until the main process has made the folder
    finished = folder / SUPERNET
    if finished.is_file():
        trained = load_supernet(finished)
        _require_same_training(trained, config, data, finished)
        if accelerator.is_main_process:
            (folder / TRAINING_STATE).unlink(missing_ok=True)  # stopped between the two
        return trained
    supernet = Supernet(
        space,
        resolution=config.resolution,
        seed=config.seed,
        layer_scale=config.recipe.layer_scale,
    )
    if accelerator.is_main_process:
        require_space_on_disk(folder, supernet)

    def keep(progress: Progress) -> None:
        if progress.search_top1 is not None:
            append_row(folder / METRICS_LOG, _epoch(progress))
        on_progress(progress)

    trained = train_supernet(
        supernet,
        data,
        config.recipe,
        accelerator,
        seed=config.seed,
        checkpoint=folder / TRAINING_STATE,
        on_progress=keep,
    )
    if accelerator.is_main_process:
        save_supernet(finished, trained)
        (folder / TRAINING_STATE).unlink(missing_ok=True)
    return trained


def _require_same_training(
    trained: TrainedSupernet, config: SearchConfig, data: SearchData, path: Path
) -> None:
    assert config.recipe is not None
    wanted = {
        "resolution": config.resolution,
        "recipe": config.recipe,
        "seed": config.seed,
        "data": data.digest,
    }
    given = {**trained.provenance, "recipe": trained.recipe}
    other = [key for key, value in wanted.items() if given.get(key) != value]
    if other:
        raise RunFolderError(
            f"{path}: was trained with another {', '.join(other)}; restore what it was trained "
            "with, or give another --output"
        )


def open_evaluator(
    config: SearchConfig,
    supernet: Supernet,
    importance: ImportanceRecord,
    data: SearchData,
    *,
    order: ChannelOrder | None = None,
) -> SelectionEvaluator:
    """What judges candidates of a run: a sample of SEARCH, BatchNorm measured on TRAIN.

    Args:
        config: of the run: how many images, and which.
        supernet: trained; put in evaluation mode.
        importance: says which network the order of the channels is measured on.
        data: TRAIN and SEARCH that the supernet was trained with.
        order: which channels narrower networks keep, see `TrainedSupernet.channel_order`; None
            for the most important by Taylor score.
    """
    supernet.eval()
    device = next(supernet.parameters()).device
    if order is None:
        order = _taylor_order(config, supernet, importance, data)
    calibration, _ = next(
        data.train.batches(
            config.calibration_images, device=device, seed=config.seed, epoch=1, augment=False
        )
    )
    images, labels = _sample(data.search, config.search_images, config.seed, device)
    return SelectionEvaluator(Inheritance(supernet, order), calibration, images, labels)


def _taylor_order(
    config: SearchConfig, supernet: Supernet, importance: ImportanceRecord, data: SearchData
) -> ChannelOrder:
    device = next(supernet.parameters()).device
    space = supernet.space
    start = importance.start(space)
    others = space.every_block()
    if space.counts_attention:
        others = (space.largest(space.attention_counts()[0]),)
    batches = data.train.batches(
        TAYLOR_BATCH, device=device, seed=config.seed, epoch=0, augment=False
    )
    some = [batch for _, batch in zip(range(TAYLOR_BATCHES), batches, strict=False)]
    routings = [supernet.fixed_routes(s) for s in dict.fromkeys((start, *others))]
    return taylor_order(supernet, routings, some)


def _sample(images: ImageSet, count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same `count` images every time, all of them if there are fewer."""
    if len(images) <= count:
        return next(images.eval_batches(count, device=device))
    return next(images.batches(count, device=device, seed=seed, epoch=0, augment=False))


def _begin(slimmer: Slimmer, path: Path, provenance: Mapping[str, Any]) -> Trajectory:
    """The saved trajectory of this run, or a new one."""
    if path.is_file():
        trajectory = Trajectory.load(path)
        if dict(trajectory.provenance) != dict(provenance):
            raise RunFolderError(
                f"{path}: was made from another supernet, table, space or data; delete it to slim "
                "again, or give another --output"
            )
        return trajectory
    trajectory = slimmer.begin(provenance)
    trajectory.save(path)
    return trajectory


def _measuring(path: Path, meter: Meter | str) -> tuple[MeasurementLog | None, Meter | str]:
    """The run's measurements, and what may add to them."""
    log = MeasurementLog.load(path)
    if isinstance(meter, str):
        return log, meter
    if log is None:
        log = MeasurementLog(path, meter.setup)
        log.save()
    old, new = flat_settings(log.setup), flat_settings(meter.setup)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        key = changed[0]
        return log, (
            f"{path} was measured with {key} {shown_setting(key, old)}, now it is "
            f"{shown_setting(key, new)}; give another --output to measure anew"
        )
    return log, meter


def _epoch(progress: Progress) -> Row:
    """What is logged of an epoch."""
    report = progress.report
    return {
        "step": report.step,
        "loss": report.loss,
        "search_top1": progress.search_top1,
        "tau": progress.tau,
        "images_per_s": report.images_per_s,
    }
