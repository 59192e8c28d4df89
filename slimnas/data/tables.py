"""A `datasets` table as an `ImageTable`: its image and label columns, its cache, its errors."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from slimnas.data.sources import LongArray, RawImage, Source
from slimnas.errors import DataError

_IMAGE_COLUMNS = ("image", "img")
TAR_IMAGES = ("jpg", "jpeg", "png", "webp")  # a row has one of them
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
TEST_SPLITS = ("test", "validation")  # the first that is labelled

Label: TypeAlias = "int | str"


@dataclass(frozen=True, eq=False)
class CacheFolder:
    """Where `datasets` unpacks to; a temporary one goes when this object does."""

    path: Path


@dataclass(frozen=True, eq=False)
class HfTable:
    """Rows of a `datasets.Dataset` with encoded images.

    Attributes:
        dataset: the image columns, undecoded; a row has its image in one of them.
        labels: class numbers (N,).
        what: the spec, for messages.
        cache: kept alive as long as the rows are.
    """

    dataset: Any
    labels: LongArray
    what: str
    cache: CacheFolder | None

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        """Return the images of these rows, undecoded."""
        columns = self.dataset[list(indexes)]
        return [first_image(cells) for cells in zip(*columns.values(), strict=True)]

    def name(self, index: int) -> str:
        """Return the image's path as the source has it, or the row number."""
        cells = [cell for cell in self.dataset[index].values() if cell is not None]
        path = cells[0].get("path") if cells else None
        if path and Path(path).is_absolute():
            return str(path)
        return f"image {index} ({path}) of {self.what}" if path else f"image {index} of {self.what}"


@dataclass(frozen=True)
class Classes:
    """Class names, and the class number of each value of the label column."""

    names: tuple[str, ...]
    number: Mapping[Label, int]

    def encode(self, values: Sequence[Label | None]) -> LongArray:
        """Return class numbers; -1 where there is no label or an unknown one."""
        numbers = [-1 if value is None else self.number.get(value, -1) for value in values]
        return np.array(numbers, dtype=np.int64)


def build_source(
    spec: str,
    kind: str,
    parts: Mapping[str, Any],
    cache: CacheFolder | None,
    names: Mapping[str, tuple[str, ...]],
) -> Source:
    """Make a `Source` of `datasets` tables, `train` and perhaps `test` or `validation`.

    Args:
        spec: what the user wrote.
        kind: of source.
        parts: the table of each split.
        cache: where the tables lie, if they must be kept there.
        names: class names of label columns that do not name their classes themselves.

    Raises:
        DataError: a table lacks an image or label column, or has images without a label.
    """
    images, label = find_columns(spec, parts["train"])
    values = label_values(spec, parts["train"], label)
    classes = find_classes(parts["train"].features[label], names.get(label), values)
    train = _table(spec, parts["train"], images, classes.encode(values), cache)
    for row in np.flatnonzero(train.labels < 0)[:1].tolist():
        raise _no_class(spec, values, train, row, classes)
    test = find_test(spec, parts, classes, cache)
    return Source(spec, kind, train, test, classes.names, flip=True)


def find_test(
    spec: str, parts: Mapping[str, Any], classes: Classes, cache: CacheFolder | None
) -> HfTable | None:
    """Return the first labelled split of those to test on; None where there are no such splits.

    Raises:
        DataError: there are some, none of them labelled with classes that train has.
    """
    found = [split for split in TEST_SPLITS if split in parts]
    for split in found:
        images, label = find_columns(spec, parts[split])
        labels = classes.encode(label_values(spec, parts[split], label))
        if len(labels) and (labels >= 0).all():
            return _table(spec, parts[split], images, labels, cache)
    if found:
        raise DataError(
            f"--data {spec}: every image of the {' or '.join(found)} split must have a label that "
            "train has too; label them, or give the train files alone: part of them is held out"
        )
    return None


def _no_class(
    spec: str, values: Sequence[Label | None], train: HfTable, row: int, classes: Classes
) -> DataError:
    value = values[row]
    if value is None or value == -1:
        count = sum(label is None or label == -1 for label in values)
        return DataError(
            f"--data {spec}: every training image must be labelled, {count} of "
            f"{len(train.labels)} are not, the first is {train.name(row)}"
        )
    return DataError(
        f"--data {spec}: {outside(value, classes)} as {train.name(row)} has; correct it, or name "
        "all classes in the file"
    )


