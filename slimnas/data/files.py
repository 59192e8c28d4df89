"""Labelled images from folders, parquet, webdataset tars and the hub, through `datasets`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimnas.data.shards import PARQUET, TARS, names_in_schema, read_shards
from slimnas.data.sources import Source
from slimnas.data.tables import build_source, cache_folder, first_line, quiet
from slimnas.errors import DataError, suggest

FOLDER, HUB = "folder", "hub"
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "val", "valid", "dev", "eval"),
}
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
_SPLIT_IN_FILE_NAME = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)
_IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Listing:
    """What a spec names.

    Attributes:
        spec: what the user wrote.
        kind: `folder`, `parquet`, `webdataset` or `hub`.
        splits: shards of each split, `train` among them; of a folder, the folder; of the hub, none.
    """

    spec: str
    kind: str
    splits: Mapping[str, Sequence[Path]]


def list_files(spec: str) -> Listing:
    """Find what `spec`, anything but `digits`, names; see `load_source`.

    Raises:
        DataError: nothing is there, or it is not one kind of files.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        for pattern in ("*.parquet", "data/*.parquet", "*.tar"):
            found = sorted(path.glob(pattern))
            if found:
                return _list_shards(spec, found)
        return Listing(spec, FOLDER, {"train": [path]})
    if path.is_file():
        return _list_shards(spec, [path], one_split=True)
    if glob.has_magic(spec):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns too)
        if not found:
            raise DataError(f"--data {spec}: no file matches; check the pattern")
        return _list_shards(spec, found)
    if _HUB_ID.fullmatch(spec) and not path.parent.exists():
        return Listing(spec, HUB, {})
    raise _missing(spec, path)


def load_files(spec: str, cache_dir: Path | None) -> Source:
    """Open the images that `spec`, anything but `digits`, names; see `load_source`.

    Raises:
        DataError: nothing is there, it cannot be read, or it lacks images or labels.
    """
    listing = list_files(spec)
    if listing.kind == FOLDER:
        return build_source(spec, FOLDER, folder_tables(listing), None, {})
    folder = cache_folder(cache_dir)
    if listing.kind == HUB:
        return build_source(spec, HUB, load_hub(spec, folder.path), folder, {})
    splits = listing.splits
    parts = {name: read_shards(listing.kind, files, folder.path) for name, files in splits.items()}
    names = names_in_schema(splits["train"][0]) if listing.kind == PARQUET else {}
    return build_source(spec, listing.kind, parts, folder, names)


def _missing(spec: str, path: Path) -> DataError:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent, path = parent.parent, parent
    siblings = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    hint = suggest(path.name, [*siblings, "digits"])
    return DataError(
        f"--data {spec}: no such file or folder; {path.name!r} is not in {parent}{hint}; give "
        "digits, an image folder, parquet files, webdataset tars or a hub id user/name"
    )


def _list_shards(spec: str, files: list[Path], *, one_split: bool = False) -> Listing:
    suffixes = {file.suffix.lower() for file in files}
    kinds = {".parquet": PARQUET, ".tar": TARS}
    if len(suffixes) != 1 or not suffixes <= kinds.keys():
        raise DataError(
            f"--data {spec}: the files must all be .parquet or all .tar, these end in "
            f"{', '.join(sorted(suffixes)) or 'nothing'}; for loose images give the folder that "
            "holds one sub-folder per class"
        )
    groups = {"train": files} if one_split else _by_split(spec, files)
    return Listing(spec, kinds[suffixes.pop()], groups)


