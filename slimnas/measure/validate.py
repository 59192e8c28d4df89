"""Validates a measured table: fresh random networks, predicted by it and measured here and now."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

from slimnas import __version__
from slimnas._lock import folder_lock
from slimnas.arch.architecture import Architecture
from slimnas.errors import LatencyTableError
from slimnas.latency.estimate import estimate
from slimnas.latency.rows import rows_to_csv
from slimnas.latency.table import ErrorFigure, LatencyTable
from slimnas.measure.journal import Journal, Visit
from slimnas.measure.local import BuildRecord, require_measured_here, require_same_runtime
from slimnas.measure.networks import Loader
from slimnas.measure.plan import network_entry
from slimnas.measure.results import Check, error_figure, timings, usual_pace
from slimnas.measure.scope import Scope
from slimnas.measure.timing import Clocks, Protocol
from slimnas.measure.visits import Progress, in_passes, open_bench
from slimnas.runtimes.base import Runtime

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class ValidateJob:
    """What to validate.

    Attributes:
        table: the table, measured on this machine.
        record: what its build recorded.
        scope: where the networks are drawn from.
        output: folder of the journal.
        protocol: how the networks are timed.
        networks: how many.
        seed: of the networks.
        force: forget what another validation left in `output`.
    """

    table: LatencyTable
    record: BuildRecord
    scope: Scope
    output: Path
    protocol: Protocol
    networks: int = 40
    seed: int = 1
    force: bool = False


@dataclass(frozen=True)
class Validation:
    """Networks that the table had never seen, predicted and measured.

    Attributes:
        checks: per network, the measurement at the pace of the build.
        figure: the table's error on them.
        halves_ms: per network, the measurements by the first and by the second half of the
            passes, in separately loaded sessions, each brought to the build's pace by its own
            visits; none of one pass.
        pace: latency of some of the build's networks (`BuildRecord.anchors`) now over that
            during the build, by their median; the measurements are divided by it. Of the reference
            network, which is small, where the build timed no others.
        unscaled: the table's error on the latencies as the clock showed them.
        resumed: visits taken over from an interrupted validation.
        date: when the last visit was made, ISO.
    """

    checks: tuple[Check, ...]
    figure: ErrorFigure
    halves_ms: tuple[tuple[float, float], ...]
    pace: float
    unscaled: ErrorFigure
    resumed: int
    date: str

    @property
    def repeat_percent(self) -> float | None:
        """Mean absolute error of predicting a measurement by a repeated one; none of one pass."""
        if not self.halves_ms:
            return None
        return 100 * fmean(abs(second / first - 1) for first, second in self.halves_ms)


def validate_table(
    job: ValidateJob,
    runtime: Runtime,
    *,
    loader: Loader | None = None,
    clocks: Clocks | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measure fresh random networks and compare them with the table's estimates.

    None of them was timed by the table's build. Every visit goes to the journal in the output
    folder, so that an interrupted validation goes on where it stopped; a finished one is read
    back.

    Args:
        job: what to validate.
        runtime: the runtime of the table.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time.
        progress: is told about every visit.

    Raises:
        LatencyTableError: the table is of another machine or runtime, the folder holds another
            validation, no network is left to draw, or the machine is too busy.
        MissingLatencyError: a network the table cannot price.
        RunFolderError: the folder is in use or cannot be written.
    """
    require_measured_here(job.table)
    require_same_runtime(job.table, runtime)
    networks = fresh_networks(job.scope, job.networks, job.seed, job.record.timed)
    for network in networks:
        estimate(network, job.table)  # refused before anything is timed
    with folder_lock(job.output):
        path = job.output / JOURNAL_FILE
        if job.force:
            path.unlink(missing_ok=True)
        ended = date.fromtimestamp(path.stat().st_mtime) if path.is_file() else date.today()
        journal = Journal(path, _header(job, runtime))
        resumed = len(journal.visits)
        anchors = [one.architecture for one in job.record.anchors]
        entries = [network_entry(one) for one in [*networks, *anchors]]
        with open_bench(
            runtime,
            job.protocol,
            # the build's, so that measurements can be brought to its pace
            job.scope.reference(random.Random(job.record.protocol.seed)),
            batch=job.table.device.batch,
            loader=loader,
            clocks=clocks,
        ) as bench:
            wanted = in_passes(entries, job.protocol, journal.visits)
            bench.make(wanted, journal.visits, journal.append, progress)
    if len(journal.visits) > resumed:
        ended = date.today()
    return _validation(job, networks, journal.visits, resumed, ended.isoformat())


