"""Closes the loop: found networks are measured, and slimming goes on until they are on target.

For each target, the highest first: slim and fill up by the table, measure the network found. Every
measurement corrects the table (`slimnas.measure.refit`). Above the target, slimming goes on;
below the share of it that should be used, filling up goes on; both from the network at hand, with
the same supernet. A handful of measurements at most; if none lies in between, the slowest network
that meets the target answers it, else the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Protocol

from slimnas.arch.architecture import Architecture
from slimnas.errors import UnreachableTargetError
from slimnas.latency.estimate import estimate
from slimnas.latency.table import LatencyTable
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.refit import refitted
from slimnas.search.checks import pricer
from slimnas.search.measurements import Measurement, MeasurementLog
from slimnas.search.slimming import Aim, Slimmer, Walk

MOST = 6
"""Measurements per target."""

SLACK = 0.25
"""Share of the wanted range that a prediction keeps away from either end of it: measurements
scatter around predictions, and at the very end half of them would be outside."""


class Meter(Protocol):
    """Measures networks on the table's device; see `slimnas.measure.local.LocalDevice`."""

    @property
    def setup(self) -> Any:
        """What the measurements belong to, as plain data."""

    def time(self, architecture: Architecture) -> tuple[NetworkTiming, float]:
        """A network's timing, and the reference network's latency meanwhile in ms."""


class MeasuringListener(Protocol):
    """Is told about measurements."""

    def measuring(self, target_ms: float, number: int) -> None:
        """Before a measurement, which takes some seconds."""

    def measured(self, measurement: Measurement) -> None:
        """After it."""


@dataclass(frozen=True)
class Answer:
    """What answers a target.

    Attributes:
        target_ms: the target.
        steps: steps of the trajectory that lead to the network.
        table: the prices that it was found by: corrected by what was measured before it.
        measurement: of the network; none where the device was out of reach.
        rounds: all measurements for this target.
    """

    target_ms: float
    steps: int
    table: LatencyTable
    measurement: Measurement | None = None
    rounds: tuple[Measurement, ...] = ()


class Loop:
    """The state of closing the loop over several targets.

    Recorded steps and measurements are gone over again before new ones are made, so that a run
    that was stopped ends as if it had not been.

    Args:
        slimmer: with the prices of `table`.
        walk: along the run's trajectory.
        table: as it is shipped or was built.
        log: earlier measurements and where to keep new ones; none where nothing is measured.
        meter: measures; none where only what the log holds is known.
        listener: told about measurements.
    """

    def __init__(
        self,
        slimmer: Slimmer,
        walk: Walk,
        table: LatencyTable,
        log: MeasurementLog | None,
        meter: Meter | None,
        listener: MeasuringListener,
    ) -> None:
        self.walk = walk
        self.table = table
        self._slimmer = slimmer
        self._prior = table
        self._log = log
        self._meter = meter
        self._listener = listener
        self._timings: dict[str, tuple[NetworkTiming, float]] = {}

    def run(self, targets_ms: Sequence[float]) -> tuple[Answer, ...]:
        """Answer every target, in the order given.

        Raises:
            UnreachableTargetError: no action that saves time is left before anything was measured.
            LatencyTableError: the machine is too busy to measure.
            ExportError: the table's runtime cannot run a network.
        """
        answers = {each: self._answer(each) for each in sorted(targets_ms, reverse=True)}
        return tuple(answers[each] for each in targets_ms)

    def aim(self, target_ms: float) -> Aim:
        """The predictions to aim at."""
        low_ms = self._slimmer.fill * target_ms
        slack_ms = SLACK * (target_ms - low_ms) if self._log and low_ms else 0.0
        return Aim(low_ms + slack_ms if low_ms else 0.0, target_ms - slack_ms)

    def _answer(self, target_ms: float) -> Answer:
        found: list[Answer] = []
        seen: set[str] = set()
        for number in range(1, MOST + 1):
            try:
                self._slimmer.reach(self.walk, self.aim(target_ms))
            except UnreachableTargetError:
                if not found:
                    raise
                break
            architecture = self._slimmer.space.architecture(self.walk.selection)
            if architecture.digest in seen:
                break  # nothing of the space lies in between
            seen.add(architecture.digest)
            answer = self._measured(target_ms, number, architecture)
            if answer.measurement is None:
                found = found or [answer]
                break
            found.append(answer)
            if self._slimmer.fill <= answer.measurement.share <= 1:
                break
        rounds = tuple(each.measurement for each in found if each.measurement is not None)
        return replace(_best(found), rounds=rounds)

    def _measured(self, target_ms: float, number: int, architecture: Architecture) -> Answer:
        """The network at hand as an answer, measured if it can be; corrects the prices."""
        answer = Answer(target_ms, self.walk.steps, self.table)
        known = None if self._log is None else self._log.find(target_ms, number)
        if self._log is None or (known is None and self._meter is None):
            return answer
        digest = architecture.digest
        if known is not None:
            timing = NetworkTiming(architecture, known.measured_ms, known.error_ms)
            self._timings.setdefault(digest, (timing, known.reference_ms))
        elif digest not in self._timings:
            assert self._meter is not None
            self._listener.measuring(target_ms, number)
            self._timings[digest] = self._meter.time(architecture)
        if known is None:
            known = self._record(target_ms, number, architecture)
        corrected = refitted(self._prior, [timing for timing, _ in self._timings.values()])
        self.table = corrected
        self._slimmer = replace(
            self._slimmer,
            price=pricer(self._slimmer.space, corrected),
            corrections=len(self._timings),
        )
        return replace(answer, measurement=known)

    def _record(self, target_ms: float, number: int, architecture: Architecture) -> Measurement:
        assert self._log is not None
        timing, reference_ms = self._timings[architecture.digest]
        priced = estimate(architecture, self.table)
        measurement = Measurement(
            target_ms=target_ms,
            number=number,
            steps=self.walk.steps,
            architecture=architecture.digest,
            predicted_ms=priced.latency_ms,
            interval_ms=priced.interval_ms,
            measured_ms=timing.latency_ms,
            error_ms=timing.error_ms,
            reference_ms=reference_ms,
            date=date.today().isoformat(),
        )
        self._log = self._log.with_one_more(measurement)
        self._listener.measured(measurement)
        return measurement


def _best(found: Sequence[Answer]) -> Answer:
    """The slowest network that meets the target, else the fastest."""
    measured = [(each.measurement.share, each) for each in found if each.measurement is not None]
    meeting = [pair for pair in measured if pair[0] <= 1]
    if meeting:
        return max(meeting, key=lambda pair: pair[0])[1]
    return min(measured, key=lambda pair: pair[0])[1] if measured else found[0]
