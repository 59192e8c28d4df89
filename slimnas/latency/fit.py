"""Fits the device model to published whole-network latencies and writes an estimated table.

`points.csv` beside a table holds one network per line: its features, its published latency, how
that number is known and where it is from, whether it is used and if not, why not. The fit
minimises the squared relative error of all used points, each with the same weight, with
non-negative coefficients; multiply-adds cannot be cheaper than the chip's stated peak rate.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scipy.stats import spearmanr

from slimnas._files import read_text
from slimnas.arch.documents import load_document, parse_spec
from slimnas.errors import LatencyTableError, SpecError
from slimnas.latency.device_model import (
    COEFFICIENT_NAMES,
    FEATURE_NAMES,
    SCALES,
    Features,
    component_features,
    envelope,
    predict_ms,
)
from slimnas.latency.keys import OVERHEAD, PriceKey, price_key
from slimnas.latency.rows import DIGITS, PriceRow
from slimnas.latency.table import (
    DEVICE_FILE,
    SCHEMA,
    WHAT,
    DeviceInfo,
    ErrorFigure,
    IntervalInfo,
    LatencyTable,
)

POINTS_FILE = "points.csv"
POINT_COLUMNS = (
    "name",
    "model",
    "resolution",
    *FEATURE_NAMES,
    "latency_ms",
    "tag",
    "source",
    "used",
    "why_not",
)
TAGS = {
    "F": "read off a figure the authors published",
    "R": "printed in the authors' repository",
    "T": "printed in a text about the paper",
}
FAMILY = ("efficientformer_l1", "efficientformer_l3", "efficientformer_l7")
LEVEL = 0.9

PEAK_MACS_PER_MS = 5.5e9
"""Apple states 11 trillion operations per second for the A14's Neural Engine, two per MAC."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One published latency.

    Attributes:
        name: the network, or the step between two networks.
        model: the timm model its features were traced from; empty where there is none.
        features: what it computes; none where it was not traced.
        latency_ms: the published latency; of a step, the difference.
        tag: how the number is known, a key of `TAGS`.
        used: whether the fit uses it.
        why_not: the reason if not.
    """

    name: str
    model: str
    resolution: int
    features: Features | None
    latency_ms: float
    tag: str
    source: str
    used: bool
    why_not: str

    @property
    def is_network(self) -> bool:
        """Whether it is a whole network and not the step between two."""
        return self.features is not None and self.features.networks == 1


@dataclass(frozen=True)
class Fit:
    """A fitted device model.

    Attributes:
        points: the points it was fitted to.
        coefficients: in the order of `COEFFICIENT_NAMES`.
        left_out: for each point, the coefficients fitted without it.
    """

    points: tuple[Point, ...]
    coefficients: tuple[float, ...]
    left_out: tuple[tuple[float, ...], ...]

    def residuals(self, names: Sequence[str] | None = None) -> Array:
        """Leave-one-out estimate over published latency minus one, for whole networks."""
        return np.array(
            [
                _predict(point, coefficients) / point.latency_ms - 1
                for point, coefficients in zip(self.points, self.left_out, strict=True)
                if point.is_network and (names is None or point.name in names)
            ]
        )


def load_points(path: Path) -> tuple[Point, ...]:
    """Read `points.csv`.

    Raises:
        LatencyTableError: a missing column or a damaged line, named.
    """
    text = read_text(path, LatencyTableError, "the points of an estimated latency table")
    reader = csv.DictReader(io.StringIO(text), strict=True)
    if tuple(reader.fieldnames or ()) != POINT_COLUMNS:
        raise LatencyTableError(f"{path}:1: columns must be {','.join(POINT_COLUMNS)}")
    points = []
    for cells in reader:
        try:
            points.append(_parse_point(cells))
        except (ValueError, TypeError, AttributeError) as error:
            raise LatencyTableError(f"{path}:{reader.line_num}: {error}") from error
    return tuple(points)


def fit_points(points: Sequence[Point]) -> Fit:
    """Fit the device model to the used points, and once more without each of them.

    Raises:
        LatencyTableError: fewer used points than coefficients they could determine.
    """
    used = tuple(point for point in points if point.used)
    if len(used) <= len(COEFFICIENT_NAMES):
        raise LatencyTableError(
            f"the device model has {len(COEFFICIENT_NAMES)} coefficients and needs more points "
            f"than that; {len(used)} are used"
        )
    left_out = tuple(_solve([*used[:i], *used[i + 1 :]]) for i in range(len(used)))
    return Fit(used, _solve(used), left_out)


def fit_table(folder: Path) -> LatencyTable:
    """Fit the points of a table's folder and price every component of the shipped spaces.

    The description of the device is taken from the folder's `device.yaml`; coefficients, error
    figures, interval and rows are computed.

    Raises:
        LatencyTableError: damaged points or description.
    """
    fit = fit_points(load_points(folder / POINTS_FILE))
    path = folder / DEVICE_FILE
    try:
        described = load_document(path, SCHEMA, WHAT)
        described.pop("rows", None)
        described["model"] = dict(zip(COEFFICIENT_NAMES, fit.coefficients, strict=True))
        described["errors"] = [figure.model_dump() for figure in error_figures(fit)]
        described["interval"] = interval(fit).model_dump()
        device = parse_spec(DeviceInfo, described, source=str(path))
    except SpecError as error:
        raise LatencyTableError(str(error)) from error
    priced = [(price_key(each), component_features(each)) for each in envelope()]
    rows = [_price(key, features, fit) for key, features in priced]
    return LatencyTable(device, (_price(OVERHEAD, Features(networks=1), fit), *rows), str(folder))


def error_figures(fit: Fit) -> tuple[ErrorFigure, ...]:
    """Leave-one-out error over all networks, then over the EfficientFormer family."""
    everything, family = fit.residuals(), fit.residuals(FAMILY)
    networks = [(p, c) for p, c in zip(fit.points, fit.left_out, strict=True) if p.is_network]
    estimates = [_predict(*pair) for pair in networks]
    rank = spearmanr(estimates, [point.latency_ms for point, _ in networks]).statistic
    return (
        _figure("leave-one-out, all networks", everything, round(float(rank), 3)),
        _figure("leave-one-out, EfficientFormer L1, L3, L7", family, None),
    )


def interval(fit: Fit) -> IntervalInfo:
    """Symmetric relative interval from the leave-one-out residuals.

    The half-width is the split-conformal quantile of |published / estimated - 1|: the
    ceil((n + 1) x level)-th smallest, the largest where n is too small for the level, and the
    level is then n / (n + 1).
    """
    sizes = np.sort(np.abs(1 / (1 + fit.residuals()) - 1))
    count = len(sizes)
    rank = min(math.ceil((count + 1) * LEVEL - 1e-9), count)
    half = round(100 * float(sizes[rank - 1]), 1)
    return IntervalInfo(
        level=round(min(LEVEL, count / (count + 1)), 3),
        low_percent=half,
        high_percent=half,
        basis=f"the {rank}-th smallest of {count} leave-one-out errors |published / estimated - 1|",
    )


def _parse_point(cells: dict[str, str]) -> Point:
    counts = [cells[name] for name in FEATURE_NAMES]
    used = {"yes": True, "no": False}.get(cells["used"])
    latency_ms = float(cells["latency_ms"])
    if used is None or used == bool(cells["why_not"]):
        raise ValueError("used: must be 'yes', or 'no' with a reason in why_not")
    if cells["tag"] not in TAGS:
        raise ValueError(f"tag: must be one of {', '.join(TAGS)}, got {cells['tag']!r}")
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        raise ValueError(f"latency_ms: must be finite and positive, got {cells['latency_ms']!r}")
    if used and not all(counts):
        raise ValueError("a used point needs every feature; run tools/trace_features.py")
    return Point(
        name=cells["name"],
        model=cells["model"],
        resolution=int(cells["resolution"]),
        features=Features(*map(int, counts)) if all(counts) else None,
        latency_ms=latency_ms,
        tag=cells["tag"],
        source=cells["source"],
        used=used,
        why_not=cells["why_not"],
    )


def _predict(point: Point, coefficients: Sequence[float]) -> float:
    if point.features is None:
        raise LatencyTableError(f"{point.name}: has no features; run tools/trace_features.py")
    return predict_ms(point.features, coefficients)


def _solve(points: Sequence[Point]) -> tuple[float, ...]:
    """Non-negative least squares on relative errors, six significant digits kept."""
    latencies = np.array([point.latency_ms for point in points])
    counts = np.array([point.features.counts for point in points if point.features], dtype=float)
    relative = counts / np.array(SCALES) / latencies[:, None]
    floor = np.zeros(len(SCALES))
    macs = FEATURE_NAMES.index("dense_macs")
    floor[macs] = SCALES[macs] / PEAK_MACS_PER_MS
    beyond_floor, _ = nnls(relative, 1 - relative @ floor)
    return tuple(float(f"{value:.6g}") for value in floor + beyond_floor)


def _price(key: PriceKey, features: Features, fit: Fit) -> PriceRow:
    """Price by the full fit, and the jackknife standard error over the fits without one point."""
    latency_ms = predict_ms(features, fit.coefficients)
    count = len(fit.points)
    varied = np.array([predict_ms(features, coefficients) for coefficients in fit.left_out])
    spread = math.sqrt((count - 1) / count * float(np.sum((varied - varied.mean()) ** 2)))
    return PriceRow(key, round(latency_ms, DIGITS), round(spread, DIGITS), count, "fitted")


def _figure(what: str, residuals: Array, spearman: float | None) -> ErrorFigure:
    percent = 100 * residuals
    return ErrorFigure(
        what=what,
        networks=len(residuals),
        mape_percent=round(float(np.abs(percent).mean()), 1),
        bias_percent=round(float(percent.mean()), 1),
        max_percent=round(float(np.abs(percent).max()), 1),
        spearman=spearman,
    )
