"""TRAIN, SEARCH and TEST: three sets of images that share none, from one source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from slimnas.data.batches import ImageSet, LazyPixels, MemoryPixels, PixelStore, Split, permutation
from slimnas.data.decode import check_header, decode_rows
from slimnas.data.load import load_source
from slimnas.data.sources import ImageTable, LongArray, Source
from slimnas.errors import DataError

_LIMIT, TEST_STREAM, _SEARCH, _SAMPLE = 11, 12, 13, 14  # keep the random streams of one seed apart
_STATISTICS_SAMPLE = 4096
_IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class DataOptions:
    """How a source becomes splits.

    Attributes:
        resolution: height and width of the images, pixels.
        channels: 1 or 3.
        seed: of splits and limits, >= 0.
        search_fraction: part of the images left after TEST that SEARCH gets.
        test_fraction: part of all images that TEST gets where the source has no test split.
        skip_bad_images: leave out what cannot be decoded instead of raising.
        max_images: use at most this many images of the source, and of its own test split, drawn
            evenly from the classes; None for all.
        memory_bytes: up to this many bytes of decoded pixels, of the source or of its own test
            split, are held in memory (twice that while splitting); above, images are decoded
            for each batch.
    """

    resolution: tuple[int, int]
    channels: int
    seed: int
    search_fraction: float = 0.2
    test_fraction: float = 0.2
    skip_bad_images: bool = False
    max_images: int | None = None
    memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        """Refuse options that no data can meet.

        Raises:
            DataError: an option is out of range.
        """
        height, width = self.resolution
        checks = (
            (height >= 1 and width >= 1, "resolution", "be at least 1 by 1", self.resolution),
            (self.channels in (1, 3), "channels", "be 1 or 3", self.channels),
            (self.seed >= 0, "seed", "be 0 or more", self.seed),
            (0 < self.search_fraction < 1, "search_fraction", "lie in 0..1", self.search_fraction),
            (0 < self.test_fraction < 1, "test_fraction", "lie in 0..1", self.test_fraction),
            (
                self.max_images is None or self.max_images >= 1,
                "max_images",
                "be 1 or more",
                self.max_images,
            ),
        )
        for holds, name, must, given in checks:
            if not holds:
                raise DataError(f"{name} must {must}, got {given}")


@dataclass(frozen=True, eq=False)
class SearchData:
    """What training and search get: TRAIN and SEARCH, and no way to TEST."""

    train: ImageSet
    search: ImageSet
    classes: int
    digest: str


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The three splits of a source.

    Attributes:
        train: to train on.
        search: held out of train, to compare candidates on.
        test: for the report alone.
        class_names: one name per class number.
        digest: sha256 of the labels, the pixels and which row went into which split. Of images
            that are decoded lazily, the pixels of a fixed sample of TRAIN.
        description: the source in words, for reports.
        skipped: images left out because they cannot be decoded.
    """

    train: ImageSet
    search: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    digest: str
    description: str
    skipped: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of TRAIN per channel, pixels scaled to 0..1."""
        return self.train.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of TRAIN per channel, pixels scaled to 0..1."""
        return self.train.std

    def for_search(self) -> SearchData:
        """Return TRAIN and SEARCH alone, for code that must not see TEST."""
        return SearchData(self.train, self.search, self.classes, self.digest)


def open_data(
    spec: str,
    *,
    resolution: tuple[int, int],
    channels: int,
    seed: int,
    search_fraction: float = 0.2,
    test_fraction: float = 0.2,
    skip_bad_images: bool = False,
    max_images: int | None = None,
) -> DataSplits:
    """Read what `--data` names and split it; see `load_source` and `DataOptions`.

    Raises:
        DataError: the data is missing, damaged or too small, or an option is out of range.
    """
    options = DataOptions(
        resolution=resolution,
        channels=channels,
        seed=seed,
        search_fraction=search_fraction,
        test_fraction=test_fraction,
        skip_bad_images=skip_bad_images,
        max_images=max_images,
    )
    return split_source(load_source(spec), options)


