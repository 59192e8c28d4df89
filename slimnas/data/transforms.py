"""What is done to a batch on its way to the network; drawn for the whole batch, done for a part.

Shapes: B images of this part, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slimnas.data.parts import WHOLE, Part

_AUGMENT = 2  # keeps this random stream apart from the others of one (seed, epoch)
_IN_CACHE = 1 << 17
"""Numbers that fit into a core's cache as float32, with room to spare."""


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device; to a GPU without waiting for it."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 (B, C, H, W) into float32 with this mean and deviation taken out, per channel."""
    shift = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    at_once = max(1, len(images))
    if images.device.type == "cpu":  # what stays in a core's cache from one operation to the next
        at_once = max(1, _IN_CACHE // max(1, images[:1].numel()))
    for at in range(0, len(images), at_once):
        piece = out[at : at + at_once].copy_(images[at : at + at_once])
        piece.div_(255.0).sub_(shift).div_(scale)
    return out


def flip_some(
    images: Tensor,
    generator: torch.Generator,
    *,
    flip: bool,
    part: Part = WHOLE,
    total: int | None = None,
) -> Tensor:
    """Mirror half of the images, if `flip` says so; arguments as of `shift_and_flip`."""
    if not flip:
        return images
    total = len(images) if total is None else total
    mirrored = (torch.rand((total, 1, 1, 1), generator=generator) < 0.5)[part.of(total)]
    if images.device.type != "cpu":
        return torch.where(mirrored.to(images.device), images.flip(3), images)
    out = images.clone()  # several times as fast on the CPU as to choose pixel by pixel
    for place in mirrored.flatten().nonzero().flatten().tolist():
        out[place] = images[place].flip(2)
    return out


def shift_and_flip(
    images: Tensor,
    generator: torch.Generator,
    *,
    flip: bool,
    part: Part = WHOLE,
    total: int | None = None,
) -> Tensor:
    """Shift each image by up to an eighth of its side, edges reflected; mirror half of them.

    The offsets are drawn on the CPU, so every device gets the same ones.

    Args:
        images: (B, C, H, W), any dtype and device.
        generator: a CPU generator.
        flip: whether to mirror.
        part: which part of a batch `images` is; draws are made for the whole batch.
        total: images of the whole batch; None for B.
    """
    batch, channels, height, width = images.shape
    total = batch if total is None else total
    mine = part.of(total)
    rows = _shifted(total, height, generator)[mine]
    columns = _shifted(total, width, generator)
    if flip:
        mirrored = torch.rand((total, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    places = rows.view(batch, height, 1) * width + columns[mine].view(batch, 1, width)
    places = places.to(images.device).view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, places).view(images.shape)


def _shifted(batch: int, side: int, generator: torch.Generator) -> Tensor:
    """Return source positions (B, side) of a random shift with reflected edges."""
    reach = min(max(1, side // 8), side - 1)
    shift = torch.randint(-reach, reach + 1, (batch, 1), generator=generator)
    position = (torch.arange(side) + shift).abs()
    return (side - 1) - (side - 1 - position).abs()


def augment_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """Return the generator of one batch's augmentation, apart from that of its order."""
    state = np.random.SeedSequence((seed, epoch, _AUGMENT, batch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
