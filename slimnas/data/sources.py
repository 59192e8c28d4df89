"""A set of labelled images, not yet decoded. Nothing here imports torch or `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

LongArray: TypeAlias = NDArray[np.int64]
RawImage: TypeAlias = "bytes | Path | NDArray[np.uint8] | None"
"""An encoded image, the file that holds one, grey pixels (H, W), or None where one is missing."""


class ImageTable(Protocol):
    """N images with a label each; rows are read on demand."""

    @property
    def labels(self) -> LongArray:
        """Class numbers (N,)."""

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        """Return the images of these rows, undecoded."""

    def name(self, index: int) -> str:
        """Return what to call this row in a message: its file, or its number."""


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images as they lie, before splitting and decoding.

    Attributes:
        spec: what the user wrote.
        kind: `digits`, `folder`, `parquet`, `webdataset` or `hub`.
        train: the images to train and search on.
        test: the source's own test images, if it has a labelled test split.
        class_names: one name per class number.
        flip: whether a mirrored image still belongs to its class.
    """

    spec: str
    kind: str
    train: ImageTable
    test: ImageTable | None
    class_names: tuple[str, ...]
    flip: bool


@dataclass(frozen=True, eq=False)
class ArrayTable:
    """Grey images (N, H, W) uint8 that are in memory already."""

    pixels: NDArray[np.uint8]
    labels: LongArray
    what: str

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        """Return the pixels (H, W) of these rows."""
        return [self.pixels[index] for index in indexes]

    def name(self, index: int) -> str:
        """Return the set's name and the row number."""
        return f"{self.what} image {index}"
