"""The device of a latency table, where that is this machine: networks can be timed on it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.latency.table import LatencyTable
from slimnas.measure.build import SAMPLES_FILE
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.machine import this_machine
from slimnas.measure.networks import Loader
from slimnas.measure.scope import Parts, Scope, SpaceScope
from slimnas.measure.timing import Clocks, Protocol
from slimnas.measure.validate import BuildRecord, require_measured_here, require_same_runtime
from slimnas.measure.visits import time_networks
from slimnas.runtimes.base import Runtime
from slimnas.runtimes.registry import get_runtime

PASSES = 4
"""Times a network is loaded and timed anew, at least: where it comes to lie in memory shows, and
one network has no others to average that out."""


@dataclass(frozen=True)
class LocalDevice:
    """Times whole networks on this machine as a table's were.

    Attributes:
        runtime: the table's.
        protocol: the table's, with `PASSES` at least.
        reference: the network timed around every round.
        batch: images per call.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time.
    """

    runtime: Runtime
    protocol: Protocol
    reference: Parts
    batch: int = 1
    loader: Loader | None = None
    clocks: Clocks = field(default_factory=Clocks)

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
