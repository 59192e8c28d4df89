"""Random crops of the two photographs that scikit-learn brings along.

A stand-in for images of one's own where a network needs photographs and none are given: real
pixels, no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimnas.data.sources import LongArray, RawImage, Source

NAME = "photos"
SMALLEST, LARGEST = 0.3, 1.0
"""Side of a crop, as a share of a photograph's shorter side."""


@dataclass(frozen=True, eq=False)
class PhotoCrops:
    """Crops (side, side, 3) uint8 of `photographs`, drawn from `seed` and the row's number."""

    photographs: tuple[NDArray[np.uint8], ...]
    labels: LongArray
    seed: int

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        """Return the pixels of these rows."""
        return [self._crop(index) for index in indexes]

    def name(self, index: int) -> str:
        """Return the set's name and the row number."""
        return f"{NAME} crop {index}"

    def _crop(self, index: int) -> NDArray[np.uint8]:
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, index))))
        photograph = self.photographs[index % len(self.photographs)]
        height, width, _ = photograph.shape
        share = SMALLEST + (LARGEST - SMALLEST) * draw.random()
        side = max(1, int(share * min(height, width)))
        top = int(draw.random() * (height - side + 1))
        left = int(draw.random() * (width - side + 1))
        crop = photograph[top : top + side, left : left + side]
        if draw.random() < 0.5:
            crop = crop[:, ::-1]
        return np.ascontiguousarray(crop)


def photo_source(count: int, seed: int) -> Source:
    """`count` crops, all of one class: labels are for a network to give."""
    from sklearn.datasets import load_sample_images

    photographs = tuple(np.asarray(image, dtype=np.uint8) for image in load_sample_images().images)
    table = PhotoCrops(photographs, np.zeros(count, dtype=np.int64), seed)
    return Source(NAME, NAME, table, None, ("photograph",), flip=True)
