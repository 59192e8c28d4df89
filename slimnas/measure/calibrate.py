"""Corrects a table of parts by whole networks: what blocks cost in the company of others.

A part timed beside copies of itself finds its caches warm and its neighbours' layouts fitting; in
a network it does not. So the prices of parts are a prior, and the latencies of random whole
networks correct them. With x the milliseconds that a network's parts take by the prior, row by
row, and y its measured latency,

    y = b + sum_k x_k (1 + d_k) + noise

where d is a ridge towards zero whose penalty knows that rows err together: all of them, more so
rows of one kind and place, more so those of neighbouring widths. That is the posterior mean of a
Gaussian process over rows; its scales are chosen by the leave-one-out error of the networks, which
has a closed form (Rasmussen and Williams, Gaussian Processes for Machine Learning, 5.4.2). Prices
stay positive: the last solve is a least squares with bounds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import walk
from slimnas.errors import MissingLatencyError
from slimnas.latency.keys import OVERHEAD, PriceKey, price_key, price_parts
from slimnas.latency.prices import row_error_ms
from slimnas.latency.rows import PriceRow
from slimnas.latency.table import LatencyTable

Array = npt.NDArray[np.float64]

COMMON = (0.0, 0.03, 0.1, 0.3)
"""Scales of the correction that all rows share, to choose from: shares of a price."""
OWN = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Scales of the correction of rows of one kind and place, to choose from."""
BEND = 0.5
"""How much of that correction changes with the width, and not for the whole kind."""
REACH = 0.5
"""How far apart in log width corrections of one kind still go together."""
NOISE = 0.01
"""Relative error of a network beside its timing error: what no table of parts explains."""
LEAST = 0.2
"""The least a correction leaves of a price."""
CALL_SCALE = 0.1
"""Scale of the intercept's correction, as a share of the networks' median latency."""


@dataclass(frozen=True)
class NetworkTiming:
    """A whole network's measured latency.

    Attributes:
        architecture: which network.
        latency_ms: median over rounds.
        error_ms: standard error of that median.
    """

    architecture: Architecture
    latency_ms: float
    error_ms: float


@dataclass(frozen=True)
class Calibration:
    """A corrected table and how it was found.

    Attributes:
        table: rows of the same keys as the prior's, and the overhead.
        left_out_ms: per network, what the table says that was corrected by all the others.
        common: chosen scale of the correction that all rows share.
        own: chosen scale of the correction per kind and place.
    """

    table: LatencyTable
    left_out_ms: tuple[float, ...]
    common: float
    own: float


def calibrate(prior: LatencyTable, networks: Sequence[NetworkTiming]) -> Calibration:
    """Correct the prices of `prior` by whole networks.

    Args:
        prior: prices of parts, with the overhead of one call; its rows must cover the networks.
        networks: at least three; more correct better.

    Raises:
        MissingLatencyError: the prior has no price for a part of a network.
        ValueError: fewer than three networks.
    """
    if len(networks) < 3:
        raise ValueError(f"a calibration needs at least 3 networks, got {len(networks)}")
    keys = [row.key for row in prior.rows if row.key != OVERHEAD]
    call_ms = prior.by_key[OVERHEAD].latency_ms if OVERHEAD in prior.by_key else 0.0
    problem = _Problem.of(prior, keys, call_ms, networks)
    scales = min(product(COMMON, OWN), key=problem.score)
    offset_ms, corrections = problem.solve(*scales)
    errors = problem.errors(*scales)
    rows = [
        _corrected(prior.by_key[key], 1 + float(d), float(error))
        for key, d, error in zip(keys, corrections, errors, strict=True)
    ]
    error_ms = problem.call_error(*scales)
    overhead = PriceRow(OVERHEAD, call_ms + offset_ms, error_ms, len(networks), "fitted")
    table = replace(prior, rows=(*rows, overhead))
    return Calibration(table, tuple(map(float, problem.left_out(*scales))), *scales)


def row_shares(architecture: Architecture, table: LatencyTable) -> Mapping[PriceKey, float]:
    """Return how often each row of `table` counts in the price of `architecture`.

    Raises:
        MissingLatencyError: a part that the table cannot price without extrapolation.
    """
    found: defaultdict[PriceKey, float] = defaultdict(float)
    for component in walk(architecture):
        for part in price_parts(component):
            key = price_key(part)
            shares = table.prices.shares(key)
            if shares is None:
                raise MissingLatencyError(
                    f"architecture {architecture.name}: the latency table "
                    f"{table.device.name!r} has no price for {part.name}: {key}"
                )
            for row, share in shares.items():
                found[row] += share
    return found


