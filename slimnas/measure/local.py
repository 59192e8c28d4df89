"""The device of a latency table, where that is this machine: networks can be timed on it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.errors import LatencyTableError
from slimnas.latency.table import LatencyTable
from slimnas.measure.build import SAMPLES_FILE
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.describe import scope_of
from slimnas.measure.journal import read_journal
from slimnas.measure.machine import this_machine
from slimnas.measure.networks import Loader
from slimnas.measure.results import network_timings, timings, usual_pace
from slimnas.measure.schedule import Networks, timed_plan
from slimnas.measure.scope import Parts, Scope, SpaceScope
from slimnas.measure.timing import Clocks, Protocol
from slimnas.measure.visits import time_networks
from slimnas.runtimes.base import Runtime
from slimnas.runtimes.registry import get_runtime

ANCHORS = 8
"""Networks of a build that a later measurement times again to learn the machine's pace."""

PASSES = 4
"""Times a network is loaded and timed anew, at least: where it comes to lie in memory shows, and
one network has no others to average that out."""


@dataclass(frozen=True)
class BuildRecord:
    """What a table's build recorded beside it.

    Attributes:
        scope: what the table covers.
        protocol: how it was timed.
        timed: names of the entries that were.
        reference_ms: latency of the reference network meanwhile.
        anchors: some of the calibration networks, fast and slow ones.
    """

    scope: Scope
    protocol: Protocol
    timed: frozenset[str]
    reference_ms: float
    anchors: tuple[NetworkTiming, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> BuildRecord:
        """Read the samples beside a table.

        Raises:
            LatencyTableError: there are none, or they are damaged.
        """
        path = Path(folder) / SAMPLES_FILE
        header, visits = read_journal(path)
        try:
            protocol = Protocol.from_dict(header["protocol"])
            networks = Networks(**header["networks"])
        except (KeyError, TypeError, ValueError) as error:
            raise LatencyTableError(
                f"{path}: protocol: must be one of this version; build the table anew"
            ) from error
        scope = scope_of(header, str(path))
        plan = timed_plan(scope, protocol, networks, visits)
        calibration = network_timings(plan.calibration, timings(plan.entries, visits))
        return cls(
            scope=scope,
            anchors=_spread(calibration, ANCHORS),
            protocol=protocol,
            timed=frozenset(visit.entry for visit in visits),
            reference_ms=usual_pace(one for visit in visits for one in visit.rounds),
        )


@dataclass(frozen=True)
class LocalDevice:
    """Times whole networks on this machine as a table's were.

    Attributes:
        runtime: the table's.
        protocol: the table's, with `PASSES` at least.
        reference: the network timed around every round.
        batch: images per call.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time; by default the runtime's.
    """

    runtime: Runtime
    protocol: Protocol
    reference: Parts
    batch: int = 1
    loader: Loader | None = None
    clocks: Clocks | None = None

    @property
    def setup(self) -> Mapping[str, Any]:
        """What a measurement belongs to, as plain data."""
        machine, runtime = this_machine(), self.runtime
        return {
            "runtime": runtime.name,
            "version": runtime.version,
            "compute_unit": runtime.compute_unit,
            "dtype": runtime.dtype,
            "threads": runtime.threads,
            "batch": self.batch,
            "machine": machine.cpu,
            "protocol": self.protocol.to_dict(),
        }

    def time(self, architecture: Architecture) -> tuple[NetworkTiming, float]:
        """Export, load and time a network, batch normalisation folded.

        Weights do not matter to its latency, so they are random.

        Returns:
            Its timing, and the reference network's latency meanwhile in milliseconds.

        Raises:
            LatencyTableError: the machine is too busy.
            ExportError: the runtime cannot run it.
        """
        (timing,), reference_ms = time_networks(
            [architecture],
            self.runtime,
            self.protocol,
            reference=self.reference,
            batch=self.batch,
            loader=self.loader,
            clocks=self.clocks,
        )
        return timing, reference_ms


def _spread(networks: Sequence[NetworkTiming], count: int) -> tuple[NetworkTiming, ...]:
    """Up to `count` of `networks`, evenly by the rank of their latency."""
    ranked = sorted(networks, key=lambda one: one.latency_ms)
    if len(ranked) <= count:
        return tuple(ranked)
    return tuple(ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count))


def require_measured_here(table: LatencyTable) -> None:
    """Refuse a table that measurements on this machine say nothing about.

    Raises:
        LatencyTableError: it is estimated or imported, of another processor, or for more threads
            than this process may use.
    """
    device, machine = table.device, this_machine()
    if device.kind != "measured":
        raise LatencyTableError(
            f"{device.name}: must be a table measured on this machine, is the {device.kind} table "
            f"of {device.device}; build one with 'slimnas latency build --device NAME'"
        )
    if device.soc != machine.cpu:
        raise LatencyTableError(
            f"{device.name}: must be a table of this machine's {machine.cpu}, is of a "
            f"{device.soc}; validate it there, or build one here with 'slimnas latency build'"
        )
    if (device.threads or 1) > machine.cores:
        raise LatencyTableError(
            f"{device.name}: is for {device.threads} threads, this process may use "
            f"{machine.cores} cores; give it as many"
        )


def require_same_runtime(table: LatencyTable, runtime: Runtime) -> None:
    """Refuse a runtime that the table's prices are not for.

    Raises:
        LatencyTableError: name, version, compute unit, number format or threads differ.
    """
    device = table.device
    pairs = {
        "runtime": (device.runtime.name, runtime.name),
        "runtime version": (device.runtime.version, runtime.version),
        "compute unit": (device.compute_unit, runtime.compute_unit),
        "number format": (device.dtype, runtime.dtype),
        "threads": (device.threads, runtime.threads),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise LatencyTableError(
                f"{device.name}: was measured with {what} {theirs}, here it is {ours}; "
                f"install what it was measured with, or build it anew with "
                f"'slimnas latency build --device {device.name} --force'"
            )


def open_local(table: LatencyTable, space: SearchSpace) -> LocalDevice:
    """Return this machine as the device of `table`.

    Args:
        table: a table measured here, with what is installed now.
        space: gives the reference network where the table's build is not beside it.

    Raises:
        LatencyTableError: the table is estimated, imported or of another machine, runtime
            version or runtime setting; says which.
        RuntimeUnavailableError: its runtime is not installed.
    """
    require_measured_here(table)
    device = table.device
    runtime = get_runtime(
        device.runtime.name,
        threads=device.threads or 1,
        dtype=device.dtype,
        unit=device.compute_unit,
    )
    require_same_runtime(table, runtime)
    protocol, scope = _recorded(table) or (_described(device.protocol), SpaceScope(space))
    reference = scope.reference(random.Random(protocol.seed))
    protocol = replace(protocol, passes=max(protocol.passes, PASSES))
    return LocalDevice(runtime, protocol, reference, device.batch)


def _recorded(table: LatencyTable) -> tuple[Protocol, Scope] | None:
    """Protocol and scope of the table's build, if its samples are beside it."""
    if not table.source or not (Path(table.source) / SAMPLES_FILE).is_file():
        return None
    record = BuildRecord.load(table.source)
    return record.protocol, record.scope


def _described(words: str) -> Protocol:
    """The protocol of this version on the clock that `words` begin with."""
    on_cpu_time = Protocol(clock="cpu")
    begins = words.startswith(on_cpu_time.describe().partition(";")[0])
    return on_cpu_time if begins else Protocol()
