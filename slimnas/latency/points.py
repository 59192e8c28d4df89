"""`points.csv`: whole-network latencies that a device model is fitted to.

A user's file needs two columns, `network` and `latency_ms`; slimnas counts what its own
architectures do. A network it does not have brings its features along. The file beside a fitted
table holds every column, so that the table can be fitted again from itself.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from slimnas._files import read_text
from slimnas.errors import LatencyTableError, SlimnasError, suggest
from slimnas.latency.features import FEATURE_NAMES, Features

POINTS_FILE = "points.csv"
POINT_COLUMNS = (
    "name",
    "model",
    "resolution",
    *FEATURE_NAMES,
    "latency_ms",
    "weight",
    "tag",
    "source",
    "used",
    "why_not",
)
MS_PER_UNIT = {"latency_ms": 1.0, "latency_us": 1e-3, "latency_s": 1e3}
KNOWN_COLUMNS = ("network", *POINT_COLUMNS, "latency_us", "latency_s")
TAGS = {
    "D": "from a published data set of measurements",
    "F": "read off a figure the authors published",
    "R": "printed in the authors' repository",
    "T": "printed in a text about the paper",
    "U": "given by whoever fitted the table",
}
SLOWEST_MACS_PER_MS, FASTEST_MACS_PER_MS = 1e4, 1e11
"""10 million multiply-adds a second is a microcontroller, 100 trillion a data-centre GPU."""

MOST_APART = 200.0
"""How far from the median point's rate another's may be; a mix-up of units is 1000 apart."""

Resolve = Callable[[str], Features]


@dataclass(frozen=True)
class Point:
    """One published latency.

    Attributes:
        name: the network, or the step between two networks.
        model: the timm model its features were traced from; empty where there is none.
        resolution: side of its input in pixels; 0 where nobody says.
        features: what it computes; none where it was not counted.
        latency_ms: the published latency; of a step, the difference.
        weight: how often the fit counts it.
        tag: how the number is known, a key of `TAGS`.
        source: where it is from.
        used: whether the fit uses it.
        why_not: the reason if not.
    """

    name: str
    model: str
    resolution: int
    features: Features | None
    latency_ms: float
    weight: float
    tag: str
    source: str
    used: bool
    why_not: str

    @property
    def is_network(self) -> bool:
        """Whether it is a whole network and not the step between two."""
        return self.features is not None and self.features.networks == 1

    @property
    def macs_per_ms(self) -> float:
        """Its rate; 0 without features."""
        return self.features.macs / self.latency_ms if self.features else 0.0


def load_points(path: Path, resolve: Resolve | None = None) -> tuple[Point, ...]:
    """Read the points of a device.

    Args:
        path: the CSV file.
        resolve: counts the network of a name, for lines that bring no features along; without
            it every used line must bring them.

    Raises:
        LatencyTableError: one line with file and line: a missing or unknown column, a network
            named twice or unknown, a latency that is not positive and finite or in another unit.
    """
    text = read_text(path, LatencyTableError, "a device's points")
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True)
    points: list[Point] = []
    lines: dict[str, int] = {}
    try:
        header = [name.strip() for name in next(reader, [])]
        unit = _unit_column(header)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise LatencyTableError(f"must have {len(header)} values, has {len(cells)}")
            row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            point = _parse_point(row, unit, resolve)
            if point.name in lines:
                raise LatencyTableError(
                    f"{point.name!r} is given twice, first on line {lines[point.name]}; keep one"
                )
            lines[point.name] = reader.line_num
            points.append(point)
    except (SlimnasError, ValueError, csv.Error) as error:
        raise LatencyTableError(f"{path}:{max(reader.line_num, 1)}: {error}") from error
    _check_units(points, lines, unit, path)
    return tuple(points)


def points_to_csv(points: Iterable[Point]) -> str:
    """Return the CSV text of `points` with every column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(POINT_COLUMNS)
    for point in points:
        counts: Sequence[object] = (
            point.features.counts if point.features else ("",) * len(FEATURE_NAMES)
        )
        head = (point.name, point.model, point.resolution, *counts)
        exact = repr(point.latency_ms).removesuffix(".0")
        how = (exact, f"{point.weight:g}", point.tag, point.source)
        writer.writerow((*head, *how, "yes" if point.used else "no", point.why_not))
    return text.getvalue()