def split_source(source: Source, options: DataOptions) -> DataSplits:
    """Decode (or arrange to decode) a source's images and divide them into three splits.

    TEST is the source's own test split where it has one. Every class of the source is in every
    split that is held out of another.

    Raises:
        DataError: an image cannot be decoded, or the images are too few or of one class.
    """
    pool = open_table(source.train, options)
    own_test = None if source.test is None else open_table(source.test, options)
    needed = 2 if own_test else 3
    check_classes(source, pool.labels, needed)
    rest = np.arange(len(pool.labels))
    if own_test is None:
        rest, test_rows = hold_out(
            rest, pool.labels, options.test_fraction, 2, (options.seed, TEST_STREAM)
        )
        test = pool.select(test_rows)
    else:
        test = own_test
    train_rows, search_rows = hold_out(
        rest, pool.labels, options.search_fraction, 1, (options.seed, _SEARCH)
    )
    train, search = pool.select(train_rows), pool.select(search_rows)
    mean, std, train_hash = pixel_statistics(train.store, len(train.labels), options.seed)
    parts = {Split.TRAIN: train, Split.SEARCH: search, Split.TEST: test}
    sets = {
        split: ImageSet(split, part.store, torch.from_numpy(part.labels), mean, std, source.flip)
        for split, part in parts.items()
    }
    skipped = pool.skipped + (own_test.skipped if own_test else 0)
    return DataSplits(
        train=sets[Split.TRAIN],
        search=sets[Split.SEARCH],
        test=sets[Split.TEST],
        class_names=source.class_names,
        digest=_digest(parts, train_hash, options),
        description=_describe(source, parts, skipped),
        skipped=skipped,
    )


@dataclass(frozen=True, eq=False)
class ImagePart:
    """Usable images: their rows in the table, labels and pixels."""

    rows: LongArray
    labels: LongArray
    store: PixelStore
    skipped: int

    def select(self, positions: LongArray) -> ImagePart:
        """Return some of the images; decoded pixels are copied, so nothing leads to the others."""
        store = self.store
        if isinstance(store, LazyPixels):
            store = replace(store, rows=store.rows[positions])
        else:
            store = MemoryPixels(store.take(positions))
        return ImagePart(self.rows[positions], self.labels[positions], store, self.skipped)


def open_table(table: ImageTable, options: DataOptions) -> ImagePart:
    """Decode (or arrange to decode) a table's images; see `DataOptions` for limits.

    Raises:
        DataError: no images, or one that cannot be decoded.
    """
    if len(table.labels) == 0:
        raise DataError("the data holds no images")
    rows = np.arange(len(table.labels))
    if options.max_images is not None and options.max_images < len(rows):
        rows = _sample(table.labels, options.max_images, (options.seed, _LIMIT))
    height, width = options.resolution
    if len(rows) * options.channels * height * width <= options.memory_bytes:
        return _decode_all(table, rows, options)
    bad = _find_bad(table, rows, options)
    _refuse_bad(table, rows, bad, options)
    good = np.delete(rows, sorted(bad))
    store = LazyPixels(table, good, options.resolution, options.channels)
    return ImagePart(good, table.labels[good], store, len(bad))


def _decode_all(table: ImageTable, rows: LongArray, options: DataOptions) -> ImagePart:
    pixels = np.empty((len(rows), options.channels, *options.resolution), dtype=np.uint8)
    bad: dict[int, str] = {}
    decoded = decode_rows(table, rows.tolist(), options.resolution, options.channels)
    for position, image in enumerate(decoded):
        if isinstance(image, str):
            bad[position] = image
        else:
            pixels[position] = image
    _refuse_bad(table, rows, bad, options)
    if bad:
        good = np.delete(np.arange(len(rows)), sorted(bad))
        rows, pixels = rows[good], pixels[good]
    return ImagePart(rows, table.labels[rows], MemoryPixels(torch.from_numpy(pixels)), len(bad))


def _find_bad(table: ImageTable, rows: LongArray, options: DataOptions) -> dict[int, str]:
    """Return position and reason of undecodable images, decoding each only if they are skipped.

    Without `skip_bad_images` the headers must do: a run then ends at a broken body, it does not
    go wrong.
    """
    if options.skip_bad_images:
        decoded = decode_rows(table, rows.tolist(), options.resolution, options.channels)
        return {at: image for at, image in enumerate(decoded) if isinstance(image, str)}
    bad = {}
    for start in range(0, len(rows), _IMAGES_AT_ONCE):
        chunk = rows[start : start + _IMAGES_AT_ONCE].tolist()
        for at, raw in enumerate(table.read(chunk), start):
            reason = check_header(raw)
            if reason is not None:
                bad[at] = reason
    return bad


def _refuse_bad(
    table: ImageTable, rows: LongArray, bad: dict[int, str], options: DataOptions
) -> None:
    if bad and not options.skip_bad_images:
        position, reason = next(iter(bad.items()))
        raise DataError(
            f"every image must be decodable, {len(bad)} of {len(rows)} are not, the first is "
            f"{table.name(int(rows[position]))} ({reason}); repair them or use --skip-bad-images"
        )


