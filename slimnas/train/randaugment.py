"""RandAugment and colour jitter on a batch, of which every image gets its own draws.

Cubuk et al., "RandAugment" (CVPR workshops 2020), with the operations, strengths and probability of
timm's `rand-m9-mstd0.5-inc1`, which the released recipes name. What differs: images are float
between operations and not 8 bit, and moved ones are resampled bilinearly (timm: bicubic here).
Rows of the batch that drew the same operation go through it together.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from slimnas.train.network_recipe import RandAugmentSpec

STRONGEST = 10.0
APPLIED = 0.5
"""Probability that a drawn operation is done: timm's."""

MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_LEAST_SIDE = 3  # pixels, of kornia's sharpness

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images (n, C, H, W) of 0..1, strength (n,) of 0..1 and sign (n,) -> images."""


def rand_augment(
    images: Tensor, generator: torch.Generator, spec: RandAugmentSpec, fill: Tensor
) -> Tensor:
    """Do `spec.n` random operations to each image.

    Args:
        images: (B, C, H, W) float of 0..1, any device.
        generator: on the CPU, so that every device gets the same draws.
        spec: how many and how strong.
        fill: colour (C,) outside of moved images.
    """
    count = len(images)
    for _ in range(spec.n):
        drawn = torch.randint(len(NAMES), (count,), generator=generator)
        done = torch.rand(count, generator=generator) < APPLIED
        noise = spec.std * torch.randn(count, generator=generator)
        strength = (spec.magnitude + noise).clamp(0.0, STRONGEST) / STRONGEST
        sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
        images = operate(images, torch.where(done, drawn, -1), strength, sign, fill)
    return images


def color_jitter(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Change brightness, contrast and saturation by factors of 1 - share to 1 + share.

    As torchvision's ColorJitter, but in one random order for the whole batch.

    Args:
        images: (B, C, H, W) float of 0..1; saturation is left alone unless C is 3.
        generator: on the CPU.
        share: below 1.
    """
    factors = 1.0 + share * (2.0 * torch.rand((3, len(images)), generator=generator) - 1.0)
    for kind in torch.randperm(3, generator=generator).tolist():
        images = (_brightened, _contrasted, _saturated)[kind](images, factors[kind])
    return images


