"""What a search measured: one JSON line for how, one per network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_text, read_text
from slimnas.errors import RunFolderError

SCHEMA = "slimnas/search-measurements/1"
FILE = "measurements.jsonl"


@dataclass(frozen=True)
class Measurement:
    """One network that a search found for a target, built, exported and measured.

    Attributes:
        target_ms: the target.
        number: which measurement for this target, from 1.
        steps: steps of the trajectory that lead to the network.
        architecture: its digest.
        predicted_ms: its latency by the table, as corrected by the measurements before.
        interval_ms: lower and upper end of the prediction's interval.
        measured_ms: median over rounds.
        error_ms: standard error of that median.
        reference_ms: latency of the reference network meanwhile, which tells the machine's pace.
        date: when, ISO.
    """

    target_ms: float
    number: int
    steps: int
    architecture: str
    predicted_ms: float
    interval_ms: tuple[float, float]
    measured_ms: float
    error_ms: float
    reference_ms: float
    date: str

    @property
    def share(self) -> float:
        """Measured latency over the target."""
        return self.measured_ms / self.target_ms

    @property
    def off_percent(self) -> float:
        """Measured over predicted, minus one, in percent."""
        return 100 * (self.measured_ms / self.predicted_ms - 1)

    @property
    def is_inside(self) -> bool:
        """Whether the prediction's interval holds the measurement."""
        return self.interval_ms[0] <= self.measured_ms <= self.interval_ms[1]


@dataclass(frozen=True)
class MeasurementLog:
    """Every measurement of a run, in a file that grows line by line.

    Attributes:
        path: the file.
        setup: runtime, machine and protocol, as plain data.
        measurements: in the order they were made.
    """

    path: Path
    setup: Mapping[str, Any]
    measurements: tuple[Measurement, ...] = ()

    @classmethod
    def load(cls, path: Path) -> MeasurementLog | None:
        """Read what `save` wrote; none where there is no file.

        Raises:
            RunFolderError: the file is damaged or of another schema.
        """
        if not path.is_file():
            return None
        text = read_text(path, RunFolderError, "measurements of a search")
        try:
            header, *rows = [json.loads(line) for line in text.splitlines()]
            if header["schema"] != SCHEMA:
                raise RunFolderError(
                    f"{path}: schema: must be {SCHEMA!r}, got {header['schema']!r}"
                )
            return cls(path, header["setup"], tuple(_measurement(row) for row in rows))
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{path}: not measurements of a search ({error}); delete it and trajectory.jsonl "
                "to slim again from the trained supernet"
            ) from error

    def with_one_more(self, measurement: Measurement) -> MeasurementLog:
        """The log one line longer, which is on disk then."""
        longer = MeasurementLog(self.path, self.setup, (*self.measurements, measurement))
        longer.save()
        return longer

    def find(self, target_ms: float, number: int) -> Measurement | None:
        """A target's measurement by its number, if it was made."""
        wanted = (target_ms, number)
        found = (m for m in self.measurements if (m.target_ms, m.number) == wanted)
        return next(found, None)

    def save(self) -> None:
        """Write JSON lines atomically."""
        header = {"schema": SCHEMA, "setup": dict(self.setup)}
        lines = [header, *map(asdict, self.measurements)]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def _measurement(row: Mapping[str, Any]) -> Measurement:
    low_ms, high_ms = row["interval_ms"]
    return Measurement(**{**row, "interval_ms": (low_ms, high_ms)})
