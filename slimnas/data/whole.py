"""All images of a source, for work that needs no training split.

Importance is estimated on whatever images there are, one per class or even of one class, which
`open_data` refuses because it must fill three splits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from slimnas.data.batches import ImageSet, Split, permutation
from slimnas.data.load import load_source
from slimnas.data.photos import NAME, photo_source
from slimnas.data.sources import ImageTable, LongArray, RawImage, Source
from slimnas.data.splits import DataOptions, ImagePart, open_table, pixel_statistics
from slimnas.errors import DataError

MOST_HELD_OUT = 10_000
PHOTO_CROPS = 1000
_ROWS = 21  # keeps this random stream apart from the others of one seed

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel, of pixels scaled to 0..1."""


@dataclass(frozen=True, eq=False)
class WholeData:
    """Images to use, and others to judge on.

    Attributes:
        images: in random order.
        test: none of `images`; None where none were wanted.
        class_names: one name per class number.
        digest: sha256 of pixels and labels; of images decoded lazily, of a sample of them.
        description: the source in words.
    """

    images: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]
    digest: str
    description: str


def open_whole(
    spec: str,
    options: DataOptions,
    *,
    normalisation: Normalisation | None = None,
    hold_out: bool = False,
) -> WholeData:
    """Open what `--data` names without asking that every class fills every split.

    Args:
        spec: see `load_source`; `photos` is crops of scikit-learn's two photographs.
        options: `max_images` limits `images`; `test_fraction` is what `hold_out` takes, 10,000 at
            most. Fractions of SEARCH do not count.
        normalisation: what the images are normalised with; None for their own mean and deviation.
        hold_out: whether `test` is wanted: the source's own test split, else a random part.

    Raises:
        DataError: the data is missing, damaged or too small.
    """
    source = _source(spec, options)
    total = len(source.train.labels)
    own = source.test if hold_out else None
    held = _held(total, options) if hold_out and own is None else 0
    if held >= total:
        raise DataError(
            f"--data {spec}: must have at least {1 + int(hold_out)} images, got {total}; add "
            "images, or give others to judge on with --test-data"
        )
    order = permutation(total, options.seed, _ROWS)
    part = _open_rows(source.train, order[held:][: options.max_images], options)
    mean, std, sample = pixel_statistics(part.store, len(part.labels), options.seed)
    normalisation = normalisation or (mean, std)
    test = None
    if own is not None:
        drawn = permutation(len(own.labels), options.seed, _ROWS)[:MOST_HELD_OUT]
        test = _open_rows(own, np.sort(drawn), options)
    elif held:
        test = _open_rows(source.train, np.sort(order[:held]), options)
    return WholeData(
        images=_image_set(part, Split.TRAIN, normalisation, source),
        test=None if test is None else _image_set(test, Split.TEST, normalisation, source),
        class_names=source.class_names,
        digest=_digest(part, sample, options),
        description=_describe(source, part, test),
    )


def held_out_rows(total: int, options: DataOptions) -> LongArray:
    """Rows that `open_whole` holds out of `total` images without a test split, ascending."""
    return np.sort(permutation(total, options.seed, _ROWS)[: _held(total, options)])


def _held(total: int, options: DataOptions) -> int:
    return min(max(1, round(options.test_fraction * total)), MOST_HELD_OUT)


def _source(spec: str, options: DataOptions) -> Source:
    if spec != NAME:
        return load_source(spec)
    wanted = options.max_images or PHOTO_CROPS
    return photo_source(math.ceil(wanted / (1 - options.test_fraction)), options.seed)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of a table, in an order of their own."""

    table: ImageTable
    rows: LongArray

    @property
    def labels(self) -> LongArray:
        return self.table.labels[self.rows]

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        return self.table.read(self.rows[list(indexes)].tolist())

    def name(self, index: int) -> str:
        return self.table.name(int(self.rows[index]))


def _open_rows(table: ImageTable, rows: LongArray, options: DataOptions) -> ImagePart:
    part = open_table(_Rows(table, rows), replace(options, max_images=None))
    if not len(part.labels):
        raise DataError("the data holds no images that can be decoded")
    return part


def _image_set(
    part: ImagePart, split: Split, normalisation: Normalisation, source: Source
) -> ImageSet:
    mean, std = normalisation
    return ImageSet(split, part.store, torch.from_numpy(part.labels), mean, std, source.flip)


def _digest(part: ImagePart, sample: bytes, options: DataOptions) -> str:
    sha = hashlib.sha256()
    sha.update(f"slimnas/whole-data/1 {options.resolution} {options.channels}".encode())
    sha.update(sample)
    sha.update(part.labels.astype("<i8").tobytes())
    return sha.hexdigest()


def _describe(source: Source, part: ImagePart, test: ImagePart | None) -> str:
    skipped = part.skipped + (test.skipped if test else 0)
    held = "" if test is None else f", {len(test.labels)} others to judge on"
    own = ", its own test split" if test is not None and source.test is not None else ""
    tail = f", {skipped} undecodable images skipped" if skipped else ""
    return (
        f"{source.spec} ({source.kind}): {len(part.labels)} images of {len(source.class_names)} "
        f"classes{held}{own}{tail}"
    )
