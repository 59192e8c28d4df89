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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial import Delaunay

from slimnas.latency.keys import PriceKey
from slimnas.latency.rows import PriceRow

PriceKind = Literal["exact", "interpolated", "extrapolated"]
Array = npt.NDArray[np.float64]
TOLERANCE = 1e-9
BESIDE = 1e-6
"""How far from the space the rows span a point counts as inside, in shares of its extent."""


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

    def shares(self, key: PriceKey) -> Mapping[PriceKey, float] | None:
        """Return the rows that the price of `key` is read from, each with its share.

        The price is the sum of the rows' prices times their shares, which add up to one: of one
        row where the table has it, of neighbours between rows. None beyond them.
        """
        if key in self._rows:
            return {key: 1.0}
        group = self._group(key)
        return group.shares(np.array(key.point)) if group else None

    def nearest(self, key: PriceKey) -> PriceRow | None:
        """Return the row of the same component type closest to `key`, to name in a message."""
        same = [row for row in self._rows.values() if _family(row.key) == _family(key)]
        return min(same, key=lambda row: _distance(row.key, key), default=None)

    def _compute(self, key: PriceKey) -> Price | None:
        row = self._rows.get(key)
        if row is not None:
            return Price(row.latency_ms, row_error_ms(row), "exact")
        group = self._group(key)
        return group.price(np.array(key.point)) if group else None

    def _group(self, key: PriceKey) -> _Group | None:
        return self._groups.get((key.group, len(key.point)))

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
        self._keys = [row.key for row in ordered]
        self._points = np.array([row.key.point for row in ordered])
        self._values = np.array([[row.latency_ms, row_error_ms(row)] for row in ordered])
        self._origin = self._points[0]
        extent = np.ptp(self._points, axis=0)
        self._scale = np.where(extent > 0, extent, 1.0)
        centred = (self._points - self._origin) / self._scale
        _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
        self._basis = directions[sizes > TOLERANCE * sizes[0]]

    def price(self, point: Array) -> Price:
        corners = self._corners(point)
        if corners is None:
            return self._beyond(point)
        latency_ms, error_ms = sum(share * self._values[i] for i, share in corners.items())
        return Price(float(latency_ms), float(error_ms), "interpolated")

    def shares(self, point: Array) -> Mapping[PriceKey, float] | None:
        corners = self._corners(point)
        return None if corners is None else {self._keys[i]: x for i, x in corners.items()}

    def _corners(self, point: Array) -> Mapping[int, float] | None:
        """Rows around `point`, by index, with their shares; none outside of them."""
        offset = (point - self._origin) / self._scale
        inside = self._basis @ offset
        if float(np.linalg.norm(offset - inside @ self._basis)) > BESIDE:
            return None
        if self._grid is not None:
            varied, lines = self._grid
            return _in_grid(lines, point[varied])
        if len(self._basis) == 1:
            order = np.argsort(self._places[:, 0])
            along = _in_grid([self._places[order, 0]], inside)
            return None if along is None else {int(order[i]): x for i, x in along.items()}
        return _in_triangles(self._triangles, inside)

    @cached_property
    def _grid(self) -> tuple[npt.NDArray[np.intp], list[Array]] | None:
        """Axes and lines of a full grid in two widths or more, else none; the rows are sorted,
        so they are in the grid's order."""
        varied = np.flatnonzero(np.ptp(self._points, axis=0))
        lines = [np.unique(self._points[:, axis]) for axis in varied]
        full = len(lines) > 1 and math.prod(map(len, lines)) == len(self._points)
        return (varied, lines) if full else None

    @cached_property
    def _places(self) -> Array:
        """The rows in coordinates of the space they span."""
        places: Array = ((self._points - self._origin) / self._scale) @ self._basis.T
        return places

    @cached_property
    def _triangles(self) -> Delaunay:
        return Delaunay(self._places)

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


def _in_grid(lines: Sequence[Array], point: Array) -> dict[int, float] | None:
    """The corners of the cell of a grid that holds `point`, by flat index, with their shares."""
    along = []
    for line, x in zip(lines, point, strict=True):
        slack = TOLERANCE * abs(line[-1] - line[0])
        if not line[0] - slack <= x <= line[-1] + slack:
            return None
        i = min(max(int(np.searchsorted(line, x)) - 1, 0), len(line) - 2)
        share = min(max(float((x - line[i]) / (line[i + 1] - line[i])), 0.0), 1.0)
        along.append([(i, 1 - share), (i + 1, share)])
    sizes = tuple(map(len, lines))
    corners = {}
    for corner in product(*along):
        share = math.prod(part for _, part in corner)
        if share:
            corners[int(np.ravel_multi_index([i for i, _ in corner], sizes))] = share
    return corners


def _in_triangles(triangles: Delaunay, place: Array) -> dict[int, float] | None:
    """The corners of the triangle that holds `place`, with its barycentric coordinates."""
    found = int(triangles.find_simplex(place))
    if found < 0:
        return None
    transform = triangles.transform[found]
    first = transform[:-1] @ (place - transform[-1])
    shares = [*first, 1 - first.sum()]
    return {int(i): float(x) for i, x in zip(triangles.simplices[found], shares, strict=True)}


def _family(key: PriceKey) -> tuple[str, str]:
    return key.component, key.type


def _distance(key: PriceKey, other: PriceKey) -> tuple[bool, bool, float]:
    gaps = [abs(a - b) for a, b in zip(key.point, other.point, strict=False)]
    return key.group != other.group, key.resolution != other.resolution, sum(gaps)
