"""Measures the latency table of a search space or model on this machine, resumably."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_bytes
from slimnas._lock import folder_lock
from slimnas.errors import LatencyTableError
from slimnas.latency.devices import refuse_taken
from slimnas.latency.table import LatencyTable
from slimnas.measure.describe import device_info, header
from slimnas.measure.journal import Journal, Visit
from slimnas.measure.networks import Loader
from slimnas.measure.plan import Plan
from slimnas.measure.results import Check, make_table, timings
from slimnas.measure.schedule import Networks, Schedule, Shard
from slimnas.measure.scope import Scope
from slimnas.measure.summary import write_summary
from slimnas.measure.timing import Clocks, Protocol
from slimnas.measure.visits import Progress, open_bench
from slimnas.runtimes.base import Runtime

JOURNAL_FILE = "journal.jsonl"
SAMPLES_FILE = "samples.jsonl.gz"


@dataclass(frozen=True)
class BuildJob:
    """What to measure and where to put it.

    Attributes:
        output: the table's folder; its name is the device's.
        scope: the networks to price, at their deployment resolution.
        protocol: how.
        batch: images per call.
        networks: whole networks, for calibration and for the stated error.
        shard: this host's part, if several share the work.
        force: replace a finished table.
    """

    output: Path
    scope: Scope
    protocol: Protocol = field(default_factory=Protocol)
    batch: int = 1
    networks: Networks = field(default_factory=Networks)
    shard: Shard | None = None
    force: bool = False


@dataclass(frozen=True)
class BuiltTable:
    """A measured table.

    Attributes:
        table: what was written.
        path: its folder.
        held_out: the networks behind its stated error.
        resumed: visits taken over from an interrupted build.
    """

    table: LatencyTable
    path: Path
    held_out: tuple[Check, ...]
    resumed: int


@dataclass(frozen=True)
class BuiltShard:
    """A finished part of a build: a journal for `slimnas latency merge`."""

    path: Path
    shard: Shard
    visits: int
    resumed: int


def build_table(
    job: BuildJob,
    runtime: Runtime,
    *,
    loader: Loader | None = None,
    clocks: Clocks | None = None,
    progress: Progress | None = None,
) -> BuiltTable:
    """Measure a table, or go on where an interrupted build of the same table stopped.

    Every visit goes to `journal.jsonl` in the output folder; at the end the table is written and
    the journal becomes `samples.jsonl.gz`.

    Args:
        job: what to measure, all of it.
        runtime: the runtime the prices are for.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time.
        progress: is told about every visit.

    Raises:
        LatencyTableError: the folder holds a finished table or another build's journal, the
            machine is too busy, or the runtime uses more threads than it was given.
        RunFolderError: the folder is in use or cannot be written.
    """
    with _journal(job, runtime) as journal:
        resumed = len(journal.visits)
        schedule = _time_all(job, runtime, journal, loader, clocks, progress)
        found = header_of(job, runtime)
        table, checks = finish_table(
            job.output, found, schedule.plan, journal.visits, date=date.today().isoformat()
        )
        journal.path.unlink()
    return BuiltTable(table, job.output, checks, resumed)


def build_shard(
    job: BuildJob,
    runtime: Runtime,
    *,
    loader: Loader | None = None,
    clocks: Clocks | None = None,
    progress: Progress | None = None,
) -> BuiltShard:
    """Measure one part of a table that several hosts share; arguments as in `build_table`.

    The journal stays in the output folder, for `slimnas.measure.shards.merge`.
    """
    assert job.shard is not None
    with _journal(job, runtime) as journal:
        resumed = len(journal.visits)
        _time_all(job, runtime, journal, loader, clocks, progress)
    return BuiltShard(job.output, job.shard, len(journal.visits), resumed)


def finish_table(
    output: Path,
    found: Mapping[str, Any],
    plan: Plan,
    visits: Sequence[Visit],
    *,
    date: str,
) -> tuple[LatencyTable, tuple[Check, ...]]:
    """Make the table of a complete journal and write its folder.

    Args:
        output: the table's folder; its name is the device's.
        found: the journal's header.
        plan: what the visits timed.
        visits: all of them.
        date: when they ended.
    """
    device = device_info(output.name, found, plan, visits, date=date)
    table, checks = make_table(plan, visits, device)
    lines = Journal.lines(found, visits)
    atomic_write_bytes(output / SAMPLES_FILE, gzip.compress(lines, mtime=0))
    write_summary(output, plan, timings(plan.entries, visits))
    table.save(output)
    return table, checks


@contextlib.contextmanager
def _journal(job: BuildJob, runtime: Runtime) -> Iterator[Journal]:
    """The journal of a build in its locked folder."""
    if job.protocol.clock == "cpu" and (runtime.threads > 1 or runtime.compute_unit != "cpu"):
        raise LatencyTableError(
            f"--clock cpu times one thread of a CPU, got {runtime.threads} on "
            f"{runtime.compute_unit}; use --threads 1 or --clock wall"
        )
    begun = (job.output / JOURNAL_FILE).is_file()  # it goes on, beside a finished table too
    refuse_taken(job.output, "measured", force=job.force or begun)
    with folder_lock(job.output):
        yield Journal(job.output / JOURNAL_FILE, header_of(job, runtime))


def header_of(job: BuildJob, runtime: Runtime) -> dict[str, Any]:
    """The header of a job's journal."""
    return header(job.scope, runtime, job.protocol, job.networks, batch=job.batch, shard=job.shard)


def _time_all(
    job: BuildJob,
    runtime: Runtime,
    journal: Journal,
    loader: Loader | None,
    clocks: Clocks | None,
    progress: Progress | None,
) -> Schedule:
    """Make the visits the journal lacks; returns the schedule, its plan complete."""
    schedule = Schedule(job.scope, job.protocol, job.networks, job.shard)
    with open_bench(
        runtime,
        job.protocol,
        schedule.plan.reference,
        batch=job.batch,
        loader=loader,
        clocks=clocks,
    ) as bench:
        wanted = schedule.missing(journal.visits)
        bench.make(wanted, journal.visits, journal.append, progress)
    return schedule
