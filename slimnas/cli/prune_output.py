"""What `slimnas prune` prints: one JSON object, or tables of blocks and of budgets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slimnas.cli.output import shown_path

if TYPE_CHECKING:
    from rich.console import Console

    from slimnas.arch.architecture import Architecture
    from slimnas.prune.config import PruneConfig
    from slimnas.prune.found import Pruned
    from slimnas.prune.measured import Session
    from slimnas.prune.ratios import RatioSet
    from slimnas.prune.run import PruneResult


def json_body(
    result: PruneResult,
    ratios: RatioSet,
    config: PruneConfig,
    folder: Path,
    files: dict[str, Path],
) -> dict[str, Any]:
    """The JSON object of a run; top1 is null where labels are the model's own predictions."""
    from slimnas.prune.found import LATENCY, MACS, PARAMS

    setup = result.setup
    before = {name: metric.value for name, metric in result.before.items()}
    accuracy = before[result.accuracy_name]
    return {
        "run": shown_path(folder),
        "model": result.start.name,
        "weights_source": result.start.source,
        "data": result.calibration.description,
        "labels": result.calibration.labels,
        "test_labels": result.calibration.test_labels,
        "test_images": len(result.calibration.test),
        "measured_with": None if setup is None else setup.model_dump(mode="json"),
        "before": {
            "params": int(before[PARAMS]),
            "macs": int(before[MACS]),
            **_accuracy(result, accuracy),
            "latency_ms": before.get(LATENCY),
            **_measured(result, result.start.network.architecture),
        },
        "after": [
            {**_after(result, config, found), "blocks": _blocks(ratios, number)}
            for number, found in enumerate(result.found)
        ],
        "files": {name: shown_path(path) for name, path in files.items()},
    }


def print_result(result: PruneResult, ratios: RatioSet, *, blocks: bool) -> None:
    """Print the table of budgets, and of ratios per block if they are asked for."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    if blocks:
        for number in range(len(ratios.budgets)):
            _print_blocks(console, ratios, number)
    _print_budgets(console, result)
    for found in result.found:
        typer.echo(shown_path(found.folder))


def _print_budgets(console: Console, result: PruneResult) -> None:
    from rich.table import Table

    from slimnas.prune.found import AGREEMENT, LATENCY, MACS, PARAMS

    setup = result.setup
    judged = "agreement" if result.accuracy_name == AGREEMENT else "top-1"
    table = Table(box=None, pad_edge=False)
    table.add_column("network", no_wrap=True)
    timed = () if setup is None else ("measured ms", "times as fast")
    for heading in ("params M", "GMACs", "MACs left", "latency ms", judged, *timed):
        table.add_column(heading, justify="right", no_wrap=True)
    whole = result.before[MACS].value
    rows = [("unpruned", result.before, result.start.network.architecture)]
    rows += [(found.budget.label, found.metrics, found.architecture) for found in result.found]
    for name, metrics, architecture in rows:
        latency = metrics.get(LATENCY)
        table.add_row(
            name,
            f"{metrics[PARAMS].value / 1e6:.3f}",
            f"{metrics[MACS].value / 1e9:.4f}",
            f"{100 * metrics[MACS].value / whole:.1f} %",
            "-" if latency is None else f"{latency.value:.3f}",
            f"{metrics[result.accuracy_name].value:.1f} %",
            *_measured_cells(result, architecture),
        )
    console.print(table)
    meaning = (
        "agreement with the unpruned network"
        if result.accuracy_name == AGREEMENT
        else "top-1 accuracy"
    )
    console.print(
        f"{judged}: {meaning} on {len(result.calibration.test)} images that importance has not "
        f"seen; {result.calibration.description}",
        highlight=False,
        markup=False,
    )
    for session in _sessions(result):
        said = f"measured: {session.provenance}; in brackets interquartile ranges"
        console.print(said, highlight=False, markup=False)


def _measured_cells(result: PruneResult, architecture: Architecture) -> tuple[str, ...]:
    known = (
        None if result.setup is None else result.measured.find(result.setup, architecture.digest)
    )
    if known is None:
        return ()
    timed = known[1]
    return (
        f"{timed.latency_ms:.3f} ({timed.latency_iqr_ms:.3f})",
        f"{timed.speed_up:.3f} ({timed.speed_up_iqr:.3f})",
    )


def _sessions(result: PruneResult) -> list[Session]:
    """Those that the measured figures come from; budgets added later have another one."""
    found: list[Session] = []
    networks = [result.start.network.architecture, *(one.architecture for one in result.found)]
    for network in networks:
        known = None if result.setup is None else result.measured.find(result.setup, network.digest)
        if known is not None and known[0] not in found:
            found.append(known[0])
    return found


def _print_blocks(console: Console, ratios: RatioSet, number: int) -> None:
    from rich.table import Table

    from slimnas.prune.ratios import table_rows

    heading, *rows = table_rows(ratios.budgets[number])
    table = Table(
        box=None, pad_edge=False, title=ratios.budgets[number].label, title_justify="left"
    )
    for at, name in enumerate(heading):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _after(result: PruneResult, config: PruneConfig, found: Pruned) -> dict[str, Any]:
    from slimnas.cli.prune_report import treatments
    from slimnas.prune.found import GAP, LATENCY, MACS, MEASURED_MACS, PARAMS, REMOVED

    accuracy = found.metrics[result.accuracy_name].value
    return {
        "budget": found.budget.asked,
        "budget_kind": found.budget.kind,
        "budget_limit": found.budget.limit,
        "params": int(found.metrics[PARAMS].value),
        "macs": int(found.metrics[MACS].value),
        "measured_macs": int(found.metrics[MEASURED_MACS].value),
        **_accuracy(result, accuracy),
        "accuracy_after": treatments(result, config, found),
        "latency_ms": found.value(LATENCY),
        **_measured(result, found.architecture),
        "removed_importance": found.value(REMOVED),
        "greedy_gap": found.value(GAP),
        "architecture": shown_path(found.folder / "architecture.yaml"),
        "weights": shown_path(found.folder / "weights.safetensors"),
        "plan": shown_path(found.folder / "plan.json"),
    }


def _measured(result: PruneResult, architecture: Architecture) -> dict[str, Any]:
    """Measured figures; null where nothing was measured."""
    known = (
        None if result.setup is None else result.measured.find(result.setup, architecture.digest)
    )
    timed = None if known is None else known[1]
    return {
        "measured_latency_ms": None if timed is None else timed.latency_ms,
        "measured_latency_iqr_ms": None if timed is None else timed.latency_iqr_ms,
        "measured_speed_up": None if timed is None else timed.speed_up,
        "measured_speed_up_iqr": None if timed is None else timed.speed_up_iqr,
        "measured_rounds": None if timed is None else timed.n,
        "measured_on": None if known is None else known[0].date,
    }


def _accuracy(result: PruneResult, value: float) -> dict[str, float | None]:
    from slimnas.zoo.metrics import TEST_TOP1

    is_top1 = result.accuracy_name == TEST_TOP1
    return {"top1": value if is_top1 else None, "agreement": None if is_top1 else value}


def _blocks(ratios: RatioSet, number: int) -> list[dict[str, Any]]:
    return [{"name": row.name, **row.after.to_dict()} for row in ratios.budgets[number].blocks]