def _by_split(spec: str, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Sort files by the split their names tell; one kind of name, or none, is all train."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        told = _SPLIT_IN_FILE_NAME.search(file.stem)
        groups.setdefault(_SPLIT_OF[told[1].lower()] if told else "", []).append(file)
    if len(groups) == 1:
        return {"train": next(iter(groups.values()))}
    if "" in groups:
        raise DataError(
            f"--data {spec}: {groups[''][0].name} does not say which split it belongs to, other "
            "files do; name it train, test or validation, or give a glob that leaves it out"
        )
    if "train" not in groups:
        raise DataError(
            f"--data {spec}: has {' and '.join(sorted(groups))} files and no train file; "
            "name the files to train on, or a glob for them"
        )
    return groups


def folder_tables(listing: Listing) -> dict[str, Any]:
    """List `class/**/image` or `split/class/**/image`; returns a `datasets.Dataset` per split.

    Listed here: the builder of `datasets` takes `test` in any file or folder name for a split
    and then leaves out all files that lack such a word.

    Raises:
        DataError: classes are missing, empty, or differ between the splits.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    spec, folder = listing.spec, listing.splits["train"][0]
    splits = {sub: _SPLIT_OF.get(sub.name.lower()) for sub in _sub_folders(folder)}
    split_folders = {split: sub for sub, split in splits.items() if split}
    has_splits = "train" in split_folders and all(splits.values())
    if has_splits and not _sub_folders(split_folders["train"]):
        raise DataError(f"--data {spec}: {split_folders['train']} must hold a sub-folder per class")
    layout = split_folders if has_splits else {"train": folder}
    listed = {split: _list_classes(spec, sub) for split, sub in layout.items()}
    names = sorted(listed["train"])
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    parts = {}
    for split, classes in listed.items():
        for name in sorted(set(classes) - set(names)):
            raise DataError(
                f"--data {spec}: class {name!r} of {layout[split]} is not among those of "
                f"{layout['train']}{suggest(name, names)}; both must hold the same sub-folders"
            )
        rows = [(str(file), label) for label, n in enumerate(names) for file in classes.get(n, [])]
        columns = {"image": [file for file, _ in rows], "label": [label for _, label in rows]}
        parts[split] = Dataset.from_dict(columns, features=features)
    return parts


def _list_classes(spec: str, folder: Path) -> dict[str, list[Path]]:
    """Return the image files below each sub-folder, sorted."""
    classes = {sub.name: _images_below(sub) for sub in _sub_folders(folder)}
    if not any(classes.values()):
        loose = any(file.suffix.lower() in _IMAGE_SUFFIXES for file in folder.iterdir())
        found = "its images lie loose" if loose else "no images in it"
        raise DataError(
            f"--data {spec}: {folder} must hold one sub-folder of images per class; {found}"
        )
    for name, files in classes.items():
        if not files:
            raise DataError(
                f"--data {spec}: the sub-folder {folder / name} holds no images; every sub-folder "
                "is a class; remove it or fill it"
            )
    return classes


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _images_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if Path(name).suffix.lower() in _IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises where the hub gives nothing."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The HTTP library below the client differs by version; its base error is a base of this.
    http = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return OSError, EntryNotFoundError, *http


def load_hub(spec: str, cache: Path, *, streaming: bool = False) -> dict[str, Any]:
    """Return a `datasets.Dataset`, or an `IterableDataset`, per split, train among them.

    Raises:
        DataError: there is no such data set, or no network, or it has no train split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi, constants

    try:
        with quiet():
            if not constants.HF_HUB_OFFLINE:
                # One request that fails at once; load_dataset would try for half a minute.
                HfApi().dataset_info(spec, timeout=10)
            loaded = load_dataset(spec, cache_dir=str(cache), streaming=streaming)
    except (ValueError, DatasetsError, *hub_errors()) as error:
        raise DataError(
            f"--data {spec}: no such path here, and the hub gave no data set of that name "
            f"({first_line(error)}); check the name and the network, or give a local path"
        ) from error
    parts = {_SPLIT_OF.get(str(split).lower(), str(split)): part for split, part in loaded.items()}
    if len(parts) == 1:
        parts = {"train": next(iter(parts.values()))}
    if "train" not in parts:
        raise DataError(f"--data {spec}: has no train split; it has {', '.join(sorted(parts))}")
    return parts