def check_classes(source: Source, labels: LongArray, needed: int) -> None:
    """Refuse images of one class, or of a class with fewer images than there are splits.

    Args:
        source: the images' source.
        labels: class numbers (N,) of those that can be decoded.
        needed: splits that need an image of every class.

    Raises:
        DataError: no images, one class, or too few of a class.
    """
    counts = np.bincount(labels, minlength=len(source.class_names))
    present = np.flatnonzero(counts)
    if len(present) == 0:
        raise DataError(f"--data {source.spec}: holds no images that can be decoded")
    if len(present) == 1:
        name = source.class_names[int(present[0])]
        raise DataError(
            f"--data {source.spec}: must have at least two classes, all {len(labels)} images are "
            f"of class {name!r}; give the folder or files that hold every class"
        )
    few = [int(number) for number in present if counts[number] < needed]
    if few:
        raise DataError(
            f"--data {source.spec}: each class needs at least {needed} images, one for each split; "
            f"{len(few)} of {len(present)} have fewer, the first is "
            f"{source.class_names[few[0]]!r} with {counts[few[0]]}; add images, or raise max_images"
        )


def hold_out(
    rows: LongArray, labels: LongArray, fraction: float, leave: int, key: Sequence[int]
) -> tuple[LongArray, LongArray]:
    """Split rows into (kept, held out), both sorted: `fraction` of each class is held out.

    At least one of each class is held out and at least `leave` are kept. Which ones follows from
    `key`, non-negative numbers, and the class.
    """
    held = []
    for number in np.unique(labels[rows]):
        members = rows[labels[rows] == number]
        wanted = int(np.floor(fraction * len(members) + 0.5))
        count = min(max(1, wanted), len(members) - leave)
        held.append(members[permutation(len(members), *key, int(number))[:count]])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(rows, out, assume_unique=True), out


def _sample(labels: LongArray, count: int, key: Sequence[int]) -> LongArray:
    """Return `count` rows, sorted, each class in its proportion (off by less than one image)."""
    order = permutation(len(labels), *key)
    place = np.empty(len(labels))
    for number in np.unique(labels):
        members = order[labels[order] == number]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(place[order], kind="stable")][:count])


def pixel_statistics(
    store: PixelStore, count: int, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...], bytes]:
    """Return mean and deviation per channel (of 0..1 pixels), and a hash of the images used."""
    chosen = np.arange(count)
    if isinstance(store, LazyPixels) and count > _STATISTICS_SAMPLE:
        chosen = np.sort(permutation(count, seed, _SAMPLE)[:_STATISTICS_SAMPLE])
    chunks = [chosen[at : at + _IMAGES_AT_ONCE] for at in range(0, len(chosen), _IMAGES_AT_ONCE)]
    return batch_statistics(store.stream(chunks))


def batch_statistics(
    batches: Iterable[Tensor],
) -> tuple[tuple[float, ...], tuple[float, ...], bytes]:
    """Return mean and deviation per channel (of 0..1 pixels) of uint8 batches, and their hash."""
    sha = hashlib.sha256()
    # Whole-number counts: the same result however many threads add them up.
    counts: Tensor | int = 0
    for images in batches:
        sha.update(images.numpy().tobytes())
        channels = images.transpose(0, 1).flatten(1)
        counts = counts + torch.stack([torch.bincount(c, minlength=256) for c in channels])
    levels = torch.arange(256, dtype=torch.float64) / 255.0
    mean, std = [], []
    for histogram in torch.as_tensor(counts).double():
        share = histogram / histogram.sum()
        centre = float(share @ levels)
        mean.append(centre)
        # A constant channel has no deviation to divide by; one grey level stands in.
        std.append(max(float(share @ (levels - centre) ** 2) ** 0.5, 1.0 / 255.0))
    return tuple(mean), tuple(std), sha.digest()


def _digest(parts: dict[Split, ImagePart], train_hash: bytes, options: DataOptions) -> str:
    sha = hashlib.sha256()
    sha.update(f"slimnas/data/1 {options.resolution} {options.channels}".encode())
    sha.update(train_hash)
    for split, part in parts.items():
        sha.update(f"{split.value} {len(part.rows)}".encode())
        sha.update(part.rows.astype("<i8").tobytes())
        sha.update(part.labels.astype("<i8").tobytes())
        if split is not Split.TRAIN and isinstance(part.store, MemoryPixels):
            sha.update(part.store.pixels.numpy().data)
    return sha.hexdigest()


def _describe(source: Source, parts: dict[Split, ImagePart], skipped: int) -> str:
    counts = ", ".join(f"{len(part.rows)} {split.value}" for split, part in parts.items())
    tail = f", {skipped} undecodable images skipped" if skipped else ""
    own = "its own test split" if source.test is not None else "test held out"
    return (
        f"{source.spec} ({source.kind}): {len(source.class_names)} classes, {counts} images, "
        f"{own}{tail}"
    )
