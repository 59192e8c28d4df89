"""Fits a device model to whole-network latencies and writes an estimated table.

The fit minimises the squared relative error of the used points, each times its weight, with
non-negative coefficients. No multiply-add is priced below the chip's stated peak rate where that
is known. Where a prior is given (another table of the same chip, say) it is scaled to the points
as a whole, and a coefficient pays for leaving it. Every point is left out once, from the scaling
too: those errors are what the table states.
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

from slimnas._files import atomic_write_text
from slimnas.arch.documents import load_document, parse_spec
from slimnas.errors import LatencyTableError, SpecError, suggest
from slimnas.latency.device_model import MODELS, Term, envelope, term_counts
from slimnas.latency.features import Features, component_features
from slimnas.latency.keys import OVERHEAD, PriceKey, price_key
from slimnas.latency.points import POINTS_FILE, Point, load_points, points_to_csv
from slimnas.latency.rows import DIGITS, PriceRow
from slimnas.latency.table import (
    DEVICE_FILE,
    SCHEMA,
    WHAT,
    DeviceInfo,
    ErrorFigure,
    FitInfo,
    IntervalInfo,
    LatencyTable,
)

LEFT_OUT_FILE = "leave_one_out.csv"
LEFT_OUT_COLUMNS = (
    "name",
    "used",
    "weight",
    "latency_ms",
    "fitted_ms",
    "fitted_error_percent",
    "left_out_ms",
    "left_out_error_percent",
)
FAMILY = ("efficientformer_l1", "efficientformer_l3", "efficientformer_l7")
FEWEST = 3
"""Points without which leaving one out says nothing, even beside a prior."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PointError:
    """How far the model is from one point.

    Attributes:
        point: the point.
        fitted_ms: estimate by the full fit; none for a point it does not use.
        left_out_ms: estimate by the fit without the point.
    """

    point: Point
    fitted_ms: float | None
    left_out_ms: float

    @property
    def fitted_error(self) -> float | None:
        """Relative error of the full fit."""
        return None if self.fitted_ms is None else self.fitted_ms / self.point.latency_ms - 1

    @property
    def left_out_error(self) -> float:
        """Relative error of the fit that has not seen the point."""
        return self.left_out_ms / self.point.latency_ms - 1


@dataclass(frozen=True)
class Fit:
    """A fitted device model.

    Attributes:
        points: every point given, used or not.
        info: how it was fitted.
        coefficients: in the order of the model's terms.
        left_out: for each used point in order, the coefficients fitted without it.
    """

    points: tuple[Point, ...]
    info: FitInfo
    coefficients: tuple[float, ...]
    left_out: tuple[tuple[float, ...], ...]

    @property
    def used(self) -> tuple[Point, ...]:
        """The points it was fitted to."""
        return tuple(point for point in self.points if point.used)

    @property
    def model(self) -> dict[str, float]:
        """Coefficients by name."""
        terms = MODELS[self.info.model]
        names = [term.coefficient for term in terms]
        return dict(zip(names, self.coefficients, strict=True))

    def errors(self) -> tuple[PointError, ...]:
        """Error at every used point, then at the others that were counted."""
        terms = MODELS[self.info.model]
        used = [
            PointError(point, *(_dot(point, c, terms) for c in (self.coefficients, without)))
            for point, without in zip(self.used, self.left_out, strict=True)
        ]
        others = [
            PointError(point, None, _dot(point, self.coefficients, terms))
            for point in self.points
            if not point.used and point.features
        ]
        return (*used, *others)

    def residuals(self, names: Sequence[str] | None = None) -> Array:
        """Leave-one-out errors of the whole networks it uses."""
        return np.array(
            [
                error.left_out_error
                for error in self.errors()
                if error.point.used
                and error.point.is_network
                and (names is None or error.point.name in names)
            ]
        )