def fresh_networks(
    scope: Scope, count: int, seed: int, timed: Collection[str] = ()
) -> tuple[Architecture, ...]:
    """Draw up to `count` different networks that were not timed; a tiny scope may hold fewer.

    Args:
        scope: where they are drawn from.
        count: how many.
        seed: of the draws.
        timed: names of entries that were.

    Raises:
        LatencyTableError: there are none.
    """
    rng = random.Random(seed)
    found: dict[str, Architecture] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        network = scope.network(rng)
        if network_entry(network).name not in timed:
            found.setdefault(network.digest, network)
    if not found:
        raise LatencyTableError(
            f"{scope.title}: its build has timed every network there is; nothing is left to "
            "validate on"
        )
    return tuple(found.values())


def _validation(
    job: ValidateJob,
    networks: Sequence[Architecture],
    visits: Sequence[Visit],
    resumed: int,
    ended: str,
) -> Validation:
    now_ms = usual_pace(one for visit in visits for one in visit.rounds)
    pace = _pace(job.record, visits, now_ms)
    shown = _latencies_ms(networks, visits, now_ms)
    middle = job.protocol.passes // 2
    first = [visit for visit in visits if visit.number < middle]
    second = [visit for visit in visits if visit.number >= middle]
    halves = [_at_own_pace(job.record, networks, half) for half in (first, second) if middle]
    checks = tuple(
        _check(one, job.table, ms / pace) for one, ms in zip(networks, shown, strict=True)
    )
    unscaled = [_check(one, job.table, ms) for one, ms in zip(networks, shown, strict=True)]
    return Validation(
        checks=checks,
        figure=error_figure(checks, f"{job.scope.sample}, drawn anew with seed {job.seed}"),
        halves_ms=tuple(zip(*halves, strict=True)),
        pace=pace,
        unscaled=error_figure(unscaled, "the same, as the clock showed them"),
        resumed=resumed,
        date=ended,
    )


def _at_own_pace(
    record: BuildRecord, networks: Sequence[Architecture], visits: Sequence[Visit]
) -> list[float]:
    """Latencies by some of the visits, at the pace of the build by the same visits."""
    now_ms = usual_pace(one for visit in visits for one in visit.rounds)
    pace = _pace(record, visits, now_ms)
    return [ms / pace for ms in _latencies_ms(networks, visits, now_ms)]


def _pace(record: BuildRecord, visits: Sequence[Visit], now_ms: float) -> float:
    """How much slower the machine is than during the build."""
    if not record.anchors:
        return now_ms / record.reference_ms
    latencies = _latencies_ms([one.architecture for one in record.anchors], visits, now_ms)
    pairs = zip(latencies, record.anchors, strict=True)
    return median(ms / anchor.latency_ms for ms, anchor in pairs)


def _latencies_ms(
    networks: Sequence[Architecture], visits: Sequence[Visit], pace_ms: float
) -> list[float]:
    """Latencies at the pace of a reference of `pace_ms`."""
    entries = [network_entry(one) for one in networks]
    found = timings(entries, visits)
    scale = pace_ms / usual_pace(one for visit in visits for one in visit.rounds)
    return [found[entry.name].latency_ms * scale for entry in entries]


def _check(architecture: Architecture, table: LatencyTable, measured_ms: float) -> Check:
    priced = estimate(architecture, table)
    return Check(architecture, priced.latency_ms, measured_ms, priced.interval_ms)


def _header(job: ValidateJob, runtime: Runtime) -> dict[str, Any]:
    """Everything that must agree before visits may be mixed."""
    device = job.table.device
    prices = rows_to_csv(job.table.rows).encode()
    return {
        "tool_version": __version__,
        **job.scope.identity,
        "table": {"name": device.name, "sha256": hashlib.sha256(prices).hexdigest()},
        "runtime": {"name": runtime.name, "version": runtime.version},
        "networks": {"count": job.networks, "seed": job.seed},
        "anchors": len(job.record.anchors),
        "protocol": job.protocol.to_dict(),
    }
