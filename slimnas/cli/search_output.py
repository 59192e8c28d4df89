"""What `slimnas search` leaves behind: its report, its JSON, its table on the terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slimnas.cli.output import shown_path

if TYPE_CHECKING:
    from slimnas.cli.search import SearchInputs
    from slimnas.data.splits import DataSplits
    from slimnas.report.run import DataSummary
    from slimnas.search.found import Found, Reference
    from slimnas.search.measurements import Measurement
    from slimnas.search.run import SearchResult


def write_search_report(
    inputs: SearchInputs, result: SearchResult, data: DataSplits | None, folder: Path
) -> Path:
    """Write the run's report; returns its page. Without data, a record says what they were."""
    from slimnas._versions import versions
    from slimnas.latency.regime import regimes
    from slimnas.report.html import write_report
    from slimnas.report.run import FoundNetwork, ReferenceNetwork, RunReport

    config = inputs.config
    report = RunReport(
        name=folder.resolve().name,
        space=result.space,
        device=inputs.table.device,
        trajectory=result.trajectory,
        importance=result.importance,
        found=tuple(
            FoundNetwork(
                architecture=found.architecture,
                estimate=found.estimate,
                target_ms=found.target_ms,
                selection=found.selection,
                search_top1=found.search_top1,
                steps=found.steps,
                folder=shown_path(found.folder),
                measurement=found.measurement,
                rounds=found.rounds,
                is_predicted=found.is_predicted,
            )
            for found in result.found
        ),
        reference=None
        if result.reference is None
        else ReferenceNetwork(
            architecture=result.reference.architecture,
            estimate=result.reference.estimate,
            search_top1=result.reference.search_top1,
        ),
        data=_data_summary(inputs, result, data),
        settings={**config.model_dump(mode="json"), "supernet digest": _digest(result)},
        training=result.training,
        command=shlex.join(["slimnas", *sys.argv[1:]]),
        versions=versions(),
        unmeasured=_unmeasured(result),
        regimes=tuple(one.sentence for one in regimes(inputs.table, result.space)),
        files=_files(folder, result),
        next_commands=_next_commands(inputs, result, folder),
        evidence=evidence(inputs, result),
        from_record=result.record is not None,
    )
    return write_report(report, folder)[0]


def evidence(inputs: SearchInputs, result: SearchResult) -> tuple[str, ...]:
    """What the search judged candidates by, one sentence each."""
    from slimnas.cli.search_record import record_lines

    if result.record is not None:
        return tuple(record_lines(result.record))
    config = inputs.config
    how = "trained in this run" if config.recipe is not None else "trained before"
    return (
        f"a supernet {how} on {config.data} at {config.resolution} px, candidates measured on "
        f"{result.evaluated_images:,} SEARCH images",
    )


def _digest(result: SearchResult) -> str:
    """Of the supernet behind every top-1."""
    if result.trained is not None:
        return result.trained.digest
    assert result.record is not None
    return result.record.supernet_digest


def _data_summary(
    inputs: SearchInputs, result: SearchResult, data: DataSplits | None
) -> DataSummary:
    from slimnas.report.run import DataSummary

    if data is not None:
        classes = data.classes
        images = {name: len(getattr(data, name)) for name in ("train", "search", "test")}
    else:
        assert result.record is not None
        classes, images = result.record.data.classes, result.record.data.images
    return DataSummary(
        source=inputs.config.data,
        classes=classes,
        images=images,
        resolution=inputs.config.resolution,
        evaluated_images=result.evaluated_images,
    )


def _next_commands(inputs: SearchInputs, result: SearchResult, folder: Path) -> dict[str, str]:
    from slimnas.search.run import CORRECTED_TABLE

    first = shown_path(result.found[0].folder)
    corrected = folder / CORRECTED_TABLE
    prices = shown_path(corrected) if corrected.is_dir() else inputs.config.device
    with_weights = {
        "add it to your zoo": f"slimnas zoo add {first}",
        "export it to ONNX": f"slimnas zoo export {first} --format onnx",
    }
    return {
        "train it": train_command(result.found[0]),
        **(with_weights if result.found[0].has_weights else {}),
        "price it by component": f"slimnas latency estimate {first} --device {prices}",
    }


