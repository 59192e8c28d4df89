"""The images of an evaluation: each once, in order, with a name and a digest.

Shapes: B batch, N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slimnas.data.batches import LazyPixels
from slimnas.data.load import load_source
from slimnas.data.sources import ImageTable, LongArray, RawImage, Source
from slimnas.data.splits import (
    TEST_STREAM,
    DataOptions,
    ImagePart,
    check_classes,
    hold_out,
    open_table,
    split_source,
)
from slimnas.data.whole import Normalisation, held_out_rows
from slimnas.errors import DataError
from slimnas.train.evaluate import check_labels
from slimnas.train.evaluation_transform import EvalTransform, PreparedTable

SplitName = Literal["test", "train", "all"]

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of ImageNet-1k, as timm and torchvision use it."""


@dataclass(frozen=True)
class ImageRequest:
    """Which images an evaluation wants.

    Attributes:
        data: what `--data` names.
        split: `test`: the source's own test images, else what `open_data` holds out; `train`: the
            rest; or `all`.
        options: resolution, channels, seed and the limits of the run whose TEST is meant.
        classes: of the network.
        normalisation: mean and deviation; None for those of the data's TRAIN images.
        transform: how images are resized and cropped; None for the largest centred crop.
        max_images: at most this many of the split, evenly from the classes; None for all.
        divide: how TEST is taken from a source without test images: `by_class` as `open_data` and
            `open_training` do it, `by_row` as `open_whole`; or `no`, then it is all of them.
    """

    data: str
    split: SplitName
    options: DataOptions
    classes: int
    normalisation: Normalisation | None = None
    transform: EvalTransform | None = None
    max_images: int | None = None
    divide: Literal["by_class", "by_row", "no"] = "by_class"


