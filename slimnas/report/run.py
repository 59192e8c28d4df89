"""What a run report is made from: frozen values that the search command hands over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import CostReport, cost
from slimnas.arch.space import SearchSpace, Selection
from slimnas.latency.estimate import Estimate
from slimnas.latency.table import DeviceInfo
from slimnas.search.importance import ImportanceRecord
from slimnas.search.measurements import Measurement
from slimnas.search.trajectory import Trajectory


@dataclass(frozen=True)
class PricedNetwork:
    """A network and what the run's latency table says about it.

    Attributes:
        architecture: the network.
        estimate: its latency by the run's table.
    """

    architecture: Architecture
    estimate: Estimate

    @cached_property
    def cost(self) -> CostReport:
        """Parameters and MACs by closed form."""
        return cost(self.architecture)


@dataclass(frozen=True)
class FoundNetwork(PricedNetwork):
    """The network that answers one target.

    Attributes:
        target_ms: the target latency.
        selection: its place in the search space, identity slots included.
        search_top1: top-1 on the SEARCH split at the proxy resolution, in percent, with
            weights inherited from the supernet.
        steps: slimming steps from the largest network.
        folder: where its architecture and weights are.
        measurement: of the exported network on the device; none where that was out of reach.
        rounds: every network measured for the target, in order.
        is_predicted: whether `search_top1` was predicted from a search record, not measured.
    """

    target_ms: float
    selection: Selection
    search_top1: float
    steps: int
    folder: str
    measurement: Measurement | None = None
    rounds: tuple[Measurement, ...] = ()
    is_predicted: bool = False

    @property
    def measured_ms(self) -> float | None:
        """Latency on the device, where it was measured."""
        return None if self.measurement is None else self.measurement.measured_ms


@dataclass(frozen=True)
class ReferenceNetwork(PricedNetwork):
    """A published network under the conditions of the found ones.

    Attributes:
        search_top1: as of a found network, weights inherited; none where it is outside the space.
    """

    search_top1: float | None = None


@dataclass(frozen=True)
class DataSummary:
    """What the supernet was trained and judged on.

    Attributes:
        source: the data set, as `--data` names it.
        classes: number of classes.
        images: images per split, such as `{"train": 1200, "search": 300, "test": 297}`.
        resolution: side in pixels the supernet was trained and judged at.
        evaluated_images: images of the SEARCH split behind every top-1 of the report.
    """

    source: str
    classes: int
    images: Mapping[str, int]
    resolution: int
    evaluated_images: int


@dataclass(frozen=True)
class RunReport:
    """One finished `slimnas search` run.

    Attributes:
        name: the run's name.
        space: the search space.
        device: the latency table's device and provenance.
        trajectory: every step with every candidate.
        importance: the trained supernet's architecture parameters.
        found: one network per target, in the order of the targets.
        reference: a published network priced by the same table, weights inherited; none where
            the table cannot price it.
        data: what the supernet was trained and judged on.
        settings: every setting of the run, seeds among them.
        training: one mapping per logged point: `step`, and where known `loss`, `search_top1`
            (percent), `tau` and `images_per_s`.
        command: the command line that started the run.
        versions: package name to version.
        unmeasured: why a found network was not measured; none where all were.
        regimes: of each stage by the table: whether latency follows depth or width.
        files: path to what it holds, of everything the run wrote.
        next_commands: what to do to the command that does it.
        evidence: what the search judged candidates by, one sentence each.
        from_record: whether that was a search record, so that the found networks have no weights.
    """

    name: str
    space: SearchSpace
    device: DeviceInfo
    trajectory: Trajectory
    importance: ImportanceRecord
    found: tuple[FoundNetwork, ...]
    reference: ReferenceNetwork | None
    data: DataSummary
    settings: Mapping[str, object]
    training: tuple[Mapping[str, float | None], ...]
    command: str
    versions: Mapping[str, str]
    unmeasured: str | None = None
    regimes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    next_commands: Mapping[str, str] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()
    from_record: bool = False
