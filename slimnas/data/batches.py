"""Images of one split, and the batches a run draws from them.

Order and augmentation of a batch follow from (seed, epoch, batch number) alone, so a run that
resumes at any batch sees what an uninterrupted one would have seen, on any device.

Shapes: B batch, N images of the split, C channels, H height, W width.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from slimnas.data.decode import decode_rows
from slimnas.data.sources import ImageTable, LongArray
from slimnas.errors import DataError

_BATCHES_AHEAD = 2
_ORDER, _AUGMENT = 1, 2  # keep the two random streams of one (seed, epoch) apart


@dataclass(frozen=True)
class Part:
    """Which images of every batch one process gets: the `index`-th of `count` contiguous slices.

    Of a batch of `size` images these are [index * size // count, (index + 1) * size // count).
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a slice that does not exist.

        Raises:
            DataError: `index` does not lie in 0..count - 1.
        """
        if not 0 <= self.index < self.count:
            raise DataError(f"a part must be one of 0..{self.count - 1}, got {self.index}")

    def of(self, size: int) -> slice:
        """Return the slice of a batch of `size` images."""
        return slice(self.index * size // self.count, (self.index + 1) * size // self.count)


WHOLE = Part()


class Split(enum.Enum):
    """What a set of images may be used for."""

    TRAIN = "train"
    SEARCH = "search"
    TEST = "test"


class PixelStore(Protocol):
    """Where the pixels of a split come from."""

    def take(self, indexes: LongArray) -> Tensor:
        """Return these images as uint8 (len(indexes), C, H, W) on the CPU."""

    def stream(self, batches: Iterable[LongArray]) -> Iterator[Tensor]:
        """Yield `take` of each batch, in order."""


@dataclass(frozen=True, eq=False)
class MemoryPixels:
    """Decoded images (N, C, H, W) uint8, held in memory."""

    pixels: Tensor

    def take(self, indexes: LongArray) -> Tensor:
        """Return these images as uint8 (len(indexes), C, H, W) on the CPU."""
        return self.pixels[torch.from_numpy(indexes)]

    def stream(self, batches: Iterable[LongArray]) -> Iterator[Tensor]:
        """Yield `take` of each batch, in order."""
        return map(self.take, batches)


@dataclass(frozen=True, eq=False)
class LazyPixels:
    """Images decoded each time they are asked for, for sets that do not fit in memory."""

    table: ImageTable
    rows: LongArray
    resolution: tuple[int, int]
    channels: int

    def take(self, indexes: LongArray) -> Tensor:
        """Return these images as uint8 (len(indexes), C, H, W) on the CPU.

        Raises:
            DataError: one cannot be decoded.
        """
        rows = self.rows[indexes].tolist()
        pixels = np.empty((len(rows), self.channels, *self.resolution), dtype=np.uint8)
        decoded = decode_rows(self.table, rows, self.resolution, self.channels)
        for position, (row, image) in enumerate(zip(rows, decoded, strict=True)):
            if isinstance(image, str):
                raise DataError(
                    f"every image must be decodable, {self.table.name(row)} is not ({image}); "
                    "remove it, or check all images first with --skip-bad-images"
                )
            pixels[position] = image
        return torch.from_numpy(pixels)

    def stream(self, batches: Iterable[LongArray]) -> Iterator[Tensor]:
        """Yield `take` of each batch, in order; the next ones are decoded meanwhile.

        Raises:
            DataError: one cannot be decoded.
        """
        pending: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(1) as background:
            for indexes in batches:
                pending.append(background.submit(self.take, indexes))
                if len(pending) > _BATCHES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split.

    Attributes:
        split: what they may be used for.
        store: their pixels.
        labels: class numbers (N,), int64.
        mean: per channel, of the TRAIN split, pixels scaled to 0..1.
        std: likewise.
        flip: whether augmentation may mirror an image.
    """

    split: Split
    store: PixelStore
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Return how many batches `batches` yields per epoch: full ones, or one that is not."""
        return max(1, len(self) // batch_size)

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
        """Yield one epoch of shuffled training batches.

        A last batch that would be short is left out (another image each epoch) unless it is the
        only one.

        Args:
            batch_size: images per batch, over all processes.
            device: where the batches are wanted; augmentation runs there.
            seed: of the run, >= 0.
            epoch: counts from 0; each has its own order and augmentation.
            augment: shift each image by up to an eighth, mirror half of them if `flip` allows.
            start_batch: the first batch to yield, for a run that resumes inside an epoch.
            part: which images of every batch are wanted; all parts together are the whole batch.

        Yields:
            Normalised images (B, C, H, W) float32 and labels (B,) int64, on `device`.
        """
        raw = self.raw_batches(
            batch_size, device=device, seed=seed, epoch=epoch, start_batch=start_batch, part=part
        )
        total = min(batch_size, len(self))
        for batch, (images, labels) in enumerate(raw, start_batch):
            if augment:
                draws = augment_generator(seed, epoch, batch)
                images = shift_and_flip(images, draws, flip=self.flip, part=part, total=total)
            yield self.normalise(images), labels

    def raw_batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int,
        epoch: int,
        start_batch: int = 0,
        part: Part = WHOLE,
        repeats: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of shuffled training batches, neither augmented nor normalised.

        With `repeats` each image stands that often in a batch, for augmentation to tell its
        copies apart, and an epoch keeps its number of batches: it shows a `repeats`-th of the
        images (Hoffer et al. 2020, as the RASampler of timm and DeiT). First copies come first in
        a batch, so that processes whose number `repeats` divides get different copies.

        Args:
            batch_size: images per batch, copies counted, over all processes.
            device: where the batches are wanted.
            seed: of the run, >= 0.
            epoch: counts from 0; each has its own order.
            start_batch: the first batch to yield, for a run that resumes inside an epoch.
            part: which images of every batch are wanted.
            repeats: copies of each image, >= 1.

        Yields:
            Images (B, C, H, W) uint8 and labels (B,) int64, on `device`.
        """
        order = permutation(len(self), seed, epoch, _ORDER)
        total = min(batch_size, len(self))
        chunks = []
        for batch in range(start_batch, self.steps(batch_size)):
            places = np.arange(batch * total, (batch + 1) * total)
            places = places[np.argsort(places % repeats, kind="stable")][part.of(total)]
            chunks.append(order[places // repeats])
        yield from self._fetch(chunks, device)

    def eval_batches(
        self, batch_size: int, *, device: torch.device | str, start_batch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every image once, in order, not augmented; the last batch may be short.

        Batches before `start_batch` are left out, for a pass that resumes.

        Yields:
            Normalised images (B, C, H, W) float32 and labels (B,) int64, on `device`.
        """
        everything = np.arange(len(self))
        starts = range(start_batch * batch_size, len(self), batch_size)
        chunks = [everything[at : at + batch_size] for at in starts]
        for images, labels in self._fetch(chunks, device):
            yield self.normalise(images), labels

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 (B, C, H, W) into float32 with the TRAIN split's mean 0 and deviation 1."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255.0 - mean) / std

    def _fetch(
        self, chunks: Sequence[LongArray], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for indexes, images in zip(chunks, self.store.stream(chunks), strict=True):
            yield images.to(device), self.labels[torch.from_numpy(indexes)].to(device)


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
    device = images.device
    which = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    rows = rows.to(device).view(batch, 1, height, 1)
    return images[which, channel, rows, columns[mine].to(device).view(batch, 1, 1, width)]


def permutation(count: int, *key: int) -> LongArray:
    """Return a permutation of range(count) that depends on the key's non-negative numbers only.

    Sorts uniform draws, whose stream NumPy keeps from release to release (its shuffles may
    change).
    """
    draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).random(count)
    return np.argsort(draws, kind="stable").astype(np.int64)


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
