"""What `--data` names: a set of labelled images, not yet decoded, from one of five kinds of source.

`load_source` turns the text of `--data` into a `Source`. Nothing here imports torch, and
`datasets` is imported only by the kinds that need it.
"""

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


def load_source(spec: str, *, cache_dir: Path | None = None) -> Source:
    """Find the images that `spec` names.

    Args:
        spec: `digits` (scikit-learn's 1,797 real 8x8 images); a folder with one sub-folder per
            class, or with `train/` and `test/` (or `val/`, `validation/`) folders of such; a
            parquet file, a folder of them or a glob; webdataset tars, likewise; or, where no
            such path exists, a Hugging Face hub id `user/name`. Write `./digits` for a folder
            of that name.
        cache_dir: where parquet and tars are unpacked; None for the cache of `datasets`, or a
            temporary folder when that cannot be written.

    Raises:
        DataError: nothing is there, it cannot be read, or it lacks images or labels.
    """
    if spec == "digits":
        return _digits()
    from slimnas.data.files import load_files

    return load_files(spec, cache_dir)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 grey levels, 0..16, spread over 0..255.
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return Source(
        spec="digits",
        kind="digits",
        train=ArrayTable(pixels, bunch.target.astype(np.int64), "digits"),
        test=None,
        class_names=tuple(str(name) for name in bunch.target_names),
        flip=False,  # a mirrored 2 is no 2
    )