def _unit_column(header: Sequence[str]) -> str:
    for i, name in enumerate(header):
        if name not in KNOWN_COLUMNS:
            raise LatencyTableError(
                f"unknown column {name!r}{suggest(name, KNOWN_COLUMNS)}; a file of points needs "
                "network,latency_ms and may have source and weight"
            )
        if name in header[:i]:
            raise LatencyTableError(f"column {name!r} is given twice; keep one")
    units = [name for name in MS_PER_UNIT if name in header]
    if len(units) != 1 or ("network" in header) == ("name" in header):
        raise LatencyTableError(
            "must have a column network and one of latency_ms, latency_us, latency_s; has "
            + (",".join(header) or "no line")
        )
    return units[0]


def _parse_point(row: Mapping[str, str], unit: str, resolve: Resolve | None) -> Point:
    name = row.get("network") or row.get("name") or ""
    used = {"yes": True, "no": False}.get(row.get("used", "yes"))
    why_not, tag = row.get("why_not", ""), row.get("tag") or "U"
    if not name:
        raise ValueError("network: must not be empty")
    if used is None or used == bool(why_not):
        raise ValueError("used: must be 'yes', or 'no' with a reason in why_not")
    if tag not in TAGS:
        raise ValueError(f"tag: must be one of {', '.join(TAGS)}, got {tag!r}")
    return Point(
        name=name,
        model=row.get("model", ""),
        resolution=int(row.get("resolution") or 0),
        features=_features(row, name, resolve, used=used),
        latency_ms=_positive(row[unit], unit) * MS_PER_UNIT[unit],
        weight=_positive(row.get("weight") or "1", "weight"),
        tag=tag,
        source=row.get("source", ""),
        used=used,
        why_not=why_not,
    )


def _features(
    row: Mapping[str, str], name: str, resolve: Resolve | None, *, used: bool
) -> Features | None:
    given = [column for column in FEATURE_NAMES if row.get(column)]
    if len(given) == len(FEATURE_NAMES):
        counts = {column: int(row[column]) for column in FEATURE_NAMES}
        negative = [column for column, count in counts.items() if count < 0]
        if negative:
            raise ValueError(f"{negative[0]}: must not be negative, got {row[negative[0]]}")
        return Features(**counts)
    if given:
        lacking = next(column for column in FEATURE_NAMES if column not in given)
        raise ValueError(f"{lacking}: a point needs every feature or none; this one is missing")
    if used and resolve is None:
        raise ValueError("a used point needs every feature; run tools/trace_features.py")
    return resolve(name) if used and resolve else None


def _positive(text: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{column}: must be a number, got {text!r}") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{column}: must be finite and positive, got {text!r}")
    return value


def _check_units(points: Sequence[Point], lines: Mapping[str, int], unit: str, path: Path) -> None:
    """Refuse latencies that no device could reach, or that disagree about their unit."""
    rates = {p.name: p.macs_per_ms for p in points if p.is_network and p.used and p.macs_per_ms}
    typical = median(rates.values()) if rates else 0.0
    for name, rate in rates.items():
        where = f"{path}:{lines[name]}: {unit}: {name} would do {rate / 1e6:.3g} GMAC a second"
        if not SLOWEST_MACS_PER_MS <= rate <= FASTEST_MACS_PER_MS:
            raise LatencyTableError(f"{where}, which no device does; is the unit another?")
        if not 1 / MOST_APART <= rate / typical <= MOST_APART:
            raise LatencyTableError(
                f"{where} and half of the others {typical / 1e6:.3g}; are the units mixed?"
            )
