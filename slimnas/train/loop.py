"""The training loop: any module, any loss, stoppable at any moment.

Batches, learning rate and whatever the loss draws follow from (seed, step), so a run that goes
on from a checkpoint gives on the CPU the same weights, bit by bit, as one never stopped.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimnas.data.batches import ImageSet
from slimnas.errors import RuntimeUnavailableError, WeightsError
from slimnas.train.checkpoint import TrainState, load_state, save_state
from slimnas.train.interrupt import deferred_interrupt
from slimnas.train.recipe import TrainRecipe, learning_rate_scale

CHECKPOINT_SECONDS = 20.0

Loss = Callable[[Tensor, Tensor, int], Tensor]
"""Images (B, c, H, W), labels (B,) and step -> scalar loss."""


@dataclass(frozen=True)
class TrainTask:
    """What to train, on what, how.

    Attributes:
        model: trained in place.
        groups: parameter groups with `params`, `lr` (peak) and `weight_decay`, and whatever else
            AdamW takes.
        loss: closes over the model.
        images: the TRAIN split.
        recipe: see `TrainRecipe`.
        seed: of the batches.
    """

    model: nn.Module
    groups: Sequence[Mapping[str, Any]]
    loss: Loss
    images: ImageSet
    recipe: TrainRecipe
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.recipe.epochs * self.images.steps(self.recipe.batch_size)


@dataclass(frozen=True)
class StepReport:
    """Where a run is, after a step."""

    step: int
    steps: int
    loss: float
    images_per_s: float


@dataclass(frozen=True)
class Watch:
    """What is told while training runs.

    Attributes:
        on_step: called after every step.
        on_epoch: called after every epoch with the averaged model and the mean loss.
    """

    on_step: Callable[[StepReport], None] = lambda report: None
    on_epoch: Callable[[nn.Module, StepReport], None] = lambda model, report: None


def accelerator_for(device: str) -> Accelerator:
    """An accelerator on `device` (auto, cpu, cuda or mps), in bf16 where the GPU has it.

    Raises:
        RuntimeUnavailableError: this machine lacks the device.
    """
    found = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not found.get(device, False):
        usable = ", ".join(name for name, there in found.items() if there)
        raise RuntimeUnavailableError(
            f"training device {device!r} is not available here; choose one of: {usable}"
        )
    bf16 = device in ("auto", "cuda") and torch.cuda.is_available()
    bf16 = bf16 and torch.cuda.is_bf16_supported()
    return Accelerator(cpu=device == "cpu", mixed_precision="bf16" if bf16 else "no")


def start(task: TrainTask, accelerator: Accelerator) -> TrainState:
    """Move the model to its device and put averaged weights and optimiser beside it."""
    task.model.to(accelerator.device)
    groups = [{**group, "peak_lr": group["lr"]} for group in task.groups]
    ema = copy.deepcopy(task.model).requires_grad_(False).eval()
    # Fused: a third of the time on the CPU, where a step is short and parameters are many.
    return TrainState(task.model, ema, torch.optim.AdamW(groups, fused=True))


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
        accelerator: where, in which precision.
        checkpoint: state file, written every few seconds and at the end.
        identity: digest that ties the checkpoint to settings, data and seed.
        watch: callbacks.

    Returns:
        A copy of the model with the averaged weights, in evaluation mode.

    Raises:
        WeightsError: the checkpoint is not this run's, or the loss is no longer finite.
        KeyboardInterrupt: Ctrl-C; the step was finished and the checkpoint written.
    """
    watch = watch or Watch()
    state = start(task, accelerator)
    if checkpoint is not None and checkpoint.is_file():
        load_state(checkpoint, state, identity)
    per_epoch = task.images.steps(task.recipe.batch_size)
    with deferred_interrupt() as interrupted:
        keeper = _Keeper(checkpoint, identity, interrupted)
        while state.step < task.steps:
            epoch, done = divmod(state.step, per_epoch)
            began, seen, losses = time.monotonic(), 0, []
            batches = task.images.batches(
                task.recipe.batch_size,
                device=accelerator.device,
                seed=task.seed,
                epoch=epoch,
                augment=task.recipe.augment,
                start_batch=done,
            )
            for images, labels in batches:
                losses.append(train_step(task, state, accelerator, images, labels))
                seen += len(labels)
                report = StepReport(
                    state.step, task.steps, losses[-1], seen / (time.monotonic() - began)
                )
                watch.on_step(report)
                if state.step % per_epoch:  # an epoch's last step is kept once it is reported
                    keeper.keep(state)
            mean = sum(losses) / len(losses)
            watch.on_epoch(state.ema, StepReport(state.step, task.steps, mean, report.images_per_s))
            keeper.keep(state)
    if checkpoint is not None:
        save_state(checkpoint, state, identity)
    return state.ema


class _Keeper:
    """Writes the checkpoint every few seconds, and when the run is interrupted."""

    def __init__(
        self, checkpoint: Path | None, identity: str, interrupted: Callable[[], bool]
    ) -> None:
        self._checkpoint, self._identity = checkpoint, identity
        self._interrupted = interrupted
        self._kept_at = time.monotonic()

    def keep(self, state: TrainState) -> None:
        """Write if it is time.

        Raises:
            KeyboardInterrupt: the run was interrupted; the state is written.
        """
        stop = self._interrupted()
        due = time.monotonic() - self._kept_at > CHECKPOINT_SECONDS
        if self._checkpoint is not None and (due or stop):
            save_state(self._checkpoint, state, self._identity)
            self._kept_at = time.monotonic()
        if stop:
            raise KeyboardInterrupt


def decay_groups(
    parameters: Mapping[str, nn.Parameter], recipe: TrainRecipe
) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and kernels with weight decay, the rest without."""
    decayed = [p for name, p in parameters.items() if p.dim() > 1 and not name.endswith("_biases")]
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
    labels: Tensor,
) -> float:
    """Do one optimiser step and average the weights; returns the loss.

    Args:
        task: what is trained.
        state: moved on by one step.
        accelerator: where, in which precision.
        images: (B, c, H, W) on the device.
        labels: (B,).

    Raises:
        WeightsError: the loss is no longer finite; no parameter was changed by this step.
    """
    scale = learning_rate_scale(task.recipe, state.step, task.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    state.model.train()
    # Set to None, so that parameters off the sampled path are skipped, moments and all.
    state.optimizer.zero_grad(set_to_none=True)
    with accelerator.autocast():
        loss = task.loss(images, labels, state.step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise WeightsError(
            f"the loss is {value} at step {state.step}; lower the learning rate (--lr) and "
            "start again in another --output"
        )
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(state.model.parameters(), task.recipe.clip_norm)
    state.optimizer.step()
    state.step += 1
    _average(state, task.recipe.ema_decay)
    return value


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
