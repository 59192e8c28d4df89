"""From the visits of a build to a latency table with its stated error."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np
from scipy import stats

from slimnas.arch.architecture import Architecture
from slimnas.errors import LatencyTableError
from slimnas.latency.estimate import estimate
from slimnas.latency.keys import OVERHEAD
from slimnas.latency.rows import PriceRow
from slimnas.latency.table import DeviceInfo, ErrorFigure, IntervalInfo, LatencyTable
from slimnas.measure.journal import Visit
from slimnas.measure.plan import Entry, Plan, network_entry
from slimnas.measure.timing import Round

LEVEL = 0.9
"""Share of networks that the stated interval is meant to hold."""

SURE = 3.0
"""Standard errors below zero at which a price is wrong and not just lost in noise."""

LEAST_MS = 1e-6
"""The least price of a row: a nanosecond."""


@dataclass(frozen=True)
class Timing:
    """What an entry's accepted rounds say.

    Attributes:
        latency_ms: median over rounds; a difference of latencies may come out negative.
        spread_ms: interquartile range over rounds.
        n: number of rounds.
    """

    latency_ms: float
    spread_ms: float
    n: int

    @property
    def error_ms(self) -> float:
        """Standard error of the median, for a normal distribution of this spread."""
        return 1.2533 * self.spread_ms / 1.349 / math.sqrt(self.n)


@dataclass(frozen=True)
class Check:
    """A whole network, as the table sees it and as it was measured."""

    architecture: Architecture
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Prediction over measurement, minus one."""
        return self.predicted_ms / self.measured_ms - 1


def timings(entries: Iterable[Entry], visits: Iterable[Visit]) -> dict[str, Timing]:
    """Return the timing of every entry that was visited, by the entry's name.

    Rounds are brought to one pace: a round's price is multiplied by the reference's median
    over all rounds and divided by the reference's latency in that round.
    """
    rounds: defaultdict[str, list[Round]] = defaultdict(list)
    for visit in visits:
        rounds[visit.entry] += [one for one in visit.rounds if one.accepted]
    paces = [one.pace for accepted in rounds.values() for one in accepted]
    usual = median(paces) if paces else 0.0
    found = {}
    for entry in entries:
        shares = [term.share for term in entry.terms]
        values = [one.price_ms(shares) * usual / one.pace for one in rounds[entry.name]]
        if values:
            low, high = np.percentile(values, [25, 75])
            found[entry.name] = Timing(median(values), float(high - low), len(values))
    return found


def make_table(
    plan: Plan, found: Mapping[str, Timing], device: DeviceInfo
) -> tuple[LatencyTable, tuple[Check, ...]]:
    """Turn timings into a table, fit its overhead, and state its error on held-out networks.

    The overhead is the mean of what the calibration networks take beyond the sum of their
    components, and never less than one call.

    Args:
        plan: what was timed.
        found: the timing of every entry of the plan.
        device: provenance, still without errors and interval.

    Returns:
        The table, and the held-out networks behind its stated error.

    Raises:
        LatencyTableError: a component whose price is negative beyond its error.
    """
    rows = [_row(entry, found[entry.name]) for entry in plan.components]
    parts_only = LatencyTable(device, tuple(rows))
    rest = [
        check.measured_ms - check.predicted_ms
        for check in _checks(plan.calibration, parts_only, found)
    ]
    rows.append(_overhead(rest, found[plan.nothing.name]))
    table = LatencyTable(device, tuple(rows))
    checks = _checks(plan.held_out, table, found)
    stated = device.model_copy(
        update={
            "errors": (_figure(checks, plan.sample),) if checks else (),
            "interval": _interval(checks),
            "notes": (*device.notes, *_lost(plan, found)),
        }
    )
    return LatencyTable(stated, tuple(rows)), checks


def _lost(plan: Plan, found: Mapping[str, Timing]) -> list[str]:
    lost = [entry.name for entry in plan.components if found[entry.name].latency_ms <= 0]
    return [f"lost in noise, priced at the standard error: {', '.join(lost)}"] if lost else []


def _row(entry: Entry, timing: Timing) -> PriceRow:
    """A component that costs next to nothing may come out negative within its error.

    Its price is then that error: the table has positive prices only, and says how sure it is.
    """
    assert entry.key is not None
    if timing.latency_ms < -SURE * timing.error_ms:
        raise LatencyTableError(
            f"{entry.name}: comes out negative ({timing.latency_ms:.6f} ms, standard error "
            f"{timing.error_ms:.6f} ms, {timing.n} rounds); free the machine, remove the journal "
            "and build again with more --rounds"
        )
    latency_ms = timing.latency_ms if timing.latency_ms > 0 else timing.error_ms
    return PriceRow(entry.key, max(latency_ms, LEAST_MS), timing.spread_ms, timing.n, "measured")


def _overhead(rest_ms: Sequence[float], call: Timing) -> PriceRow:
    if not rest_ms:
        return PriceRow(OVERHEAD, call.latency_ms, call.spread_ms, call.n, "measured")
    error_ms = stdev(rest_ms) / len(rest_ms) ** 0.5 if len(rest_ms) > 1 else 0.0
    latency_ms = max(fmean(rest_ms), call.latency_ms)
    return PriceRow(OVERHEAD, latency_ms, error_ms, len(rest_ms), "fitted")


def _checks(
    networks: Iterable[Architecture], table: LatencyTable, found: Mapping[str, Timing]
) -> tuple[Check, ...]:
    return tuple(
        Check(one, estimate(one, table).latency_ms, found[network_entry(one).name].latency_ms)
        for one in networks
    )


def _figure(checks: Sequence[Check], sample: str) -> ErrorFigure:
    errors = [100 * check.error for check in checks]
    predicted = [check.predicted_ms for check in checks]
    measured = [check.measured_ms for check in checks]
    spearman = None
    if len(set(predicted)) > 1 and len(set(measured)) > 1:
        spearman = round(float(stats.spearmanr(predicted, measured).statistic), 4)
    return ErrorFigure(
        what=f"{sample}, measured whole and used for nothing else",
        networks=len(checks),
        mape_percent=round(fmean(abs(error) for error in errors), 3),
        bias_percent=round(fmean(errors), 3),
        max_percent=round(max(abs(error) for error in errors), 3),
        spearman=spearman,
    )


def _interval(checks: Sequence[Check]) -> IntervalInfo | None:
    """Student's t prediction interval of truth over estimate from the held-out networks."""
    n = len(checks)
    if n < 2:
        return None
    truths = [check.measured_ms / check.predicted_ms - 1 for check in checks]
    quantile = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1))
    half = quantile * stdev(truths) * (1 + 1 / n) ** 0.5
    low, high = fmean(truths) - half, fmean(truths) + half
    return IntervalInfo(
        level=LEVEL,
        low_percent=round(min(max(0.0, -100 * low), 99.9), 3),
        high_percent=round(max(0.0, 100 * high), 3),
        basis=f"Student's t prediction interval from {n} held-out networks",
    )
