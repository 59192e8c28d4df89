"""Measured latency of the networks of a pruning run, side by side in one runtime.

The unpruned network and those found are timed in interleaved rounds in shuffled order (see
`slimnas.measure.timing`), so that speed-ups are ratios within a round and hardly see the machine
drift. What was measured stays in `measured.json` and is not measured again in the same setup.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from slimnas._files import atomic_write_text
from slimnas.arch.documents import Spec, check_schema, load_json, parse_spec
from slimnas.errors import PruneError, RuntimeUnavailableError
from slimnas.latency.table import LatencyTable
from slimnas.measure.machine import load_average, this_machine
from slimnas.measure.timing import Call, Clocks, Protocol, Round, Stopwatch
from slimnas.nn.build import Network
from slimnas.nn.fold import fold
from slimnas.nn.seeding import seeded
from slimnas.prune.config import MeasureSpec, Whole
from slimnas.runtimes.base import Runtime
from slimnas.runtimes.registry import RUNTIMES, get_runtime
from slimnas.zoo.metrics import Metric, Metrics

DTYPE = "fp32"
"""What networks are timed in."""
SCHEMA = "slimnas/prune-measured/1"
WHAT = "measured latencies of a pruning run (remove the file to measure anew)"
FILE = "measured.json"

VISITS = 4
"""Visits to all networks, each with another warm-up and order."""

PROTOCOL = Protocol(rounds=5, max_drift=0.1, patience_s=300.0)
"""Rounds of each visit. Ratios within a round allow more drift than the prices of a table."""

FEW = 9
"""Reference timings to begin with: ratios within a round stand more drift than prices."""

Loader = Callable[[Network], Call]
"""Makes a network ready to run one image."""

Positive = Annotated[float, Field(gt=0)]
Spread = Annotated[float, Field(ge=0)]


class Setup(Spec):
    """What a latency belongs to; measurements in equal setups are not repeated.

    Attributes:
        runtime, version, compute_unit, threads: of the runtime.
        clock: `wall`, or `cpu` for the CPU time of the timing thread.
        machine: the processor's name.
        cores: logical cores that may be used.
    """

    runtime: str
    version: str
    compute_unit: str
    threads: Whole
    clock: Literal["wall", "cpu"]
    machine: str
    cores: Whole

    @property
    def title(self) -> str:
        """`onnxruntime 1.23.2, 1 thread`."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        clock = "" if self.clock == "wall" else ", CPU time"
        return f"{self.runtime} {self.version}, {threads}{clock}"


class Timed(Spec):
    """One network in one session.

    Attributes:
        architecture: its digest.
        latency_ms: median over rounds.
        latency_iqr_ms: interquartile range over rounds.
        speed_up: the unpruned network's latency over this one's, median of the ratios in rounds.
        speed_up_iqr: their interquartile range.
        n: rounds.
    """

    architecture: str
    latency_ms: Positive
    latency_iqr_ms: Spread
    speed_up: Positive
    speed_up_iqr: Spread
    n: Whole


class Session(Spec):
    """Networks that were timed side by side, the unpruned one first.

    Attributes:
        setup: where and how.
        date: when, ISO.
        busy_threads: threads at work in a call; above `setup.threads` the runtime took more.
        load_average: of the machine at the start; None where it does not tell.
        rejected: rounds that the machine's drift spoilt, not part of any figure.
        networks: the figures.
    """

    setup: Setup
    date: str
    busy_threads: float
    load_average: float | None
    rejected: int
    networks: tuple[Timed, ...]

    @property
    def provenance(self) -> str:
        """Everything about these figures in one line."""
        setup = self.setup
        clock = "wall clock" if setup.clock == "wall" else "CPU time of the one thread"
        load = "" if self.load_average is None else f", load average {self.load_average:.2f}"
        return (
            f"{setup.title}, {clock}, {setup.compute_unit}, {DTYPE}, batch 1, {setup.machine} "
            f"with {setup.cores} cores, {self.date}; median of {self.networks[0].n} interleaved "
            f"rounds ({self.rejected} more rejected), {self.busy_threads:.2f} threads busy{load}"
        )


