"""The training loop: any module, any loss, any number of processes, stoppable at any moment.

Batches, learning rate and whatever the loss draws follow from (seed, step), so a run that goes
on from a checkpoint gives on the CPU the same weights, bit by bit, as one never stopped. A batch
is divided among the processes, so their number changes the result by rounding alone (and, unless
the recipe says `sync_bn`, by what BatchNorm sees).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimnas.data.batches import TrainImages
from slimnas.errors import TrainingError, WeightsError
from slimnas.nn.undecayed import is_decayed
from slimnas.train.checkpoint import TrainState, load_state, save_state
from slimnas.train.clipping import clip_gradients
from slimnas.train.devices import check_batch, part_of
from slimnas.train.interrupt import deferred_interrupt
from slimnas.train.recipe import TrainRecipe, check_schedule, learning_rate_scale
from slimnas.train.sync_norm import synchronise_norms

__all__ = [
    "Loss",
    "StepReport",
    "TrainTask",
    "Watch",
    "decay_groups",
    "fit",
    "start",
    "train_step",
]

CHECKPOINT_SECONDS = 20.0
_STEP = 4  # keeps this random stream apart from those of data and routes

Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
"""The module to call, images (B, c, H, W), targets (B,) or (B, K), and step -> scalar loss, a
mean over the images. The module may be wrapped: what is called must be the argument."""


@dataclass(frozen=True)
class TrainTask:
    """What to train, on what, how.

    Attributes:
        model: trained in place.
        groups: parameter groups with `params`, `lr` (peak) and `weight_decay`, and whatever else
            AdamW takes.
        loss: see `Loss`.
        images: the TRAIN split.
        recipe: see `TrainRecipe`.
        seed: of the batches, and of what modules draw while training.
        partial: whether a step may leave parameters unused.
    """

    model: nn.Module
    groups: Sequence[Mapping[str, Any]]
    loss: Loss
    images: TrainImages
    recipe: TrainRecipe
    seed: int
    partial: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.recipe.epochs * self.images.steps(self.recipe.batch_size)


@dataclass(frozen=True)
class StepReport:
    """Where a run is, after a step.

    Attributes:
        step: steps done.
        steps: of the whole run.
        loss: of this step, or the mean of those of an epoch (since it was last resumed).
        images_per_s: of all processes, since the epoch began or was resumed.
        wait_share: share of that time spent waiting for data.
        lr: learning rate of this step, of the first parameter group.
        grad_norm: norm of all gradients before clipping.
    """

    step: int
    steps: int
    loss: float
    images_per_s: float
    wait_share: float = 0.0
    lr: float = 0.0
    grad_norm: float = 0.0


@dataclass(frozen=True)
class Watch:
    """What is told while training runs, in every process.

    Attributes:
        on_step: called after every step.
        on_epoch: called after every epoch with the averaged model and the mean loss.
    """

    on_step: Callable[[StepReport], None] = lambda report: None
    on_epoch: Callable[[nn.Module, StepReport], None] = lambda model, report: None


class NonFiniteLossError(WeightsError):
    """Raised when the loss is no longer finite; no parameter was changed by its step."""


def start(task: TrainTask, accelerator: Accelerator) -> TrainState:
    """Move the model to its device and put averaged weights and optimiser beside it."""
    recipe = task.recipe
    task.model.to(accelerator.device)
    if recipe.channels_last:
        task.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [{**group, "peak_lr": group["lr"]} for group in task.groups]
    ema = copy.deepcopy(task.model).requires_grad_(False).eval()
    # Fused: a third of the time on the CPU, where a step is short and parameters are many.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), eps=recipe.eps, fused=True)
    return TrainState(task.model, ema, optimizer, _runner(task, accelerator))


def _runner(task: TrainTask, accelerator: Accelerator) -> nn.Module:
    """What a step calls: the model, compiled and spread over the processes as asked."""
    runner = task.model
    if accelerator.num_processes > 1:
        if task.recipe.sync_bn:
            runner = synchronise_norms(runner)
        index = accelerator.device.index
        runner = DistributedDataParallel(
            runner,
            device_ids=[index] if accelerator.device.type == "cuda" else None,
            find_unused_parameters=task.partial,
        )
    if task.recipe.compile:
        runner = torch.compile(runner)  # type: ignore[assignment]
    return runner


def fit(
    task: TrainTask,
    accelerator: Accelerator,
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    watch: Watch | None = None,
) -> nn.Module:
    """Train, going on from `checkpoint` if it exists.

    Args:
        task: what to train.
        accelerator: where, in which precision; all its processes call this.
        checkpoint: state file, written by the main process every few seconds and at the end.
        identity: digest that ties the checkpoint to settings, data and seed.
        watch: callbacks.

    Returns:
        A copy of the model with the averaged weights, in evaluation mode.

    Raises:
        WeightsError: the checkpoint is not this run's, or the loss is no longer finite.
        TrainingError: out of memory, a batch cannot be divided, no epoch lies between warm-up and
            cool-down, or another process ended.
        KeyboardInterrupt: Ctrl-C; the step was finished and the checkpoint written.
    """
    watch = watch or Watch()
    check_schedule(task.recipe)
    check_batch(task.recipe, len(task.images), accelerator)
    state = start(task, accelerator)
    if checkpoint is not None and checkpoint.is_file():
        load_state(checkpoint, state, identity)
    with deferred_interrupt(patient=accelerator.num_processes > 1) as interrupted:
        keeper = _Keeper(checkpoint, identity, accelerator, interrupted)
        while state.step < task.steps:
            try:
                _epoch(task, state, accelerator, watch, keeper)
            except NonFiniteLossError as error:
                raise WeightsError(f"{error}; {keeper.last_good()}") from error
            except RuntimeError as error:
                told = _told(error, task.recipe, accelerator)
                if told is None:
                    raise
                raise told from error
    keeper.save(state)
    accelerator.wait_for_everyone()
    return state.ema


def _epoch(
    task: TrainTask,
    state: TrainState,
    accelerator: Accelerator,
    watch: Watch,
    keeper: _Keeper,
) -> None:
    """Train to the end of the epoch that `state` is in."""
    recipe = task.recipe
    per_epoch = task.images.steps(recipe.batch_size)
    epoch, done = divmod(state.step, per_epoch)
    batches = task.images.batches(
        recipe.batch_size,
        device=accelerator.device,
        seed=task.seed,
        epoch=epoch,
        augment=recipe.augment,
        start_batch=done,
        part=part_of(accelerator),
    )
    began, seen, waited = time.monotonic(), 0, 0.0
    reports = []
    while True:
        asked = time.monotonic()
        batch = next(batches, None)
        waited += time.monotonic() - asked
        if batch is None:
            break
        loss, grad_norm = train_step(task, state, accelerator, *batch)
        seen += len(batch[1]) * accelerator.num_processes
        passed = time.monotonic() - began
        lr = state.optimizer.param_groups[0]["lr"]
        reports.append(
            StepReport(state.step, task.steps, loss, seen / passed, waited / passed, lr, grad_norm)
        )
        watch.on_step(reports[-1])
        if state.step % per_epoch:  # an epoch's last step is kept once it is reported
            keeper.keep(state)
    watch.on_epoch(state.ema, _mean(reports))
    keeper.keep(state)


def _mean(reports: Sequence[StepReport]) -> StepReport:
    last, count = reports[-1], len(reports)
    return StepReport(
        last.step,
        last.steps,
        sum(report.loss for report in reports) / count,
        last.images_per_s,
        last.wait_share,
        last.lr,
        sum(report.grad_norm for report in reports) / count,
    )


def _told(
    error: RuntimeError, recipe: TrainRecipe, accelerator: Accelerator
) -> TrainingError | None:
    """One line for what torch raises when memory runs out or another process ends."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return TrainingError(
            f"out of memory with batches of {recipe.batch_size} in {recipe.accumulation} parts; "
            f"give a smaller --batch-size, or accumulation {2 * recipe.accumulation}"
        )
    gone = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    if accelerator.num_processes > 1 and gone:
        return TrainingError(
            "another process of this run ended; what it said is above, and the same command goes "
            "on from the last checkpoint"
        )
    return None