def outside(value: Label, classes: Classes) -> str:
    """Return what is wrong with a label that belongs to no class."""
    last = len(classes.names) - 1
    return f"every label must be one of the classes, 0..{last}, not {value!r}"


def find_columns(spec: str, dataset: Any) -> tuple[list[str], str]:
    """Return the columns that hold the images, one of them in each row, and the label's.

    Raises:
        DataError: there is none.
    """
    from datasets import ClassLabel, Image

    features = dataset.features
    images = [name for name in _IMAGE_COLUMNS if name in features][:1]
    images = images or [name for name in TAR_IMAGES if name in features]
    images = images or [name for name, kind in features.items() if isinstance(kind, Image)][:1]
    labels = [name for name in _LABEL_COLUMNS if name in features]
    labels = labels or [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    for found, what in ((images, "image"), (labels, "label")):
        if not found:
            raise DataError(
                f"--data {spec}: must have a column {what!r}, has {', '.join(features) or 'none'}; "
                f"rename the one that holds the {what}s"
            )
    return images, labels[0]


def label_values(spec: str, dataset: Any, column: str) -> list[Label | None]:
    """Return the label column.

    Raises:
        DataError: it holds neither whole numbers nor names.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    odd = next((v for v in values if v is not None and not isinstance(v, (int, str))), None)
    if odd is not None:
        raise DataError(
            f"--data {spec}: column {column!r} must hold whole numbers or names, it holds {odd!r}"
        )
    return list(values)


def find_classes(
    feature: Any, names: tuple[str, ...] | None, values: Sequence[Label | None]
) -> Classes:
    """Return the classes a label column names itself, or those of `names`, or of its values."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    if names is not None:
        return Classes(names, {number: number for number in range(len(names))})
    # -1 is how `datasets` marks a row without a label.
    distinct = sorted({value for value in values if value is not None and value != -1}, key=_key)
    return Classes(
        tuple(str(value) for value in distinct),
        {value: number for number, value in enumerate(distinct)},
    )


def _key(value: Label) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value)


def _table(
    spec: str, dataset: Any, images: Sequence[str], labels: LongArray, cache: CacheFolder | None
) -> HfTable:
    from datasets import Image

    dataset = dataset.select_columns(list(images))
    with quiet(), reading(f"--data {spec}: column {images[0]!r} must hold images"):
        for name in images:
            dataset = dataset.cast_column(name, Image(decode=False))
    return HfTable(dataset, labels, spec, cache)


def first_image(cells: Sequence[Mapping[str, Any] | None]) -> RawImage:
    """Return the image of the first cell that has one: its bytes, or its file."""
    for cell in cells:
        if cell is not None:
            encoded, path = cell.get("bytes"), cell.get("path")
            if encoded is not None:
                return bytes(encoded)
            return Path(path) if path else None
    return None


def cache_folder(wanted: Path | None) -> CacheFolder:
    """Return `wanted`, else the cache of `datasets`, else, if it is read-only, a temporary one."""
    from datasets import config

    path = Path(wanted or config.HF_DATASETS_CACHE).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return CacheFolder(path)
    except OSError:
        folder = CacheFolder(Path(tempfile.mkdtemp(prefix="slimnas-data-")))
        weakref.finalize(folder, shutil.rmtree, folder.path, ignore_errors=True)
        return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars of `datasets` and the log lines of it and the hub client, then restore.

    Downloads keep their own bar: they may take long.
    """
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def reading(what: str | Callable[[], str]) -> Iterator[None]:
    """Turn what `datasets` raises for damaged data into one `DataError` line.

    Args:
        what: is read; a function is asked only if reading fails.

    Raises:
        DataError: the block failed on its data.
    """
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (
        DatasetsError,
        EOFError,
        OSError,
        TypeError,
        ValueError,
        pyarrow.ArrowException,
        tarfile.TarError,
    ) as error:
        cause = error.__cause__ or error
        name = what if isinstance(what, str) else what()
        raise DataError(
            f"{name}: cannot be read ({first_line(cause)}); check the files, or download or "
            "write them again"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
