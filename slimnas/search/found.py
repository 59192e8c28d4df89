"""The networks a search found: built with inherited weights, priced, and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import CostReport, cost
from slimnas.arch.space import SearchSpace, Selection
from slimnas.data.whole import Normalisation
from slimnas.errors import MissingLatencyError, SpecError
from slimnas.latency.estimate import Estimate, estimate
from slimnas.latency.table import DeviceInfo, LatencyTable
from slimnas.latency.target import latency_label
from slimnas.search.closing import Answer
from slimnas.search.config import SearchConfig
from slimnas.search.evaluator import SelectionEvaluator
from slimnas.search.measurements import Measurement
from slimnas.search.slimming import Evaluate
from slimnas.search.trajectory import Trajectory
from slimnas.supernet.inherit import Alphas, place_by
from slimnas.supernet.train import TrainedSupernet
from slimnas.zoo.entry import FOUND, save_model
from slimnas.zoo.metrics import Metric
from slimnas.zoo.preprocessing import KEY, TRAINED_AT, preprocessing
from slimnas.zoo.registry import get

REFERENCE = "efficientformer_l1"
SOURCE = "slimnas search, greedy latency-driven slimming"


@dataclass(frozen=True)
class Found:
    """The network that answers one target.

    Attributes:
        target_ms: the target.
        architecture: the network at the deployment resolution.
        selection: its place in the space.
        estimate: its latency by the table, as corrected by what was measured before it.
        cost: parameters and MACs.
        search_top1: on SEARCH at the training resolution, weights inherited, in percent.
        steps: steps that led to it.
        folder: where its files are.
        measurement: on the table's device; none where that was out of reach.
        rounds: every network measured for the target.
        has_weights: whether inherited weights are among its files; not if it was found from a
            search record.
        is_predicted: whether `search_top1` was predicted from a search record, not measured.
    """

    target_ms: float
    architecture: Architecture
    selection: Selection
    estimate: Estimate
    cost: CostReport
    search_top1: float
    steps: int
    folder: Path
    measurement: Measurement | None = None
    rounds: tuple[Measurement, ...] = ()
    has_weights: bool = True
    is_predicted: bool = False


@dataclass(frozen=True)
class Reference:
    """A published network under the conditions of the found ones: classes, table, weights.

    Attributes:
        architecture: with the data's number of classes.
        estimate: its latency by the table.
        search_top1: on SEARCH with weights inherited from the supernet, in percent; None where
            the network is outside the space.
    """

    architecture: Architecture
    estimate: Estimate
    search_top1: float | None


@dataclass(frozen=True)
class Origin:
    """What a found network was made from.

    Attributes:
        config, space, table, trained: of the search.
        evaluator: what judged it.
        images: SEARCH images it was judged on.
        normalisation: of the images that the supernet was trained with.
    """

    config: SearchConfig
    space: SearchSpace
    table: LatencyTable
    trained: TrainedSupernet
    evaluator: SelectionEvaluator
    images: int
    normalisation: Normalisation


def save_found(origin: Origin, trajectory: Trajectory, answer: Answer, folder: Path) -> Found:
    """Build, price and write the state of `trajectory` that answers a target.

    Raises:
        RunFolderError: `folder` cannot be written.
    """
    selection, _, top1 = trajectory.states[answer.steps]
    name = found_name(origin.space, origin.table, answer.target_ms)
    provenance = {
        "source": SOURCE,
        "target_ms": answer.target_ms,
        "seed": origin.config.seed,
        "supernet_digest": origin.trained.digest,
        "table_digest": origin.config.table_digest,
        TRAINED_AT: origin.config.resolution,
        KEY: preprocessing(*origin.normalisation),
    }
    architecture = origin.space.architecture(selection).renamed(name, provenance)
    network = origin.evaluator.inheritance.extract(architecture, selection=selection)
    state = {**network.state_dict(), **origin.evaluator.calibrated_buffers(selection)}
    priced, counted = estimate(architecture, answer.table), cost(architecture)
    inherited = Metric(
        top1,
        f"measured on {origin.images} SEARCH images of {origin.config.data} at "
        f"{origin.config.resolution} px, weights inherited from the supernet, not fine-tuned",
    )
    metrics = found_metrics(origin.table, priced, counted, inherited, answer.measurement)
    save_model(folder, architecture=architecture, weights=state, metrics=metrics)
    return Found(
        target_ms=answer.target_ms,
        architecture=architecture,
        selection=selection,
        estimate=priced,
        cost=counted,
        search_top1=top1,
        steps=answer.steps,
        folder=folder,
        measurement=answer.measurement,
        rounds=answer.rounds,
    )


def price_reference(origin: Origin) -> Reference | None:
    """EfficientFormer-L1 beside the found networks; None where the table cannot price it."""
    alphas = origin.trained.supernet.alphas()
    return judged_reference(origin.space, origin.table, alphas, origin.evaluator.top1)


def judged_reference(
    space: SearchSpace, table: LatencyTable, alphas: Alphas, evaluate: Evaluate
) -> Reference | None:
    """EfficientFormer-L1 with the space's head; None where the table cannot price it.

    Args:
        space: the search space.
        table: prices it.
        alphas: architecture parameters, which say what slots its blocks go to.
        evaluate: judges it, if it is in the space.
    """
    published = get(REFERENCE).architecture
    architecture = published.with_head(classes=space.head.classes, distilled=space.head.distilled)
    try:
        priced = estimate(architecture, table)
    except MissingLatencyError:
        return None
    try:
        selection = place_by(alphas, space, architecture)
    except SpecError:
        return Reference(architecture, priced, None)
    return Reference(architecture, priced, evaluate(selection))


def found_name(space: SearchSpace, table: LatencyTable, target_ms: float) -> str:
    """What a found network is called."""
    return f"{space.name}_{table.device.name}_{latency_label(target_ms)}"


def found_metrics(
    table: LatencyTable,
    priced: Estimate,
    counted: CostReport,
    top1: Metric,
    measurement: Measurement | None,
) -> dict[str, Metric]:
    """What `metrics.json` of a found network says."""
    low, high = priced.interval_ms
    level = "" if priced.level is None else f" ({100 * priced.level:g} % interval)"
    device = table.device
    metrics = {
        "search_top1_percent": top1,
        "latency_ms": Metric(
            priced.latency_ms,
            f"by the {device.kind} latency table {device.name}, between {low:.4g} and "
            f"{high:.4g}{level}",
        ),
        "params": Metric(counted.params, "computed by closed form"),
        "macs": Metric(counted.macs, "computed by closed form, one image"),
    }
    return metrics if measurement is None else metrics | _measured_metrics(device, measurement)


def _measured_metrics(device: DeviceInfo, measured: Measurement) -> dict[str, Metric]:
    said = (
        f"measured on {measured.date} with {device.runtime.name} {device.runtime.version} on "
        f"{device.soc}, {device.threads or 1} threads, by the protocol of the table"
    )
    return {
        "measured_latency_ms": Metric(measured.measured_ms, f"{said}; median over rounds"),
        "measured_latency_error_ms": Metric(measured.error_ms, f"{said}; standard error"),
    }


def found_folder(folder: Path, config: SearchConfig, target_ms: float) -> Path:
    """Where the network for `target_ms` goes: the run folder itself if it is the only one."""
    return folder if len(config.targets_ms) == 1 else folder / FOUND / latency_label(target_ms)