class _Keeper:
    """Writes the checkpoint every few seconds, and when the run is interrupted."""

    def __init__(
        self,
        checkpoint: Path | None,
        identity: str,
        accelerator: Accelerator,
        interrupted: Callable[[], bool],
    ) -> None:
        self._checkpoint, self._identity = checkpoint, identity
        self._accelerator = accelerator
        self._interrupted = interrupted
        self._kept_at = time.monotonic()
        self._kept_step: int | None = None

    def keep(self, state: TrainState) -> None:
        """Write if it is time.

        Raises:
            KeyboardInterrupt: the run was interrupted; the state is written.
        """
        stop = self._interrupted()
        if self._accelerator.num_processes > 1:
            # A process that stopped alone would leave the others waiting for its gradients.
            if stop:
                self._accelerator.set_trigger()
            stop = self._accelerator.check_trigger()
        if stop or time.monotonic() - self._kept_at > CHECKPOINT_SECONDS:
            self.save(state)
            self._kept_at = time.monotonic()
        if stop:
            raise KeyboardInterrupt

    def save(self, state: TrainState) -> None:
        """Write now, in the main process."""
        if self._checkpoint is not None and self._accelerator.is_main_process:
            save_state(self._checkpoint, state, self._identity)
            self._kept_step = state.step

    def last_good(self) -> str:
        """Where the last state with a finite loss is."""
        if self._checkpoint is None or not self._checkpoint.is_file():
            return "no state was kept before that"
        step = "an earlier run" if self._kept_step is None else f"step {self._kept_step}"
        return f"the last good state, of {step}, is in {self._checkpoint}"


