"""What a recipe does to training images on the batch, where the network runs.

Every draw follows from (seed, epoch, batch number, part of the batch), on the CPU, so a resumed
run sees what an uninterrupted one would have seen; the noise of random erasing is drawn on the
device and so differs from one kind of device to another.

In order, as timm does it: shift or crop, mirror, RandAugment or colour jitter, normalisation,
random erasing, mixup or CutMix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from slimnas.data.batches import (
    WHOLE,
    Part,
    TrainSource,
    augment_generator,
    flip_some,
    normalise,
    shift_and_flip,
)
from slimnas.train.network_recipe import Augmentation, CropSpec
from slimnas.train.randaugment import color_jitter, rand_augment

_PIXELS, _MIX = 11, 12  # keep these random streams apart from those of the data
_TRIES = 10
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's

Box = tuple[int, int, int, int]
"""Top, bottom, left, right; bottom and right lie outside."""


@dataclass(frozen=True)
class AugmentedImages:
    """Images as a recipe augments them; `TrainImages` is what they are used as.

    Attributes:
        images: to augment.
        augmentation: how; a recipe is one.
        classes: number of classes K, for shares of classes.
        smoothing: share of a mixed target spread over all classes.
    """

    images: TrainSource
    augmentation: Augmentation
    classes: int
    smoothing: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int) -> int:
        """How many batches an epoch has; repeats do not change it."""
        return self.images.steps(batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int,
        epoch: int,
        augment: bool,
        start_batch: int = 0,
        part: Part = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `part` of each batch of an epoch from `start_batch` on.

        Args:
            batch_size: images per batch, over all processes.
            device: where the batches are wanted; augmentation runs there.
            seed: of the run, >= 0.
            epoch: counts from 0; each has its own order and augmentation.
            augment: without it images are normalised and nothing else.
            start_batch: the first batch to yield.
            part: which images of every batch are wanted; images are mixed within the part.

        Yields:
            Normalised images (B, C, H, W) float32 and, if they may be mixed, smoothed shares of
            classes (B, K) float32, else labels (B,) int64.
        """
        if not augment:
            yield from self.images.batches(
                batch_size,
                device=device,
                seed=seed,
                epoch=epoch,
                augment=False,
                start_batch=start_batch,
                part=part,
            )
            return
        raw = self.images.raw_batches(
            batch_size,
            device=device,
            seed=seed,
            epoch=epoch,
            start_batch=start_batch,
            part=part,
            repeats=self.augmentation.repeats,
        )
        total = min(batch_size, len(self))
        for batch, (images, labels) in enumerate(raw, start_batch):
            draws = augment_generator(seed, epoch, batch)
            images = self._placed(images, draws, part, total)
            key = (seed, epoch, batch, part.index)
            images = self._changed(images, _generator(*key))
            yield self._mixed(images, labels, key)

    def _placed(self, images: Tensor, draws: torch.Generator, part: Part, total: int) -> Tensor:
        """Choose what of each image is seen: drawn for the whole batch, whatever the part."""
        flip = self.images.flip
        if self.images.cropped:
            return flip_some(images, draws, flip=flip, part=part, total=total)
        if self.augmentation.crop is None:
            return shift_and_flip(images, draws, flip=flip, part=part, total=total)
        boxes = crop_boxes(total, (images.shape[2], images.shape[3]), draws, self.augmentation.crop)
        images = crop_images(images, boxes[part.of(total)], self.augmentation.crop.interpolation)
        return flip_some(images, draws, flip=flip, part=part, total=total)

    def _changed(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Change colours and shapes, normalise, erase."""
        plan, source = self.augmentation, self.images
        if plan.randaugment is not None or plan.color_jitter:
            images = images.float() / 255.0
            if plan.randaugment is not None:
                fill = torch.tensor(source.mean)
                images = rand_augment(images, draws, plan.randaugment, fill)
            else:  # timm leaves it out beside RandAugment
                images = color_jitter(images, draws, plan.color_jitter)
            images = images * 255.0
        images = normalise(images, source.mean, source.std)
        return erase(images, draws, plan.erasing) if plan.erasing else images

    def _mixed(self, images: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        plan = self.augmentation
        if not plan.mixes:
            return images, labels
        lam, box = draw_mix(plan, (images.shape[2], images.shape[3]), key)
        targets = soft_targets(labels, lam, classes=self.classes, smoothing=self.smoothing)
        return mix(images, lam, box), targets


def crop_boxes(
    count: int, size: tuple[int, int], generator: torch.Generator, crop: CropSpec
) -> Tensor:
    """Draw random resized crops: ten tries for one that fits, else the whole image.

    Args:
        count: number of boxes.
        size: height and width of the images.
        generator: on the CPU.
        crop: range of areas, and of widths by heights, which are drawn evenly in the logarithm.

    Returns:
        (count, 4) float: top, left, height and width in whole pixels.
    """
    draws = torch.rand((4, count, _TRIES), generator=generator)
    height, width, fits = _fitting(draws[:2], size, crop.scale, crop.ratio)
    height, width = _first(height, fits), _first(width, fits)
    height = torch.where(fits.any(1), height, float(size[0]))
    width = torch.where(fits.any(1), width, float(size[1]))
    top = (_first(draws[2], fits) * (size[0] - height + 1)).floor()
    left = (_first(draws[3], fits) * (size[1] - width + 1)).floor()
    return torch.stack([top, left, height, width], dim=1)


def crop_images(images: Tensor, boxes: Tensor, interpolation: str) -> Tensor:
    """Enlarge a box of each image to the whole image's size.

    Args:
        images: (B, C, H, W) uint8.
        boxes: (B, 4) top, left, height and width in pixels.
        interpolation: bilinear or bicubic.

    Returns:
        (B, C, H, W) float of 0..255.
    """
    height, width = images.shape[2:]
    top, left, high, wide = boxes.unbind(1)
    nothing = torch.zeros_like(top)
    across = torch.stack([wide / width, nothing, (2 * left + wide) / width - 1.0], dim=1)
    down = torch.stack([nothing, high / height, (2 * top + high) / height - 1.0], dim=1)
    theta = torch.stack([across, down], dim=1).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    seen = F.grid_sample(
        images.float(), grid, mode=interpolation, padding_mode="border", align_corners=False
    )
    return seen.clamp_(0.0, 255.0)


def erase(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Fill a rectangle of some images with noise of mean 0 and deviation 1.

    Random erasing (Zhong et al. 2020) as in timm's mode `pixel`: 2 % to a third of the area, sides
    in ratios of 0.3 to 1 / 0.3, ten tries for a rectangle that fits, else none.

    Args:
        images: (B, C, H, W) normalised; they may be changed in place.
        generator: on the CPU.
        probability: share of the images.
    """
    count, _, rows, columns = images.shape
    chosen = torch.rand(count, generator=generator) < probability
    draws = torch.rand((4, count, _TRIES), generator=generator)
    noise_seed = int(torch.randint(2**62, (), generator=generator))
    size = (rows, columns)
    high, wide, fits = _fitting(draws[:2], size, _ERASED_AREA, _ERASED_RATIO, whole=False)
    on = (chosen & fits.any(1)).nonzero()[:, 0]
    if not len(on):
        return images
    high, wide = _first(high, fits)[on], _first(wide, fits)[on]
    top = (_first(draws[2], fits)[on] * (rows - high + 1)).floor()
    left = (_first(draws[3], fits)[on] * (columns - wide + 1)).floor()
    down = _between(top, top + high, rows).view(-1, 1, rows, 1)
    across = _between(left, left + wide, columns).view(-1, 1, 1, columns)
    erased = (down & across).to(images.device)
    on = on.to(images.device)
    noise = torch.Generator(images.device).manual_seed(noise_seed)
    shape = (len(on), *images.shape[1:])
    filled = torch.randn(shape, generator=noise, device=images.device, dtype=images.dtype)
    images[on] = torch.where(erased, filled, images[on])
    return images


def draw_mix(
    plan: Augmentation, size: tuple[int, int], key: tuple[int, ...]
) -> tuple[float, Box | None]:
    """Draw how a batch is mixed, once for all its images (timm's mode `batch`).

    Returns:
        The images' own share, 1.0 for a batch that is not mixed, and the box that CutMix takes
        from the others; None for mixup.
    """
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, _MIX))))
    mixed, switch = draw.random(2)
    if mixed >= plan.mix_prob:
        return 1.0, None
    if not plan.cutmix or (plan.mixup and switch >= plan.mix_switch):
        return float(draw.beta(plan.mixup, plan.mixup)), None
    rows, columns = size
    side = math.sqrt(1.0 - draw.beta(plan.cutmix, plan.cutmix))
    high, wide = int(rows * side), int(columns * side)
    middle, centre = (int(draw.random() * length) for length in size)
    top, bottom = max(0, middle - high // 2), min(rows, middle + (high + 1) // 2)
    left, right = max(0, centre - wide // 2), min(columns, centre + (wide + 1) // 2)
    share = (bottom - top) * (right - left) / (rows * columns)
    return 1.0 - share, (top, bottom, left, right)


def mix(images: Tensor, lam: float, box: Box | None) -> Tensor:
    """Mix each image with the one as far from the end as it is from the beginning.

    Args:
        images: (B, C, H, W).
        lam: the image's own share, for mixup (Zhang et al. 2018).
        box: what CutMix (Yun et al. 2019) takes from the other image; None for mixup.
    """
    if box is None:
        return images if lam == 1.0 else images * lam + images.flip(0) * (1.0 - lam)
    top, bottom, left, right = box
    out = images.clone()
    out[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return out


def soft_targets(labels: Tensor, lam: float, *, classes: int, smoothing: float) -> Tensor:
    """Shares of classes (B, K) float32 of mixed images, smoothed.

    Args:
        labels: class numbers (B,) before mixing.
        lam: each image's own share.
        classes: number of classes K.
        smoothing: share of the target spread over all classes.
    """
    shares = F.one_hot(labels, classes).float() * (1.0 - smoothing) + smoothing / classes
    return shares * lam + shares.flip(0) * (1.0 - lam)


def _fitting(
    draws: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    whole: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Heights, widths and whether they fit, (count, tries), of rectangles of random shape.

    `ratio` bounds widths by heights. `whole` lets a rectangle be as long as the image.
    """
    area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * draws[1]).exp()
    rows, columns = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    longest = (size[0], size[1]) if whole else (size[0] - 1, size[1] - 1)
    fits = (rows <= longest[0]) & (columns <= longest[1]) & (rows > 0) & (columns > 0)
    return rows, columns, fits


def _first(values: Tensor, fits: Tensor) -> Tensor:
    """Of each row of (count, tries) the value of the first try that fits, or of the first."""
    return values.gather(1, fits.int().argmax(dim=1, keepdim=True))[:, 0]


def _between(first: Tensor, end: Tensor, length: int) -> Tensor:
    """Masks (n, length) of the places from `first` and before `end`."""
    places = torch.arange(length)
    return (places >= first[:, None]) & (places < end[:, None])


def _generator(*key: int) -> torch.Generator:
    state = np.random.SeedSequence((*key, _PIXELS)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
