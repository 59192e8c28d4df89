"""A whole pruning run: importance once, then one network per budget. Every step can be resumed.

Each step leaves its files in the run folder and is skipped when they are there, so a run that was
stopped goes on where it was and ends with the same result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from slimnas._files import remove_leftovers
from slimnas.arch.architecture import Architecture
from slimnas.latency.table import LatencyTable
from slimnas.nn.build import Network, build
from slimnas.prune.apply import apply_plan
from slimnas.prune.calibration import Batches, Calibration
from slimnas.prune.compose import compose
from slimnas.prune.config import BudgetSpec, PruneConfig
from slimnas.prune.correct import correct, position_importance
from slimnas.prune.costs import Budget, CostModel, amount_text
from slimnas.prune.finetune import evaluate, finetune
from slimnas.prune.found import (
    CORRECTED,
    CUT,
    PLAN,
    Origin,
    Pruned,
    load_figures,
    load_found,
    save_found,
    selection_metrics,
)
from slimnas.prune.measured import FILE as MEASURED
from slimnas.prune.measured import Measured, Meter, Setup, measure, open_meter
from slimnas.prune.pretrained import Start
from slimnas.prune.scored import Scored, Scoring, scored_network
from slimnas.prune.select import Selected, select
from slimnas.prune.widths import WidthPlan
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import StepReport
from slimnas.zoo.entry import FOUND, METRICS, WEIGHTS
from slimnas.zoo.metrics import Metrics, save_metrics
from slimnas.zoo.weights import load_weights, save_weights

BEFORE = "before.json"
STEPS = "steps"
UNTUNED = "before_finetuning.safetensors"
TRAINING_STATE = "finetuning.safetensors"
CORRECTION_IMAGES = 1000
"""Images for correction, at most: it holds their feature maps."""


class Listener(Protocol):
    """Is told how a run goes."""

    def stage(self, name: str, done: int, total: int, state: str = "") -> None:
        """After every minibatch, layer or step of a stage; `done` is `total` at its end."""


@dataclass(frozen=True)
class PruneResult:
    """What a run gives.

    Attributes:
        start: the unpruned network.
        calibration: its images.
        scored: the network that was pruned, in the basis of its scores.
        before: figures of the unpruned network.
        found: one network per budget, in the order of the budgets.
        accuracy_name: key of the accuracy among figures.
        measured: latencies measured in the folder so far.
        setup: which of them this run asked for; None for none.
    """

    start: Start
    calibration: Calibration
    scored: Scored
    before: Metrics
    found: tuple[Pruned, ...]
    accuracy_name: str
    measured: Measured
    setup: Setup | None = None


def run_prune(
    config: PruneConfig,
    start: Start,
    calibration: Calibration,
    folder: Path,
    *,
    listener: Listener,
    table: LatencyTable | None = None,
    scored: Scored | None = None,
    prune_on: str = "auto",
) -> PruneResult:
    """Prune a network to every budget, in a folder claimed for `config`.

    Args:
        config: the settings; `claim` has tied the folder to them.
        start: the network.
        calibration: its images.
        folder: the run folder, locked by the caller.
        listener: told how it goes.
        table: prices, for a latency budget, and for figures otherwise.
        scored: the network with scores from another run; None estimates importance here.
        prune_on: auto, cpu, cuda or mps.

    Raises:
        PruneError: a budget that cannot be met, importance that is not finite.
        MissingLatencyError: the table cannot price a width.
        WeightsError, RunFolderError, SpecError: a damaged or foreign file in the folder.
        RuntimeUnavailableError: this machine lacks `prune_on`, or the runtime to measure with.
        LatencyTableError: the machine is too busy to measure on; everything else is done.
    """
    meter = None if config.measure is None else open_meter(config.measure)
    remove_leftovers(folder)
    device = accelerator_for(prune_on).device
    run = _Run(Origin(config, start, calibration, table, device), folder, listener, prune_on)
    before = run.before()
    if scored is None:
        scored = run.scored(start.network, folder)
    scored.network.to(device)
    found = tuple(run.pruned(budget, scored) for budget in config.budgets)
    result = PruneResult(
        *(start, calibration, scored, before, found, run.origin.accuracy_name),
        measured=Measured.load(folder / MEASURED),
    )
    return result if meter is None else measure_result(result, folder, meter, listener)


def measure_result(
    result: PruneResult, folder: Path, meter: Meter, listener: Listener
) -> PruneResult:
    """Time the unpruned network and all found, and add that to their figures in the folder.

    Args:
        result: of the run.
        folder: the run folder, locked by the caller.
        meter: what times them.
        listener: told how it goes.

    Raises:
        LatencyTableError, ExportError, SpecError: see `slimnas.prune.measured.measure`.
    """
    title, unpruned = f"measuring with {meter.setup.title}", result.start.network
    measured = measure(
        meter,
        unpruned,
        [partial(_load, one.folder, one.architecture) for one in result.found],
        [one.architecture.digest for one in result.found],
        folder / MEASURED,
        on_visit=lambda done, total: listener.stage(title, done, total),
    )

    def added(metrics: Metrics, architecture: Architecture, path: Path) -> Metrics:
        whole = {**metrics, **measured.metrics(meter.setup, architecture.digest)}
        if whole != metrics:
            save_metrics(path, whole)
        return whole

    found = tuple(
        replace(one, metrics=added(one.metrics, one.architecture, one.folder / METRICS))
        for one in result.found
    )
    before = added(result.before, unpruned.architecture, folder / BEFORE)
    return replace(result, before=before, found=found, measured=measured, setup=meter.setup)


@dataclass(frozen=True)
class _Step:
    """One step towards a budget.

    Attributes:
        budget: the budget.
        number: from 1.
        count: steps in all.
        limit: the most that the network may cost after it.
        folder: of the step's network.
    """

    budget: BudgetSpec
    number: int
    count: int
    limit: float
    folder: Path

    @property
    def is_last(self) -> bool:
        """Whether it leads to the budget itself."""
        return self.number == self.count

    @property
    def name(self) -> str:
        """What to call it on a screen."""
        return self.budget.label + ("" if self.count == 1 else f" step {self.number}/{self.count}")


class _Run:
    """One run; see `run_prune`."""

    def __init__(self, origin: Origin, folder: Path, listener: Listener, prune_on: str) -> None:
        self.origin, self.folder, self.listener = origin, folder, listener
        self.config = origin.config
        self.accelerator = accelerator_for(prune_on)
        self.device = self.accelerator.device
        self.original = origin.start.network.to(self.device)
        self._weighed: tuple[Network, dict[str, Tensor]] | None = None

    def before(self) -> Metrics:
        """Figures of the unpruned network, kept in `before.json`."""
        path, name = self.folder / BEFORE, self.origin.accuracy_name
        if path.is_file():
            return load_figures(path, name, remove=path)
        self.listener.stage("unpruned", 0, 1, "accuracy")
        metrics = {
            **self.origin.priced(self.original.architecture),
            **self._accuracy(self.original, "unpruned", name),
        }
        save_metrics(path, metrics)
        self.listener.stage("unpruned", 1, 1, f"{metrics[name].value:.1f} %")
        return metrics

    def scored(self, network: Network, folder: Path, prefix: str = "") -> Scored:
        """The network in its basis with its importance scores, both kept in `folder`."""
        scoring = Scoring(
            criterion=self.config.criterion,
            basis=self.config.basis,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            calibration=self.origin.calibration,
            device=self.device,
        )

        def on_images(stage: str, done: int, total: int) -> None:
            self.listener.stage(prefix + stage, done, total, "images")

        return scored_network(network, scoring, folder, on_images)

    def pruned(self, budget: BudgetSpec, first: Scored) -> Pruned:
        """The network that meets `budget`, from its folder if it is done."""
        folder = self.folder / FOUND / budget.label
        done = load_found(folder, budget, self.origin.accuracy_name)
        if done is not None:
            return done
        current: Scored | None = first
        network = first.network
        whole: WidthPlan | None = None
        for step in self._steps(budget, folder, first.network):
            kept = None
            if not step.is_last:
                kept = load_found(step.folder, budget, self.origin.accuracy_name)
            if kept is not None:
                plan, network = kept.plan, _load(step.folder, kept.architecture).to(self.device)
            else:
                own = folder / STEPS / str(step.number)
                scored = current or self.scored(network, own, f"{step.name}: ")
                plan, network = self._step(step, scored, whole, own)
            whole = plan if whole is None else compose(whole, plan, first.network.architecture)
            current = None
        found = load_found(folder, budget, self.origin.accuracy_name)
        assert found is not None
        return found

    def _steps(self, budget: BudgetSpec, folder: Path, network: Network) -> Iterator[_Step]:
        """Limits fall geometrically: every step removes the same share of what is left."""
        count = self.config.iterations
        total = CostModel(budget.kind, self.origin.table).total(network.architecture)
        share = min(1.0, budget.limit / total)
        for number in range(1, count + 1):
            last = number == count
            limit = budget.limit if last else total * share ** (number / count)
            place = folder if last else folder / STEPS / str(number)
            yield _Step(budget, number, count, limit, place)

    def _step(
        self, step: _Step, scored: Scored, whole: WidthPlan | None, own: Path
    ) -> tuple[WidthPlan, Network]:
        """Choose, cut, correct, train if asked, judge and write."""
        config, source = self.config, scored.network
        limit = step.limit
        if whole is not None:
            # A step that cuts whole layers may go below the next limit: there is nothing to do.
            cost = CostModel(step.budget.kind, self.origin.table).total(source.architecture)
            limit = min(limit, cost)
        self.listener.stage(f"{step.name}: planning", 0, 1)
        selected = select(
            source.architecture,
            scored.scores,
            Budget(step.budget.kind, limit),
            units=config.units,
            method=config.method,
            round_to=config.round_to,
            table=self.origin.table,
            name=f"{_plain(self.origin.start.name)}_{step.budget.label}",
        )
        reached = amount_text(step.budget.kind, selected.after)
        self.listener.stage(f"{step.name}: planning", 1, 1, reached)
        network, metrics = self._cut(step, scored.network, selected)
        plan = selected.plan
        if step.is_last and step.count > 1 and whole is not None:
            plan.save(own / PLAN)
            first = self.origin.start.network.architecture
            plan_of_all = compose(whole, plan, first)
        else:
            plan_of_all = plan
        done = {
            "basis": config.basis,
            "units": list(config.units),
            "correction": config.correction,
            "step": f"{step.number} of {step.count}",
            "budget": f"{step.budget.kind} {step.budget.asked}",
        }
        save_found(self.origin, network, plan_of_all, step.folder, metrics, history=done)
        for name in (UNTUNED, TRAINING_STATE):
            (step.folder / name).unlink(missing_ok=True)
        return plan, network

    def _cut(self, step: _Step, source: Network, selected: Selected) -> tuple[Network, Metrics]:
        """The pruned network, corrected and trained as asked, and its figures."""
        config, final = self.config, self.origin.accuracy_name
        trains = config.finetune is not None and (step.is_last or config.finetune_between)
        metrics = dict(selection_metrics(selected, step.count))
        network = apply_plan(selected.plan, source, name=selected.architecture.name)
        corrects = config.correction != "none"
        metrics |= self._accuracy(network, "cut", CUT if corrects or trains else final)
        if corrects:
            network = self._corrected(step, source, network, selected)
            metrics |= self._accuracy(
                network, f"corrected by {config.correction}", CORRECTED if trains else final
            )
        if trains:
            network = self._finetuned(step, network)
            metrics |= self._accuracy(network, "fine-tuned", final)
        self.listener.stage(f"{step.name}: done", 1, 1, f"{metrics[final].value:.1f} %")
        return network, metrics

    def _corrected(
        self, step: _Step, source: Network, network: Network, selected: Selected
    ) -> Network:
        assert self.config.correction != "none"
        name = f"{step.name}: correction"
        images, size = self.origin.calibration.images, self.config.batch_size
        batches = Batches(images, size, self.device, limit=CORRECTION_IMAGES)
        if self._weighed is None or self._weighed[0] is not source:  # the same for every budget
            self._weighed = source, position_importance(source, batches)
        return correct(
            source,
            network,
            selected.plan,
            batches,
            self.config.correction,
            importance=self._weighed[1],
            on_layer=lambda done, total: self.listener.stage(name, done, total, "layers"),
        )

    def _finetuned(self, step: _Step, network: Network) -> Network:
        """Trained; what training begins from is kept until the step is done."""
        assert self.config.finetune is not None
        name = f"{step.name}: fine-tuning"
        kept = step.folder / UNTUNED
        if kept.is_file():
            network.load_state_dict(load_weights(kept, network.architecture))
        else:
            save_weights(kept, network.state_dict(), network.architecture)

        def on_step(report: StepReport) -> None:
            state = f"{report.images_per_s:.0f} images/s loss {report.loss:.3f}"
            self.listener.stage(name, report.step, report.steps, state)

        return finetune(
            network,
            self.original,
            self.origin.calibration.training,
            self.config.finetune,
            self.accelerator,
            seed=self.config.seed,
            checkpoint=step.folder / TRAINING_STATE,
            on_step=on_step,
        )

    def _accuracy(self, network: Network, what: str, name: str) -> Metrics:
        value = evaluate(network, self.origin.calibration.test, self.device)
        return {name: self.origin.accuracy(value, what)}


def _load(folder: Path, architecture: Architecture) -> Network:
    network = build(architecture).eval()
    network.load_state_dict(load_weights(folder / WEIGHTS, architecture))
    return network


def _plain(name: str) -> str:
    """A model's name as part of another's; it may be a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "model"