@dataclass(frozen=True, eq=False)
class EvaluationImages:
    """Images to judge on.

    Attributes:
        parts: tables with the images that are meant, one after the other.
        class_names: one name per class number.
        normalisation: mean and deviation per channel.
        description: the images in words.
        skipped: images left out because they cannot be decoded.
    """

    parts: tuple[tuple[ImageTable, ImagePart], ...]
    class_names: tuple[str, ...]
    normalisation: Normalisation
    description: str
    skipped: int

    def __len__(self) -> int:
        return sum(len(part.labels) for _, part in self.parts)

    @property
    def labels(self) -> LongArray:
        """Class numbers (N,)."""
        return np.concatenate([part.labels for _, part in self.parts])

    def name(self, index: int) -> str:
        """What to call an image: its file, or its number."""
        place = index
        for table, part in self.parts:
            if place < len(part.labels):
                return table.name(int(part.rows[place]))
            place -= len(part.labels)
        raise IndexError(index)

    def batches(
        self, batch_size: int, *, device: torch.device | str, digest: hashlib._Hash | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, C, H, W) float32 and labels (B,) int64, on `device`.

        Args:
            batch_size: images per batch; the last may have fewer.
            device: where the batches are wanted.
            digest: gets the pixels, resized and not yet normalised, and at the end all labels.

        Raises:
            DataError: an image cannot be decoded.
        """
        mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in self.normalisation
        )
        for _, part in self.parts:
            places = np.arange(len(part.labels))
            chunks = [places[at : at + batch_size] for at in range(0, len(places), batch_size)]
            for chunk, pixels in zip(chunks, part.store.stream(chunks), strict=True):
                labels = part.labels[chunk]
                if digest is not None:
                    digest.update(pixels.contiguous().numpy().data)
                images = (pixels.to(device).float() / 255.0 - mean) / std
                yield images, torch.from_numpy(labels).to(device)
        if digest is not None:
            digest.update(self.labels.astype("<i8").tobytes())


@dataclass(frozen=True, eq=False)
class TableRows:
    """Some rows of a table."""

    table: ImageTable
    rows: LongArray

    @property
    def labels(self) -> LongArray:
        """Class numbers of these rows."""
        return self.table.labels[self.rows]

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        """Return the images of these rows, undecoded."""
        return self.table.read(self.rows[list(indexes)].tolist())

    def name(self, index: int) -> str:
        """Return what the table calls this row."""
        return self.table.name(int(self.rows[index]))


def open_images(request: ImageRequest) -> EvaluationImages:
    """Find the images of an evaluation; they are decoded when they are looked at.

    TEST of a source without a test split is what `open_data` (or `open_whole`) holds out with the
    same options, so what a run found or trained is judged on images that it never saw.

    Raises:
        DataError: the data is missing, damaged, too small, or of other classes than the network.
    """
    source = load_source(request.data)
    names = source.class_names
    if len(names) != request.classes:
        raise DataError(
            f"--data {request.data}: must have the {request.classes} classes of the network, has "
            f"{len(names)}; give data of its classes, or the network trained on these"
        )
    wanted, skipped = _tables(source, request)
    total = sum(len(table.labels) for table in wanted)
    if not total:
        raise DataError(f"--data {request.data}: holds no images")
    parts, left, rest = [], min(request.max_images or total, total), total
    for table in wanted:
        mine = round(left * len(table.labels) / rest)
        left, rest = left - mine, rest - len(table.labels)
        if mine:
            parts.append(_open(table, request, mine))
    images = EvaluationImages(
        parts=tuple(parts),
        class_names=names,
        normalisation=request.normalisation or _train_statistics(source, request.options),
        description="",
        skipped=skipped + sum(part.skipped for _, part in parts),
    )
    if not len(images):
        raise DataError(f"--data {request.data}: holds no images that can be decoded")
    check_labels(images.labels, request.classes, what=f"--data {request.data}")
    return replace(images, description=_describe(source, request, images))


def _tables(source: Source, request: ImageRequest) -> tuple[list[TableRows], int]:
    """The rows of the split that is wanted, and how many images were left out before."""
    own = source.test
    everything = TableRows(source.train, np.arange(len(source.train.labels)))
    test = None if own is None else TableRows(own, np.arange(len(own.labels)))
    if request.split == "all":
        return [everything, *([] if test is None else [test])], 0
    if test is None and request.divide == "no" and request.split == "test":
        return [everything], 0
    if test is not None:
        return [test if request.split == "test" else everything], 0
    options = request.options
    rows, labels, skipped = everything.rows, source.train.labels, 0
    if request.divide == "by_row":
        held = held_out_rows(len(rows), options)
        kept = np.setdiff1d(rows, held, assume_unique=True)
        return [TableRows(source.train, held if request.split == "test" else kept)], 0
    if options.skip_bad_images or options.max_images is not None:
        # What is left out, and of how many, decides who is held out.
        pool = open_table(source.train, replace(options, memory_bytes=0))
        rows, labels, skipped = pool.rows, pool.labels, pool.skipped
    try:
        check_classes(source, labels, 2)
    except DataError as error:
        raise DataError(f"{error}; or judge on all images: --split all") from error
    leave = 2 if np.unique(labels, return_counts=True)[1].min() >= 3 else 1
    key = (options.seed, TEST_STREAM)
    kept, held = hold_out(np.arange(len(rows)), labels, options.test_fraction, leave, key)
    return [TableRows(source.train, rows[held if request.split == "test" else kept])], skipped


def _open(table: TableRows, request: ImageRequest, limit: int) -> tuple[ImageTable, ImagePart]:
    # Every image is looked at once: none is kept in memory.
    options = replace(request.options, max_images=limit, memory_bytes=0)
    part = open_table(table, options)
    if request.transform is not None:
        assert isinstance(part.store, LazyPixels)
        prepared = PreparedTable(table, request.transform, options.channels)
        part = replace(part, store=replace(part.store, table=prepared))
    return table, part


def _train_statistics(source: Source, options: DataOptions) -> Normalisation:
    """What a search or a training run on this data normalises with."""
    try:
        splits = split_source(source, options)
    except DataError as error:
        raise DataError(
            f"{error}; or say what to normalise with, for one without TRAIN images: "
            "--normalisation imagenet"
        ) from error
    return splits.mean, splits.std


def _describe(source: Source, request: ImageRequest, images: EvaluationImages) -> str:
    kind = "" if source.kind == source.spec else f" ({source.kind})"
    own = source.test is not None
    divided = "all images" if request.divide == "no" else "test held out"
    part = {
        "all": "all images",
        "test": "its own test split" if own else divided,
        "train": "its train split" if own else "what test leaves",
    }[request.split]
    tail = f", {images.skipped} undecodable images skipped" if images.skipped else ""
    return (
        f"{source.spec}{kind}, {part}: {len(images)} images of {len(images.class_names)} "
        f"classes{tail}"
    )
