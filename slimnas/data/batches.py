"""Images of one split, and the batches a run draws from them.

Order and augmentation of a batch follow from (seed, epoch, batch number) alone, so a run that
resumes at any batch sees what an uninterrupted one would have seen, on any device.

Shapes: B batch, N images of the split, C channels, H height, W width.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from slimnas.data.ahead import Job, decoded_batches
from slimnas.data.crop import CropDraw, CropPolicy
from slimnas.data.decode import decode_rows
from slimnas.data.parts import WHOLE, Part, permutation
from slimnas.data.sources import ImageTable, LongArray
from slimnas.data.transforms import (
    augment_generator,
    flip_some,
    normalise,
    shift_and_flip,
    to_device,
)
from slimnas.errors import DataError

_ORDER, _CROP = 1, 3  # keep the random streams of one (seed, epoch) apart; 2 augments

__all__ = [
    "WHOLE",
    "ImageSet",
    "LazyPixels",
    "MemoryPixels",
    "Part",
    "PixelStore",
    "Split",
    "TrainSource",
    "augment_generator",
    "flip_some",
    "normalise",
    "permutation",
    "shift_and_flip",
    "to_device",
]


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
    """Images decoded each time they are asked for, for sets that do not fit in memory.

    Attributes:
        table: where they lie.
        rows: which of its rows these are.
        resolution: height and width to decode to, pixels.
        channels: 1 or 3.
        crop: what `stream_crops` takes of each image, if it is to be asked.
    """

    table: ImageTable
    rows: LongArray
    resolution: tuple[int, int]
    channels: int
    crop: CropPolicy | None = None

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
                raise self._undecodable(row, image)
            pixels[position] = image
        return torch.from_numpy(pixels)

    def stream(self, batches: Iterable[LongArray]) -> Iterator[Tensor]:
        """Yield `take` of each batch, in order; the next ones are decoded meanwhile.

        Raises:
            DataError: one cannot be decoded.
        """
        return self._decoded((indexes, None) for indexes in batches)

    def stream_crops(
        self, batches: Iterable[tuple[LongArray, LongArray]], *, seed: int, epoch: int
    ) -> Iterator[Tensor]:
        """Yield a random crop of each image of each batch, in order.

        Args:
            batches: the images, and which copy of it each is: every copy gets another crop.
            seed: of the run.
            epoch: crops differ from epoch to epoch.

        Raises:
            DataError: one cannot be decoded.
        """
        policy = self.crop
        if policy is None:
            return self.stream(indexes for indexes, _ in batches)
        return self._decoded(
            (
                indexes,
                [
                    CropDraw(policy, (seed, epoch, _CROP, row, copy))
                    for row, copy in zip(self.rows[indexes].tolist(), copies.tolist(), strict=True)
                ],
            )
            for indexes, copies in batches
        )

    def _decoded(
        self, batches: Iterable[tuple[LongArray, Sequence[CropDraw] | None]]
    ) -> Iterator[Tensor]:
        first, second = itertools.tee(batches)
        reads = (partial(self._read, indexes, crops) for indexes, crops in first)
        decoded = decoded_batches(reads, self.resolution, self.channels)
        for (indexes, _), (pixels, bad) in zip(second, decoded, strict=True):
            for place, reason in bad.items():
                raise self._undecodable(int(self.rows[indexes[place]]), reason)
            yield pixels

    def _read(self, indexes: LongArray, crops: Sequence[CropDraw] | None) -> list[Job]:
        raws = self.table.read(self.rows[indexes].tolist())
        draws = crops or itertools.repeat(None, len(raws))
        return [Job(raw, crop) for raw, crop in zip(raws, draws, strict=True)]

    def _undecodable(self, row: int, reason: str) -> DataError:
        return DataError(
            f"every image must be decodable, {self.table.name(row)} is not ({reason}); "
            "remove it, or check all images first with --skip-bad-images"
        )


class TrainImages(Protocol):
    """What a network is trained on: an `ImageSet`, `StreamedImages`, or either augmented."""

    def __len__(self) -> int:
        """Images per epoch."""

    def steps(self, batch_size: int) -> int:
        """Return the number of batches per epoch."""

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

        Normalised images (B, C, H, W) float32, and labels (B,) int64 or shares of classes (B, K).
        """