class Measured(Spec):
    """Everything measured in a run folder."""

    sessions: tuple[Session, ...] = ()

    @property
    def setups(self) -> tuple[Setup, ...]:
        """Each once, in the order of measurement."""
        found: list[Setup] = []
        for session in self.sessions:
            if session.setup not in found:
                found.append(session.setup)
        return tuple(found)

    def find(self, setup: Setup, architecture: str) -> tuple[Session, Timed] | None:
        """The first figures of an architecture (digest) in a setup, and their session."""
        for session in self.sessions:
            for timed in session.networks:
                if session.setup == setup and timed.architecture == architecture:
                    return session, timed
        return None

    def metrics(self, setup: Setup, architecture: str) -> Metrics:
        """The same figures as they stand in `metrics.json`; none where it was not timed."""
        found = self.find(setup, architecture)
        if found is None:
            return {}
        (session, timed), name = found, f"measured_{setup.runtime}"
        said = f"measured: {session.provenance}"
        ratio = f"unpruned over this one within a round; {said}"
        return {
            f"{name}_latency_ms": Metric(timed.latency_ms, said),
            f"{name}_latency_iqr_ms": Metric(timed.latency_iqr_ms, said),
            f"{name}_rounds": Metric(timed.n, said),
            f"{name}_speed_up": Metric(timed.speed_up, ratio),
            f"{name}_speed_up_iqr": Metric(timed.speed_up_iqr, ratio),
        }

    def save(self, path: Path) -> None:
        """Write JSON atomically."""
        body = {"schema": SCHEMA, **self.model_dump(mode="json")}
        atomic_write_text(path, json.dumps(body, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what `save` wrote; nothing where there is no file.

        Raises:
            SpecError: a damaged file, by key.
        """
        if not path.is_file():
            return cls()
        data = check_schema(load_json(path, WHAT), SCHEMA, WHAT, source=str(path))
        return parse_spec(cls, data, source=str(path))


@dataclass(frozen=True)
class Meter:
    """What times networks.

    Attributes:
        setup: what the figures belong to.
        loader: makes a network ready to run.
        clocks: what tells the time.
        protocol: how each visit is made.
    """

    setup: Setup
    loader: Loader
    clocks: Clocks = field(default_factory=Clocks)
    protocol: Protocol = PROTOCOL


def open_meter(spec: MeasureSpec) -> Meter:
    """The meter of a runtime on this machine.

    Raises:
        RuntimeUnavailableError: the runtime is not installed; says what installs it.
        PruneError: CPU time of more than one thread.
    """
    if spec.clock == "cpu" and spec.threads > 1:
        raise PruneError(
            f"--clock cpu: times one thread, got {spec.threads}; use --threads 1 or --clock wall"
        )
    runtime, machine = get_runtime(spec.runtime, threads=spec.threads), this_machine()
    setup = Setup(
        runtime=runtime.name,
        version=runtime.version,
        compute_unit=runtime.compute_unit,
        threads=runtime.threads,
        clock=spec.clock,
        machine=machine.cpu,
        cores=machine.cores,
    )
    protocol = PROTOCOL if spec.clock == "wall" else Protocol(**{**vars(PROTOCOL), "clock": "cpu"})
    return Meter(setup, partial(_load, runtime), protocol=protocol)


def spec_of_table(table: LatencyTable) -> MeasureSpec | None:
    """How the table was measured, if that was with a runtime here on this very machine."""
    device, machine = table.device, this_machine()
    here = f"{machine.architecture} machine with {machine.cores} cores"
    name, threads = device.runtime.name, device.threads
    if device.kind != "measured" or (device.soc, device.device) != (machine.cpu, here):
        return None
    if (device.batch, device.dtype) != (1, DTYPE) or threads is None or name not in RUNTIMES:
        return None
    try:
        runtime = get_runtime(name, threads=threads)
    except RuntimeUnavailableError:
        return None
    if (runtime.version, runtime.compute_unit) != (device.runtime.version, device.compute_unit):
        return None
    on_cpu_time = Protocol(clock="cpu").describe().partition(";")[0]
    clock: Literal["wall", "cpu"] = "cpu" if device.protocol.startswith(on_cpu_time) else "wall"
    return MeasureSpec(runtime=name, threads=threads, clock=clock)


def measure(
    meter: Meter,
    unpruned: Network,
    found: Sequence[Callable[[], Network]],
    digests: Sequence[str],
    path: Path,
    *,
    on_visit: Callable[[int, int], None],
) -> Measured:
    """Time the networks that `path` lacks in the meter's setup, beside the unpruned one.

    Args:
        meter: what times them.
        unpruned: what speed-ups are over.
        found: opens each pruned network; called only for those that are timed.
        digests: of their architectures.
        path: the file of earlier measurements, written when all are done.
        on_visit: told visits done and in all.

    Returns:
        Everything measured so far, also in other setups.

    Raises:
        LatencyTableError: the machine is too busy.
        ExportError: the runtime cannot run a network.
        SpecError: `path` is damaged.
    """
    known = Measured.load(path)
    missing = {
        digest: opened
        for digest, opened in zip(digests, found, strict=True)
        if known.find(meter.setup, digest) is None
    }
    own = unpruned.architecture.digest
    missing.pop(own, None)
    if not missing and known.find(meter.setup, own) is not None:
        return known
    threads = torch.get_num_threads()
    try:
        session = _session(
            meter, [unpruned, *(opened() for opened in missing.values())], on_visit=on_visit
        )
    finally:
        torch.set_num_threads(threads)  # which the torch runtime sets for the whole process
    known = Measured(sessions=(*known.sessions, session))
    known.save(path)
    return known


def _session(
    meter: Meter, networks: Sequence[Network], *, on_visit: Callable[[int, int], None]
) -> Session:
    load = load_average()
    on_visit(0, VISITS)
    calls = [meter.loader(network) for network in networks]
    stopwatch = Stopwatch(meter.protocol, calls[0], meter.clocks)
    busy = stopwatch.busy_threads()
    stopwatch.prime(visits=FEW)
    rounds: list[Round] = []
    for number in range(VISITS):
        rng = random.Random(f"{meter.protocol.seed} {number}")
        rounds += stopwatch.rounds(calls, name=networks[0].architecture.name, rng=rng)
        on_visit(number + 1, VISITS)
    accepted = [one for one in rounds if one.accepted]
    taken = [[median(samples) for samples in one.samples_ms] for one in accepted]
    return Session(
        setup=meter.setup,
        date=date.today().isoformat(),
        busy_threads=busy,
        load_average=load,
        rejected=len(rounds) - len(accepted),
        networks=tuple(
            _timed(network, [row[0] for row in taken], [row[i] for row in taken])
            for i, network in enumerate(networks)
        ),
    )


def _timed(network: Network, unpruned_ms: Sequence[float], own_ms: Sequence[float]) -> Timed:
    ratios = [before / after for before, after in zip(unpruned_ms, own_ms, strict=True)]
    return Timed(
        architecture=network.architecture.digest,
        latency_ms=median(own_ms),
        latency_iqr_ms=_iqr(own_ms),
        speed_up=median(ratios),
        speed_up_iqr=_iqr(ratios),
        n=len(own_ms),
    )


def _iqr(values: Sequence[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def _load(runtime: Runtime, network: Network) -> Call:
    """Folded as it is deployed, for one image of the network's own resolution."""
    shape = network.architecture.input.shape
    with seeded(0):
        image = torch.randn(1, shape.channels, shape.height, shape.width)
    deployed = fold(copy.deepcopy(network).cpu())
    return partial(runtime.load(deployed, image).run, image.numpy())