def moved(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Resample images as Pillow's affine transforms do, bilinearly.

    The middle (x, y) of an output pixel, in pixels from the top left corner, shows the image at
    (a x + b y + c, d x + e y + f); what lies outside is filled.

    Args:
        images: (n, C, H, W) float.
        matrices: (n, 2, 3), rows (a, b, c) and (d, e, f).
        fill: colour (C,).
    """
    height, width = images.shape[2:]
    (a, b, c), (d, e, f) = (row.unbind(1) for row in matrices.unbind(1))
    b, d = b * (height / width), d * (width / height)  # in halves of the image from its middle
    across = torch.stack([a, b, a + b + 2.0 / width * c - 1.0], dim=1)
    down = torch.stack([d, e, d + e + 2.0 / height * f - 1.0], dim=1)
    theta = torch.stack([across, down], dim=1).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1.0).all(dim=3)
    return torch.where(inside[:, None], seen, fill.to(images).view(1, -1, 1, 1))


def move_matrices(name: str, amount: Tensor, size: tuple[int, int]) -> Tensor:
    """Matrices (n, 2, 3) for `moved`.

    Args:
        name: one of `MOVES`.
        amount: signed strength (n,) of -1..1: of 30 degrees, a slope of 0.3, or 0.45 of a side.
        size: height and width of the images.
    """
    height, width = size
    nothing = torch.zeros_like(amount)
    one = torch.ones_like(amount)
    if name == "rotate":
        angle = -math.radians(30.0) * amount
        cos, sin = angle.cos(), angle.sin()
        x, y = width / 2, height / 2
        rows = [cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos]
    elif name == "shear_x":
        rows = [one, 0.3 * amount, nothing, nothing, one, nothing]
    elif name == "shear_y":
        rows = [one, nothing, nothing, 0.3 * amount, one, nothing]
    elif name == "translate_x":
        rows = [one, nothing, 0.45 * width * amount, nothing, one, nothing]
    else:
        rows = [one, nothing, nothing, nothing, one, 0.45 * height * amount]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def operate(images: Tensor, drawn: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    """Do one operation to each image.

    Args:
        images: (B, C, H, W) float of 0..1.
        drawn: (B,) which of `NAMES`; nothing is done where it is negative.
        strength: (B,) of 0..1.
        sign: (B,) of -1 or 1, for operations that go both ways.
        fill: colour (C,) outside of moved images.
    """
    out = images.clone()
    moving: list[Tensor] = []
    matrices: list[Tensor] = []
    for number, name in enumerate(NAMES):
        rows = (drawn == number).nonzero()[:, 0]
        if not len(rows):
            continue
        if name in MOVES:
            size = (images.shape[2], images.shape[3])
            moving.append(rows)
            matrices.append(move_matrices(name, sign[rows] * strength[rows], size))
        else:
            on = rows.to(images.device)
            out[on] = OPERATIONS[name](images[on], strength[rows], sign[rows])
    if moving:
        on = torch.cat(moving).to(images.device)
        out[on] = moved(images[on], torch.cat(matrices), fill)
    return out


def _auto_contrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    spread = images.amax(dim=(2, 3), keepdim=True) > images.amin(dim=(2, 3), keepdim=True)
    return torch.where(spread, _enhance().normalize_min_max(images), images)


def _equalize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    equalized: Tensor = _enhance().equalize(images)
    return equalized


def _invert(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return 1.0 - images


def _posterize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    bits = (4 - (4.0 * strength).floor().int()).clamp(min=1)  # of 0 a black image is left
    posterized: Tensor = _enhance().posterize(images, bits.to(images.device))
    return posterized


def _solarize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    # Between two of the 256 values, so that rounding cannot move one across.
    threshold = (256.0 - (256.0 * strength).floor() - 0.5) / 255.0
    solarized: Tensor = _enhance().solarize(images, threshold.to(images))
    return solarized


def _solarize_add(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    added = ((110.0 * strength).floor() / 255.0).to(images).view(-1, 1, 1, 1)
    return torch.where(images < 127.5 / 255.0, (images + added).clamp(max=1.0), images)


def _sharpened(images: Tensor, factor: Tensor) -> Tensor:
    if min(images.shape[2:]) < _LEAST_SIDE:
        return images
    sharpened: Tensor = _enhance().sharpness(images, factor.to(images))
    return sharpened


def _brightened(images: Tensor, factor: Tensor) -> Tensor:
    out: Tensor = _enhance().adjust_brightness_accumulative(images, factor.to(images))
    return out


def _contrasted(images: Tensor, factor: Tensor) -> Tensor:
    out: Tensor = _enhance().adjust_contrast_with_mean_subtraction(images, factor.to(images))
    return out


def _saturated(images: Tensor, factor: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images
    out: Tensor = _enhance().adjust_saturation_with_gray_subtraction(images, factor.to(images))
    return out


def _enhancing(change: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    """An operation whose factor moves away from 1 by up to 0.9."""

    def operation(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
        return change(images, (1.0 + 0.9 * sign * strength).clamp(min=0.1))

    return operation


def _enhance() -> Any:
    """kornia's intensity operations; importing kornia takes a second."""
    return importlib.import_module("kornia.enhance")


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "auto_contrast": _auto_contrast,
        "equalize": _equalize,
        "invert": _invert,
        "posterize": _posterize,
        "solarize": _solarize,
        "solarize_add": _solarize_add,
        "color": _enhancing(_saturated),
        "contrast": _enhancing(_contrasted),
        "brightness": _enhancing(_brightened),
        "sharpness": _enhancing(_sharpened),
    }
)
"""What changes colours; `MOVES` move pixels."""

NAMES = (*OPERATIONS, *MOVES)
"""All operations, each as likely as another."""