class TrainSource(TrainImages, Protocol):
    """Images to augment: an `ImageSet`, or `StreamedImages`, which document the methods."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, pixels scaled to 0..1."""

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise."""

    @property
    def flip(self) -> bool:
        """Whether augmentation may mirror an image."""

    @property
    def cropped(self) -> bool:
        """Whether training batches are random crops, so that nothing needs to be shifted."""

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
        """Yield images (B, C, H, W) uint8 and labels (B,) int64."""

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 (B, C, H, W) into float32 with mean 0 and deviation 1."""


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

    @property
    def cropped(self) -> bool:
        """Whether training batches are random crops, so that nothing needs to be shifted."""
        return isinstance(self.store, LazyPixels) and self.store.crop is not None

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
            augment: take a random crop of each image where the images are `cropped`, else shift it
                by up to an eighth; mirror half of them if `flip` allows.
            start_batch: the first batch to yield, for a run that resumes inside an epoch.
            part: which images of every batch are wanted; all parts together are the whole batch.

        Yields:
            Normalised images (B, C, H, W) float32 and labels (B,) int64, on `device`.
        """
        total = min(batch_size, len(self))
        drawn = self._draw(batch_size, (seed, epoch), start_batch, part)
        if augment and self.cropped:
            raw = self._fetch_crops(drawn, device, seed, epoch)
        else:
            raw = self._fetch([indexes for indexes, _ in drawn], device)
        for batch, (images, labels) in enumerate(raw, start_batch):
            if augment:
                draws = augment_generator(seed, epoch, batch)
                change = flip_some if self.cropped else shift_and_flip
                images = change(images, draws, flip=self.flip, part=part, total=total)
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
        """Yield one epoch of shuffled training batches: no augmentation but crops, as bytes.

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
            Images (B, C, H, W) uint8, random crops where the images are `cropped`, another of each
            copy, and labels (B,) int64, on `device`.
        """
        drawn = self._draw(batch_size, (seed, epoch), start_batch, part, repeats)
        yield from self._fetch_crops(drawn, device, seed, epoch)

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
        return normalise(images, self.mean, self.std)

    def _draw(
        self,
        batch_size: int,
        key: tuple[int, int],
        start_batch: int,
        part: Part,
        repeats: int = 1,
    ) -> list[tuple[LongArray, LongArray]]:
        """Return, per batch, the images of this part and which copy of it each is."""
        order = permutation(len(self), *key, _ORDER)
        total = min(batch_size, len(self))
        drawn = []
        for batch in range(start_batch, self.steps(batch_size)):
            places = np.arange(batch * total, (batch + 1) * total)
            places = places[np.argsort(places % repeats, kind="stable")][part.of(total)]
            drawn.append((order[places // repeats], places % repeats))
        return drawn

    def _fetch_crops(
        self,
        drawn: Sequence[tuple[LongArray, LongArray]],
        device: torch.device | str,
        seed: int,
        epoch: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not isinstance(self.store, LazyPixels):
            yield from self._fetch([indexes for indexes, _ in drawn], device)
            return
        crops = self.store.stream_crops(drawn, seed=seed, epoch=epoch)
        for (indexes, _), images in zip(drawn, crops, strict=True):
            yield to_device(images, device), self._labels(indexes, device)

    def _fetch(
        self, chunks: Sequence[LongArray], device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for indexes, images in zip(chunks, self.store.stream(chunks), strict=True):
            yield to_device(images, device), self._labels(indexes, device)

    def _labels(self, indexes: LongArray, device: torch.device | str) -> Tensor:
        return to_device(self.labels[torch.from_numpy(indexes)], device)
