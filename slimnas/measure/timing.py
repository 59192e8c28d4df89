"""The timing protocol: what one round is, when it counts, and what its samples mean.

A round times every term of an entry in shuffled order, with the reference network before and
after. When the reference is further than `max_drift` from its running lower quartile, the machine
was doing something else: the whole round is rejected, never a single sample, and repeated. Every
rejected round stays in the journal. It is the quartile, not the median, because a disturbance only
ever slows: the machine's own pace stays in sight until it is disturbed three quarters of the time.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from slimnas.errors import LatencyTableError

Call = Callable[[], object]
"""Runs a loaded network once."""

LEVEL = 3
"""Windows in a row that are no faster: the warm-up is over."""

WINDOW = 101
"""Reference timings that the running quartile looks back on."""

BUSY = 1.2
"""Working threads per thread given, beyond which a runtime uses more than it was given."""


@dataclass(frozen=True)
class Clocks:
    """Seconds of the wall, of CPU time of this thread, and of CPU time of the process."""

    wall: Callable[[], float] = time.perf_counter
    thread: Callable[[], float] = time.thread_time
    process: Callable[[], float] = time.process_time


@dataclass(frozen=True)
class Protocol:
    """How latencies are taken.

    Attributes:
        clock: `wall`, or `cpu` for the CPU time of the timing thread, which on one thread is the
            same but for the turns that other processes take; for machines never left alone.
        rounds: accepted rounds per entry and pass.
        passes: how often each entry is visited, in newly loaded networks and another order.
        max_drift: how far the reference may be from its running lower quartile, as a share.
        visit_ms: how long one network is timed in one round.
        sample_ms: least duration of one sample; fast networks run several times in it.
        settled: warm-up ends when windows are no longer faster than all before by more than this
            share.
        patience_s: how long to wait for a round that is accepted.
        warm_up_ms: longest warm-up of one network.
        chains: lengths of the two chains of a block.
        precision: standard error of a price, as a share, above which an entry is visited again.
        extra_passes: how often at most.
        seed: of the order of rounds and of the random networks.
    """

    clock: Literal["wall", "cpu"] = "wall"
    rounds: int = 6
    passes: int = 2
    max_drift: float = 0.05
    visit_ms: float = 15.0
    sample_ms: float = 1.0
    settled: float = 0.01
    warm_up_ms: float = 400.0
    patience_s: float = 120.0
    chains: tuple[int, int] = (1, 4)
    precision: float = 0.03
    extra_passes: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clock not in ("wall", "cpu"):
            raise LatencyTableError(f"clock must be wall or cpu, got {self.clock!r}")
        if self.rounds < 1 or self.passes < 1:
            raise LatencyTableError(
                f"rounds and passes must be at least 1, got {self.rounds} and {self.passes}"
            )
        if not 0 < self.max_drift < 1:
            raise LatencyTableError(
                f"max_drift must be a share between 0 and 1, got {self.max_drift}"
            )
        if not 1 <= self.chains[0] < self.chains[1]:
            raise LatencyTableError(f"chains must be two growing lengths, got {self.chains}")

    def describe(self) -> str:
        """Say it in one line, for `device.yaml`."""
        short, long = self.chains
        clock = "wall clock" if self.clock == "wall" else "CPU time of the one thread"
        return (
            f"{clock}; blocks by differencing chains of {long} and {short} copies, other "
            "components by differencing networks with and without them; BN folded; "
            f"{self.passes} passes of "
            f"{self.rounds} rounds in shuffled order, a reference network around each; rounds "
            f"with a reference more than {100 * self.max_drift:g} % from its running lower "
            "quartile rejected, the others scaled by it, those at another pace left out; "
            "median over rounds, spread is the IQR"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON gives back unchanged."""
        return {**asdict(self), "chains": list(self.chains)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Protocol:
        """Read what `to_dict` gave.

        Raises:
            TypeError, ValueError: it is not that.
            LatencyTableError: a value that no protocol may have.
        """
        short, long = data["chains"]
        return cls(**{**data, "chains": (short, long)})


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        reference_ms: the reference's median before and after.
        samples_ms: per term, milliseconds per call of every sample; empty in a round that was
            given up before them.
        accepted: whether the reference stood still.
    """

    reference_ms: tuple[float, float]
    samples_ms: tuple[tuple[float, ...], ...]
    accepted: bool

    @property
    def pace(self) -> float:
        """The reference's latency in this round, in milliseconds."""
        return sum(self.reference_ms) / 2

    def price_ms(self, shares: Sequence[float]) -> float:
        """Weighted sum of the terms' medians."""
        pairs = zip(shares, self.samples_ms, strict=True)
        return sum(share * median(samples) for share, samples in pairs)


class Stopwatch:
    """Times networks by the protocol on one machine.

    Args:
        protocol: how.
        reference: the reference network, loaded.
        clocks: what tells the time.
    """

    def __init__(
        self,
        protocol: Protocol,
        reference: Call,
        clocks: Clocks,
    ) -> None:
        self.protocol = protocol
        self._clocks = clocks
        self._clock = clocks.wall if protocol.clock == "wall" else clocks.thread
        self._paces: deque[float] = deque(maxlen=WINDOW)
        self._reference = reference
        self._reference_repeat = self._warm_up(reference)

    def prime(self, paces_ms: Sequence[float] = (), visits: int = WINDOW) -> None:
        """Give the running quartile something to go by: earlier paces, else some visits now."""
        self._paces.extend(paces_ms)
        if not self._paces:
            self._paces.extend(self._pace() for _ in range(visits))

    def busy_threads(self) -> float:
        """CPU time of the process over that of this thread, while the reference runs.

        About the number of threads that work on a call, however busy the machine is.
        """
        clocks = self._clocks
        start, process_start = clocks.thread(), clocks.process()
        while clocks.thread() - start < 0.1:
            self._reference()
        return (clocks.process() - process_start) / (clocks.thread() - start)

    def rounds(self, calls: Sequence[Call], *, name: str, rng: random.Random) -> tuple[Round, ...]:
        """Time `calls` side by side until enough rounds are accepted.

        Args:
            calls: the loaded terms of one entry.
            name: the entry, for the message.
            rng: gives the order within rounds.

        Raises:
            LatencyTableError: the machine is too busy: no round was accepted for `patience_s`.
        """
        repeats = [self._warm_up(call) for call in calls]
        done: list[Round] = []
        wall = self._clocks.wall
        quiet = wall()
        while sum(one.accepted for one in done) < self.protocol.rounds:
            done.append(self._round(calls, repeats, rng))
            if done[-1].accepted:
                quiet = wall()
            elif wall() - quiet > self.protocol.patience_s:
                raise LatencyTableError(self._too_busy(name))
        return tuple(done)

    def _round(self, calls: Sequence[Call], repeats: Sequence[int], rng: random.Random) -> Round:
        before = self._pace()
        steady = self._is_usual(before)
        samples = {}
        if steady:  # else the round is lost already
            for i in rng.sample(range(len(calls)), len(calls)):
                samples[i] = self._visit(calls[i], repeats[i])
        after = self._pace() if steady else before
        accepted = steady and self._is_usual(after)
        # Unusual paces count too, so that a lasting change is followed.
        self._paces.extend((before, after) if steady else (before,))
        return Round((before, after), tuple(samples[i] for i in sorted(samples)), accepted)

    def _is_usual(self, pace: float) -> bool:
        own = sorted(self._paces)[len(self._paces) // 4]
        return abs(pace / own - 1) <= self.protocol.max_drift

    def _too_busy(self, name: str) -> str:
        return (
            f"{name}: the reference network stayed more than {100 * self.protocol.max_drift:g} % "
            f"off its running lower quartile for {self.protocol.patience_s:g} s; the machine is "
            "too busy: free it and start the same command again, it goes on here; where it is "
            "never free, measure on one thread with --clock cpu"
        )

    def _pace(self) -> float:
        return median(self._visit(self._reference, self._reference_repeat))

    def _visit(self, call: Call, repeat: int) -> tuple[float, ...]:
        """Milliseconds per call, one value per sample of `repeat` calls."""
        call()  # brings the network back into the caches
        samples: list[float] = []
        start = self._clock()
        while len(samples) < 3 or 1e3 * (self._clock() - start) < self.protocol.visit_ms:
            samples.append(self._sample_ms(call, repeat))
        return tuple(samples)

    def _sample_ms(self, call: Call, repeat: int) -> float:
        start = self._clock()
        for _ in range(repeat):
            call()
        took = self._clock() - start
        if took <= 0:
            raise LatencyTableError(
                f"the {self.protocol.clock} clock must go on while a network runs, it moved by "
                f"{took:g} s; use the other --clock, or a system whose clock is steady"
            )
        return 1e3 * took / repeat

    def _warm_up(self, call: Call) -> int:
        """Run until window medians no longer fall; returns how many calls fill a sample.

        Warming up makes calls faster; that they vary is the machine's noise, which no waiting ends.
        """
        start = self._clock()
        repeat, level, fastest = 1, 0, math.inf
        while level < LEVEL and 1e3 * (self._clock() - start) < self.protocol.warm_up_ms:
            window = median(self._sample_ms(call, repeat) for _ in range(3))
            repeat = max(1, round(self.protocol.sample_ms / max(window, 1e-6)))
            level = 0 if window < (1 - self.protocol.settled) * fastest else level + 1
            fastest = min(fastest, window)
        return repeat
