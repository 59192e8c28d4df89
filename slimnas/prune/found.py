"""A pruned network in its folder: architecture, weights, plan and figures with provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.errors import ZooError
from slimnas.latency.estimate import estimate
from slimnas.latency.table import LatencyTable
from slimnas.nn.build import Network
from slimnas.prune.calibration import Calibration
from slimnas.prune.config import BudgetSpec, PruneConfig
from slimnas.prune.pretrained import Start
from slimnas.prune.select import Selected
from slimnas.prune.widths import WidthPlan
from slimnas.zoo.entry import ARCHITECTURE, METRICS, load_entry, save_model
from slimnas.zoo.metrics import TEST_TOP1, Metric, Metrics, load_metrics
from slimnas.zoo.preprocessing import KEY, preprocessing

PLAN = "plan.json"
PARAMS, MACS, MEASURED_MACS = "params", "macs", "measured_macs"
AGREEMENT = "test_agreement_percent"
CUT, CORRECTED = "cut_percent", "corrected_percent"
"""Accuracy before what was done next: correction or training."""
REMOVED, GAP = "removed_importance", "greedy_gap"
LATENCY = "latency_ms"


@dataclass(frozen=True)
class Pruned:
    """The network that meets one budget, as it lies in its folder.

    Attributes:
        budget: what was asked.
        architecture: what stays.
        plan: from the unpruned network to this one.
        metrics: figures with provenance.
        folder: where it is.
    """

    budget: BudgetSpec
    architecture: Architecture
    plan: WidthPlan
    metrics: Mapping[str, Metric]
    folder: Path

    def value(self, name: str) -> float | None:
        """One figure, None where it was not taken."""
        metric = self.metrics.get(name)
        return None if metric is None else metric.value


@dataclass(frozen=True)
class Origin:
    """What pruned networks of a run come from.

    Attributes:
        config: the settings.
        start: the unpruned network.
        calibration: the images.
        table: prices, if any.
        device: where things are computed.
    """

    config: PruneConfig
    start: Start
    calibration: Calibration
    table: LatencyTable | None
    device: torch.device

    @property
    def accuracy_name(self) -> str:
        """`TEST_TOP1`, or `AGREEMENT` where labels are the model's own predictions."""
        return TEST_TOP1 if self.calibration.test_labels == "data" else AGREEMENT

    def accuracy(self, value: float, what: str) -> Metric:
        """A measured share of right answers."""
        against = (
            "against its labels"
            if self.calibration.test_labels == "data"
            else f"agreement with {self.start.name} unpruned, whose classes the data do not have"
        )
        shape = self.start.network.architecture.input.shape
        return Metric(
            value,
            f"measured on {len(self.calibration.test)} images of "
            f"{self.config.test_data or self.config.data} (held out) at {shape.height}x"
            f"{shape.width} px on {datetime.now(timezone.utc):%Y-%m-%d}, {against}; {what}",
        )

    def priced(self, architecture: Architecture) -> Metrics:
        """What an architecture costs, computed and by the table.

        Raises:
            MissingLatencyError: the table has no price for a component.
        """
        counted = cost(architecture)
        metrics = {
            PARAMS: Metric(counted.params, "computed by closed form"),
            MACS: Metric(counted.macs, "computed by closed form, one image"),
        }
        if self.table is not None:
            priced, device = estimate(architecture, self.table), self.table.device
            low, high = priced.interval_ms
            metrics[LATENCY] = Metric(
                priced.latency_ms,
                f"by the {device.kind} latency table {device.name}, between {low:.4g} and "
                f"{high:.4g}",
            )
        return metrics


def save_found(
    origin: Origin,
    network: Network,
    plan: WidthPlan,
    folder: Path,
    metrics: Metrics,
    *,
    history: Mapping[str, Any],
) -> None:
    """Write a pruned network; `architecture.yaml` comes last and says that all is there.

    Args:
        origin: where it comes from.
        network: the pruned network.
        plan: the one that `plan.json` gets.
        folder: its folder.
        metrics: figures beside costs, which are added.
        history: what was done, for the provenance.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    config, images = origin.config, origin.calibration.images
    given = network.architecture
    provenance = {
        "source": f"slimnas prune of {origin.start.name}, {config.criterion} importance",
        "pruned_from": {
            "name": origin.start.name,
            "architecture": config.architecture_digest,
            "weights": config.weights_digest,
            "weights_source": origin.start.source,
        },
        KEY: preprocessing(images.mean, images.std),
        "calibration": {"data": config.data, "digest": config.data_digest, "images": len(images)},
        "seed": config.seed,
        **history,
    }
    plan.save(folder / PLAN)
    everything = {
        **origin.priced(given),
        MEASURED_MACS: Metric(measured_macs(network), "counted by torch in a forward pass"),
        **metrics,
    }
    save_model(
        folder,
        architecture=given.renamed(given.name, provenance),
        weights=network.state_dict(),
        metrics=everything,
    )


def load_found(folder: Path, budget: BudgetSpec, accuracy_name: str) -> Pruned | None:
    """What `save_found` wrote, None where it did not finish.

    Raises:
        SlimnasError: a damaged file.
    """
    if not (folder / ARCHITECTURE).is_file():
        return None
    return Pruned(
        budget=budget,
        architecture=load_entry(folder).architecture,
        plan=WidthPlan.load(folder / PLAN),
        metrics=load_figures(folder / METRICS, MEASURED_MACS, accuracy_name, remove=folder),
        folder=folder,
    )


def load_figures(path: Path, *names: str, remove: Path) -> Metrics:
    """Figures of a network of a run, costs and `names` among them.

    Args:
        path: the file.
        names: of figures besides costs.
        remove: what is made anew when it is not there.

    Raises:
        ZooError: a damaged file, or one without a figure that it must have.
    """
    metrics = load_metrics(path)
    missing = [name for name in (PARAMS, MACS, *names) if name not in metrics]
    if missing:
        raise ZooError(
            f"{path}: {', '.join(missing)}: missing; remove {remove} to have it made anew"
        )
    return metrics


def selection_metrics(selected: Selected, steps: int) -> Metrics:
    """What the last selection says about itself."""
    cuts = "" if steps == 1 else f", last of {steps} steps"
    metrics = {
        REMOVED: Metric(
            selected.removed_importance, f"summed importance of what went, {selected.method}{cuts}"
        )
    }
    if selected.gap is not None:
        metrics[GAP] = Metric(
            selected.gap, "importance that greedy would lose more than the optimum, relative"
        )
    return metrics


@torch.no_grad()
def measured_macs(network: Network) -> int:
    """Multiply-adds of one forward pass of one image, counted operator by operator by torch."""
    shape = network.architecture.input.shape
    first = next(network.parameters())
    image = torch.zeros(1, shape.channels, shape.height, shape.width).to(first)
    counter = FlopCounterMode(display=False)
    # Attention as plain products: the fused operators are not counted on every device.
    with sdpa_kernel(SDPBackend.MATH), counter:
        network(image)
    return int(counter.get_total_flops()) // 2
