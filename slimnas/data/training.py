"""Images to train a network on and to judge it on: two sets that share none.

A network that a search found is judged on images that neither search nor training saw: without
`--test-data` and without a test split of the source's own, TEST is the one `open_data` takes with
the same options.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace

import numpy as np
import torch

from slimnas.data.batches import ImageSet, LazyPixels, MemoryPixels, Split, TrainSource
from slimnas.data.crop import CropPolicy
from slimnas.data.load import load_source
from slimnas.data.sources import ImageTable, LongArray, RawImage
from slimnas.data.splits import (
    TEST_STREAM,
    DataOptions,
    ImagePart,
    batch_statistics,
    check_classes,
    hold_out,
    open_table,
    pixel_statistics,
)
from slimnas.data.stream_source import StreamOptions as StreamOptions
from slimnas.data.stream_source import open_stream
from slimnas.data.streaming import StreamedImages
from slimnas.data.whole import Normalisation
from slimnas.errors import DataError, suggest

_STREAM_SAMPLE = 1024
_UNKNOWN: Normalisation = ((0.0,), (1.0,))


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Images to train on and to judge on.

    Attributes:
        train: an `ImageSet`, or `StreamedImages`.
        test: whole; None where a stream has no test split and none was given.
        class_names: one name per class number.
        mean: per channel, pixels scaled to 0..1: as given, else of `train`.
        std: likewise.
        digest: sha256 of labels, pixels (of a fixed sample where they are decoded for each batch)
            and which image is in which set.
        description: the source in words.
        skipped: images left out because they cannot be decoded.
    """

    train: TrainSource
    test: ImageSet | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    description: str
    skipped: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def open_training(
    spec: str,
    options: DataOptions,
    *,
    test_spec: str | None = None,
    crop: CropPolicy | None = None,
    normalisation: Normalisation | None = None,
    stream: StreamOptions | None = None,
) -> TrainingData:
    """Open what `--data` names to train on, all of it but TEST, and TEST.

    Args:
        spec: see `load_source`.
        options: `search_fraction` does not count; see `DataOptions`.
        test_spec: images to judge on, instead of the source's own: their test split, else all of
            them. Their classes must be among those of `spec`, by name.
        crop: random crops to train on, taken where images are decoded; None for centred ones.
        normalisation: mean and deviation; None for those of the images to train on.
        stream: read the images to train on one after another instead of looking them up.

    Raises:
        DataError: the data is missing, damaged or too small, or an option is out of range.
    """
    if test_spec is not None and test_spec == spec:
        raise DataError(
            f"--test-data {test_spec}: must not be the images trained on; leave it out, and part "
            "of --data is held out"
        )
    if stream is not None:
        return _open_streamed(spec, options, test_spec, crop, normalisation, stream)
    source = load_source(spec)
    own = source.test if test_spec is None else _test_table(test_spec, spec, source.class_names)
    # A crop needs the image as it lies, not as it is scaled for judging.
    pool = open_table(source.train, options if crop is None else replace(options, memory_bytes=0))
    check_classes(source, pool.labels, 2 if own is None else 1)
    if own is None:
        train, test = _divide(pool, options)
    else:
        train, test = pool, open_table(own, options)
    mean, std, sample = pixel_statistics(train.store, len(train.labels), options.seed)
    mean, std = normalisation or (mean, std)
    if isinstance(train.store, LazyPixels):
        train = replace(train, store=replace(train.store, crop=crop))
    skipped = pool.skipped + (0 if own is None else test.skipped)
    name = f"{spec} ({source.kind}): {len(source.class_names)} classes"
    judges = test_spec or ("held out" if own is None else "its own test split")
    return TrainingData(
        train=_image_set(Split.TRAIN, train, (mean, std), source.flip),
        test=_image_set(Split.TEST, test, (mean, std), source.flip),
        class_names=source.class_names,
        mean=mean,
        std=std,
        digest=_digest(options, (mean, std), [sample, *_evidence(train)], test),
        description=_describe(name, len(train.labels), test, judges, skipped),
        skipped=skipped,
    )


def require_full_batch(images: Sized, batch_size: int, *, processes: int = 1) -> None:
    """Refuse a batch that the images cannot fill, or that leaves a process without any.

    Raises:
        DataError: naming what to change.
    """
    if batch_size > len(images):
        raise DataError(
            f"a batch (--batch-size) must not be larger than the data, got {batch_size} for "
            f"{len(images)} images to train on; lower it, or give more images"
        )
    if batch_size < processes:
        raise DataError(
            f"a batch (--batch-size) must have an image for each process, got {batch_size} for "
            f"{processes} processes; raise it, or start fewer processes"
        )


