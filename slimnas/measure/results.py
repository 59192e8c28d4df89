"""From the visits of a build to a latency table with its stated error."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, median

import numpy as np
from scipy import stats

from slimnas.arch.architecture import Architecture
from slimnas.errors import LatencyTableError
from slimnas.latency.estimate import estimate
from slimnas.latency.keys import OVERHEAD
from slimnas.latency.rows import DIGITS, PriceRow
from slimnas.latency.table import (
    LEVEL,
    DeviceInfo,
    ErrorFigure,
    IntervalInfo,
    LatencyTable,
    RuntimeInfo,
)
from slimnas.measure.calibrate import Calibration, NetworkTiming, calibrate
from slimnas.measure.journal import Visit
from slimnas.measure.monotone import falling
from slimnas.measure.plan import Entry, Plan, network_entry
from slimnas.measure.timing import Round

FEWEST = 3
"""Fewer whole networks than this correct nothing."""

ANOTHER_PACE = 0.1
"""How far a round's reference may be from its median over a whole build, as a share."""

SURE = 0.9987
"""How sure, by Student's t of its rounds, a price must be below zero to be wrong and not lost in
noise: three standard errors of many rounds, many more of two, whose spread says little."""

LEAST_MS = 1e-6
"""The least price of a row: a nanosecond."""

UNNAMED = DeviceInfo(
    name="prior",
    device="",
    soc="",
    os="",
    runtime=RuntimeInfo(name="", version=""),
    compute_unit="",
    dtype="",
    protocol="",
    date="",
    tool_version="",
    kind="measured",
)
"""Of a table that lives only as long as a computation."""


@dataclass(frozen=True)
class Timing:
    """What an entry's accepted rounds say.

    Attributes:
        latency_ms: median over rounds; a difference of latencies may come out negative.
        spread_ms: interquartile range over rounds.
        p10_ms: a tenth of the rounds were faster.
        p90_ms: a tenth were slower.
        n: number of rounds.
    """

    latency_ms: float
    spread_ms: float
    p10_ms: float
    p90_ms: float
    n: int

    @property
    def error_ms(self) -> float:
        """Standard error of the median, for a normal distribution of this spread."""
        return 1.2533 * self.spread_ms / 1.349 / math.sqrt(self.n)

    def interval_ms(self, level: float = LEVEL) -> tuple[float, float]:
        """Confidence interval of the median."""
        half = NormalDist().inv_cdf(0.5 + level / 2) * self.error_ms
        return self.latency_ms - half, self.latency_ms + half


@dataclass(frozen=True)
class Check:
    """A whole network, as the table sees it and as it was measured.

    Attributes:
        architecture: which network.
        predicted_ms: the table's estimate.
        measured_ms: the network's latency.
        interval_ms: the estimate's interval; none where it is not known yet.
    """

    architecture: Architecture
    predicted_ms: float
    measured_ms: float
    interval_ms: tuple[float, float] | None = None

    @property
    def error(self) -> float:
        """Prediction over measurement, minus one."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def covered(self) -> bool:
        """Whether the interval holds the measurement."""
        low_ms, high_ms = self.interval_ms or (math.nan, math.nan)
        return low_ms <= self.measured_ms <= high_ms


def timings(entries: Iterable[Entry], visits: Sequence[Visit]) -> dict[str, Timing]:
    """Return the timing of every entry that was visited, by the entry's name.

    Rounds are brought to one pace: a round's price is multiplied by the reference's median
    over all rounds and divided by the reference's latency in that round. Rounds at another pace
    altogether (`ANOTHER_PACE`), where networks slow down by other shares than the reference does,
    count only for entries that have no others.
    """
    usual = usual_pace(one for visit in visits for one in visit.rounds)
    rounds: defaultdict[str, list[Round]] = defaultdict(list)
    for visit in visits:
        rounds[visit.entry] += visit.rounds
    found = {}
    for entry in entries:
        (values,) = _prices_ms(entry, [rounds[entry.name]], usual)
        if values:
            p10, low, high, p90 = map(float, np.percentile(values, [10, 25, 75, 90]))
            found[entry.name] = Timing(median(values), high - low, p10, p90, len(values))
    return found


def load_latencies(
    networks: Iterable[Architecture], visits: Sequence[Visit]
) -> dict[str, tuple[float, ...]]:
    """Return the latency in milliseconds of every visit to each network, by its digest.

    Every visit loads the network anew, into other memory: these differ by more than rounds do.
    The rounds that count are those of `timings`.
    """
    usual = usual_pace(one for visit in visits for one in visit.rounds)
    of_entry: defaultdict[str, list[Sequence[Round]]] = defaultdict(list)
    for visit in visits:
        of_entry[visit.entry].append(visit.rounds)
    found = {}
    for network in networks:
        entry = network_entry(network)
        prices = _prices_ms(entry, of_entry[entry.name], usual)
        found[network.digest] = tuple(median(values) for values in prices if values)
    return found


def _prices_ms(
    entry: Entry, visits: Iterable[Sequence[Round]], usual_ms: float
) -> list[list[float]]:
    """What the rounds of each visit to an entry say, at the reference's usual pace."""
    shares = [term.share for term in entry.terms]
    accepted = [[one for one in rounds if one.accepted] for rounds in visits]
    steady = [
        [one for one in rounds if abs(one.pace / usual_ms - 1) <= ANOTHER_PACE]
        for rounds in accepted
    ]
    counted = steady if any(steady) else accepted
    return [[one.price_ms(shares) * usual_ms / one.pace for one in rounds] for rounds in counted]


