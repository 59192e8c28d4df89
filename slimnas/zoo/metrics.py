"""Numbers about a model, each with where it comes from.

Names say what they are. Accuracies published for ImageNet-1k, in percent: `imagenet_top1` is the
paper's, `imagenet_top1_of_weights` what the downloadable weights reach. `test_top1_percent` was
measured by slimnas on the TEST images that the provenance names. Published speeds:
`DEVICE_latency_ms` for one image and `DEVICE_images_per_s` for a throughput, such as
`iphone12_latency_ms` and `v100_images_per_s`; runtime, number format and batch size belong in the
provenance.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_text, read_text
from slimnas.errors import ZooError

TOP1 = "imagenet_top1"
TEST_TOP1 = "test_top1_percent"
_SPEED = re.compile(r"(?:(?P<device>.+)_)?(?P<unit>latency_ms|images_per_s)")
_UNITS = {"latency_ms": "ms", "images_per_s": "images/s"}


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


@dataclass(frozen=True)
class Speed:
    """A latency or throughput.

    Attributes:
        name: of the metric.
        device: what it is of, from the name; may be empty.
        unit: `ms` or `images/s`.
        metric: the number.
    """

    name: str
    device: str
    unit: str
    metric: Metric


def speeds(metrics: Metrics) -> tuple[Speed, ...]:
    """The speeds among `metrics`, latencies before throughputs."""
    found = []
    for name, metric in metrics.items():
        match = _SPEED.fullmatch(name)
        if match is not None:
            device = (match["device"] or "").replace("_", " ")
            found.append(Speed(name, device, _UNITS[match["unit"]], metric))
    return tuple(sorted(found, key=lambda speed: speed.unit != "ms"))


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