def train_command(found: Found) -> str:
    """What trains a found network."""
    return f"slimnas train {shown_path(found.folder)} --data YOUR_DATA"


def _files(folder: Path, result: SearchResult) -> dict[str, str]:
    from slimnas.search import measurements, run
    from slimnas.search.config import FILE
    from slimnas.train import history

    named = {
        FILE: "settings",
        run.SUPERNET: "trained supernet",
        history.FILE: "training, one line per epoch",
        run.IMPORTANCE: "architecture parameters and importance",
        run.TRAJECTORY: "every step with every candidate",
        measurements.FILE: "every network measured",
        run.CORRECTED_TABLE: "the latency table, corrected by them",
    }
    files = {
        shown_path(folder / name): what for name, what in named.items() if (folder / name).exists()
    }
    for found in result.found:
        for name, what in (
            ("architecture.yaml", "found network"),
            *((("weights.safetensors", "its inherited weights"),) if found.has_weights else ()),
            ("metrics.json", "its figures with provenance"),
        ):
            files[shown_path(found.folder / name)] = f"{what}, target {found.target_ms:g} ms"
    return files


def _unmeasured(result: SearchResult) -> str | None:
    """Why a found network was not measured; none where all were."""
    if all(found.measurement is not None for found in result.found):
        return None
    return result.unmeasured


def json_body(inputs: SearchInputs, result: SearchResult, folder: Path) -> dict[str, Any]:
    """What `--json` prints."""
    from slimnas.latency.regime import regimes

    device = inputs.table.device
    return {
        "run": shown_path(folder),
        "device": {"name": device.name, "kind": device.kind},
        "supernet_digest": _digest(result),
        "evidence": _evidence_body(inputs, result),
        "unmeasured": _unmeasured(result),
        "regimes": [one.sentence for one in regimes(inputs.table, result.space)],
        "reference": None
        if result.reference is None
        else {
            "name": result.reference.architecture.name,
            "latency_ms": result.reference.estimate.latency_ms,
            "interval_ms": list(result.reference.estimate.interval_ms),
            "search_top1": result.reference.search_top1,
        },
        "found": [
            {
                "target_ms": found.target_ms,
                "latency_ms": found.estimate.latency_ms,
                "interval_ms": list(found.estimate.interval_ms),
                "measured_ms": None if found.measurement is None else found.measurement.measured_ms,
                "measured_error_ms": None
                if found.measurement is None
                else found.measurement.error_ms,
                "rounds": [_round(one) for one in found.rounds],
                "params": found.cost.params,
                "macs": found.cost.macs,
                "search_top1": found.search_top1,
                "search_top1_kind": "predicted" if found.is_predicted else "measured",
                "steps": found.steps,
                "widths": list(found.architecture.widths),
                "depths": list(found.architecture.depths),
                "architecture_digest": found.architecture.digest,
                "architecture": shown_path(found.folder / "architecture.yaml"),
                "weights": shown_path(found.folder / "weights.safetensors")
                if found.has_weights
                else None,
            }
            for found in result.found
        ],
    }


def _evidence_body(inputs: SearchInputs, result: SearchResult) -> dict[str, Any]:
    record = result.record
    kind = "trained" if inputs.config.recipe is not None else "supernet"
    return {
        "kind": kind if record is None else "record",
        "said": list(evidence(inputs, result)),
        "record_digest": None if record is None else record.digest,
        "held_out": [] if record is None else [one.model_dump() for one in record.errors],
    }


def _round(measured: Measurement) -> dict[str, Any]:
    return {
        "predicted_ms": measured.predicted_ms,
        "interval_ms": list(measured.interval_ms),
        "measured_ms": measured.measured_ms,
        "measured_error_ms": measured.error_ms,
        "steps": measured.steps,
        "architecture_digest": measured.architecture,
    }