def usual_pace(rounds: Iterable[Round]) -> float:
    """The reference's median latency in milliseconds over accepted rounds; 0 without any."""
    paces = [one.pace for one in rounds if one.accepted]
    return median(paces) if paces else 0.0


def make_prior(
    plan: Plan, found: Mapping[str, Timing], device: DeviceInfo | None = None
) -> LatencyTable:
    """Return the table of isolated parts, its overhead that of one call.

    Args:
        plan: what was timed.
        found: the timing of every entry of the plan but whole networks.
        device: provenance, where the table is to be kept.

    Raises:
        LatencyTableError: a component whose price is negative beyond its error.
    """
    rows = [_row(entry, found[entry.name]) for entry in plan.components]
    call = found[plan.nothing.name]
    call_ms = max(call.latency_ms, LEAST_MS)
    overhead = PriceRow(OVERHEAD, call_ms, call.spread_ms, call.n, "measured")
    return LatencyTable(device or UNNAMED, (*rows, overhead))


def make_table(
    plan: Plan, visits: Sequence[Visit], device: DeviceInfo
) -> tuple[LatencyTable, tuple[Check, ...]]:
    """Turn timings into a table, correct it by whole networks, and state its error on others.

    With fewer than `FEWEST` calibration networks the prices stay those of isolated parts.

    Args:
        plan: what was timed.
        visits: to every entry of the plan.
        device: provenance, still without errors and interval.

    Returns:
        The table, and the held-out networks behind its stated error.

    Raises:
        LatencyTableError: a component whose price is negative beyond its error.
    """
    found = timings(plan.entries, visits)
    prior = make_prior(plan, found, device)
    networks = network_timings(plan.calibration, found)
    fit = calibrate(prior, networks) if len(networks) >= FEWEST else None
    # as the file will have them, so that the stated error is that of the file
    rows = tuple(map(_as_written, prior.rows if fit is None else fit.table.rows))
    held_out = network_timings(plan.held_out, found)
    checks = _checks(held_out, LatencyTable(device, rows))
    before = _checks(held_out, prior)
    left_out = [] if fit is None else _left_out(fit, networks)
    loads = load_latencies([*plan.calibration, *plan.held_out], visits)
    covered = tuple(_with_interval(i, checks, left_out, loads) for i in range(len(checks)))
    what = f"{plan.sample}, measured whole and used for nothing else"
    errors = []
    if checks:
        errors = [error_figure(covered, what)]
        if fit is not None:
            errors.append(error_figure(before, f"the same before calibration on {len(networks)}"))
    stated = device.model_copy(
        update={
            "errors": tuple(errors),
            "interval": interval([*checks, *left_out], loads),
            "notes": (*device.notes, *_notes(plan, found, fit, rows)),
        }
    )
    return LatencyTable(stated, rows), covered


def network_timings(
    networks: Iterable[Architecture], found: Mapping[str, Timing]
) -> tuple[NetworkTiming, ...]:
    """Return those of `networks` that were timed."""
    timed = ((one, found.get(network_entry(one).name)) for one in networks)
    return tuple(
        NetworkTiming(one, timing.latency_ms, timing.error_ms)
        for one, timing in timed
        if timing is not None
    )


