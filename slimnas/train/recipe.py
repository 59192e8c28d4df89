"""How a network is trained, as plain data."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from slimnas.arch.documents import Spec

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Whole = Annotated[int, Field(strict=True, ge=1)]


class TrainRecipe(Spec):
    """AdamW with linear warm-up and cosine decay, label smoothing and weight averaging.

    Attributes:
        epochs: passes over TRAIN.
        batch_size: images per step.
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup: share of the steps spent rising linearly from `min_lr` to `lr`.
        weight_decay: of matrices and kernels; vectors and biases have none.
        label_smoothing: share of the target spread over all classes.
        ema_decay: of the averaged weights, reached gradually.
        clip_norm: largest gradient norm.
        augment: shift (and mirror, where the data allow) every image.
    """

    epochs: Whole = 10
    batch_size: Whole = 64
    lr: Positive = 2e-3
    min_lr: Positive = 1e-5
    warmup: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.025
    label_smoothing: Share = 0.1
    ema_decay: Share = 0.995
    clip_norm: Positive = 1.0
    augment: bool = True


def learning_rate_scale(recipe: TrainRecipe, step: int, steps: int) -> float:
    """Learning rate of `step` (from 0) of `steps`, as a share of the peak."""
    floor = recipe.min_lr / recipe.lr
    warmup_steps = recipe.warmup * steps
    if step < warmup_steps:
        return floor + (1.0 - floor) * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
