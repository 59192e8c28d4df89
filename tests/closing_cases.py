"""Devices whose true latency is a known function, and a search of the tiny space without torch."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from micro import made_up_table

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace, Selection
from slimnas.arch.walk import component_cost, walk
from slimnas.latency.estimate import latency_ms
from slimnas.latency.table import LatencyTable
from slimnas.measure.calibrate import NetworkTiming
from slimnas.search.checks import pricer
from slimnas.search.closing import Loop
from slimnas.search.importance import ImportanceRecord
from slimnas.search.measurements import Measurement, MeasurementLog
from slimnas.search.slimming import Slimmer, Walk
from slimnas.search.trajectory import Trajectory

Truth = Callable[[Architecture], float]


@cache
def tiny() -> SearchSpace:
    return SearchSpace.load("efficientformer_tiny").with_classes(10)


@cache
def tiny_table() -> LatencyTable:
    return made_up_table(tiny())


def scatter(architecture: Architecture) -> float:
    """Between -1 and 1, another for every network and always the same."""
    return zlib.crc32(architecture.digest.encode()) % 2001 / 1000 - 1


def slower(architecture: Architecture) -> float:
    """A tenth more than the table, and something that no sum of parts knows."""
    predicted = latency_ms(architecture, tiny_table())
    return 1.1 * predicted + 0.2 * predicted**0.5


def faster(architecture: Architecture) -> float:
    return 0.88 * latency_ms(architecture, tiny_table())


def uneven(architecture: Architecture) -> float:
    """Attention is much dearer than the table says, the rest a little cheaper."""
    total = latency_ms(architecture, tiny_table())
    for part in walk(architecture):
        own = 0.003 + component_cost(part).macs / 20e6
        total += own * (0.35 if getattr(part.spec, "type", "") == "mb3d" else -0.05)
    return total


def noisy(architecture: Architecture) -> float:
    return slower(architecture) * (1 + 0.006 * scatter(architecture))


TRUTHS: dict[str, Truth] = {
    "exact": lambda architecture: latency_ms(architecture, tiny_table()),
    "slower": slower,
    "faster": faster,
    "uneven": uneven,
    "noisy": noisy,
}


@dataclass
class FakeMeter:
    """A device that can be measured.

    Attributes:
        truth: its latency of a network.
        fail_after: measurements after which the next stops the program, as Ctrl-C would.
        timed: digests of what was measured.
    """

    truth: Truth
    fail_after: int | None = None
    version: str = "1"
    timed: list[str] = field(default_factory=list)

    @property
    def setup(self) -> dict[str, Any]:
        return {"runtime": "fake", "version": self.version}

    def time(self, architecture: Architecture) -> tuple[NetworkTiming, float]:
        if len(self.timed) == self.fail_after:
            raise KeyboardInterrupt
        self.timed.append(architecture.digest)
        ms = self.truth(architecture)
        return NetworkTiming(architecture, ms, 0.002 * ms), 1.0


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.before: list[tuple[float, int]] = []
        self.after: list[Measurement] = []

    def measuring(self, target_ms: float, number: int) -> None:
        self.before.append((target_ms, number))

    def measured(self, measurement: Measurement) -> None:
        self.after.append(measurement)


def importance(space: SearchSpace) -> ImportanceRecord:
    return ImportanceRecord(
        tuple(
            tuple(
                {c: 0.2 * (7 * i + 5 * j) % 3 * (c != "identity") for c in stage.choices}
                for j in range(stage.slots)
            )
            for i, stage in enumerate(space.stages)
        ),
        {},
    )


def top1(selection: Selection) -> float:
    """Less for narrower and shorter networks, in steps as coarse as 300 images give."""
    full = tiny().largest()
    width = sum(w / m for w, m in zip(selection.widths, full.widths, strict=True)) / 4
    depth = len(selection.active()) / len(full.active())
    bonus = sum(choice == "mb3d" for *_, choice in selection.active()) / 10
    return round(3 * (91 - 14 * (1 - width) ** 2 - 11 * (1 - depth) ** 1.5 + bonus)) / 3


def tiny_slimmer(fill: float = 0.97) -> Slimmer:
    space = tiny()
    return Slimmer(space, importance(space), pricer(space, tiny_table()), top1, fill=fill)


@dataclass
class Case:
    """A run of the loop in a folder: its trajectory and its measurements on disk."""

    folder: Path
    meter: FakeMeter | None
    fill: float = 0.97
    told: Told = field(default_factory=Told)

    @property
    def trajectory(self) -> Path:
        return self.folder / "trajectory.jsonl"

    @property
    def measurements(self) -> Path:
        return self.folder / "measurements.jsonl"

    def loop(self, evaluated: Callable[[], None] = lambda: None) -> Loop:
        slimmer = tiny_slimmer(self.fill)
        if self.trajectory.is_file():
            trajectory = Trajectory.load(self.trajectory)
        else:
            trajectory = slimmer.begin({"seed": 0})
            trajectory.save(self.trajectory)

        def on_step(longer: Trajectory) -> None:
            longer.save(self.trajectory)
            evaluated()

        log = MeasurementLog.load(self.measurements)
        if log is None and self.meter is not None:
            log = MeasurementLog(self.measurements, self.meter.setup)
        walk = Walk(trajectory, on_step)
        return Loop(slimmer, walk, tiny_table(), log, self.meter, self.told)


def largest_ms(truth: Truth) -> float:
    """True latency of the network that slimming starts from."""
    space = tiny()
    return truth(space.architecture(importance(space).start(space)))
