"""What the command line of `slimnas prune` names, opened and checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimnas.cli.output import note

if TYPE_CHECKING:
    from slimnas.arch.architecture import Architecture
    from slimnas.cli.prune_progress import PruneProgress
    from slimnas.latency.table import LatencyTable
    from slimnas.prune.calibration import Calibration
    from slimnas.prune.config import BudgetSpec, MeasureSpec, PruneConfig
    from slimnas.prune.pretrained import Start
    from slimnas.prune.scored import Scored
    from slimnas.train.loop import StepReport


AUTO, NONE = "auto", "none"
"""Values of `--measure` besides runtimes."""


@dataclass(frozen=True)
class Asked:
    """The command line of `slimnas prune`, grouped.

    Attributes:
        model, weights, data, test_data, skip_bad_images, scores, device, prune_on: as given.
        budgets: kind and text of each.
        settings: those that `PruneConfig` takes as they are.
        reports: what `--report` asks for.
        measure: a runtime to time the networks with, `auto` or `none`.
        threads, clock: for that; None where they were not given.
    """

    model: str
    weights: str
    data: str | None
    test_data: str | None
    skip_bad_images: bool
    scores: Path | None
    budgets: tuple[tuple[str, str], ...]
    device: str | None
    settings: dict[str, Any]
    prune_on: str
    reports: tuple[str, ...]
    measure: str
    threads: int | None
    clock: str | None

    @property
    def seed(self) -> int:
        """Of everything random."""
        seed: int = self.settings["seed"]
        return seed


@dataclass(frozen=True)
class Inputs:
    """Everything a run needs.

    Attributes:
        config: the settings.
        start: the unpruned network.
        calibration: its images.
        table: prices, if a device was named.
        scored: the network with scores of another run, if they were given.
    """

    config: PruneConfig
    start: Start
    calibration: Calibration
    table: LatencyTable | None
    scored: Scored | None


def check_before(asked: Asked) -> None:
    """Refuse what cannot end well before anything is downloaded, trained or written.

    Raises:
        SlimnasError: one line.
    """
    from slimnas.errors import PruneError, suggest
    from slimnas.prune.graph import channel_graph
    from slimnas.prune.measured import open_meter
    from slimnas.prune.taylor import CRITERIA
    from slimnas.zoo.registry import get

    criterion = asked.settings["criterion"]
    if criterion not in CRITERIA:
        raise PruneError(
            f"--criterion: must be one of {', '.join(CRITERIA)}, got {criterion!r}"
            f"{suggest(criterion, CRITERIA)}"
        )
    if asked.settings["method"] == "exact" and "embedding" in asked.settings["units"]:
        raise PruneError(
            "--method exact: cannot weigh embedding channels; use greedy, or other --units"
        )
    measure = _measure(asked, None)
    if measure is not None:
        open_meter(measure)
    elif (asked.threads or asked.clock) and (asked.measure == NONE or asked.device is None):
        given = "--threads" if asked.threads else "--clock"
        raise PruneError(f"{given}: is for measuring; give --measure RUNTIME as well")
    entry = get(asked.model)
    channel_graph(entry.architecture)  # refuses blocks that cannot be pruned
    for kind, text in asked.budgets:
        if kind == "latency_ms" and asked.device is None:
            raise PruneError(f"--latency {text}: needs a latency table of the model; give --device")
        if kind != "latency_ms":
            _budget(kind, text, entry.architecture, None, asked.settings["units"])


def open_inputs(asked: Asked, folder: Path, progress: PruneProgress) -> Inputs:
    """Open weights, table, images and scores; trains the model where the hub is out of reach.

    Raises:
        SlimnasError: one line.
    """
    from slimnas.arch.documents import parse_spec
    from slimnas.latency.devices import find_device, provenance_line
    from slimnas.nn.tensorfiles import tensors_digest
    from slimnas.prune.config import PruneConfig
    from slimnas.prune.measured import open_meter
    from slimnas.prune.scored import load_scored
    from slimnas.search.checks import table_digest
    from slimnas.train.devices import accelerator_for

    device = accelerator_for(asked.prune_on).device
    table = None
    if asked.device is not None:
        table = find_device(asked.device)
        note(f"latency table: {provenance_line(table)}")
    measure = _measure(asked, table)
    if measure is not None:
        open_meter(measure)
    start = _start(asked, folder, progress)
    architecture = start.network.architecture
    budgets = _budget_specs(asked, architecture, table)
    scored = None if asked.scores is None else load_scored(asked.scores, start.network)
    calibration, data = _images(asked, start, device)
    config = parse_spec(
        PruneConfig,
        {
            **asked.settings,
            "model": asked.model,
            "architecture_digest": architecture.digest,
            "weights": asked.weights,
            "weights_digest": tensors_digest(start.network.state_dict()),
            "data": data,
            "data_digest": calibration.digest,
            "test_data": asked.test_data,
            "test_digest": calibration.test_digest,
            "budgets": [budget.model_dump() for budget in budgets],
            "table_digest": None if table is None else table_digest(table),
            "scores_digest": None if scored is None else _file_digest(asked.scores),
            "measure": None if measure is None else measure.model_dump(),
        },
        source="command line",
    )
    _refuse_unreachable(config, start, table)
    return Inputs(config, start, calibration, table, scored)


def _measure(asked: Asked, table: LatencyTable | None) -> MeasureSpec | None:
    """How to time the networks: as asked, else as a table of this machine was measured."""
    from slimnas.prune.config import MeasureSpec
    from slimnas.prune.measured import spec_of_table

    given = {"threads": asked.threads, "clock": asked.clock}
    changes = {key: value for key, value in given.items() if value is not None}
    if asked.measure not in (AUTO, NONE):
        return MeasureSpec.model_validate({"runtime": asked.measure, **changes})
    spec = spec_of_table(table) if asked.measure == AUTO and table is not None else None
    return None if spec is None else MeasureSpec.model_validate({**spec.model_dump(), **changes})


def _start(asked: Asked, folder: Path, progress: PruneProgress) -> Start:
    from slimnas.prune.pretrained import NoHubError, open_start, train_start

    try:
        start = open_start(asked.model, asked.weights)
    except NoHubError as error:
        note(
            f"no published weights: {error}; training {asked.model} briefly on digits instead. "
            "Give --weights FILE for real ones"
        )

        def on_step(report: StepReport) -> None:
            state = f"{report.images_per_s:.0f} images/s loss {report.loss:.3f}"
            progress.stage("training", report.step, report.steps, state)

        start = train_start(
            asked.model,
            seed=asked.seed,
            train_on=asked.prune_on,
            spare=folder / "pretrained",
            on_step=on_step,
        )
    note(f"weights: {start.source}")
    return start


def _images(asked: Asked, start: Start, device: Any) -> tuple[Calibration, str]:
    from slimnas.data.photos import NAME
    from slimnas.prune.calibration import DataRequest, open_calibration

    data = asked.data or start.trained_on or NAME
    calibration = open_calibration(
        DataRequest(
            data=data,
            test_data=asked.test_data,
            images=asked.settings["images"],
            labels=asked.settings["labels"],
            normalisation=start.normalisation,
            foreign=start.trained_on is not None and data != start.trained_on,
            seed=asked.seed,
            skip_bad_images=asked.skip_bad_images,
            for_training=asked.settings["finetune"] is not None,
        ),
        start.network,
        device,
    )
    note(f"data: {calibration.description}")
    if asked.data is None and data == NAME:
        note(
            "no --data: random crops of two photographs stand in for images; --data with images "
            "like the model's own gives better results"
        )
    if calibration.labels == "model":
        note("labels: the model's own predictions, since its classes are not the data's")
    if calibration.test_labels == "model":
        note("accuracy: agreement with the unpruned network, for the same reason")
    return calibration, data


def _budget_specs(
    asked: Asked, architecture: Architecture, table: LatencyTable | None
) -> list[BudgetSpec]:
    from slimnas.errors import PruneError

    units = asked.settings["units"]
    specs = [_budget(kind, text, architecture, table, units) for kind, text in asked.budgets]
    labels = [spec.label for spec in specs]
    double = next((label for label in labels if labels.count(label) > 1), None)
    if double is not None:
        raise PruneError(f"budgets: each must be given once, {double} is given twice")
    return specs


def _budget(
    kind: str, text: str, architecture: Architecture, table: LatencyTable | None, units: list[str]
) -> BudgetSpec:
    from slimnas.prune.config import BudgetSpec
    from slimnas.prune.costs import parse_budget

    if kind == "units":
        return _ratio(text, architecture, units)
    limit = parse_budget(kind, text, architecture, table).limit  # type: ignore[arg-type]
    return BudgetSpec(kind=kind, limit=limit, asked=text.strip())


def _ratio(text: str, architecture: Architecture, units: list[str]) -> BudgetSpec:
    """A share of the chosen units as the number of all units that stay."""
    from slimnas.errors import PruneError
    from slimnas.prune.config import BudgetSpec
    from slimnas.prune.costs import BlockWidths

    share = float(text)
    if not 0 < share < 1:
        raise PruneError(f"--ratio: must lie between 0 and 1, got {text}")
    chosen = total = 0
    for stage in architecture.stages:
        for block in stage.blocks:
            widths = BlockWidths.of(block, stage.width)
            total += widths.units
            layer = "layer" in units
            heads = layer or "head" in units
            chosen += widths.heads * widths.qk * (heads or "qk" in units)
            chosen += widths.heads * widths.v * (heads or "v" in units)
            chosen += widths.ffn * (layer or "ffn" in units)
    return BudgetSpec(kind="units", limit=max(1.0, total - share * chosen), asked=text)


def _refuse_unreachable(config: PruneConfig, start: Start, table: LatencyTable | None) -> None:
    """Plan every budget by random scores: what cannot be met is refused before the long work.

    Raises:
        PruneError: names the minimum.
        MissingLatencyError: the table lacks a price.
    """
    from slimnas.prune.costs import Budget
    from slimnas.prune.select import select
    from slimnas.prune.taylor import ScoreRun

    scores = ScoreRun(start.network, ("random",)).result()["random"]
    for budget in config.budgets:
        select(
            start.network.architecture,
            scores,
            Budget(budget.kind, budget.limit),
            units=config.units,
            round_to=config.round_to,
            table=table,
        )


def _file_digest(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