@dataclass(frozen=True)
class _Problem:
    """The regression in relative units: every line is divided by the network's latency.

    Attributes:
        parts: (networks, rows), milliseconds by the prior over measured milliseconds.
        call: (networks,), one millisecond of intercept over measured milliseconds.
        missing: (networks,), what the prior lacks, as a share.
        noise: (networks,), relative standard error.
        together: (rows, rows), correlation of rows of one kind.
        timing: (rows,), relative standard error of the prior's own timing.
        call_ms: intercept of the prior.
        call_scale_ms: scale of its correction.
        latencies_ms: (networks,), measured.
    """

    parts: Array
    call: Array
    missing: Array
    noise: Array
    together: Array
    timing: Array
    call_ms: float
    call_scale_ms: float
    latencies_ms: Array

    @classmethod
    def of(
        cls,
        prior: LatencyTable,
        keys: Sequence[PriceKey],
        call_ms: float,
        networks: Sequence[NetworkTiming],
    ) -> _Problem:
        latencies = np.array([one.latency_ms for one in networks])
        place = {key: i for i, key in enumerate(keys)}
        parts = np.zeros((len(networks), len(keys)))
        for line, one in zip(parts, networks, strict=True):
            for key, share in row_shares(one.architecture, prior).items():
                line[place[key]] = share * prior.by_key[key].latency_ms
        relative = parts / latencies[:, None]
        noise = np.array([one.error_ms for one in networks]) / latencies
        rows = [prior.by_key[key] for key in keys]
        return cls(
            parts=relative,
            call=1 / latencies,
            missing=1 - relative.sum(axis=1) - call_ms / latencies,
            noise=np.hypot(NOISE, noise),
            together=_together(keys),
            timing=np.array([row_error_ms(row) / row.latency_ms for row in rows]),
            call_ms=call_ms,
            call_scale_ms=CALL_SCALE * float(np.median(latencies)),
            latencies_ms=latencies,
        )

    def covariance(self, common: float, own: float) -> Array:
        """Of the corrections of the rows, before any network is seen."""
        every: Array = common**2 + own**2 * self.together + np.diag(self.timing**2)
        return every

    def score(self, scales: tuple[float, float]) -> float:
        """Mean squared relative leave-one-out error."""
        return float(np.mean((self.left_out(*scales) / self.latencies_ms - 1) ** 2))

    def left_out(self, common: float, own: float) -> Array:
        """Latency of every network in milliseconds, predicted from all the others."""
        inverse = np.linalg.inv(self._gram(common, own))
        residual = inverse @ self.missing / np.diag(inverse)
        return np.asarray(self.latencies_ms * (1 - residual))

    def solve(self, common: float, own: float) -> tuple[float, Array]:
        """Correction of the intercept in milliseconds, and of every row as a share, in bounds."""
        offset, corrections = self.posterior(common, own)
        if offset >= 0 and corrections.min(initial=0.0) >= LEAST - 1:
            return offset, corrections
        return self._bounded(self.covariance(common, own))

    def posterior(self, common: float, own: float) -> tuple[float, Array]:
        """The same without bounds."""
        root = _root(self.covariance(common, own))
        design = np.column_stack([self.call * self.call_scale_ms, self.parts @ root])
        gram = design @ design.T + np.diag(self.noise**2)
        whitened = design.T @ np.linalg.solve(gram, self.missing)
        return self.call_scale_ms * float(whitened[0]), np.asarray(root @ whitened[1:])

    def errors(self, common: float, own: float) -> Array:
        """Standard error of every row's correction, after the networks."""
        before = self.covariance(common, own)
        told = before @ self.parts.T
        after = before - told @ np.linalg.solve(self._gram(common, own), told.T)
        return np.asarray(np.sqrt(np.clip(np.diag(after), 0.0, None)))

    def call_error(self, common: float, own: float) -> float:
        """Standard error of the intercept in milliseconds."""
        told = self.call * self.call_scale_ms**2
        after = self.call_scale_ms**2 - told @ np.linalg.solve(self._gram(common, own), told)
        return math.sqrt(max(float(after), 0.0))

    def _gram(self, common: float, own: float) -> Array:
        rows = self.parts @ self.covariance(common, own) @ self.parts.T
        call = np.outer(self.call, self.call) * self.call_scale_ms**2
        return np.asarray(rows + call + np.diag(self.noise**2))

    def _bounded(self, covariance: Array) -> tuple[float, Array]:
        """The same least squares with prices that stay positive."""
        count = len(covariance)
        ridge = np.linalg.inv(_root(covariance + 1e-8 * np.eye(count)))
        penalty = np.zeros((count + 1, count + 1))
        penalty[0, 0], penalty[1:, 1:] = 1 / self.call_scale_ms, ridge
        lines = np.column_stack([self.call, self.parts]) / self.noise[:, None]
        system = np.vstack([lines, penalty])
        wanted = np.concatenate([self.missing / self.noise, np.zeros(count + 1)])
        lower = np.concatenate([[0.0], np.full(count, LEAST - 1)])
        found = lsq_linear(system, wanted, bounds=(lower, np.inf)).x
        return float(found[0]), found[1:]


def _root(covariance: Array) -> Array:
    """A matrix whose product with its transpose is `covariance`."""
    sizes, directions = np.linalg.eigh(covariance)
    return np.asarray(directions * np.sqrt(np.clip(sizes, 0.0, None)))


def _together(keys: Sequence[PriceKey]) -> Array:
    """Correlation of rows: one for a row with itself, none for rows of another kind or place."""
    found = np.zeros((len(keys), len(keys)))
    for members in _kinds(keys):
        widths = np.log(np.array([keys[i].point for i in members]).clip(min=1.0))
        apart = ((widths[:, None] - widths[None]) ** 2).sum(axis=2)
        near = (1 - BEND) + BEND * np.exp(-apart / (2 * REACH**2))
        found[np.ix_(members, members)] = near
    return found


def _kinds(keys: Sequence[PriceKey]) -> Iterator[list[int]]:
    members: defaultdict[object, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        members[key.component, key.type, key.resolution].append(i)
    # Rows of one kind may differ in the number of widths they are told apart by.
    for places in members.values():
        by_axes: defaultdict[int, list[int]] = defaultdict(list)
        for i in places:
            by_axes[len(keys[i].point)].append(i)
        yield from by_axes.values()


def _corrected(row: PriceRow, factor: float, error: float) -> PriceRow:
    """A row at its corrected price, with the errors of its timing and of the correction."""
    error_ms = math.hypot(row_error_ms(row) * factor, row.latency_ms * error)
    return PriceRow(row.key, row.latency_ms * factor, error_ms, row.n, "fitted")
