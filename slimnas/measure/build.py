"""Measures the latency table of a search space or model on this machine, resumably."""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from slimnas import __version__
from slimnas._files import atomic_write_bytes
from slimnas._lock import folder_lock
from slimnas.errors import LatencyTableError
from slimnas.latency.devices import known_devices
from slimnas.latency.table import DEVICE_FILE, DeviceInfo, LatencyTable, RuntimeInfo
from slimnas.measure.journal import Journal, Visit
from slimnas.measure.machine import load_average, this_machine
from slimnas.measure.networks import Loader, runtime_loader
from slimnas.measure.plan import Entry, Plan, make_plan
from slimnas.measure.results import Check, Timing, make_table, timings
from slimnas.measure.scope import Scope
from slimnas.measure.timing import BUSY, Clocks, Protocol, Round, Stopwatch
from slimnas.runtimes.base import Runtime

JOURNAL_FILE = "journal.jsonl"
SAMPLES_FILE = "samples.jsonl.gz"
DTYPE = "fp32"

Progress = Callable[[int, int, str], None]
"""Called with visits done, visits planned, and what is timed next."""


@dataclass(frozen=True)
class BuildJob:
    """What to measure and where to put it.

    Attributes:
        output: the table's folder; its name is the device's.
        scope: the networks to price, at their deployment resolution.
        protocol: how.
        batch: images per call.
        calibration: random networks that the overhead is fitted to.
        held_out: random networks for the stated error.
        force: replace a finished table.
    """

    output: Path
    scope: Scope
    protocol: Protocol = field(default_factory=Protocol)
    batch: int = 1
    calibration: int = 4
    held_out: int = 6
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
        job: what to measure.
        runtime: the runtime the prices are for.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time.
        progress: is told about every visit.

    Raises:
        LatencyTableError: the folder holds a finished table or another build's journal, the
            machine is too busy, or the runtime uses more threads than it was given.
        RunFolderError: the folder is in use or cannot be written.
    """
    if job.protocol.clock == "cpu" and runtime.threads > 1:
        raise LatencyTableError(
            f"--clock cpu times one thread, got {runtime.threads}; use --threads 1 or --clock wall"
        )
    _refuse_taken(job)
    loader = loader or runtime_loader(runtime, batch=job.batch)
    clocks = clocks or Clocks()
    plan = make_plan(
        job.scope,
        chains=job.protocol.chains,
        calibration=job.calibration,
        held_out=job.held_out,
        seed=job.protocol.seed,
    )
    with folder_lock(job.output):
        journal = Journal(job.output / JOURNAL_FILE, _header(job, runtime))
        resumed = len(journal.visits)
        busy = _time_all(plan, journal, job.protocol, loader, clocks, progress, runtime.threads)
        found = timings(plan.entries, journal.visits)
        device = _device(job, runtime, plan, journal.visits, busy)
        table, checks = make_table(plan, found, device)
        atomic_write_bytes(
            job.output / SAMPLES_FILE, gzip.compress(journal.path.read_bytes(), mtime=0)
        )
        table.save(job.output)
        journal.path.unlink()
    return BuiltTable(table, job.output, checks, resumed)


def _time_all(
    plan: Plan,
    journal: Journal,
    protocol: Protocol,
    loader: Loader,
    clocks: Clocks,
    progress: Progress | None,
    threads: int,
) -> float | None:
    """Make the visits the journal lacks; returns the busy threads, none if nothing lacked."""
    stopwatch, busy = None, None
    for number, entry, planned in _wanted(plan, journal, protocol):
        if stopwatch is None:
            stopwatch = Stopwatch(protocol, loader(plan.reference), clocks)
            busy = _checked_threads(stopwatch, threads)
            stopwatch.prime([ms for one in _rounds(journal.visits) for ms in one.reference_ms])
        if progress is not None:
            progress(len(journal.visits), planned, entry.name)
        calls = [loader(term.parts) for term in entry.terms]
        rng = random.Random(f"{protocol.seed} {number} {entry.name}")
        rounds = stopwatch.rounds(calls, name=entry.name, rng=rng)
        journal.append(Visit(entry.name, number, rounds))
    if progress is not None:
        progress(len(journal.visits), len(journal.visits), "done")
    return busy


def _checked_threads(stopwatch: Stopwatch, threads: int) -> float:
    busy = stopwatch.busy_threads()
    if busy > BUSY * threads:
        raise LatencyTableError(
            f"the runtime must stay on the {threads} thread(s) it was given, {busy:.1f} are busy; "
            "set OMP_NUM_THREADS to the number of threads"
        )
    return busy


def _wanted(plan: Plan, journal: Journal, protocol: Protocol) -> Iterator[tuple[int, Entry, int]]:
    """Yield (pass, entry, visits planned) for every visit that is not in the journal yet.

    After the regular passes come extra ones over the components that are still uncertain. What
    they are follows from the journal alone, so that a resumed build makes the same visits.
    """
    planned = 0
    for number in range(protocol.passes + protocol.extra_passes):
        entries = list(plan.entries)
        if number >= protocol.passes:
            earlier = [visit for visit in journal.visits if visit.number < number]
            entries = _uncertain(plan, timings(plan.components, earlier), protocol.precision)
            planned += len(entries)
        else:
            planned = protocol.passes * len(entries)
        random.Random(f"{protocol.seed} {number}").shuffle(entries)
        done = {visit.entry for visit in journal.visits if visit.number == number}
        for entry in entries:
            if entry.name not in done:
                yield number, entry, planned


def _uncertain(plan: Plan, found: dict[str, Timing], precision: float) -> list[Entry]:
    return [
        entry
        for entry in plan.components
        if found[entry.name].error_ms > precision * found[entry.name].latency_ms
    ]


def _refuse_taken(job: BuildJob) -> None:
    name = job.output.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise LatencyTableError(
            f"a device's name, which its table's folder has, must be letters, digits, '.', '_' "
            f"and '-', got {name!r}"
        )
    # A table of that name elsewhere would be hidden by this one, or hide it.
    for folder in (job.output, known_devices().get(name, job.output)):
        if (folder / DEVICE_FILE).is_file():
            known = LatencyTable.load(folder).device
            if known.kind != "measured":
                raise LatencyTableError(
                    f"{name}: is the {known.kind} table of {known.device} in {folder}; "
                    "choose another name with --device or --output"
                )
    if not (job.output / DEVICE_FILE).is_file() or (job.output / JOURNAL_FILE).is_file():
        return
    table = LatencyTable.load(job.output)
    if not job.force:
        raise LatencyTableError(
            f"{job.output}: holds a finished table measured on {table.device.date}; choose "
            "another --output, or measure it anew with --force"
        )


def _header(job: BuildJob, runtime: Runtime) -> dict[str, Any]:
    """Everything that must agree before visits may be mixed."""
    machine = this_machine()
    return {
        "tool_version": __version__,
        **job.scope.identity,
        "runtime": {
            "name": runtime.name,
            "version": runtime.version,
            "compute_unit": runtime.compute_unit,
            "threads": runtime.threads,
        },
        "machine": {"cpu": machine.cpu, "cores": machine.cores},
        "batch": job.batch,
        "networks": {"calibration": job.calibration, "held_out": job.held_out},
        "protocol": job.protocol.to_dict(),
    }


def _device(
    job: BuildJob,
    runtime: Runtime,
    plan: Plan,
    visits: Sequence[Visit],
    busy: float | None,
) -> DeviceInfo:
    machine = this_machine()
    rounds = list(_rounds(visits))
    rejected = sum(not one.accepted for one in rounds)
    pace_ms = median(one.pace for one in rounds if one.accepted)
    load = load_average()
    notes = [
        f"{job.scope.title}: {len(plan.components)} components timed, widths between them "
        "are interpolated",
        f"overhead: mean excess of {len(plan.calibration)} whole networks over the sum of their "
        "components, not below one call",
        f"{rejected} of {len(rounds)} rounds rejected; reference network {pace_ms:.4f} ms",
        f"frequency governor: {machine.governor or 'cannot be read'}",
    ]
    if load is not None:
        notes.append(f"load average of the last minute at the end: {load:.2f}")
    if busy is not None:
        notes.append(f"threads busy in a call: {busy:.2f}")
    return DeviceInfo(
        name=job.output.name,
        device=f"{machine.architecture} machine with {machine.cores} cores",
        soc=machine.cpu,
        os=machine.system,
        runtime=RuntimeInfo(name=runtime.name, version=runtime.version),
        compute_unit=runtime.compute_unit,
        dtype=DTYPE,
        batch=job.batch,
        threads=runtime.threads,
        protocol=job.protocol.describe(),
        date=date.today().isoformat(),
        tool_version=__version__,
        kind="measured",
        notes=tuple(notes),
    )


def _rounds(visits: Sequence[Visit]) -> Iterator[Round]:
    for visit in visits:
        yield from visit.rounds