def fit_points(points: Sequence[Point], info: FitInfo) -> Fit:
    """Fit the device model to the used points, and once more without each of them.

    Raises:
        LatencyTableError: an unknown model, or fewer used points than they could determine
            coefficients.
    """
    if info.model not in MODELS:
        raise LatencyTableError(
            f"device model {info.model!r}{suggest(info.model, MODELS)}: must be one of "
            + ", ".join(MODELS)
        )
    used = tuple(point for point in points if point.used)
    counted = _counts(used, MODELS[info.model])
    held = (_prior(info) > 0) & (info.strength > 0)
    free = int(np.sum(np.any(counted > 0, axis=0) & ~held)) if len(used) else 0
    needed = max(free + 1, FEWEST)
    if len(used) < needed:
        raise LatencyTableError(
            f"{len(used)} points are too few: the {info.model} model has {free} coefficients that "
            f"these networks determine and needs {needed} points or more; add points, or hold the "
            "coefficients to a similar device's table with --prior"
        )
    left_out = tuple(_solve([*used[:i], *used[i + 1 :]], info) for i in range(len(used)))
    return Fit(tuple(points), info, _solve(used, info), left_out)


def fitted_table(fit: Fit, description: DeviceInfo, source: str = "") -> LatencyTable:
    """Price every component of the shipped spaces by a fit.

    Args:
        fit: the fitted model.
        description: the device; its figures are replaced by the fit's.
        source: the folder it belongs to, if there is one.
    """
    device = description.model_copy(
        update={
            "kind": "estimated",
            "fit": fit.info,
            "model": fit.model,
            "errors": error_figures(fit),
            "interval": interval(fit),
        }
    )
    priced = [(OVERHEAD, Features(networks=1))] if fit.model["overhead_ms"] > 0 else []
    priced += [(price_key(each), component_features(each)) for each in envelope()]
    return LatencyTable(device, _price(priced, fit), source)


def refit(folder: Path) -> tuple[LatencyTable, Fit]:
    """Fit the points of a table's folder again, as its `device.yaml` says.

    Where the table is held to another that lies beside it, that one is read again too.

    Raises:
        LatencyTableError: damaged points or description, or a table that is not fitted.
    """
    path = folder / DEVICE_FILE
    try:
        described = load_document(path, SCHEMA, WHAT)
        described.pop("rows", None)
        device = parse_spec(DeviceInfo, described, source=str(path))
    except SpecError as error:
        raise LatencyTableError(str(error)) from error
    if device.fit is None:
        raise LatencyTableError(f"{path}: fit: is missing; only a fitted table is fitted again")
    info = device.fit
    beside = folder.parent / info.prior
    if info.prior and (beside / DEVICE_FILE).is_file():
        prior = LatencyTable.load(beside).device.model
        info = info.model_copy(update={"held_to": prior})
    fit = fit_points(load_points(folder / POINTS_FILE), info)
    return fitted_table(fit, device, str(folder)), fit


def save_fitted(table: LatencyTable, fit: Fit, folder: Path) -> None:
    """Write a fitted table with its points and its leave-one-out errors beside it.

    Raises:
        RunFolderError: the place cannot be written.
    """
    atomic_write_text(folder / POINTS_FILE, points_to_csv(fit.points))
    atomic_write_text(folder / LEFT_OUT_FILE, errors_to_csv(fit))
    table.save(folder)


