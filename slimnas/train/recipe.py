"""How a network is trained, as plain data."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from slimnas.arch.documents import Spec
from slimnas.errors import TrainingError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Whole = Annotated[int, Field(strict=True, ge=1)]


class TrainRecipe(Spec):
    """AdamW with linear warm-up and cosine decay, label smoothing and weight averaging.

    Attributes:
        epochs: passes over TRAIN, those of the cool-down included.
        batch_size: images of one optimiser step, over all processes and micro-batches.
        accumulation: micro-batches that a process splits its part of a step into, where a whole
            one does not fit into memory.
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup: share of the steps spent rising linearly from `warmup_lr` to `lr`.
        warmup_epochs: how long that takes instead, in epochs.
        warmup_lr: learning rate at the beginning; None for `min_lr`.
        cooldown_epochs: last epochs, all at `min_lr`.
        beta2: AdamW's decay of squared gradients.
        eps: AdamW's epsilon.
        weight_decay: of matrices and kernels; vectors, biases and attention biases have none.
        label_smoothing: share of the target spread over all classes.
        ema_decay: of the averaged weights, reached gradually.
        clip: `norm` bounds the norm of all gradients by `clip_norm`; `agc` the norm of each unit's
            gradient by `clip_norm` times that of its weights; `none` nothing.
        clip_norm: see `clip`.
        augment: shift (and mirror, where the data allow) every image.
        sync_bn: BatchNorm takes its statistics over all processes.
        channels_last: memory format of images and weights.
        compile: run the network through `torch.compile`.
    """

    epochs: Whole = 10
    batch_size: Whole = 64
    accumulation: Whole = 1
    lr: Positive = 2e-3
    min_lr: Positive = 1e-5
    warmup: Share = 0.1
    warmup_epochs: NotNegative | None = None
    warmup_lr: Positive | None = None
    cooldown_epochs: Annotated[int, Field(strict=True, ge=0)] = 0
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.025
    label_smoothing: Share = 0.1
    ema_decay: Share = 0.995
    clip: Literal["norm", "agc", "none"] = "norm"
    clip_norm: Positive = 1.0
    augment: bool = True
    sync_bn: bool = False
    channels_last: bool = False
    compile: bool = False


def check_schedule(recipe: TrainRecipe) -> None:
    """Refuse a warm-up and a cool-down that leave no epoch between them to train in.

    Raises:
        TrainingError: says how long they are, and what to change.
    """
    warmup, cooldown = recipe.warmup * recipe.epochs, recipe.cooldown_epochs
    if recipe.warmup_epochs is not None:
        warmup = recipe.warmup_epochs
    if warmup + cooldown < recipe.epochs:
        return
    shorter = f"--set warmup_epochs={recipe.epochs / 10:g}"
    raise TrainingError(
        f"epochs: must be more than the {warmup:g} of warm-up and {cooldown} of cool-down, got "
        f"{recipe.epochs}; give more --epochs, or {shorter}"
        f"{' --set cooldown_epochs=0' if cooldown else ''}"
    )


def learning_rate_scale(recipe: TrainRecipe, step: int, steps: int) -> float:
    """Learning rate of `step` (from 0) of `steps`, as a share of the peak."""
    floor = recipe.min_lr / recipe.lr
    start = floor if recipe.warmup_lr is None else recipe.warmup_lr / recipe.lr
    per_epoch = steps / recipe.epochs
    warmup_steps = recipe.warmup * steps
    if recipe.warmup_epochs is not None:
        warmup_steps = recipe.warmup_epochs * per_epoch
    if step < warmup_steps:
        return start + (1.0 - start) * (step + 1) / (warmup_steps + 1)
    falling_steps = steps - recipe.cooldown_epochs * per_epoch - warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1.0, falling_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
