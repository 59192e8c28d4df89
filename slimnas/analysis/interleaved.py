"""Timing calls side by side: every round visits all of them once, in a new order.

Slow changes of the machine then reach all of them alike, and the ratio of two calls can be taken
within a round, where it hardly drifts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

Call = Callable[[], object]
Progress = Callable[[int, int, str], None]
"""Called with steps done, steps planned, and what comes next."""


@dataclass(frozen=True)
class Rounds:
    """How calls are timed.

    Attributes:
        rounds: visits to every call.
        sample_ms: least duration of a visit; fast calls run several times in it.
        settled: warm-up ends when the last five samples lie within this share of their median.
        warm_up_ms: longest warm-up of one call, but three samples at least.
    """

    rounds: int = 12
    sample_ms: float = 30.0
    settled: float = 0.02
    warm_up_ms: float = 1500.0

    def describe(self) -> str:
        """Say it in one line."""
        return (
            f"warm-up of each layer until five samples lie within {100 * self.settled:g} % or "
            f"{self.warm_up_ms / 1e3:g} s, then {self.rounds} rounds in one process, every round "
            f"all layers in a new random order, each for at least {self.sample_ms:g} ms; medians "
            "over rounds, ratios within a round"
        )


def time_interleaved(
    calls: Sequence[Call],
    how: Rounds,
    *,
    clock: Callable[[], float],
    rng: random.Random,
    progress: Progress | None = None,
) -> list[tuple[float, ...]]:
    """Return the milliseconds per call of every round, call by call.

    Args:
        calls: what to time.
        how: the protocol.
        clock: what tells the time, in seconds.
        rng: gives the order within rounds.
        progress: told about every warm-up and round.
    """
    planned = len(calls) + how.rounds
    repeats = []
    for number, call in enumerate(calls):
        if progress is not None:
            progress(number, planned, "warming up")
        repeats.append(_warm_up(call, how, clock))
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(how.rounds):
        if progress is not None:
            progress(len(calls) + number, planned, "timing")
        for i in rng.sample(range(len(calls)), len(calls)):
            if repeats[i] > 1:
                calls[i]()  # brings a small layer back into the caches
            samples[i].append(_sample_ms(calls[i], repeats[i], clock))
    if progress is not None:
        progress(planned, planned, "done")
    return [tuple(own) for own in samples]


def _warm_up(call: Call, how: Rounds, clock: Callable[[], float]) -> int:
    """Run until samples settle; returns how many calls fill a visit."""
    start, last = clock(), [_sample_ms(call, 1, clock)]
    while len(last) < 3 or 1e3 * (clock() - start) < how.warm_up_ms:
        repeat = _filling(median(last), how.sample_ms / 5)
        last = [*last[-4:], _sample_ms(call, repeat, clock)]
        if len(last) == 5 and max(last) - min(last) <= how.settled * median(last):
            break
    return _filling(median(last), how.sample_ms)


def _filling(call_ms: float, wanted_ms: float) -> int:
    return max(1, round(wanted_ms / max(call_ms, 1e-6)))


def _sample_ms(call: Call, repeat: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeat):
        call()
    return 1e3 * (clock() - start) / repeat