def errors_to_csv(fit: Fit) -> str:
    """Return the CSV text of every point's error, fitted and left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LEFT_OUT_COLUMNS)
    for error in fit.errors():
        point, fitted = error.point, error.fitted_error
        writer.writerow(
            (
                point.name,
                "yes" if point.used else "no",
                f"{point.weight:g}",
                f"{point.latency_ms:.9g}",
                "" if error.fitted_ms is None else f"{error.fitted_ms:.4f}",
                "" if fitted is None else f"{100 * fitted:.1f}",
                f"{error.left_out_ms:.4f}",
                f"{100 * error.left_out_error:.1f}",
            )
        )
    return text.getvalue()


def error_figures(fit: Fit) -> tuple[ErrorFigure, ...]:
    """Leave-one-out error over all networks, then over the EfficientFormer family."""
    seen = [error for error in fit.errors() if error.point.used and error.point.is_network]
    estimates, truth = [e.left_out_ms for e in seen], [e.point.latency_ms for e in seen]
    rank = float(spearmanr(estimates, truth).statistic) if len(set(truth)) > 1 else math.nan
    spearman = round(rank, 3) if math.isfinite(rank) else None
    figures = [_figure("leave-one-out, all networks", fit.residuals(), spearman)]
    family = [name for name in FAMILY if any(error.point.name == name for error in seen)]
    if family:
        named = ", ".join(name.rpartition("_")[2].upper() for name in family)
        what = f"leave-one-out, EfficientFormer {named}"
        figures.append(_figure(what, fit.residuals(family), None))
    return tuple(figures)


def interval(fit: Fit) -> IntervalInfo:
    """Symmetric relative interval from the leave-one-out residuals."""
    errors = [float(error) for error in 1 / (1 + fit.residuals()) - 1]
    return IntervalInfo.conformal(
        errors, "leave-one-out errors |published / estimated - 1|", digits=1
    )


def _counts(points: Sequence[Point], terms: Sequence[Term]) -> Array:
    return np.array([term_counts(_counted(point), terms) for point in points], dtype=float)


def _counted(point: Point) -> Features:
    if point.features is None:
        raise LatencyTableError(f"{point.name}: has no features; run tools/trace_features.py")
    return point.features


def _dot(point: Point, coefficients: Sequence[float], terms: Sequence[Term]) -> float:
    return float(np.dot(term_counts(_counted(point), terms), coefficients))


def _prior(info: FitInfo) -> Array:
    terms = MODELS[info.model]
    unknown = set(info.held_to) - {term.coefficient for term in terms}
    if unknown:
        raise LatencyTableError(
            f"prior {info.prior!r}: has a coefficient {min(unknown)!r} that the {info.model} model "
            "lacks; take a prior of the same model"
        )
    return np.array([info.held_to.get(term.coefficient, 0.0) for term in terms])


def _solve(points: Sequence[Point], info: FitInfo) -> tuple[float, ...]:
    """Non-negative least squares on relative errors, six significant digits kept.

    A coefficient whose prior is zero is not held to it: the prior's points did not show it.
    """
    terms = MODELS[info.model]
    latencies = np.array([point.latency_ms for point in points])
    roots = np.sqrt([point.weight for point in points])
    matrix = _counts(points, terms) / latencies[:, None] * roots[:, None]
    floor, prior = np.zeros(len(terms)), _prior(info)
    if info.peak_gmacs_per_s is not None:
        ms_per_billion = 1e3 / info.peak_gmacs_per_s
        priced = [term.coefficient.endswith("_macs") for term in terms]
        floor = np.where(priced, ms_per_billion, 0.0)
    expected = matrix @ prior
    if np.any(expected > 0):
        prior = prior * (expected @ roots) / (expected @ expected)
    wanted = roots - matrix @ floor
    held = (prior > 0) & (info.strength > 0)
    scale = np.sqrt(info.strength) / np.where(held, prior, 1.0)
    pulls = np.diag(np.where(held, scale, 0.0))
    beyond_floor, _ = nnls(
        np.vstack([matrix, pulls]), np.concatenate([wanted, pulls @ (prior - floor)])
    )
    return tuple(float(f"{value:.6g}") for value in floor + beyond_floor)


def _price(priced: Sequence[tuple[PriceKey, Features]], fit: Fit) -> tuple[PriceRow, ...]:
    """Price by the full fit, and the jackknife standard error over the fits without one point."""
    terms, count = MODELS[fit.info.model], len(fit.left_out)
    counts = np.array([term_counts(features, terms) for _, features in priced])
    latencies_ms = counts @ np.array(fit.coefficients)
    varied = counts @ np.array(fit.left_out).T
    deviations = varied - varied.mean(axis=1, keepdims=True)
    spreads_ms = np.sqrt((count - 1) / count * np.sum(deviations**2, axis=1))
    free = next(
        (k for (k, _), ms in zip(priced, latencies_ms, strict=True) if _rounded(ms) <= 0), 0
    )
    if free:
        raise LatencyTableError(f"the points do not tell what {free} costs; add other networks")
    return tuple(
        PriceRow(key, _rounded(ms), _rounded(spread), count, "fitted")
        for (key, _), ms, spread in zip(priced, latencies_ms, spreads_ms, strict=True)
    )


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)


def _figure(what: str, residuals: Array, spearman: float | None) -> ErrorFigure:
    percent = 100 * residuals
    return ErrorFigure(
        what=what,
        networks=len(residuals),
        mape_percent=round(float(np.abs(percent).mean()), 1),
        bias_percent=round(float(percent.mean()), 1),
        max_percent=round(float(np.abs(percent).max()), 1),
        median_percent=round(float(np.median(np.abs(percent))), 1),
        spearman=spearman,
    )
