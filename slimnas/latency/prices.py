"""Looks prices up in a table, interpolating between its rows where it must.

Rows that differ in widths only form a group. Where they hold every combination of some values of
each width, the price is linear in each width between them, which is what a layer costs: heads
times head width, input times output width. Elsewhere widths move together (input width, output
width, FFN width), so a group is first projected onto the affine space its rows span; there the
price is linear between neighbours (Delaunay triangulation in two dimensions and more).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.interpolate import LinearNDInterpolator

from slimnas.latency.keys import PriceKey
from slimnas.latency.rows import PriceRow

PriceKind = Literal["exact", "interpolated", "extrapolated"]
Array = npt.NDArray[np.float64]
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Price:
    """The price of one component.

    Attributes:
        latency_ms: its latency.
        error_ms: standard error of that, from the rows it was read from.
        kind: a row of the table, between its rows, or beyond them.
    """

    latency_ms: float
    error_ms: float
    kind: PriceKind


class PriceBook:
    """Prices by key for one table; every answer is computed once.

    Args:
        rows: the table's rows by key, which must not change.
    """

    def __init__(self, rows: Mapping[PriceKey, PriceRow]) -> None:
        self._rows = rows
        self._known: dict[PriceKey, Price | None] = {}

    def find(self, key: PriceKey) -> Price | None:
        """Return the price of `key`, or none if the table has no rows of its kind to go by."""
        if key not in self._known:
            self._known[key] = self._compute(key)
        return self._known[key]

    def nearest(self, key: PriceKey) -> PriceRow | None:
        """Return the row of the same component type closest to `key`, to name in a message."""
        same = [row for row in self._rows.values() if _family(row.key) == _family(key)]
        return min(same, key=lambda row: _distance(row.key, key), default=None)

    def _compute(self, key: PriceKey) -> Price | None:
        row = self._rows.get(key)
        if row is not None:
            return Price(row.latency_ms, row_error_ms(row), "exact")
        group = self._groups.get((key.group, len(key.point)))
        return group.price(np.array(key.point)) if group else None

    @cached_property
    def _groups(self) -> dict[tuple[object, int], _Group]:
        rows = defaultdict(list)
        for key, row in self._rows.items():
            rows[key.group, len(key.point)].append(row)
        return {name: _Group(members) for name, members in rows.items() if len(members) > 1}


def row_error_ms(row: PriceRow) -> float:
    """Standard error of a row's price.

    A measured row's spread is the interquartile range of n timings; the standard error of their
    median is 1.2533 sigma / sqrt(n) with sigma = IQR / 1.349 for a normal distribution.
    """
    if row.kind == "measured":
        return 1.2533 * row.spread_ms / 1.349 / math.sqrt(row.n)
    return row.spread_ms


class _Group:
    """Rows that differ in widths only, in coordinates of the affine space they span."""

    def __init__(self, rows: Iterable[PriceRow]) -> None:
        ordered = sorted(rows, key=lambda row: row.key.point)
        self._points = np.array([row.key.point for row in ordered])
        self._values = np.array([[row.latency_ms, row_error_ms(row)] for row in ordered])
        self._origin = self._points[0]
        extent = np.ptp(self._points, axis=0)
        self._scale = np.where(extent > 0, extent, 1.0)
        centred = (self._points - self._origin) / self._scale
        _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
        self._basis = directions[sizes > TOLERANCE * sizes[0]]

    def price(self, point: Array) -> Price:
        offset = (point - self._origin) / self._scale
        inside = self._basis @ offset
        beside = float(np.linalg.norm(offset - inside @ self._basis))
        if beside < 1e-6:
            latency_ms, error_ms = self._grid(point) if self._grid else self._interpolate(inside)
            if np.isfinite(latency_ms):
                return Price(float(latency_ms), float(error_ms), "interpolated")
        return self._beyond(point)

    @cached_property
    def _grid(self) -> Callable[[Array], Array] | None:
        """Interpolation where the rows are a full grid in two widths or more, else none."""
        varied = np.flatnonzero(np.ptp(self._points, axis=0))
        lines = [np.unique(self._points[:, axis]) for axis in varied]
        if len(lines) < 2 or math.prod(map(len, lines)) != len(self._points):
            return None
        # the rows are sorted, so they are in the grid's order
        corners = self._values.reshape(*map(len, lines), 2)

        def between(point: Array) -> Array:
            values = corners
            for line, x in zip(lines, point[varied], strict=True):
                if not line[0] <= x <= line[-1]:
                    return np.full(2, np.nan)
                i = min(max(int(np.searchsorted(line, x)) - 1, 0), len(line) - 2)
                share = (x - line[i]) / (line[i + 1] - line[i])
                values = (1 - share) * values[i] + share * values[i + 1]
            return values

        return between

    @cached_property
    def _interpolate(self) -> Callable[[Array], Array]:
        places = ((self._points - self._origin) / self._scale) @ self._basis.T
        if places.shape[1] > 1:
            surface = LinearNDInterpolator(places, self._values)
            return lambda inside: np.asarray(surface(inside[None])[0])
        order = np.argsort(places[:, 0])
        line, values = places[order, 0], self._values[order]

        def between(inside: Array) -> Array:
            slack = TOLERANCE * abs(line[-1] - line[0])
            if not line[0] - slack <= inside[0] <= line[-1] + slack:
                return np.full(2, np.nan)
            return np.array([np.interp(inside[0], line, column) for column in values.T])

        return between

    def _beyond(self, point: Array) -> Price:
        """Extend the plane through the nearest rows; never below the nearest row's share."""
        scaled = (self._points - point) / self._scale
        nearest = np.argsort(np.linalg.norm(scaled, axis=1), kind="stable")
        chosen = nearest[: 2 * (len(self._basis) + 1)]
        places = np.column_stack([np.ones(len(chosen)), scaled[chosen]])
        plane, *_ = np.linalg.lstsq(places, self._values[chosen, 0], rcond=None)
        closest_ms, closest_error_ms = self._values[nearest[0]]
        share = min(1.0, float(np.min(point / np.maximum(self._points[nearest[0]], 1.0))))
        latency_ms = max(float(plane[0]), closest_ms * share)
        return Price(latency_ms, closest_error_ms * latency_ms / closest_ms, "extrapolated")


def _family(key: PriceKey) -> tuple[str, str]:
    return key.component, key.type


def _distance(key: PriceKey, other: PriceKey) -> tuple[bool, bool, float]:
    gaps = [abs(a - b) for a, b in zip(key.point, other.point, strict=False)]
    return key.group != other.group, key.resolution != other.resolution, sum(gaps)
