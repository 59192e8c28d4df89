"""Does a width depend on depth? Piecewise-constant fits of per-block values, one to three levels.

The number of levels is decided by three rules, all of which more than one level must pass:

1. The Bayesian information criterion, N log(RSS / N) + 2 k log N for k levels (k levels, k - 1
   places and a variance), is lowest. RSS / N counts at least as much as rounding to the hardware's
   step would make, step**2 / 12: finer differences could not be built.
2. The same values in another order of blocks explain as much in at most 5 % of random orders. BIC
   alone takes the best of many places for granted and finds levels in noise.
3. Neighbouring levels differ after rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

MOST = 3
FEWEST_BLOCKS = 2
"""Blocks of a segment."""

ORDERS = 1999
SIGNIFICANCE = 0.05

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """The best fit with one number of levels.

    Attributes:
        levels: how many.
        starts: first value of each segment; the first is 0.
        explained: share of the variance of the values that the levels explain.
        bic: Bayesian information criterion, lower is better.
        chance: share of random orders that explain as much; 1 for one level.
        accepted: whether all rules let it stand.
    """

    levels: int
    starts: tuple[int, ...]
    explained: float
    bic: float
    chance: float
    accepted: bool


def fit_levels(
    values: Sequence[float],
    *,
    step: float,
    rounded: Callable[[float], float],
    breaks: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Fit, ...]:
    """Fit one, two and three levels to `values` in their order.

    Args:
        values: one per block.
        step: the finest difference that can be built.
        rounded: what a level becomes.
        breaks: places where a segment may begin (stages); None for any that leaves every segment
            two blocks.
        seed: of the random orders.

    Returns:
        One fit per number of levels that is possible; the one to use is `chosen`.
    """
    array = np.asarray(values, dtype=np.float64)
    fits = []
    for levels in range(1, MOST + 1):
        ways = _ways(len(array), levels, breaks)
        if not ways:
            break
        losses = _losses(array[None], ways)[0]
        best = int(losses.argmin())
        starts = (0, *ways[best])
        loss = float(losses[best])
        bic = _bic(loss, len(array), levels, step)
        whole = float(((array - array.mean()) ** 2).sum())
        explained = 1 - loss / whole if whole > 0 else 0.0
        chance = _chance(array, ways, loss, seed) if levels > 1 else 1.0
        medians = [rounded(float(np.median(part))) for part in np.split(array, starts[1:])]
        differ = all(a != b for a, b in pairwise(medians))
        accepted = levels == 1 or (chance <= SIGNIFICANCE and differ)
        fits.append(Fit(levels, starts, explained, bic, chance, accepted))
    return tuple(fits)


def chosen(fits: Sequence[Fit]) -> Fit:
    """The accepted fit with the lowest BIC."""
    return min((fit for fit in fits if fit.accepted), key=lambda fit: fit.bic)


def _ways(count: int, levels: int, breaks: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Every way to place the segments: where those after the first begin."""
    places = range(1, count) if breaks is None else [b for b in breaks if 0 < b < count]
    shortest = FEWEST_BLOCKS if breaks is None else 1
    found = []
    for starts in combinations(places, levels - 1):
        edges = (0, *starts, count)
        if levels == 1 or min(b - a for a, b in pairwise(edges)) >= shortest:
            found.append(starts)
    return found


def _losses(rows: Array, ways: Sequence[tuple[int, ...]]) -> Array:
    """Residual sum of squares (rows, ways) of the means of every segment."""
    count = rows.shape[1]
    sums = np.concatenate([np.zeros((len(rows), 1)), rows.cumsum(axis=1)], axis=1)
    squares = (rows**2).sum(axis=1)
    losses = np.empty((len(rows), len(ways)))
    for number, starts in enumerate(ways):
        edges = (0, *starts, count)
        fitted = sum((sums[:, b] - sums[:, a]) ** 2 / (b - a) for a, b in pairwise(edges))
        losses[:, number] = squares - fitted
    return np.maximum(losses, 0.0)


def _bic(loss: float, count: int, levels: int, step: float) -> float:
    variance = max(loss / count, step**2 / 12)
    return count * math.log(variance) + 2 * levels * math.log(count)


def _chance(array: Array, ways: Sequence[tuple[int, ...]], loss: float, seed: int) -> float:
    generator = np.random.default_rng(seed)
    orders = generator.permuted(np.tile(array, (ORDERS, 1)), axis=1)
    as_good = int((_losses(orders, ways).min(axis=1) <= loss * (1 + 1e-9) + 1e-12).sum())
    return (1 + as_good) / (1 + ORDERS)
