"""Numbers about a model, each with where it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_text, read_text
from slimnas.errors import ZooError


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        value: the number, in the unit its name ends with.
        provenance: what measured, computed or published it.
    """

    value: float
    provenance: str


Metrics = Mapping[str, Metric]


def save_metrics(path: str | Path, metrics: Metrics) -> None:
    """Write a `metrics.json` atomically.

    Raises:
        RunFolderError: the place cannot be written.
    """
    body = {name: asdict(metric) for name, metric in metrics.items()}
    atomic_write_text(Path(path), json.dumps(body, indent=2, allow_nan=False) + "\n")


def load_metrics(path: str | Path) -> dict[str, Metric]:
    """Read a `metrics.json`.

    Raises:
        ZooError: missing, not JSON, or a number without provenance.
    """
    try:
        data = json.loads(read_text(Path(path), ZooError, "metrics"))
    except json.JSONDecodeError as error:
        raise ZooError(f"{path}: not valid JSON ({error})") from error
    return parse_metrics(data, source=str(path))


def parse_metrics(data: Any, *, source: str) -> dict[str, Metric]:
    """Check a mapping of name to `{value, provenance}`.

    Raises:
        ZooError: anything else, with the key.
    """
    if not isinstance(data, Mapping):
        raise ZooError(f"{source}: must map names to numbers, got a {type(data).__name__}")
    metrics = {}
    for name, entry in data.items():
        value = entry.get("value") if isinstance(entry, Mapping) else None
        provenance = entry.get("provenance") if isinstance(entry, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ZooError(f"{source}: {name}.value: must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ZooError(f"{source}: {name}.value: must be finite, got {value!r}")
        if not isinstance(provenance, str) or not provenance:
            raise ZooError(f"{source}: {name}.provenance: must say where the number comes from")
        metrics[str(name)] = Metric(value, provenance)
    return metrics
