"""The report of a finished `slimnas prune` run: page, figures, tables, and what they need."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slimnas.cli.output import shown_path

if TYPE_CHECKING:
    from slimnas.cli.prune_progress import PruneProgress
    from slimnas.prune.config import PruneConfig
    from slimnas.prune.found import Pruned
    from slimnas.prune.run import PruneResult
    from slimnas.prune.sensitivity import Sensitivity, SensitivityPoint
    from slimnas.report.pruning import PrunedNetwork, PruneReport, ReportKind

SENSITIVITY_IMAGES = 200
"""Held-out images behind every point of a sensitivity curve; there are hundreds of points."""
SENSITIVITY_JOURNAL = "sensitivity.jsonl"


def write_reports(
    result: PruneResult,
    config: PruneConfig,
    kinds: tuple[ReportKind, ...],
    folder: Path,
    progress: PruneProgress,
) -> tuple[PruneReport, dict[str, Path]]:
    """Write the page and everything beside it; see `slimnas.report.pruning.write_report`.

    Raises:
        RunFolderError: the folder cannot be written.
        PruneError: a sensitivity journal of something else.
    """
    from slimnas._versions import versions
    from slimnas.prune.found import AGREEMENT, LATENCY
    from slimnas.report.pruning import PruneReport, write_report

    latency = result.before.get(LATENCY)
    start, calibration = result.start, result.calibration
    report = PruneReport(
        name=folder.resolve().name,
        source=start.network.architecture,
        networks=tuple(_network(result, config, found) for found in result.found),
        top1=result.before[result.accuracy_name].value,
        images=len(calibration.test),
        accuracy="agreement" if result.accuracy_name == AGREEMENT else "top-1",
        scores=result.scored.scores,
        sensitivity=_sensitivity(result, folder, progress) if "sensitivity" in kinds else None,
        latency_ms={} if latency is None else {"by table": latency.value},
        measured=result.measured,
        provenance={
            "model": start.name,
            "weights": start.source,
            "images": calibration.description,
            "labels": calibration.labels,
            **config.model_dump(mode="json", exclude={"model", "weights", "labels", "budgets"}),
        },
        versions=versions(),
        command=shlex.join(["slimnas", *sys.argv[1:]]),
        warning=_warning(result),
        files={shown_path(folder / "config.json"): "settings"},
        next_commands=_next_commands(result),
    )
    return report, write_report(report, folder, kinds)


def treatments(result: PruneResult, config: PruneConfig, found: Pruned) -> dict[str, float]:
    """Accuracy in percent by what was done to a network, in that order."""
    from slimnas.prune.found import CORRECTED, CUT

    cut = "one shot" if config.iterations == 1 else f"{config.iterations} steps"
    done = [cut]
    done += [] if config.correction == "none" else ["corrected"]
    done += [] if config.finetune is None else ["fine-tuned"]
    values = [found.value(name) for name in (CUT, CORRECTED)]
    known = [value for value in values if value is not None]
    return dict(zip(done, [*known, found.metrics[result.accuracy_name].value], strict=True))


def _network(result: PruneResult, config: PruneConfig, found: Pruned) -> PrunedNetwork:
    from slimnas.prune.costs import amount_text
    from slimnas.prune.found import GAP, LATENCY
    from slimnas.report.pruning import PrunedNetwork

    latency = found.value(LATENCY)
    return PrunedNetwork(
        label=found.budget.label,
        budget=amount_text(found.budget.kind, found.budget.limit),
        architecture=found.architecture,
        plan=found.plan,
        top1=treatments(result, config, found),
        latency_ms={} if latency is None else {"by table": latency},
        method=config.method,
        gap=found.value(GAP),
        folder=shown_path(found.folder),
    )


def _sensitivity(result: PruneResult, folder: Path, progress: PruneProgress) -> Sensitivity:
    from slimnas.prune.calibration import Batches
    from slimnas.prune.sensitivity import sensitivity

    network = result.scored.network
    device = next(network.parameters()).device
    batches = list(Batches(result.calibration.test, 50, device, limit=SENSITIVITY_IMAGES))

    def on_point(done: int, total: int, point: SensitivityPoint) -> None:
        progress.stage("sensitivity", done, total, f"{point.block} {point.kind}")

    return sensitivity(
        network,
        result.scored.scores,
        batches,
        journal=folder / SENSITIVITY_JOURNAL,
        on_point=on_point,
    )


def _warning(result: PruneResult) -> str:
    said = []
    if result.start.trained_on is not None:
        said.append(f"Weights: {result.start.source}.")
    if result.calibration.is_stand_in:
        said.append(
            "Importance was estimated on crops of two photographs, a stand-in: --data with images "
            "like the model's own gives better results."
        )
    if result.calibration.test_labels == "model":
        said.append("Accuracy is agreement with the unpruned network.")
    return " ".join(said)


def _next_commands(result: PruneResult) -> dict[str, str]:
    first = shlex.quote(shown_path(result.found[0].folder))
    return {
        "add it to your zoo": f"slimnas zoo add {first}",
        "export it to ONNX": f"slimnas zoo export {first} --format onnx",
        "prune it further": f"slimnas prune --model {first} --macs 80%",
    }
