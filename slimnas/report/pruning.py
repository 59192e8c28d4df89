"""The report of a pruning run: one self-contained HTML page, figures, CSV and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import slimnas
from slimnas._files import atomic_write_text
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import CostReport, cost
from slimnas.errors import PruneError, suggest
from slimnas.prune.findings import published_findings
from slimnas.prune.measured import Measured, Setup, Timed
from slimnas.prune.ratios import KINDS, TITLES, RatioSet, channel_ratios
from slimnas.prune.scores import Scores
from slimnas.prune.sensitivity import Sensitivity
from slimnas.prune.widths import WidthPlan
from slimnas.report.figures import WIDE_IN, save_figure
from slimnas.report.html import FIGURES, Picture, page_environment, themes
from slimnas.report.pruning_curves import importance_figure, sensitivity_figure, zero_units
from slimnas.report.pruning_figures import ParetoPoint, channel_ratios_figure, pareto_figure
from slimnas.report.tables import standard_error_points

ReportKind = Literal["channel_ratios", "importance", "sensitivity"]
REPORT_KINDS: tuple[ReportKind, ...] = get_args(ReportKind)
FIGURE_NAMES = ("pareto", *REPORT_KINDS)
"""Names of the figures; `pareto` is accuracy against MACs."""

PAGE = "report.html"
TEMPLATE = "pruning.html.j2"


@dataclass(frozen=True)
class PrunedNetwork:
    """The network that meets one budget.

    Attributes:
        label: name of the budget in file names and figures, such as `macs-0.9G`.
        budget: the budget in words, such as `0.9 GMACs`.
        architecture: what stays.
        plan: from the unpruned network to it.
        top1: accuracy in percent by what was done, in that order: `one shot`, `corrected`,
            `fine-tuned`; empty where none was measured.
        latency_ms: milliseconds by the table they come from.
        method: how units were chosen.
        gap: how far the choice is from the optimum, relative; None where it is not known.
        folder: where architecture and weights are.
    """

    label: str
    budget: str
    architecture: Architecture
    plan: WidthPlan
    top1: Mapping[str, float] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    method: str = "greedy"
    gap: float | None = None
    folder: str = ""

    @cached_property
    def cost(self) -> CostReport:
        """Parameters and MACs by closed form."""
        return cost(self.architecture)


@dataclass(frozen=True)
class PruneReport:
    """One finished `slimnas prune` run.

    Attributes:
        name: the run's name.
        source: the unpruned architecture.
        networks: one per budget, in the order asked for; one at least.
        top1: accuracy of the unpruned network in percent; None where it was not measured.
        images: images behind every accuracy.
        accuracy: what is counted: `top-1`, or agreement with the unpruned network.
        scores: importance of the units, for the importance figure.
        sensitivity: for the sensitivity figure.
        latency_ms: of the unpruned network, under the keys of the pruned ones.
        measured: latencies measured side by side.
        provenance: model, weights, data, criterion, basis, seed: whatever decides the numbers.
        versions: package name to version.
        command: the command line that started the run.
        warning: one sentence that must not be missed, such as where the weights come from.
        files: path to what it holds.
        next_commands: what to do to the command that does it.
    """

    name: str
    source: Architecture
    networks: tuple[PrunedNetwork, ...]
    top1: float | None = None
    images: int = 0
    accuracy: str = "top-1"
    scores: Scores | None = None
    sensitivity: Sensitivity | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    provenance: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    warning: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    next_commands: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def cost(self) -> CostReport:
        """Parameters and MACs of the unpruned network."""
        return cost(self.source)

    @cached_property
    def ratios(self) -> RatioSet:
        """Channel ratios of every budget."""
        return RatioSet(
            self.source,
            tuple(
                channel_ratios(self.source, n.architecture, n.plan, label=n.label)
                for n in self.networks
            ),
            {**self.provenance, "versions": dict(self.versions)},
        )

    @property
    def timed(self) -> dict[Setup, tuple[Timed | None, ...]]:
        """Measured figures by setup: of the unpruned network, then of each pruned one."""
        whole = [self.source, *(network.architecture for network in self.networks)]
        return {
            setup: tuple(found and found[1] for found in given)
            for setup in self.measured.setups
            if any(given := [self.measured.find(setup, one.digest) for one in whole])
        }

    @property
    def tightest(self) -> PrunedNetwork:
        """The network with the fewest MACs."""
        return min(self.networks, key=lambda network: network.cost.macs)

    @property
    def treatments(self) -> list[str]:
        """What accuracies are of, in order."""
        return list(dict.fromkeys(name for network in self.networks for name in network.top1))

    @property
    def pareto(self) -> list[ParetoPoint]:
        """Every accuracy of every network."""
        return [
            ParetoPoint(name, network.cost.macs, network.top1[name])
            for name in self.treatments
            for network in self.networks
            if name in network.top1
        ]


def write_report(
    report: PruneReport, folder: Path, kinds: Sequence[ReportKind] = REPORT_KINDS
) -> dict[str, Path]:
    """Write the page, `channel_ratios.*`, `sensitivity.csv` and `figures/*`, each atomically.

    Channel ratios and, where accuracies are known, accuracy against MACs are always part of it.

    Args:
        report: what to show.
        folder: where.
        kinds: which analyses; the report must hold what they need.

    Returns:
        What was written by file name, such as `channel_ratios.csv` or `channel_ratios.png`; the
        page, `report.html`, is the first entry and is written last.

    Raises:
        PruneError: an unknown kind, or one the report has no data for.
        RunFolderError: the folder cannot be written.
    """
    _check(report, kinds)
    folder = Path(folder)
    pictures = _pictures(report, kinds)
    page = folder / PAGE
    written = {PAGE: page}
    for name, save in (
        ("channel_ratios.json", report.ratios.save_json),
        ("channel_ratios.csv", report.ratios.save_csv),
    ):
        written[name] = folder / name
        save(written[name])
    if "sensitivity" in kinds and report.sensitivity is not None:
        written["sensitivity.csv"] = folder / "sensitivity.csv"
        report.sensitivity.save_csv(written["sensitivity.csv"])
    for picture in pictures:
        for path in save_figure(picture.draw(WIDE_IN), folder / FIGURES / picture.name):
            written[path.name] = path
    atomic_write_text(page, _render(report, pictures, folder, written))
    return written


def _check(report: PruneReport, kinds: Sequence[ReportKind]) -> None:
    for kind in kinds:
        if kind not in REPORT_KINDS:
            raise PruneError(
                f"report: must be one of {', '.join(REPORT_KINDS)}, got {kind!r}"
                f"{suggest(kind, REPORT_KINDS)}"
            )
    for needed, given in (("importance", report.scores), ("sensitivity", report.sensitivity)):
        if needed in kinds and given is None:
            raise PruneError(f"report: {needed} was not estimated in this run; ask for it there")


def _pictures(report: PruneReport, kinds: Sequence[ReportKind]) -> list[Picture]:
    pictures = []
    unpruned, pareto = report.top1, report.pareto
    if unpruned is not None and pareto:
        star = ParetoPoint(f"{report.source.name}, unpruned", report.cost.macs, unpruned)
        error = standard_error_points(unpruned, report.images)
        pictures.append(
            Picture(
                "pareto",
                "Accuracy against MACs of the pruned networks and the unpruned one",
                lambda width: pareto_figure(pareto, star, width, error_points=error),
            )
        )
    pictures.append(
        Picture(
            "channel_ratios",
            "Ratios of channels to the embedding width per block, before and after pruning",
            lambda width: channel_ratios_figure(report.ratios, width),
        )
    )
    scores, found = report.scores, report.sensitivity
    if "importance" in kinds and scores is not None:
        plan = _scored_plan(report, scores)
        pictures.append(
            Picture(
                "importance",
                "Importance of the units of every block, by kind, on a logarithmic scale",
                lambda width: importance_figure(scores, report.source, plan, width),
            )
        )
    if "sensitivity" in kinds and found is not None:
        pictures.append(
            Picture(
                "sensitivity",
                "Accuracy and loss when one kind of unit of one block is pruned alone",
                lambda width: sensitivity_figure(found, report.source, width),
            )
        )
    return pictures


def _scored_plan(report: PruneReport, scores: Scores) -> WidthPlan | None:
    """The tightest budget's plan, if the scores are for the network it cuts."""
    return report.tightest.plan if scores.architecture == report.source.digest else None


def _render(
    report: PruneReport, pictures: list[Picture], folder: Path, written: Mapping[str, Path]
) -> str:
    latencies = dict.fromkeys(
        [*report.latency_ms, *(key for n in report.networks for key in n.latency_ms)]
    )
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            report=report,
            treatments=report.treatments,
            latencies=list(latencies),
            findings=published_findings(report.ratios),
            kinds=KINDS,
            titles=TITLES,
            zeros=None if report.scores is None else zero_units(report.scores),
            figures={picture.name: picture.inline() for picture in pictures},
            written=[
                path.relative_to(folder).as_posix() for path in written.values() if path != folder
            ],
            error_points=None
            if report.top1 is None
            else standard_error_points(report.top1, report.images),
            themes=themes(),
            version=slimnas.__version__,
        )
    )
