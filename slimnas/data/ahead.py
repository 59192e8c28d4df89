"""Batches decoded in threads while the ones before them are used, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from slimnas.data.crop import CropDraw
from slimnas.data.decode import Pixels, try_decode
from slimnas.data.sources import RawImage

_BATCHES_AHEAD = 2
_IMAGES_PER_TASK = 8


@dataclass(frozen=True)
class Job:
    """An image to decode, whole or a crop of it."""

    raw: RawImage
    crop: CropDraw | None


Read: TypeAlias = Callable[[], Sequence[Job]]
"""Reads the images of one batch."""
Bad: TypeAlias = dict[int, str]
"""Place in the batch and reason of each undecodable image."""


def cores() -> int:
    """Return how many cores this process may use, shared with those launched beside it."""
    found = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun and accelerate launch
    return max(1, found // max(1, int(beside) if beside.isdecimal() else 1))


def decoded_batches(
    reads: Iterable[Read], resolution: tuple[int, int], channels: int
) -> Generator[tuple[Tensor, Bad], None, None]:
    """Yield each batch as uint8 (B, C, H, W), undecodable images black and named.

    One thread calls the `reads` one after another, as many as there are cores decode. Two batches
    are prepared ahead.
    """
    pending: deque[Future[_Batch]] = deque()
    reader = ThreadPoolExecutor(1)
    decoders = ThreadPoolExecutor(cores())

    def begin(read: Read) -> _Batch:
        return _begin(read(), resolution, channels, decoders)

    try:
        for read in reads:
            pending.append(reader.submit(begin, read))
            if len(pending) > _BATCHES_AHEAD:
                yield pending.popleft().result().finish()
        while pending:
            yield pending.popleft().result().finish()
    finally:  # the caller may have had enough, or something failed
        reader.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)


@dataclass(frozen=True, eq=False)
class _Batch:
    pixels: Pixels
    tasks: Sequence[Future[Bad]]

    def finish(self) -> tuple[Tensor, Bad]:
        bad: Bad = {}
        for task in self.tasks:
            bad.update(task.result())
        return torch.from_numpy(self.pixels), bad


def _begin(
    jobs: Sequence[Job], resolution: tuple[int, int], channels: int, pool: ThreadPoolExecutor
) -> _Batch:
    pixels = np.empty((len(jobs), channels, *resolution), dtype=np.uint8)

    def work(places: range) -> Bad:
        bad: Bad = {}
        for place in places:
            job = jobs[place]
            image = try_decode(job.raw, resolution, channels, job.crop)
            if isinstance(image, str):
                bad[place], pixels[place] = image, 0
            else:
                pixels[place] = image
        return bad

    starts = range(0, len(jobs), _IMAGES_PER_TASK)
    places = [range(at, min(at + _IMAGES_PER_TASK, len(jobs))) for at in starts]
    return _Batch(pixels, [pool.submit(work, some) for some in places])
