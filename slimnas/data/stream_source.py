"""What a stream is read from: its shards, classes and number of images, known before it starts."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimnas.data.batches import permutation
from slimnas.data.files import FOLDER, HUB, Listing, folder_tables, list_files, load_hub
from slimnas.data.shards import PARQUET, broken_shard, names_in_schema, read_shards, stream_shards
from slimnas.data.tables import (
    TAR_IMAGES,
    TEST_SPLITS,
    CacheFolder,
    Classes,
    HfTable,
    Label,
    cache_folder,
    find_classes,
    find_columns,
    find_test,
    outside,
    quiet,
    reading,
)
from slimnas.errors import DataError

_FOLDER_ORDER = 31  # keeps this random stream apart from the others of one seed
_FOLDER_SHARDS = 64
_TAR_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass(frozen=True)
class StreamOptions:
    """How images are read that are not looked up one by one.

    Attributes:
        buffer: encoded images each reader holds to draw the next one from; the order within a
            shard is as random as this is large.
        readers: threads that read shards, each its own, one shard each at least.
        images_per_epoch: after how many images an epoch ends; None for all, which the hub does
            not tell of every data set.
    """

    buffer: int = 1024
    readers: int = 2
    images_per_epoch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be read.

        Raises:
            DataError: a number is below 1.
        """
        for name in ("buffer", "readers", "images_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} of a stream must be 1 or more, got {value}")


@dataclass(frozen=True, eq=False)
class StreamSource:
    """Labelled images in shards.

    Attributes:
        spec: what the user wrote.
        kind: `folder`, `parquet`, `webdataset` or `hub`.
        rows: a `datasets.IterableDataset`, images undecoded.
        images: columns that hold the images, one of them in each row.
        label: column of the label.
        classes: which label belongs to which class.
        count: number of images; None where nobody knows.
        test: the source's own labelled test split, not streamed.
        where: what cannot be read, asked when reading fails.
        evidence: names, sizes and labels of what is read, as text for a digest.
        cache: kept alive as long as the rows are.
    """

    spec: str
    kind: str
    rows: Any
    images: tuple[str, ...]
    label: str
    classes: Classes
    count: int | None
    test: HfTable | None
    where: Callable[[], str]
    evidence: str
    cache: CacheFolder | None


def open_stream(spec: str, seed: int) -> StreamSource:
    """Find what `spec` names without reading its images.

    Labels of local data are read, to know the classes and count the images.

    Args:
        spec: see `load_source`; not `digits`.
        seed: of the order of a folder's images, which lie sorted by class.

    Raises:
        DataError: nothing is there, a shard is damaged or empty, or images or labels are missing.
    """
    if spec == "digits":
        raise DataError("--data digits: is too small to be streamed; leave out --stream")
    listing = list_files(spec)
    if listing.kind == FOLDER:
        return _open_folder(listing, seed)
    return _open_hub(listing) if listing.kind == HUB else _open_shards(listing)


def _open_folder(listing: Listing, seed: int) -> StreamSource:
    from datasets import Dataset

    parts = folder_tables(listing)
    table = parts["train"]
    classes = find_classes(table.features["label"], None, [])
    order = permutation(len(table), seed, _FOLDER_ORDER).tolist()
    mixed = Dataset.from_dict(table[order], features=table.features)
    root = listing.splits["train"][0]
    names = [str(Path(cell["path"]).relative_to(root)) for cell in table["image"]]
    return StreamSource(
        spec=listing.spec,
        kind=FOLDER,
        rows=mixed.to_iterable_dataset(num_shards=min(len(table), _FOLDER_SHARDS)),
        images=("image",),
        label="label",
        classes=classes,
        count=len(table),
        test=find_test(listing.spec, parts, classes, None),
        where=lambda: listing.spec,
        evidence=f"{names} {list(table['label'])}",
        cache=None,
    )