def decay_groups(
    parameters: Mapping[str, nn.Parameter], recipe: TrainRecipe
) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and kernels with weight decay, the rest without."""
    decayed = [p for name, p in parameters.items() if is_decayed(name, p)]
    chosen = {id(p) for p in decayed}
    plain = [p for p in parameters.values() if id(p) not in chosen]
    return [
        {"params": decayed, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": plain, "lr": recipe.lr, "weight_decay": 0.0},
    ]


def train_step(
    task: TrainTask,
    state: TrainState,
    accelerator: Accelerator,
    images: Tensor,
    targets: Tensor,
) -> tuple[float, float]:
    """Do one optimiser step and average the weights.

    Args:
        task: what is trained.
        state: moved on by one step.
        accelerator: where, in which precision.
        images: this process's part of a batch, (B, c, H, W) on the device.
        targets: (B,) or (B, K).

    Returns:
        The loss, and the norm of all gradients before clipping.

    Raises:
        NonFiniteLossError: the loss is no longer finite; no parameter was changed by this step.
    """
    recipe = task.recipe
    scale = learning_rate_scale(recipe, state.step, task.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    state.model.train()
    # Set to None, so that parameters off the sampled path are skipped, moments and all.
    state.optimizer.zero_grad(set_to_none=True)
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    value = 0.0
    chunks = images.chunk(recipe.accumulation), targets.chunk(recipe.accumulation)
    parts = list(zip(*chunks, strict=True))
    with _drawing(task.seed, state.step, accelerator):
        for number, (some, theirs) in enumerate(parts, 1):
            with _gradients_together(state.runner, last=number == len(parts)):
                with accelerator.autocast():
                    loss = task.loss(state.runner, some, theirs, state.step)
                share = loss * (len(some) / len(images)) if len(parts) > 1 else loss
                value += _everywhere(share, accelerator)
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"the loss is {value} at step {state.step}; lower the learning rate (--lr) "
                        "and start again in another --output"
                    )
                accelerator.backward(share)
    grad_norm = clip_gradients(state.model, recipe)
    state.optimizer.step()
    state.step += 1
    _average(state, recipe.ema_decay)
    return value, grad_norm


@contextlib.contextmanager
def _drawing(seed: int, step: int, accelerator: Accelerator) -> Iterator[None]:
    """Let modules draw, from torch's generators, numbers that follow from seed and step."""
    key = np.random.SeedSequence((seed, _STEP, step, accelerator.process_index))
    drawn = int(key.generate_state(1, np.uint64)[0] >> np.uint64(1))
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(drawn)
        if device.type == "cuda":
            torch.cuda.manual_seed(drawn)
        yield


@contextlib.contextmanager
def _gradients_together(runner: nn.Module, *, last: bool) -> Iterator[None]:
    """Exchange gradients between processes with the last micro-batch alone."""
    if isinstance(runner, DistributedDataParallel) and not last:
        with runner.no_sync():
            yield
    else:
        yield


def _everywhere(loss: Tensor, accelerator: Accelerator) -> float:
    """The mean over all processes, which so all notice a loss that is not finite."""
    if accelerator.num_processes == 1:
        return float(loss.detach())
    return float(accelerator.reduce(loss.detach().clone(), "mean"))  # reduced in place


@torch.no_grad()
def _average(state: TrainState, decay: float) -> None:
    """Move the averaged weights towards the model's; a young average forgets faster."""
    weight = 1.0 - min(decay, (1.0 + state.step) / (10.0 + state.step))
    averaged = state.ema.state_dict()
    for name, value in state.model.state_dict().items():
        if value.is_floating_point():
            averaged[name].lerp_(value, weight)
        else:
            averaged[name].copy_(value)
