"""Measured throughput of networks over that of one base network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import walk
from slimnas.errors import AnalysisError
from slimnas.measure.machine import pinned
from slimnas.measure.networks import Loader, runtime_loader
from slimnas.measure.timing import Clocks, Protocol, Round, Stopwatch
from slimnas.runtimes.base import Runtime, clock_of

PRIMING = 5
"""Visits to the base before its first round: what its running median begins with."""


@dataclass(frozen=True)
class Speed:
    """Throughput over the base's, from rounds in which the two took turns.

    Attributes:
        speedup: median over the rounds.
        low: lower quartile.
        high: upper quartile.
        images_per_s: throughput of the network.
        base_images_per_s: throughput of the base in the same rounds.
        rounds: how many counted.
    """

    speedup: float
    low: float
    high: float
    images_per_s: float
    base_images_per_s: float
    rounds: int


def speed_of(rounds: Sequence[Round], *, batch: int) -> Speed:
    """What rounds of one network say; those that were rejected do not count."""
    kept = [one for one in rounds if one.accepted]
    own_ms = [median(one.samples_ms[0]) for one in kept]
    ratios = [one.pace / ms for one, ms in zip(kept, own_ms, strict=True)]
    low, high = ratios[0], ratios[0]
    if len(ratios) > 1:
        low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Speed(
        speedup=median(ratios),
        low=low,
        high=high,
        images_per_s=1e3 * batch / median(own_ms),
        base_images_per_s=1e3 * batch / median(one.pace for one in kept),
        rounds=len(kept),
    )


class SpeedMeter:
    """Times networks beside `base`, which is loaded when the first one is.

    Every round times base, network and base again (`slimnas.measure.timing`); rounds in which the
    base was not at its usual pace are rejected.

    Args:
        base: what speed-ups are over.
        runtime: what runs the networks, BN folded.
        protocol: how they are timed.
        batch: images per call.
        loader: makes networks ready to run; by default `runtime` does.
        clocks: what tells the time; by default the runtime's.

    Raises:
        AnalysisError: the CPU clock cannot time what the runtime does.
    """

    def __init__(
        self,
        base: Architecture,
        runtime: Runtime,
        protocol: Protocol,
        *,
        batch: int,
        loader: Loader | None = None,
        clocks: Clocks | None = None,
    ) -> None:
        if protocol.clock == "cpu" and (runtime.threads > 1 or runtime.compute_unit != "cpu"):
            raise AnalysisError(
                f"--clock cpu times one thread of a CPU, got {runtime.threads} on "
                f"{runtime.compute_unit}; use --threads 1 or --clock wall"
            )
        self._base, self._runtime, self._protocol, self._batch = base, runtime, protocol, batch
        self._load = loader or runtime_loader(runtime, batch=batch)
        self._clocks = clocks or Clocks(wall=clock_of(runtime))
        self._stopwatch: Stopwatch | None = None
        self._visits = 0

    def __call__(self, architecture: Architecture) -> Speed:
        """Measure one network.

        Raises:
            LatencyTableError: the machine is too busy.
        """
        with pinned(self._runtime.threads):
            if self._stopwatch is None:
                base = self._load(tuple(walk(self._base)))
                self._stopwatch = Stopwatch(self._protocol, base, self._clocks)
                self._stopwatch.prime(visits=PRIMING)
            self._visits += 1
            rounds = self._stopwatch.rounds(
                [self._load(tuple(walk(architecture)))],
                name=architecture.name,
                rng=random.Random(f"{self._protocol.seed} {self._visits}"),
            )
        return speed_of(rounds, batch=self._batch)