def _open_streamed(
    spec: str,
    options: DataOptions,
    test_spec: str | None,
    crop: CropPolicy | None,
    normalisation: Normalisation | None,
    stream: StreamOptions,
) -> TrainingData:
    if options.max_images is not None:
        raise DataError(
            "--max-images chooses images by number, which a stream does not have; give "
            "--images-per-epoch, or leave out --stream"
        )
    source = open_stream(spec, options.seed)
    names = source.classes.names
    if len(names) < 2:
        raise DataError(f"--data {spec}: must have at least two classes, has {len(names)}")
    own = source.test if test_spec is None else _test_table(test_spec, spec, names)
    train = StreamedImages(
        source=source,
        options=stream,
        resolution=options.resolution,
        channels=options.channels,
        crop=crop,
        mean=_UNKNOWN[0],
        std=_UNKNOWN[1],
        flip=True,
        skip_bad_images=options.skip_bad_images,
    )
    mean, std, sample = batch_statistics(train.sample(_STREAM_SAMPLE, options.seed))
    mean, std = normalisation or (mean, std)
    test = None if own is None else open_table(own, options)
    name = f"{spec} ({source.kind}, streamed): {len(names)} classes"
    evidence = [sample, source.evidence.encode(), str(len(train)).encode()]
    skipped = 0 if test is None else test.skipped
    return TrainingData(
        train=replace(train, mean=mean, std=std),
        test=None if test is None else _image_set(Split.TEST, test, (mean, std), True),
        class_names=names,
        mean=mean,
        std=std,
        digest=_digest(options, (mean, std), evidence, test),
        description=_describe(name, len(train), test, test_spec or "its own test split", skipped),
        skipped=skipped,
    )


def _divide(pool: ImagePart, options: DataOptions) -> tuple[ImagePart, ImagePart]:
    """Hold out TEST as `open_data` does, if it would accept the images at all."""
    leave = 2 if np.unique(pool.labels, return_counts=True)[1].min() >= 3 else 1
    rows = np.arange(len(pool.labels))
    key = (options.seed, TEST_STREAM)
    rows, test_rows = hold_out(rows, pool.labels, options.test_fraction, leave, key)
    test = pool.select(test_rows)
    height, width = options.resolution
    fits = len(test_rows) * options.channels * height * width <= options.memory_bytes
    if fits and isinstance(test.store, LazyPixels):
        held = MemoryPixels(test.store.take(np.arange(len(test_rows))))
        test = replace(test, store=held)
    return pool.select(rows), test


@dataclass(frozen=True, eq=False)
class _Relabelled:
    """A table whose labels are the class numbers of another source."""

    table: ImageTable
    labels: LongArray

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        return self.table.read(indexes)

    def name(self, index: int) -> str:
        return self.table.name(index)


def _test_table(test_spec: str, spec: str, names: tuple[str, ...]) -> ImageTable:
    """Return the images `--test-data` names, labelled with the class numbers of `--data`."""
    other = load_source(test_spec)
    table = other.train if other.test is None else other.test
    if other.class_names == names:
        return table
    number = {name: index for index, name in enumerate(names)}
    unknown = [name for name in other.class_names if name not in number]
    if unknown:
        raise DataError(
            f"--test-data {test_spec}: its classes must be those of --data {spec}, {unknown[0]!r} "
            f"is not among those{suggest(unknown[0], names)}; name them alike in both"
        )
    if len(number) < len(names):
        raise DataError(
            f"--test-data {test_spec}: must list the classes as --data {spec} does, because some "
            "there have the same name"
        )
    renumbered = np.array([number[name] for name in other.class_names], dtype=np.int64)
    return _Relabelled(table, renumbered[table.labels])


def _image_set(split: Split, part: ImagePart, normalisation: Normalisation, flip: bool) -> ImageSet:
    mean, std = normalisation
    return ImageSet(split, part.store, torch.from_numpy(part.labels), mean, std, flip)


def _digest(
    options: DataOptions,
    normalisation: Normalisation,
    train: Sequence[bytes],
    test: ImagePart | None,
) -> str:
    sha = hashlib.sha256()
    sha.update(f"slimnas/training-data/1 {options.resolution} {options.channels}".encode())
    sha.update(np.array(normalisation, dtype="<f8").tobytes())
    for evidence in (*train, *([] if test is None else _evidence(test))):
        sha.update(f"{len(evidence)} ".encode())
        sha.update(evidence)
    if test is not None:
        sha.update(pixel_statistics(test.store, len(test.labels), options.seed)[2])
    return sha.hexdigest()


def _evidence(part: ImagePart) -> list[bytes]:
    return [part.rows.astype("<i8").tobytes(), part.labels.astype("<i8").tobytes()]


def _describe(name: str, count: int, test: ImagePart | None, judges: str, skipped: int) -> str:
    judged = "none to judge on" if test is None else f"{len(test.labels)} to judge on, {judges}"
    tail = f", {skipped} undecodable images skipped" if skipped else ""
    return f"{name}, {count} images to train on, {judged}{tail}"
