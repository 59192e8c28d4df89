"""Corrects a table by a few whole networks measured near the place where it is to be right.

A search finds a network, measures it, and must go on with prices that agree with what it saw. One
measurement cannot tell which rows were wrong, but the table says how wrong it may be: with p_k the
price of row k, its true price is taken as p_k (1 + c + g_k), where the common error c and the
errors g_k of each kind and place (MB4D at 14x14, ...) are independent, normal, of one variance,
chosen so that a whole network's relative error has the standard deviation of the table's stated
interval, or that of the errors seen if they are larger. The corrected price is the posterior mean
given the measurements (Bayesian linear regression; Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2.1). So the measured networks come out as measured, up to the error of timing
them; networks made of the same parts move with them, and others by the common error alone.

It is for steering a search, not for restating a table's error: the stated figures stay those of
the table before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from slimnas.latency.keys import OVERHEAD, PriceKey
from slimnas.latency.prices import row_error_ms
from slimnas.latency.rows import PriceRow
from slimnas.latency.table import LatencyTable
from slimnas.measure.calibrate import NetworkTiming, row_shares

Array = npt.NDArray[np.float64]

UNSTATED = 0.05
"""Relative error of a network by a table that states none."""
TIMING = 0.003
"""Relative error of a measurement beside the one it states: what another session would show."""
LEAST = 0.2
"""The least a correction leaves of a price."""


def refitted(table: LatencyTable, networks: Sequence[NetworkTiming]) -> LatencyTable:
    """Return `table` corrected by the latencies of whole networks; see the module.

    Args:
        table: its rows must cover the networks.
        networks: all that were measured so far; the order does not matter.

    Raises:
        MissingLatencyError: the table cannot price a network without extrapolation.
    """
    if not networks:
        return table
    keys = [row.key for row in table.rows]
    parts = np.array([_parts_ms(one, table, keys) for one in networks])
    predicted = parts.sum(axis=1)
    measured = np.array([one.latency_ms for one in networks])
    noise = np.hypot([one.error_ms / one.latency_ms for one in networks], TIMING)
    weights = parts / predicted[:, None]
    together = 1.0 + _same_kind(keys)
    missing = measured / predicted - 1
    variance = max(_stated_error(table) ** 2, float(np.mean(missing**2)))
    spread = weights @ together @ weights.T
    scale = variance / float(np.mean(np.diag(spread)))
    gram = scale * spread + np.diag(noise**2)
    corrections = scale * together @ weights.T @ np.linalg.solve(gram, missing)
    factors = np.clip(1 + corrections, LEAST, None)
    rows = tuple(_corrected(row, float(f)) for row, f in zip(table.rows, factors, strict=True))
    notes = (*table.device.notes, *(_note(*each) for each in zip(networks, predicted, strict=True)))
    return replace(table, device=table.device.model_copy(update={"notes": notes}), rows=rows)


def _parts_ms(network: NetworkTiming, table: LatencyTable, keys: Sequence[PriceKey]) -> Array:
    """What the network takes by the table, row by row; it has no other parts."""
    shares = dict(row_shares(network.architecture, table))
    if OVERHEAD in table.by_key:
        shares[OVERHEAD] = 1.0
    return np.array([shares.get(key, 0.0) * table.by_key[key].latency_ms for key in keys])


def _same_kind(keys: Sequence[PriceKey]) -> Array:
    """One for two rows of one kind and place, else zero."""
    kinds = [(key.component, key.type, key.resolution) for key in keys]
    return np.array([[float(a == b) for b in kinds] for a in kinds])


def _stated_error(table: LatencyTable) -> float:
    """Standard deviation of a network's relative error by the table's interval."""
    stated = table.device.interval
    if stated is None:
        return UNSTATED
    width = (stated.low_percent + stated.high_percent) / 200
    return max(width / NormalDist().inv_cdf(0.5 + stated.level / 2), TIMING)


def _corrected(row: PriceRow, factor: float) -> PriceRow:
    error_ms = row_error_ms(row) * factor
    return PriceRow(row.key, row.latency_ms * factor, error_ms, row.n, "fitted")


def _note(network: NetworkTiming, predicted_ms: float) -> str:
    off = 100 * (network.latency_ms / predicted_ms - 1)
    return (
        f"prices corrected by network {network.architecture.digest[:12]}: measured "
        f"{network.latency_ms:.4f} ms, standard error {network.error_ms:.4f} ms, "
        f"{off:+.2f} % of the {predicted_ms:.4f} ms before"
    )