def _open_shards(listing: Listing) -> StreamSource:
    spec, kind, files = listing.spec, listing.kind, listing.splits["train"]
    cache = cache_folder(None)
    rows = stream_shards(kind, files, cache.path)
    images, label = find_columns(spec, rows)
    labels = [_shard_labels(kind, file, label) for file in files]
    values = [value for shard in labels for value in shard]
    names = names_in_schema(files[0]) if kind == PARQUET else {}
    classes = find_classes(rows.features[label], names.get(label), values)
    for number, value in enumerate(values):
        if classes.encode([value])[0] < 0:
            raise _no_class(spec, number, value, classes)
    held = {name: listing.splits[name] for name in TEST_SPLITS if name in listing.splits}
    parts = {name: read_shards(kind, shards, cache.path) for name, shards in held.items()}
    sizes = [(file.name, file.stat().st_size) for file in files]
    return StreamSource(
        spec=spec,
        kind=kind,
        rows=_undecoded(rows, images, label),
        images=tuple(images),
        label=label,
        classes=classes,
        count=len(values),
        test=find_test(spec, parts, classes, cache),
        where=lambda: broken_shard(kind, files),
        evidence=f"{sizes} {labels}",
        cache=cache,
    )


def _open_hub(listing: Listing) -> StreamSource:
    from datasets import ClassLabel, Dataset

    spec = listing.spec
    cache = cache_folder(None)
    with quiet(), reading(f"--data {spec}: must tell its columns"):
        parts = {
            name: part.decode(False)
            for name, part in load_hub(spec, cache.path, streaming=True).items()
        }
    rows = parts["train"]
    images, label = find_columns(spec, rows)
    feature = rows.features[label]
    values: list[Label | None] = []
    if not isinstance(feature, ClassLabel):
        with quiet(), reading(f"--data {spec}"):
            values = [row[label] for row in rows.select_columns([label])]
    classes = find_classes(feature, None, values)
    known = (rows.info.splits or {}).get(str(rows.split))
    held = {}
    for name in TEST_SPLITS:
        if name in parts:
            part = _undecoded(parts[name], *find_columns(spec, parts[name]))
            with quiet(), reading(f"--data {spec}: {name} split"):
                # Only this split is downloaded; load_dataset would fetch the others too.
                held[name] = Dataset.from_generator(
                    _each, gen_kwargs={"part": part}, features=part.features, cache_dir=cache.path
                )
    return StreamSource(
        spec=spec,
        kind=HUB,
        rows=_undecoded(rows, images, label),
        images=tuple(images),
        label=label,
        classes=classes,
        count=len(values) or (known.num_examples if known else None),
        test=find_test(spec, held, classes, cache),
        where=lambda: f"--data {spec}",
        evidence=f"{spec} {rows.info.version} {classes.names}",
        cache=cache,
    )


def _each(part: Any) -> Iterator[Any]:
    yield from part


def _undecoded(rows: Any, images: Sequence[str], label: str) -> Any:
    """Return these columns alone, images as encoded bytes."""
    from datasets import Image

    rows = rows.select_columns([*images, label])
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    return rows


def _no_class(spec: str, number: int, value: Label | None, classes: Classes) -> DataError:
    if value is None or value == -1:
        return DataError(
            f"--data {spec}: every training image must be labelled, image {number} is not"
        )
    return DataError(
        f"--data {spec}: {outside(value, classes)} as image {number} has; correct it, or name "
        "all classes in the file"
    )


def _shard_labels(kind: str, file: Path, column: str) -> list[Label | None]:
    with reading(str(file)):
        if kind != PARQUET:
            return _tar_labels(file)
        import pyarrow.parquet

        values = pyarrow.parquet.read_table(file, columns=[column])[column].to_pylist()
        for value in values:
            if value is not None and not isinstance(value, (int, str)):
                raise DataError(
                    f"{file}: column {column!r} must hold whole numbers or names, "
                    f"it holds {value!r}"
                )
        return list(values)


def _tar_labels(file: Path) -> list[Label | None]:
    """Return the label of each image, in order, without reading the images.

    Raises:
        DataError: there are none.
        ValueError: a label is no whole number.
    """
    fields: dict[str, dict[str, bytes | None]] = {}
    with tarfile.open(file) as archive:
        for member in archive:
            told = _TAR_KEY.fullmatch(member.name)
            if not member.isreg() or told is None or Path(member.name).name.startswith((".", "__")):
                continue
            content = archive.extractfile(member) if told[2] == "cls" else None
            fields.setdefault(told[1], {})[told[2]] = content.read() if content else None
    images = [each for each in fields.values() if any(suffix in each for suffix in TAR_IMAGES)]
    if not images:
        raise DataError(f"{file}: holds no images; leave it out")
    labels = [each.get("cls") for each in images]
    return [None if label is None else int(label) for label in labels]
