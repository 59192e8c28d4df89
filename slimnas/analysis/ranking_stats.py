"""How far two rankings of the same networks agree, and how sure that is.

Kendall's tau-b and Spearman's rho, both with ties, and percentile bootstrap intervals over the
networks (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

Shapes: n networks, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata, spearmanr

from slimnas.errors import AnalysisError

Array: TypeAlias = "NDArray[np.float64]"
Pair: TypeAlias = "tuple[Sequence[float], Sequence[float]]"
Interval: TypeAlias = "tuple[float, float]"

FEWEST = 3
"""Fewer networks have no ranking to speak of."""

LEVEL = 0.95
"""Share of studies like this one whose interval is meant to hold the truth."""

RESAMPLES = 2000
_AT_ONCE = 1 << 21
"""Pairs of networks compared at once: bounds the memory."""


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of two lists; None where a list is constant and ranks nothing.

    Attributes:
        n: networks ranked.
        tau: Kendall's tau-b.
        tau_interval: its bootstrap interval at `LEVEL`.
        spearman: Spearman's rho.
        spearman_interval: likewise.
    """

    n: int
    tau: float | None
    tau_interval: Interval | None
    spearman: float | None
    spearman_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one key per number."""
        low, high = self.tau_interval or (None, None)
        rho_low, rho_high = self.spearman_interval or (None, None)
        return {
            "n": self.n,
            "tau": self.tau,
            "tau_low": low,
            "tau_high": high,
            "spearman": self.spearman,
            "spearman_low": rho_low,
            "spearman_high": rho_high,
        }


def agreement(x: Sequence[float], y: Sequence[float], *, seed: int) -> Agreement:
    """How far two lists rank the same networks alike.

    Args:
        x: (n,) one number per network.
        y: (n,) likewise.
        seed: of the bootstrap.

    Raises:
        AnalysisError: fewer than three networks, or lists of different lengths.
    """
    return mean_agreement([(x, y)], seed=seed)


def mean_agreement(pairs: Sequence[Pair], *, seed: int) -> Agreement:
    """The mean agreement of several pairs of lists about the same networks.

    A resample takes the same networks in every list.

    Raises:
        AnalysisError: see `agreement`.
    """
    lists = [_checked(pair, len(pairs[0][0])) for pair in pairs]
    n = len(lists[0][0])
    drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    return Agreement(
        n,
        _mean([_kendall(x, y) for x, y in lists]),
        _interval(tau_rows, lists, drawn),
        _mean([_spearman(x, y) for x, y in lists]),
        _interval(spearman_rows, lists, drawn),
    )


def partial_tau(xy: float | None, xz: float | None, yz: float | None) -> float | None:
    """Kendall's partial tau: how far x and y agree beyond what both owe to z.

    (t_xy - t_xz t_yz) / sqrt((1 - t_xz^2) (1 - t_yz^2)); Kendall, "Partial Rank Correlation",
    Biometrika 32 (1942). None where z decides the ranking of x or y alone.

    Args:
        xy: tau of x and y.
        xz: tau of x and z.
        yz: tau of y and z.
    """
    if xy is None or xz is None or yz is None:
        return None
    left = (1 - xz * xz) * (1 - yz * yz)
    return (xy - xz * yz) / math.sqrt(left) if left > 1e-12 else None


def tau_rows(x: Array, y: Array) -> Array:
    """Kendall's tau-b of every pair of rows (B, n); nan where a row is constant."""
    first, second = np.triu_indices(x.shape[1], 1)
    rows = max(1, _AT_ONCE // max(1, len(first)))
    found = [
        _tau(np.sign(a[:, first] - a[:, second]), np.sign(b[:, first] - b[:, second]))
        for a, b in (
            (x[at : at + rows], y[at : at + rows]) for at in range(0, max(1, len(x)), rows)
        )
    ]
    return np.concatenate(found)


def spearman_rows(x: Array, y: Array) -> Array:
    """Spearman's rho of every pair of rows (B, n), equals sharing a rank; nan likewise."""
    a, b = (rankdata(rows, axis=1) for rows in (x, y))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    return _ratio((a * b).sum(axis=1), (a * a).sum(axis=1) * (b * b).sum(axis=1))


def _tau(a: Array, b: Array) -> Array:
    """(concordant - discordant) / sqrt(pairs not tied in x, times those not tied in y)."""
    return _ratio((a * b).sum(axis=1), (a * a).sum(axis=1) * (b * b).sum(axis=1))


def _ratio(above: Array, squared: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(above / np.sqrt(squared), dtype=np.float64)


def _checked(pair: Pair, n: int) -> tuple[Array, Array]:
    x, y = (np.asarray(one, dtype=np.float64) for one in pair)
    if not len(x) == len(y) == n:
        raise AnalysisError(
            f"rankings: must be of the same networks, got {n}, {len(x)} and {len(y)} values"
        )
    if n < FEWEST:
        raise AnalysisError(f"rankings: must be of at least {FEWEST} networks, got {n}; add some")
    return x, y


def _is_constant(values: Array) -> bool:
    return bool((values == values[0]).all())


def _kendall(x: Array, y: Array) -> float | None:
    if _is_constant(x) or _is_constant(y):
        return None
    return float(kendalltau(x, y).statistic)


def _spearman(x: Array, y: Array) -> float | None:
    if _is_constant(x) or _is_constant(y):
        return None
    return float(spearmanr(x, y).statistic)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _interval(
    statistic: Callable[[Array, Array], Array],
    lists: Sequence[tuple[Array, Array]],
    drawn: NDArray[np.int64],
) -> Interval | None:
    """The middle `LEVEL` of the resamples; those that drew one value only say nothing."""
    found = [
        statistic(x[drawn], y[drawn]) for x, y in lists if not (_is_constant(x) or _is_constant(y))
    ]
    if not found:
        return None
    means = np.mean(found, axis=0)
    known = means[np.isfinite(means)]
    if not len(known):
        return None
    low, high = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
