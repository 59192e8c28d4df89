"""Makes visits: entries loaded, timed beside the reference network, and kept."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from slimnas.arch.architecture import Architecture
from slimnas.errors import LatencyTableError
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.exports import Exports, OnExport, exports_slowly, in_folder
from slimnas.measure.journal import Visit
from slimnas.measure.machine import load_average, pinned, temperature_celsius
from slimnas.measure.networks import Loader, runtime_loader
from slimnas.measure.plan import Entry, network_entry
from slimnas.measure.results import network_timings, timings, usual_pace
from slimnas.measure.scope import Parts
from slimnas.measure.timing import BUSY, Clocks, Protocol, Stopwatch
from slimnas.runtimes.base import FileRuntime, Runtime, clock_of

Progress = Callable[[int, int, str], None]
"""Called with visits done, visits planned as far as is known, and what is timed next."""

Wanted = tuple[int, Entry, int]
"""Pass, entry, and visits planned as far as is known."""

Prepare = Callable[[Iterable[Parts], OnExport], None]
"""Makes ready what loading networks needs, before anything is timed."""


class Bench:
    """A runtime on this machine with a reference network, ready to time entries.

    Args:
        runtime: what runs the networks.
        protocol: how they are timed.
        reference: the network timed around every round.
        loader: makes networks ready to run.
        clocks: what tells the time; by default the runtime's.
        prepare: called with the networks of a batch of visits before them.
    """

    def __init__(
        self,
        runtime: Runtime,
        protocol: Protocol,
        reference: Parts,
        loader: Loader,
        clocks: Clocks | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        self._runtime, self._protocol, self._reference = runtime, protocol, reference
        self._load, self._prepare = loader, prepare
        self._clocks = clocks or Clocks(wall=clock_of(runtime))

    def make(
        self,
        batches: Iterable[Sequence[Wanted]],
        visits: Sequence[Visit],
        keep: Callable[[Visit], None],
        progress: Progress | None = None,
    ) -> None:
        """Make every wanted visit and hand it to `keep`, which adds it to `visits`.

        The reference is loaded with the first one: nothing is, if nothing is wanted.

        Args:
            batches: visits, in batches that are known before their first one.
            visits: those made so far.
            keep: adds one.
            progress: is told about every visit.

        Raises:
            LatencyTableError: the machine is too busy, or the runtime uses too many threads.
            ExportError: the runtime has no form for a network.
        """
        stopwatch = None
        show = progress or (lambda *_: None)
        for batch in batches:
            if batch and self._prepare is not None:
                self._prepare(self._networks(batch), self._exporting(batch, visits, show))
            for number, entry, planned in batch:
                if stopwatch is None:
                    paces = [ms for v in visits for one in v.rounds for ms in one.reference_ms]
                    stopwatch = self._stopwatch(paces)
                show(len(visits), planned, entry.name)
                calls = [self._load(term.parts) for term in entry.terms]
                rng = random.Random(f"{self._protocol.seed} {number} {entry.name}")
                rounds = stopwatch.rounds(calls, name=entry.name, rng=rng)
                keep(Visit(entry.name, number, rounds, load_average(), temperature_celsius()))
        show(len(visits), len(visits), "done")

    def _networks(self, batch: Sequence[Wanted]) -> Iterator[Parts]:
        yield self._reference
        for _, entry, _ in batch:
            yield from (term.parts for term in entry.terms)

    @staticmethod
    def _exporting(batch: Sequence[Wanted], visits: Sequence[Visit], show: Progress) -> OnExport:
        """Shows every tenth."""
        planned = batch[0][2]

        def on_export(made: int, of: int) -> None:
            if made % max(of // 10, 1) == 0 or made == of:
                show(len(visits), planned, f"exporting ahead, {made} of {of}")

        return on_export

    def _stopwatch(self, paces_ms: Sequence[float]) -> Stopwatch:
        stopwatch = Stopwatch(self._protocol, self._load(self._reference), self._clocks)
        busy, threads = stopwatch.busy_threads(), self._runtime.threads
        if busy > BUSY * threads and self._runtime.compute_unit == "cpu":
            raise LatencyTableError(
                f"the runtime must stay on the {threads} thread(s) it was given, {busy:.1f} "
                "are busy; set OMP_NUM_THREADS to the number of threads"
            )
        stopwatch.prime(paces_ms)
        return stopwatch


@contextlib.contextmanager
def open_bench(
    runtime: Runtime,
    protocol: Protocol,
    reference: Parts,
    *,
    batch: int = 1,
    loader: Loader | None = None,
    clocks: Clocks | None = None,
) -> Iterator[Bench]:
    """Pin this thread as `runtime` needs it and yield a bench.

    Files of runtimes that export slowly are made in several processes before they are timed, and
    kept until the end.

    Args:
        runtime: what runs the networks.
        protocol: how they are timed.
        reference: the network timed around every round.
        batch: images per call.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time.
    """
    with contextlib.ExitStack() as stack:
        model: Callable[[Parts], bytes] | None = None
        prepare: Prepare | None = None
        if loader is None and isinstance(runtime, FileRuntime) and exports_slowly(runtime):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            exports = stack.enter_context(
                Exports(runtime, batch, in_folder(folder, runtime.suffix))
            )
            model, prepare = exports.model, exports.prepare
        stack.enter_context(pinned(runtime.threads))
        load = loader or runtime_loader(runtime, batch=batch, model=model)
        yield Bench(runtime, protocol, reference, load, clocks, prepare)


def in_passes(
    entries: Sequence[Entry], protocol: Protocol, visits: Sequence[Visit] = ()
) -> Iterator[list[Wanted]]:
    """Yield the visits of the regular passes that `visits` lacks, every pass in its order."""
    done = {(visit.number, visit.entry) for visit in visits}
    planned = protocol.passes * len(entries)
    for number in range(protocol.passes):
        order = list(entries)
        random.Random(f"{protocol.seed} {number}").shuffle(order)
        yield [(number, entry, planned) for entry in order if (number, entry.name) not in done]


def time_networks(
    architectures: Sequence[Architecture],
    runtime: Runtime,
    protocol: Protocol,
    *,
    reference: Parts,
    batch: int = 1,
    loader: Loader | None = None,
    clocks: Clocks | None = None,
    progress: Progress | None = None,
) -> tuple[tuple[NetworkTiming, ...], float]:
    """Time whole networks by the protocol, interleaved with a reference network.

    Args:
        architectures: different networks.
        runtime: what runs them.
        protocol: how often and how long.
        reference: the network timed around every round.
        batch: images per call.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time.
        progress: is told about every visit.

    Returns:
        Their timings in the same order, and the reference's latency in milliseconds meanwhile.

    Raises:
        LatencyTableError: the machine is too busy, or the runtime uses too many threads.
    """
    entries = [network_entry(one) for one in architectures]
    visits: list[Visit] = []
    with open_bench(
        runtime, protocol, reference, batch=batch, loader=loader, clocks=clocks
    ) as bench:
        bench.make(in_passes(entries, protocol), visits, visits.append, progress)
    found = timings(entries, visits)
    pace_ms = usual_pace(one for visit in visits for one in visit.rounds)
    return network_timings(architectures, found), pace_ms