def print_result(inputs: SearchInputs, result: SearchResult, folder: Path, page: Path) -> None:
    """Print the found networks, what was measured, and every file."""
    from rich.console import Console
    from rich.table import Table

    from slimnas.arch.cost import cost
    from slimnas.latency.regime import regimes
    from slimnas.report.tables import block_mix

    counts = result.space.counts_attention
    table = Table(box=None, pad_edge=False)
    for heading in ("network", "widths", "depths", *(("MB3D",) if counts else ())):
        table.add_column(heading, no_wrap=True)
    timed = ("measured ms", "of target") if any(found.rounds for found in result.found) else ()
    for heading in ("params M", "GMACs", "latency ms", "interval", *timed, "search top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = _result_rows(result)
    for name, row, top1 in rows:
        low, high = row.estimate.interval_ms
        counted = cost(row.architecture)
        table.add_row(
            name,
            "-".join(map(str, row.architecture.widths)),
            "-".join(map(str, row.architecture.depths)),
            *((str(row.architecture.count("mb3d")),) if counts else ()),
            f"{counted.params / 1e6:.2f}",
            f"{counted.macs / 1e9:.3f}",
            f"{row.estimate.latency_ms:.3f}",
            f"{low:.2f}-{high:.2f}",
            *(_measured_cells(row) if timed else ()),
            top1,
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"latency by the {inputs.table.device.kind} table {inputs.table.device.name}; top-1 on "
        f"{result.evaluated_images} SEARCH images of {inputs.config.data} at "
        f"{inputs.config.resolution} px, {_judged(result)}",
        highlight=False,
    )
    for line in evidence(inputs, result):
        console.print(f"evidence: {line}", highlight=False, soft_wrap=True)
    if not counts:
        for name, row, _ in rows:
            console.print(f"{name}: {block_mix(row.architecture)}", highlight=False)
    said = [
        *_measuring_lines(result),
        *(regime.sentence for regime in regimes(inputs.table, result.space)),
        f"supernet digest {_digest(result)[:16]}",
        *(
            f"no weights for {found.target_ms:g} ms; train it: {train_command(found)}"
            for found in result.found
            if not found.has_weights
        ),
    ]
    for line in said:
        console.print(line, highlight=False, soft_wrap=True)
    for path in (page, *(Path(name) for name in _files(folder, result))):
        typer.echo(shown_path(path))


def _result_rows(result: SearchResult) -> list[tuple[str, Found | Reference, str]]:
    """Name, network and top-1 of every row of the table."""

    def shown(top1: float | None, *, is_predicted: bool) -> str:
        return "-" if top1 is None else f"{'about ' if is_predicted else ''}{top1:.1f} %"

    rows: list[tuple[str, Found | Reference, str]] = [
        (
            f"found for {found.target_ms:g} ms",
            found,
            shown(found.search_top1, is_predicted=found.is_predicted),
        )
        for found in result.found
    ]
    reference = result.reference
    if reference is not None:
        top1 = shown(reference.search_top1, is_predicted=result.record is not None)
        rows.append(("EfficientFormer-L1", reference, top1))
    return rows


def _judged(result: SearchResult) -> str:
    """What top-1 figures are of."""
    if result.record is None:
        return "inherited weights"
    return "weights inherited from the record's supernet ('about': predicted, not measured)"


def _measured_cells(row: Found | Reference) -> tuple[str, str]:
    measured = getattr(row, "measurement", None)
    if measured is None:
        return "-", "-"
    return f"{measured.measured_ms:.3f} ± {measured.error_ms:.3f}", f"{100 * measured.share:.1f} %"


def _measuring_lines(result: SearchResult) -> list[str]:
    """How each target was come by on the device, and what was not measured and why."""
    lines = []
    for found in result.found:
        for one in found.rounds:
            outside = "" if one.is_inside else ", outside the interval"
            lines.append(
                f"target {found.target_ms:g} ms, measurement {one.number}: "
                f"{one.measured_ms:.3f} ± {one.error_ms:.3f} ms, {100 * one.share:.1f} % of the "
                f"target, {one.off_percent:+.1f} % of the {one.predicted_ms:.3f} ms predicted"
                f"{outside}"
            )
        if found.measurement is not None and found.measurement.share > 1:
            lines.append(
                f"target {found.target_ms:g} ms was missed: {len(found.rounds)} networks were "
                "measured and none met it; give the target a margin or a table with less error"
            )
    reason = _unmeasured(result)
    return lines if reason is None else [*lines, f"not measured: {reason}"]
