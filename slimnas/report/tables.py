"""Numbers of the report as text: formats, and the rows of its tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slimnas.arch.architecture import Architecture
from slimnas.arch.templates import TITLES
from slimnas.latency.estimate import Estimate
from slimnas.report.plots import action_kind
from slimnas.report.run import FoundNetwork, ReferenceNetwork, RunReport
from slimnas.search.trajectory import Candidate, Step

NOTHING = "–"
PHASES = {"fill": "fills up", "exchange": "one of a pair that fits better"}


@dataclass(frozen=True)
class NetworkRow:
    """One network of the result table; `found` is none for the reference."""

    network: FoundNetwork | ReferenceNetwork
    found: FoundNetwork | None

    @property
    def title(self) -> str:
        """What the row is about."""
        if self.found is None:
            return self.network.architecture.name
        return f"found for {self.found.target_ms:g} ms"

    @property
    def met(self) -> bool:
        """Whether the target holds: by the measurement, where there is one, else by the table."""
        if self.found is None:
            return True
        if self.found.measured_ms is not None:
            return self.found.measured_ms <= self.found.target_ms
        return self.network.estimate.latency_ms <= self.found.target_ms


@dataclass(frozen=True)
class StepRow:
    """One step of the trajectory beside the state before it.

    Attributes:
        number: from 1.
        step: the step.
        kind: kind of action, for its colour.
        taken: the candidate that was taken.
        answers: the targets this step answers, in ms.
        why: what the step was for, where it did not slim, and whose prices it went by.
    """

    number: int
    step: Step
    kind: str
    taken: Candidate
    answers: tuple[float, ...]
    why: str


def network_rows(report: RunReport) -> list[NetworkRow]:
    """The found networks, then the reference where there is one."""
    rows = [NetworkRow(network, network) for network in report.found]
    if report.reference is not None:
        rows.append(NetworkRow(report.reference, None))
    return rows


def step_rows(report: RunReport) -> list[StepRow]:
    """One row per step, in order."""
    rows = []
    for number, step in enumerate(report.trajectory.steps, start=1):
        taken = next(c for c in step.candidates if c.action == step.taken)
        answers = tuple(n.target_ms for n in report.found if n.steps == number)
        rows.append(StepRow(number, step, action_kind(step.taken), taken, answers, _why(step)))
    return rows


def _why(step: Step) -> str:
    words = [PHASES[step.phase]] if step.phase in PHASES else []
    if step.corrections:
        networks = "1 network" if step.corrections == 1 else f"{step.corrections} networks"
        words.append(f"prices corrected by {networks}")
    return "; ".join(words)


def block_mix(architecture: Architecture) -> str:
    """How many blocks of each type: `9 MB4D, 3 HiLo`."""
    counts = Counter(block.type for stage in architecture.stages for block in stage.blocks)
    return ", ".join(f"{count} {TITLES.get(kind, kind)}" for kind, count in counts.items())


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every leaf of a nested mapping."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, float):
            yield name, f"{value:g}"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(str(item) for item in value)
        else:
            yield name, NOTHING if value is None else str(value)


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def compact(value: float | None) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    return fixed(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def millions(value: float) -> str:
    """A count in millions: `12.29 M`."""
    return f"{value / 1e6:.2f} M"


def giga(value: float) -> str:
    """A count in billions: `1.291 G`."""
    return f"{value / 1e9:.3f} G"


def interval(estimate: Estimate) -> str:
    """The interval of a total with its level: `1.42 to 1.71 ms (90 %)`."""
    low, high = estimate.interval_ms
    level = (
        "no stated level"
        if estimate.level is None
        else f"{100 * estimate.level:.0f}\N{NO-BREAK SPACE}%"
    )
    return f"{fixed(low, 2)} to {fixed(high, 2)} ms ({level})"


def standard_error_points(top1: float, images: int) -> float | None:
    """Binomial standard error of a top-1 in percent, in percentage points."""
    if images < 1:
        return None
    share = min(max(top1 / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / images)
