"""Parquet files and webdataset tars: checked, unpacked into a table, or streamed.

They are read by the builders of `datasets` themselves: `load_dataset` would first send a request
to count downloads.
"""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slimnas.data.tables import first_line, quiet, reading
from slimnas.errors import DataError

PARQUET, TARS = "parquet", "webdataset"


def read_shards(kind: str, files: Sequence[Path], cache: Path) -> Any:
    """Unpack shards into `cache`; returns a `datasets.Dataset`.

    Raises:
        DataError: one is damaged or empty.
    """
    check_shards(kind, files)
    with quiet(), reading(lambda: broken_shard(kind, files)):
        if kind == PARQUET:
            from datasets import Dataset

            return Dataset.from_parquet(
                _literal(files), features=_parquet_features(files[0]), cache_dir=str(cache)
            )
        builder = _builder(kind, files, cache)
        builder.download_and_prepare()
        return builder.as_dataset(split="train")


def stream_shards(kind: str, files: Sequence[Path], cache: Path) -> Any:
    """Return a `datasets.IterableDataset` that reads the shards as they lie.

    Raises:
        DataError: one is damaged or empty.
    """
    check_shards(kind, files)
    with quiet(), reading(lambda: broken_shard(kind, files)):
        return _builder(kind, files, cache).as_streaming_dataset(split="train")


def check_shards(kind: str, files: Sequence[Path]) -> None:
    """Look at the beginning, or the summary, of every shard.

    Raises:
        DataError: one is damaged or empty.
    """
    for file in files:
        if kind == PARQUET:
            _check_parquet(file)
        else:
            _check_tar(file)


def names_in_schema(file: Path) -> dict[str, tuple[str, ...]]:
    """Return the class names that `datasets` wrote into a parquet file, by column."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    try:
        columns = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in columns.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}  # names are a courtesy; without them classes are called by number


def broken_shard(kind: str, files: Sequence[Path]) -> str:
    """Read shards to their end; return the first that cannot be, or all where each of them can."""
    if len(files) == 1:
        return str(files[0])
    for file in files:
        try:
            with reading(str(file)):
                _read_through(kind, file)
        except DataError:
            return str(file)
    return f"{files[0]} and others"


def _builder(kind: str, files: Sequence[Path], cache: Path) -> Any:
    from datasets import Features, Image, Value
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    given = {"cache_dir": str(cache), "data_files": {"train": _literal(files)}}
    if kind == PARQUET:
        return Parquet(**given, features=_parquet_features(files[0]))
    # Named here, so that keys may mix formats; `datasets` would take those of the first keys.
    images = {suffix: Image(decode=False) for suffix in ("jpg", "jpeg", "png", "webp")}
    others = {"cls": Value("int64"), "__key__": Value("string"), "__url__": Value("string")}
    return WebDataset(**given, features=Features({**images, **others}))


def _parquet_features(file: Path) -> Any:
    import pyarrow.parquet
    from datasets import Features

    # `datasets` refuses class names that repeat, as ImageNet's do: keep them out of its sight.
    return Features.from_arrow_schema(pyarrow.parquet.read_schema(file).remove_metadata())


def _check_parquet(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(file).num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file}: not a whole parquet file ({first_line(error)}); download or write it again"
        ) from error
    if rows == 0:
        raise DataError(f"{file}: holds no images; a split needs some")


def _check_tar(file: Path) -> None:
    with reading(str(file)), tarfile.open(file) as archive:
        if not any(member.isreg() for member in archive):
            raise DataError(f"{file}: holds no images; leave it out")


def _read_through(kind: str, file: Path) -> None:
    import pyarrow.parquet

    if kind == PARQUET:
        for _ in pyarrow.parquet.ParquetFile(file).iter_batches():
            pass
        return
    with tarfile.open(file) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                content.read()


def _literal(files: Iterable[Path]) -> list[str]:
    return [glob.escape(str(file.resolve())) for file in files]
