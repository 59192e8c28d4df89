"""The attention study's settings and what it finds; `slimnas.analysis.attention` runs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median, quantiles
from typing import Literal

from slimnas.analysis.interleaved import Rounds
from slimnas.analysis.mechanisms import (
    HILO,
    MECHANISMS,
    STUDY_BATCH,
    STUDY_HEADS,
    STUDY_SIDE,
    STUDY_WIDTH,
    Mechanism,
)
from slimnas.errors import AnalysisError, suggest
from slimnas.measure.machine import Machine

LEVEL = 0.95
"""Confidence of the intervals of ratios."""

NOISE = 0.05
"""By how much a published ratio may be missed: the study's own GPU figures moved by 2 to 4 %
between two states of its repository that have the same code."""

DEFAULT_ROUNDS = Rounds()

Layout = Literal["tokens", "own"]
Verdict = Literal["holds", "smaller", "no difference", "reversed"]


@dataclass(frozen=True)
class AttentionStudy:
    """What to time.

    Attributes:
        resolutions: sides of the map in tokens.
        width: channels.
        heads: attention heads, which divide the width.
        batch: maps per call.
        mechanisms: names of `MECHANISMS`.
        runtime: `torch` or `onnxruntime`.
        device: `cpu` or `cuda`.
        threads: threads per call on the CPU.
        fused: whether attention may use fused kernels; else products and softmax one by one.
            Exported models have no such choice.
        layout: `tokens` in and out for all, as in the study, or each mechanism's own.
        clock: `wall`, or `cpu` for the CPU time of the one thread.
        memory: whether to measure memory, which PyTorch can.
        how: the protocol.
        seed: of weights, inputs and orders.
    """

    resolutions: tuple[int, ...] = (STUDY_SIDE,)
    width: int = STUDY_WIDTH
    heads: int = STUDY_HEADS
    batch: int = STUDY_BATCH
    mechanisms: tuple[str, ...] = tuple(MECHANISMS)
    runtime: str = "torch"
    device: str = "cpu"
    threads: int = 1
    fused: bool = True
    layout: Layout = "tokens"
    clock: Literal["wall", "cpu"] = "wall"
    memory: bool = True
    how: Rounds = DEFAULT_ROUNDS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.mechanisms:
            if name not in MECHANISMS:
                raise AnalysisError(
                    f"unknown mechanism {name!r}{suggest(name, MECHANISMS)}; known: "
                    f"{', '.join(MECHANISMS)}"
                )
        for what, values in (
            ("a mechanism", self.mechanisms),
            ("a resolution", self.resolutions),
        ):
            if not values or len(set(values)) < len(values):
                raise AnalysisError(f"must name {what}, each once; got {list(values)}")
        if min(*self.resolutions, self.width, self.heads, self.batch) < 1:
            raise AnalysisError(
                f"resolutions, dim, heads and batch must be at least 1, got "
                f"{list(self.resolutions)}, {self.width}, {self.heads} and {self.batch}"
            )
        if self.width % self.heads:
            raise AnalysisError(
                f"heads must divide dim, {self.width}, got {self.heads}; try "
                f"{_nearest_divisor(self.width, self.heads)}"
            )
        if self.clock == "cpu" and (self.threads > 1 or self.device != "cpu"):
            raise AnalysisError(
                "the cpu clock counts one thread's time: it needs one thread on the CPU, got "
                f"{self.threads} on {self.device}"
            )

    def is_studys(self, side: int) -> bool:
        """Whether layers on maps of `side` are those of the published study."""
        own = side, self.width, self.heads
        return own == (STUDY_SIDE, STUDY_WIDTH, STUDY_HEADS)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a mechanism HiLo is, from the rounds of one study.

    Attributes:
        value: median over rounds.
        iqr: interquartile range over rounds.
        interval: confidence interval of the median.
        published: the published ratio; none where there is none for this layer and device.
    """

    value: float
    iqr: float
    interval: tuple[float, float]
    published: float | None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the published ratio holds here.

        It holds if the interval reaches it, or `NOISE` less. Else HiLo's advantage is `smaller`,
        or there is none (`no difference`), or the other is faster (`reversed`).
        """
        if self.published is None:
            return None
        low, high = self.interval
        if high >= self.published * (1 - NOISE):
            return "holds"
        if low > 1:
            return "smaller"
        return "no difference" if high >= 1 else "reversed"


@dataclass(frozen=True)
class LayerRow:
    """What one mechanism took on one map.

    Attributes:
        mechanism: its name.
        side: side of the map in tokens.
        params: parameters.
        macs: multiply-adds for one map.
        rounds_ms: milliseconds per call in every round.
        difference: largest difference from double precision, as a share of the largest output.
        test_bytes: peak memory of a call without gradients, weights and input included.
        train_bytes: the same of a call with gradients and the backward pass.
    """

    mechanism: Mechanism
    side: int
    params: int
    macs: int
    rounds_ms: tuple[float, ...]
    difference: float
    test_bytes: int | None
    train_bytes: int | None

    @property
    def latency_ms(self) -> float:
        """Median over rounds."""
        return median(self.rounds_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile over rounds."""
        return _quartiles(self.rounds_ms)


@dataclass(frozen=True)
class LeftOut:
    """A mechanism that was not timed on a map, and why."""

    mechanism: str
    side: int
    reason: str


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        study: what was asked.
        rows: what was timed, in the order of `MECHANISMS`, map by map.
        left_out: what could not be.
        machine: where.
        runtime: name and version of the runtime.
        compute_unit: where the runtime ran.
        date: when, ISO 8601.
    """

    study: AttentionStudy
    rows: tuple[LayerRow, ...]
    left_out: tuple[LeftOut, ...]
    machine: Machine
    runtime: tuple[str, str]
    compute_unit: str
    date: str

    def row(self, mechanism: str, side: int) -> LayerRow | None:
        """The row of a mechanism on a map; None if it was left out."""
        for row in self.rows:
            if (row.mechanism.name, row.side) == (mechanism, side):
                return row
        return None

    def images_per_s(self, row: LayerRow) -> float:
        """Throughput in maps per second."""
        return 1e3 * self.study.batch / row.latency_ms

    def ratio(self, row: LayerRow) -> Ratio | None:
        """HiLo's throughput over that of `row`; None for HiLo itself and where it is missing."""
        hilo = self.row(HILO, row.side)
        if hilo is None or hilo is row:
            return None
        pairs = zip(row.rounds_ms, hilo.rounds_ms, strict=True)
        ratios = [other / own for other, own in pairs]
        low, high = _quartiles(ratios)
        error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(ratios))  # of a median
        half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * error
        value = median(ratios)
        return Ratio(value, high - low, (value - half, value + half), self._published(row))

    def _published(self, row: LayerRow) -> float | None:
        theirs, own = row.mechanism.published, MECHANISMS[HILO].published
        if theirs is None or own is None or not self.study.is_studys(row.side):
            return None
        if self.study.device == "cuda":
            return own.gpu_images_per_s / theirs.gpu_images_per_s
        return own.cpu_images_per_s / theirs.cpu_images_per_s


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def _nearest_divisor(width: int, heads: int) -> int:
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    return min(divisors, key=lambda n: abs(n - heads))
