"""Training images read shard by shard, each process and thread its own, through a shuffle buffer.

For sets that are too large to look images up in, or lie elsewhere. The order follows from (seed,
epoch, process), crops from (seed, epoch, process, place): a run that resumes inside an epoch reads
past what it has seen, without decoding it, and goes on as an uninterrupted one would.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimnas.data.ahead import Bad, Job, decoded_batches
from slimnas.data.batches import (
    WHOLE,
    Part,
    augment_generator,
    flip_some,
    normalise,
    shift_and_flip,
    to_device,
)
from slimnas.data.crop import CropDraw, CropPolicy
from slimnas.data.sources import RawImage
from slimnas.data.stream_source import StreamOptions, StreamSource
from slimnas.data.tables import first_image, outside, quiet, reading
from slimnas.errors import DataError

_CROP = 41  # keeps this random stream apart from the others of one seed
_ROWS_AT_ONCE = 16
_CHUNKS_AHEAD = 2
_NEXT_PASS = 1_000_003  # a pass begun inside an epoch is shuffled as none of the epochs is


@dataclass(frozen=True)
class _Row:
    """An encoded image on its way into a batch."""

    raw: RawImage
    label: int
    name: str
    number: int
    copy: int


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Training images that come in a stream; stands where an `ImageSet` does.

    Processes read different images: the number of processes changes which images share a batch,
    unlike with an `ImageSet`. A process whose shards end before its epoch does starts over in
    another order.

    Attributes:
        source: what is read.
        options: how.
        resolution: height and width, pixels.
        channels: 1 or 3.
        crop: random crops to train on; None for centred ones that are shifted.
        mean: per channel, pixels scaled to 0..1.
        std: likewise.
        flip: whether augmentation may mirror an image.
        skip_bad_images: put the image before it in the place of an undecodable one, instead of
            raising.
    """

    source: StreamSource
    options: StreamOptions
    resolution: tuple[int, int]
    channels: int
    crop: CropPolicy | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    skip_bad_images: bool

    def __post_init__(self) -> None:
        """Refuse a stream whose epochs have no end.

        Raises:
            DataError: nobody knows how many images there are.
        """
        if self.options.images_per_epoch is None and self.source.count is None:
            raise DataError(
                f"--data {self.source.spec}: does not tell how many images it has; give the "
                "number with --images-per-epoch"
            )

    def __len__(self) -> int:
        """Images per epoch."""
        count = self.options.images_per_epoch or self.source.count
        assert count is not None
        return count

    @property
    def cropped(self) -> bool:
        """Whether training batches are random crops, so that nothing needs to be shifted."""
        return self.crop is not None

    def steps(self, batch_size: int) -> int:
        """Return how many batches there are per epoch: full ones, or one that is not."""
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
        """Yield one epoch of training batches; see `ImageSet.batches`.

        Yields:
            Normalised images (B, C, H, W) float32 and labels (B,) int64, on `device`.

        Raises:
            DataError: an image or a shard cannot be read, or a label belongs to no class.
        """
        total = min(batch_size, len(self))
        sizes = (batch_size, start_batch, 1)
        crop = self.crop if augment else None
        raw = self._read((seed, epoch), sizes, part, crop)
        with contextlib.closing(raw):
            for batch, (images, labels) in enumerate(raw, start_batch):
                images, labels = to_device(images, device), to_device(labels, device)
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
        """Yield one epoch of batches of bytes; see `ImageSet.raw_batches`.

        With `repeats` the copies of an image are all in the same process.

        Yields:
            Images (B, C, H, W) uint8 and labels (B,) int64, on `device`.

        Raises:
            DataError: an image or a shard cannot be read, or a label belongs to no class.
        """
        raw = self._read((seed, epoch), (batch_size, start_batch, repeats), part, self.crop)
        with contextlib.closing(raw):
            for images, labels in raw:
                yield to_device(images, device), to_device(labels, device)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 (B, C, H, W) into float32 with mean 0 and deviation 1."""
        return normalise(images, self.mean, self.std)

    def sample(self, count: int, seed: int) -> Iterator[Tensor]:
        """Yield about `count` images, centred, as uint8 batches (B, C, H, W)."""
        size = min(64, len(self))
        raw = self._read((seed, 0), (size, 0, 1), WHOLE, None)
        with contextlib.closing(raw):
            for images, _ in itertools.islice(raw, max(1, count // size)):
                yield images

    def _read(
        self,
        key: tuple[int, int],
        sizes: tuple[int, int, int],
        part: Part,
        crop: CropPolicy | None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images (B, C, H, W) uint8 and labels (B,); key: seed, epoch."""
        batch_size, start_batch, repeats = sizes
        mine = part.of(min(batch_size, len(self)))
        size = mine.stop - mine.start
        batches = self.steps(batch_size) - start_batch
        taken: deque[list[_Row]] = deque()

        def read(rows: Iterator[_Row]) -> list[Job]:
            taken.append(list(itertools.islice(rows, size)))
            return [Job(row.raw, _draw(crop, key, part, row)) for row in taken[-1]]

        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            rows = self._rows(key, part, start_batch * size, repeats)
            stack.enter_context(contextlib.closing(rows))
            reads = (partial(read, rows) for _ in range(batches))
            decoded = decoded_batches(reads, self.resolution, self.channels)
            stack.enter_context(contextlib.closing(decoded))
            for images, bad in decoded:
                batch = taken.popleft()
                labels = torch.tensor([row.label for row in batch], dtype=torch.int64)
                if bad:
                    kept = self._stand_ins(batch, bad)
                    images, labels = images[kept], labels[kept]
                yield images, labels

    def _stand_ins(self, batch: Sequence[_Row], bad: Bad) -> list[int]:
        """Return which image stands at each place: the last decodable one up to it."""
        first, reason = min(bad.items())
        if not self.skip_bad_images or len(bad) == len(batch):
            raise DataError(
                f"every image must be decodable, {batch[first].name} is not ({reason}); "
                "repair it or use --skip-bad-images"
            )
        good = [place for place in range(len(batch)) if place not in bad]
        stands = np.searchsorted(good, np.arange(len(batch)), side="right") - 1
        return [good[max(0, at)] for at in stands.tolist()]

    def _rows(
        self, key: tuple[int, int], part: Part, skipped: int, repeats: int
    ) -> Generator[_Row, None, None]:
        """Yield images without end, each `repeats` times, after the first `skipped`."""
        seed, epoch = key
        number = 0
        for again in itertools.count():
            before = number
            with contextlib.closing(self._pass(seed, epoch + again * _NEXT_PASS, part)) as cells:
                for cell in cells:
                    for copy in range(repeats):
                        if number * repeats + copy >= skipped:
                            yield self._row(cell, number, copy)
                    number += 1
            if number == before:
                raise DataError(
                    f"--data {self.source.spec}: has no image for process {part.index} of "
                    f"{part.count}; start fewer processes"
                )

    def _row(self, cell: dict[str, Any], number: int, copy: int) -> _Row:
        images = [cell[name] for name in self.source.images]
        path = next((image["path"] for image in images if image and image.get("path")), None)
        name = f"{path or f'image {number} of the stream'} of {self.source.spec}"
        value = cell[self.source.label]
        label = -1 if value is None else self.source.classes.number.get(value, -1)
        if label < 0:
            raise DataError(
                f"--data {self.source.spec}: {outside(value, self.source.classes)} as {name} has"
            )
        return _Row(first_image(images), label, name, number, copy)

    def _pass(self, seed: int, epoch: int, part: Part) -> Generator[dict[str, Any], None, None]:
        """Yield all images of this process once, from each reader in turn."""
        from datasets.distributed import split_dataset_by_node

        count = _readers(self.options.readers, self.source.rows.num_shards, part.count)
        waiting: deque[Generator[dict[str, Any], None, None]] = deque()
        with contextlib.ExitStack() as stack:
            for index in range(count):
                rows = self.source.rows.shard(num_shards=count, index=index)
                rows = rows.shuffle(seed=seed, buffer_size=self.options.buffer, **_one_shard(rows))
                rows = split_dataset_by_node(rows, rank=part.index, world_size=part.count)
                rows.set_epoch(epoch)
                reader = self._ahead(iter(rows))
                waiting.append(stack.enter_context(contextlib.closing(reader)))
            while waiting:
                cell = next(waiting[0], None)
                if cell is None:
                    waiting.popleft()
                else:
                    waiting.rotate(-1)
                    yield cell

    def _ahead(self, rows: Iterator[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
        """Yield rows that a thread reads before they are asked for."""

        def take() -> list[dict[str, Any]]:
            with reading(self.source.where):
                return [self._fetched(row) for row in itertools.islice(rows, _ROWS_AT_ONCE)]

        pending: deque[Future[list[dict[str, Any]]]] = deque()
        thread = ThreadPoolExecutor(1)
        try:
            pending.extend(thread.submit(take) for _ in range(_CHUNKS_AHEAD))
            while chunk := pending.popleft().result():
                pending.append(thread.submit(take))
                yield from chunk
        finally:
            thread.shutdown(cancel_futures=True)

    def _fetched(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read an image that the row only tells the address of."""
        import fsspec  # type: ignore[import-untyped]

        for name in self.source.images:
            image = row[name] or {}
            address = image.get("path") or ""
            if image.get("bytes") is None and "://" in address:
                with fsspec.open(address, "rb") as file:
                    row = {**row, name: {**image, "bytes": file.read()}}
        return row


def _readers(wanted: int, shards: int, processes: int) -> int:
    """Return how many readers leave each process with shards of its own, where there are enough."""
    if processes == 1 or shards % processes:
        return min(wanted, shards)
    each = shards // processes
    return max(count for count in range(1, min(wanted, each) + 1) if each % count == 0)


def _one_shard(rows: Any) -> dict[str, int]:
    """Read one shard at a time: readers see to more, and `datasets` would end with a long pause."""
    known = inspect.signature(rows.shuffle).parameters
    return {name: 1 for name in ("max_buffer_input_shards",) if name in known}


def _draw(crop: CropPolicy | None, key: tuple[int, int], part: Part, row: _Row) -> CropDraw | None:
    if crop is None:
        return None
    place = row.number * part.count + part.index
    return CropDraw(crop, (*key, _CROP, place, row.copy))