def error_figure(checks: Sequence[Check], what: str) -> ErrorFigure:
    """State how far the estimates of `checks` were off; at least one check.

    Args:
        checks: predictions beside measurements.
        what: which networks, and how they were held out.
    """
    errors = [100 * check.error for check in checks]
    predicted = [check.predicted_ms for check in checks]
    measured = [check.measured_ms for check in checks]
    spearman = None
    if len(set(predicted)) > 1 and len(set(measured)) > 1:
        spearman = round(float(stats.spearmanr(predicted, measured).statistic), 4)
    known = all(check.interval_ms for check in checks)
    return ErrorFigure(
        what=what,
        networks=len(checks),
        mape_percent=round(fmean(abs(error) for error in errors), 3),
        bias_percent=round(fmean(errors), 3),
        max_percent=round(max(abs(error) for error in errors), 3),
        within_5_percent=_percentage(abs(error) <= 5 for error in errors),
        within_10_percent=_percentage(abs(error) <= 10 for error in errors),
        coverage_percent=_percentage(check.covered for check in checks) if known else None,
        spearman=spearman,
    )


def interval(checks: Sequence[Check], loads: Mapping[str, Sequence[float]]) -> IntervalInfo | None:
    """Relative interval of an estimate from networks that the table had not seen.

    Made for a network loaded once, as users' are: from the error of every load on its own. The
    median over loads, which the prices were held against, hides how much they differ.

    None from fewer than two networks.

    Args:
        checks: predictions of networks the table had not seen.
        loads: latency of each load in milliseconds, by the network's digest.
    """
    if len(checks) < 2:
        return None
    errors = [
        ms / check.predicted_ms - 1
        for check in checks
        for ms in loads.get(check.architecture.digest) or (check.measured_ms,)
    ]
    return IntervalInfo.conformal(
        errors,
        f"errors |measured / predicted - 1| of {len(checks)} networks the prices had not seen, "
        "each load on its own",
    )


def _with_interval(
    i: int,
    checks: Sequence[Check],
    left_out: Sequence[Check],
    loads: Mapping[str, Sequence[float]],
) -> Check:
    """A held-out network with the interval that all other networks give it."""
    check = checks[i]
    others = interval([*checks[:i], *checks[i + 1 :], *left_out], loads)
    if others is None:
        return check
    low_ms = check.predicted_ms * (1 - others.low_percent / 100)
    high_ms = check.predicted_ms * (1 + others.high_percent / 100)
    return Check(check.architecture, check.predicted_ms, check.measured_ms, (low_ms, high_ms))


def _left_out(fit: Calibration, networks: Sequence[NetworkTiming]) -> list[Check]:
    return [
        Check(one.architecture, predicted_ms, one.latency_ms)
        for one, predicted_ms in zip(networks, fit.left_out_ms, strict=True)
    ]


def _checks(networks: Iterable[NetworkTiming], table: LatencyTable) -> tuple[Check, ...]:
    return tuple(
        Check(one.architecture, estimate(one.architecture, table).latency_ms, one.latency_ms)
        for one in networks
    )


def _percentage(hits: Iterable[bool]) -> float:
    return round(100 * fmean(map(float, hits)), 3)


def _notes(
    plan: Plan,
    found: Mapping[str, Timing],
    fit: Calibration | None,
    rows: Iterable[PriceRow],
) -> list[str]:
    notes = []
    if fit is not None:
        notes.append(
            f"calibrated on {len(fit.left_out_ms)} whole networks; scales of the correction: "
            f"{100 * fit.common:g} % common, {100 * fit.own:g} % per kind of part"
        )
    lost = [entry.name for entry in plan.components if found[entry.name].latency_ms <= 0]
    if lost:
        notes.append(f"lost in noise, priced at the standard error: {', '.join(lost)}")
    cheaper = [f"{wide} below {narrow}" for narrow, wide in falling(rows)]
    if cheaper:
        notes.append(f"cheaper than narrower ones, beyond their errors: {', '.join(cheaper)}")
    return notes


def _as_written(row: PriceRow) -> PriceRow:
    latency_ms, spread_ms = round(row.latency_ms, DIGITS), round(row.spread_ms, DIGITS)
    return replace(row, latency_ms=max(latency_ms, LEAST_MS), spread_ms=spread_ms)


def _row(entry: Entry, timing: Timing) -> PriceRow:
    """A component that costs next to nothing may come out negative within its error.

    Its price is then that error: the table has positive prices only, and says how sure it is. Of
    one round there is no error.
    """
    assert entry.key is not None
    if timing.n > 1 and timing.latency_ms < -stats.t.ppf(SURE, timing.n - 1) * timing.error_ms:
        raise LatencyTableError(
            f"{entry.name}: comes out negative ({timing.latency_ms:.6f} ms, standard error "
            f"{timing.error_ms:.6f} ms, {timing.n} rounds); free the machine, remove the journal "
            "and build again with more --rounds"
        )
    latency_ms = timing.latency_ms if timing.latency_ms > 0 else timing.error_ms
    return PriceRow(entry.key, max(latency_ms, LEAST_MS), timing.spread_ms, timing.n, "measured")
