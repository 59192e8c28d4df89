"""A whole training run in a folder: stoppable at any moment, and finished when it says so."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn

from slimnas._files import remove_leftovers
from slimnas.data.batches import ImageSet
from slimnas.data.training import TrainingData, require_full_batch
from slimnas.nn.build import Network
from slimnas.nn.regularisation import set_drop_path, set_layer_scale
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.train.augment import AugmentedImages
from slimnas.train.checkpoint import require_space_on_disk
from slimnas.train.config import FRESH, TrainConfig, claim
from slimnas.train.devices import accelerator_for, check_batch, part_of
from slimnas.train.history import FILE as HISTORY
from slimnas.train.history import Row, append_row, read_history
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, fit
from slimnas.train.losses import network_loss
from slimnas.train.recipe import check_schedule
from slimnas.train.result import (
    BEST,
    TrainResult,
    best_row,
    load_result,
    provenance_of,
    save_result,
)
from slimnas.train.teacher import Teacher, teacher_digest
from slimnas.train.trackers import track, tracking
from slimnas.zoo.weights import save_weights

STATE = "training.safetensors"
EVAL_BATCH = 256
POINTS_PER_EPOCH = 20
"""How many steps of an epoch trackers are told of."""


class Listener(Protocol):
    """Is told, in every process, how training goes."""

    def step(self, report: StepReport) -> None:
        """After every step."""

    def epoch(self, rows: Sequence[Row]) -> None:
        """After every epoch, in the main process: all epochs so far."""


class Silent:
    """A listener that says nothing."""

    def step(self, report: StepReport) -> None:
        """After every step."""

    def epoch(self, rows: Sequence[Row]) -> None:
        """After every epoch."""


@dataclass(frozen=True)
class RunOptions:
    """What a run is made with, beside the settings that decide its result.

    Attributes:
        accelerator: where, in which precision, with which trackers; None makes one.
        train_on: where, if there is no accelerator: auto, cpu, cuda or mps.
        teacher: of a recipe with distillation.
    """

    accelerator: Accelerator | None = None
    train_on: str = "auto"
    teacher: Teacher | None = None


def run_training(
    config: TrainConfig,
    network: Network,
    data: TrainingData,
    folder: Path,
    *,
    listener: Listener | None = None,
    options: RunOptions | None = None,
) -> TrainResult:
    """Train `network` by `config.recipe`, in a folder of its own.

    Every process of a distributed run calls this; the main one writes. A run that was stopped goes
    on where it was, and one that is finished is not trained again.

    Args:
        config: the settings; what it does not know yet of data and teacher is filled in.
        network: for the data's classes and resolution, with the weights to begin with; trained in
            place. Where `config.weights` says `fresh`, the recipe's layer scale is set in it.
        data: TRAIN, and TEST if there is one.
        folder: the run folder, locked by the caller where others could write to it.
        listener: told how it goes.
        options: where it trains, and what it learns from.

    Returns:
        Where the averaged weights of the last epoch are, and what they reach on TEST.

    Raises:
        RunFolderError: the folder holds a run with other settings, or cannot be written.
        DataError: a batch is larger than the data, or an image cannot be decoded.
        TrainingError: out of memory, batches that do not divide among processes, or epochs that
            warm-up and cool-down use up.
        WeightsError: a damaged or foreign file in the folder, a loss that is no longer finite, or
            a recipe that needs a teacher and got none.
        RuntimeUnavailableError: this machine lacks what `options` ask for.
        KeyboardInterrupt: Ctrl-C; the state is written.
    """
    options = options or RunOptions()
    accelerator = options.accelerator or accelerator_for(
        options.train_on, precision=config.precision
    )
    config = completed(config, data, options.teacher)
    check_run(config, data, accelerator)
    run = _Run(config, network, data, folder, listener or Silent(), accelerator)
    if accelerator.is_main_process:
        require_space_on_disk(folder, network, besides=2)  # the last weights and the best
        claim(folder, config)
        remove_leftovers(folder)
    accelerator.wait_for_everyone()
    finished = load_result(folder)
    return finished or run.train(options.teacher)


def completed(config: TrainConfig, data: TrainingData, teacher: Teacher | None) -> TrainConfig:
    """`config` with what only the open data and teacher tell."""
    return config.model_copy(
        update={
            "data_digest": data.digest,
            "classes": len(data.class_names),
            "teacher_digest": None if teacher is None else teacher_digest(teacher),
        }
    )


def check_run(config: TrainConfig, data: TrainingData, accelerator: Accelerator) -> None:
    """Refuse what cannot end well before anything is written.

    Raises:
        DataError: a batch that is larger than the data.
        TrainingError: one that cannot be divided among processes and micro-batches, or epochs that
            warm-up and cool-down use up.
    """
    batch_size, processes = config.recipe.batch_size, accelerator.num_processes
    require_full_batch(data.train, batch_size, processes=processes)
    check_batch(config.recipe, len(data.train), accelerator)
    check_schedule(config.recipe)


class _Run:
    """One run; see `run_training`."""

    def __init__(
        self,
        config: TrainConfig,
        network: Network,
        data: TrainingData,
        folder: Path,
        listener: Listener,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.network, self.data = config, network, data
        self.folder, self.listener, self.accelerator = folder, listener, accelerator
        self.architecture = network.architecture
        self._epoch_began = time.monotonic()

    def train(self, teacher: Teacher | None) -> TrainResult:
        """Train to the end and write what comes out."""
        config, accelerator = self.config, self.accelerator
        recipe = config.recipe.scaled()
        set_drop_path(self.network, recipe.drop_path)
        if config.weights == FRESH and recipe.layer_scale is not None:
            set_layer_scale(self.network, recipe.layer_scale)
        identity = self._identity()  # of the weights to begin with
        if teacher is not None:
            teacher.to(accelerator.device)
        task = TrainTask(
            model=self.network,
            groups=decay_groups(dict(self.network.named_parameters()), recipe),
            loss=network_loss(recipe, teacher),
            images=AugmentedImages(
                self.data.train, recipe, self.data.classes, smoothing=recipe.label_smoothing
            ),
            recipe=recipe,
            seed=config.seed,
        )
        self._per_epoch = task.images.steps(recipe.batch_size)
        with tracking(accelerator, config.model_dump(mode="json")):
            averaged = fit(
                task,
                accelerator,
                checkpoint=self.folder / STATE,
                identity=identity,
                watch=Watch(self._on_step, self._on_epoch),
            )
        if accelerator.is_main_process:
            state = averaged.state_dict()
            provenance = provenance_of(accelerator)
            save_result(self.folder, config, self.data, self.architecture, state, provenance)
        accelerator.wait_for_everyone()
        result = load_result(self.folder)
        assert result is not None
        return result

    def _identity(self) -> str:
        """Digest of everything that decides the result."""
        parts = (
            self.config.model_dump_json(),
            self.architecture.digest,
            tensors_digest(self.network.state_dict()),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _on_step(self, report: StepReport) -> None:
        self.listener.step(report)
        every = math.ceil(self._per_epoch / POINTS_PER_EPOCH)
        if report.step % every == 0:
            row = {"step": report.step, "loss": report.loss, "lr": report.lr}
            track(self.accelerator, row, "step")

    def _on_epoch(self, averaged: nn.Module, report: StepReport) -> None:
        test = self.data.test
        top1 = None if test is None else top1_of_all(averaged, test, self.accelerator)
        now = time.monotonic()
        row: Row = {
            "step": report.step,
            "epoch": report.step // self._per_epoch,
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "images_per_s": report.images_per_s,
            "wait_share": report.wait_share,
            "test_top1": top1,
            "seconds": now - self._epoch_began,
        }
        self._epoch_began = now
        track(self.accelerator, row, "epoch")
        if self.accelerator.is_main_process:
            before = read_history(self.folder / HISTORY)
            best = best_row(tuple(old for old in before if (old["step"] or 0) < report.step))
            if top1 is not None and (best is None or top1 > (best["test_top1"] or 0.0)):
                save_weights(self.folder / BEST, averaged.state_dict(), self.architecture)
            self.listener.epoch(append_row(self.folder / HISTORY, row))


def top1_of_all(network: nn.Module, images: ImageSet, accelerator: Accelerator) -> float:
    """Top-1 of `network` in percent; every process of a run judges a part of the images.

    Args:
        network: in evaluation mode, on the accelerator's device; the same in every process.
        images: to judge on, not empty.
        accelerator: of the run.
    """
    mine = part_of(accelerator).of(math.ceil(len(images) / EVAL_BATCH))
    batches = images.eval_batches(EVAL_BATCH, device=accelerator.device, start_batch=mine.start)
    right = torch.zeros((), dtype=torch.long, device=accelerator.device)
    with torch.inference_mode():
        for pixels, labels in itertools.islice(batches, mine.stop - mine.start):
            right += (network(pixels).argmax(dim=1) == labels).sum()
    return 100.0 * int(accelerator.reduce(right, "sum")) / len(images)
