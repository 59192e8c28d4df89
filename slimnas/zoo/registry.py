"""Models by name: those built in, and those of the user's zoo."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from slimnas.arch.architecture import Architecture
from slimnas.errors import SlimnasError, ZooError, suggest
from slimnas.zoo.entry import ARCHITECTURE, WEIGHTS, Entry, load_entry, save_entry
from slimnas.zoo.metrics import parse_metrics
from slimnas.zoo.weights import load_weights

MODELS = Path(__file__).resolve().parent / "models"
"""Published architectures, a file each; their weights are on a hub."""
TRAINED = Path(__file__).resolve().parent / "trained"
"""Networks that slimnas found and trained, an entry with weights each."""
ZOO_VARIABLE = "SLIMNAS_ZOO"
DEFAULT_ZOO = "model_zoo"


@dataclass(frozen=True)
class Listing:
    """What a zoo holds.

    Attributes:
        entries: built-in ones first, each group by name.
        damaged: folders that look like entries and cannot be read, with the reason.
    """

    entries: tuple[Entry, ...]
    damaged: tuple[tuple[Path, str], ...]


def zoo_folder(zoo: str | Path | None = None) -> Path:
    """The user's zoo: `zoo` if given, else $SLIMNAS_ZOO, else ./model_zoo; it need not exist."""
    return Path(zoo or os.environ.get(ZOO_VARIABLE) or DEFAULT_ZOO)


def builtin_names() -> list[str]:
    """Names of the models that ship with slimnas."""
    return sorted([*(path.stem for path in MODELS.glob("*.yaml")), *_entry_names(TRAINED)])


def family_of(name: str) -> str:
    """The family of a model by its name: `efficientformerv2_s0` -> `efficientformerv2`."""
    return name.partition("_")[0]


def list_entries(
    zoo: str | Path | None = None, *, pattern: str = "*", family: str | None = None
) -> Listing:
    """List the built-in entries and those of the user's zoo (see `zoo_folder`).

    Args:
        zoo: the user's zoo.
        pattern: what names must match, with shell wildcards: `efficient*`.
        family: what names must begin with, up to the first underscore: `deit`.

    Raises:
        ZooError: no model of that family.
    """
    builtin, users = builtin_names(), _entry_names(zoo_folder(zoo))
    families = sorted({family_of(name) for name in (*builtin, *users)})
    if family is not None and family not in families:
        raise ZooError(
            f"no family {family!r}{suggest(family, families)}; the zoo has: {', '.join(families)}"
        )

    def wanted(name: str) -> bool:
        return fnmatchcase(name, pattern) and family in (None, family_of(name))

    entries = [_builtin(name) for name in builtin if wanted(name)]
    damaged = []
    for name in filter(wanted, users):
        folder = zoo_folder(zoo) / name
        try:
            entries.append(load_entry(folder, source="zoo"))
        except SlimnasError as error:
            damaged.append((folder, str(error)))
    return Listing(tuple(entries), tuple(damaged))


def get(name_or_path: str | Path, *, zoo: str | Path | None = None) -> Entry:
    """Find a model by zoo name, architecture file, run folder or zoo entry folder.

    A name of the user's zoo wins over a built-in one, and a name over a path; `./name` is
    always a path.

    Raises:
        ZooError: nothing of that name, or a folder without a model.
        SpecError: a damaged architecture.
    """
    name, path = str(name_or_path), Path(name_or_path)
    users = _entry_names(zoo_folder(zoo))
    if name in users:
        return load_entry(zoo_folder(zoo) / name, source="zoo")
    if name in builtin_names():
        return _builtin(name)
    if path.is_dir():
        return load_entry(path)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return _from_file(path)
    known = [*builtin_names(), *users]
    raise ZooError(
        f"no model, file or folder {name!r}{suggest(name, known)}; known models: {', '.join(known)}"
    )


def add(folder: str | Path, *, name: str | None = None, zoo: str | Path | None = None) -> Path:
    """Copy the model of a run folder, or of another zoo's entry, into the user's zoo.

    Args:
        folder: what `slimnas.zoo.entry.load_entry` reads.
        name: the entry's name; by default the architecture's.
        zoo: see `zoo_folder`; made if it is missing.

    Returns:
        The new entry's folder.

    Raises:
        ZooError: no model or no weights there, or the name is in use.
        WeightsError: damaged weights.
    """
    entry = load_entry(folder)
    name = name or entry.name
    if entry.weights is None:
        raise ZooError(f"{entry.folder}: has no {WEIGHTS}; a zoo entry needs weights")
    if name in builtin_names():
        raise ZooError(f"zoo entry name {name!r}: a built-in model has it; choose another --name")
    return save_entry(
        zoo_folder(zoo),
        name,
        architecture=entry.architecture,
        weights=load_weights(entry.weights, entry.architecture),
        metrics=entry.metrics,
    )


def _entry_names(zoo: Path) -> list[str]:
    return sorted(path.parent.name for path in zoo.glob(f"[!.]*/{ARCHITECTURE}"))


def _builtin(name: str) -> Entry:
    if (TRAINED / name).is_dir():
        # without its folder, which is no place for a user's exports
        return replace(load_entry(TRAINED / name), source="built-in", folder=None)
    path = MODELS / f"{name}.yaml"
    architecture = Architecture.load(path)
    metrics = parse_metrics(architecture.provenance.get("metrics", {}), source=str(path))
    return Entry(name=name, source="built-in", architecture=architecture, metrics=metrics)


def _from_file(path: Path) -> Entry:
    if path.name == ARCHITECTURE and path.is_file():
        return load_entry(path.parent)
    architecture = Architecture.load(path)
    weights = path.with_suffix(Path(WEIGHTS).suffix)
    return Entry(
        name=architecture.name,
        source="file",
        architecture=architecture,
        metrics={},
        weights=weights if weights.is_file() else None,
    )
