"""Models on disk: run folders and zoo entries share three files, an entry adds a card.

`architecture.yaml`, `weights.safetensors` and `metrics.json`; a zoo entry has a `README.md` and
`exports/` besides and appears whole or not at all.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from slimnas._files import atomic_write_text
from slimnas.arch.architecture import Architecture
from slimnas.errors import ZooError
from slimnas.zoo.card import model_card
from slimnas.zoo.metrics import Metric, Metrics, load_metrics, save_metrics
from slimnas.zoo.weights import save_weights

ARCHITECTURE = "architecture.yaml"
WEIGHTS = "weights.safetensors"
METRICS = "metrics.json"
CARD = "README.md"
EXPORTS = "exports"
FOUND = "found"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Entry:
    """A model that has a name: built in, in a user's zoo, in a run folder, or a YAML file.

    Attributes:
        name: how it is asked for.
        source: `built-in`, `zoo`, `folder` or `file`.
        architecture: what it is.
        metrics: its numbers, each with provenance.
        folder: where its files lie; None for built-in entries and lone files.
        weights: its weights file, if it has one on disk.
    """

    name: str
    source: str
    architecture: Architecture
    metrics: dict[str, Metric]
    folder: Path | None = None
    weights: Path | None = None


def save_model(
    folder: str | Path,
    *,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    metrics: Metrics,
) -> None:
    """Write the three files of a model into `folder`, each atomically, over what is there.

    Raises:
        WeightsError: the weights are not those of `architecture`.
        RunFolderError: the folder cannot be written.
    """
    folder = Path(folder)
    save_weights(folder / WEIGHTS, weights, architecture)
    save_metrics(folder / METRICS, metrics)
    architecture.save(folder / ARCHITECTURE)


def load_entry(folder: str | Path, *, source: str = "folder") -> Entry:
    """Read a zoo entry, or a run folder; weights are located, not read.

    A run that found models for several targets holds them in `found/<target>/`: name one of
    them, unless there is only one.

    Raises:
        ZooError: no model there, several, or damaged metrics.
        SpecError: a damaged architecture.
    """
    folder = _model_folder(Path(folder))
    architecture = Architecture.load(folder / ARCHITECTURE)
    metrics = load_metrics(folder / METRICS) if (folder / METRICS).is_file() else {}
    weights = folder / WEIGHTS
    return Entry(
        name=folder.name if source == "zoo" else architecture.name,
        source=source,
        architecture=architecture,
        metrics=metrics,
        folder=folder,
        weights=weights if weights.is_file() else None,
    )


def save_entry(
    zoo: str | Path,
    name: str,
    *,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    metrics: Metrics,
) -> Path:
    """Add a model to a zoo under `name`; it appears whole or not at all.

    Returns:
        The new entry's folder.

    Raises:
        ZooError: a bad name, or one in use.
        WeightsError: the weights are not those of `architecture`.
        RunFolderError: the zoo cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ZooError(
            f"zoo entry name {name!r}: must be letters, digits, '.', '_' or '-', beginning with "
            "a letter or digit"
        )
    zoo, named = Path(zoo), architecture.renamed(name)
    target = zoo / name
    _refuse_existing(target)
    temporary = _temporary_folder(zoo, name)
    try:
        save_model(temporary, architecture=named, weights=weights, metrics=metrics)
        atomic_write_text(temporary / CARD, model_card(named, metrics))
        (temporary / EXPORTS).mkdir()
        _refuse_existing(target)
        temporary.rename(target)
    except OSError as error:
        raise ZooError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _model_folder(folder: Path) -> Path:
    if (folder / ARCHITECTURE).is_file():
        return folder
    found = sorted(path.parent for path in folder.glob(f"{FOUND}/*/{ARCHITECTURE}"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(path) for path in found)
        raise ZooError(f"{folder}: holds several models; name one of {names}")
    raise ZooError(f"{folder}: no {ARCHITECTURE} there, so it is no run folder and no zoo entry")


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ZooError(f"{target}: exists already; choose another --name or remove it first")


def _temporary_folder(zoo: Path, name: str) -> Path:
    try:
        zoo.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=zoo))
        temporary.chmod(zoo.stat().st_mode & 0o777)  # mkdtemp makes it private
    except OSError as error:
        raise ZooError(f"{zoo}: cannot be written ({error.strerror or error})") from error
    return temporary
