"""What the attention study writes: `attention.csv`, one row per layer, and `attention.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimnas import __version__
from slimnas.analysis.attention_study import LEVEL, NOISE, LayerRow, StudyResult
from slimnas.report.analysis_files import write_csv, write_json

SCHEMA = "slimnas/attention-study/1"
CSV_FILE, JSON_FILE = "attention.csv", "attention.json"


def study_dict(result: StudyResult) -> dict[str, Any]:
    """The study as plain data, every round included."""
    study, machine = result.study, result.machine
    return {
        "schema": SCHEMA,
        "tool_version": __version__,
        "date": result.date,
        "machine": asdict(machine),
        "runtime": {
            "name": result.runtime[0],
            "version": result.runtime[1],
            "compute_unit": result.compute_unit,
            "threads": study.threads,
            "dtype": "fp32",
            "attention": attention_kernels(result),
        },
        "settings": {
            "resolutions": list(study.resolutions),
            "dim": study.width,
            "heads": study.heads,
            "batch": study.batch,
            "layout": study.layout,
            "clock": study.clock,
            "seed": study.seed,
        },
        "protocol": study.how.describe(),
        "rule": (
            f"a published ratio holds if the {100 * LEVEL:.0f} % interval of the measured one "
            f"reaches it, or {100 * NOISE:.0f} % less"
        ),
        "rows": [_row_dict(result, row) for row in result.rows],
        "left_out": [asdict(one) for one in result.left_out],
    }


def attention_kernels(result: StudyResult) -> str:
    """Which kernels attention without a position bias runs on."""
    if result.study.runtime != "torch":
        return "as exported"
    return "fused" if result.study.fused else "explicit"


def save_study(result: StudyResult, folder: Path) -> tuple[Path, Path]:
    """Write both files.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    rows = [_row_dict(result, row) for row in result.rows]
    table = write_csv(folder / CSV_FILE, [_without_rounds(row) for row in rows])
    document = write_json(folder / JSON_FILE, study_dict(result))
    return table, document


def _row_dict(result: StudyResult, row: LayerRow) -> dict[str, Any]:
    ratio = result.ratio(row)
    first, third = row.quartiles_ms
    return {
        "mechanism": row.mechanism.name,
        "resolution": row.side,
        "params": row.params,
        "macs": row.macs,
        "images_per_s": result.images_per_s(row),
        "latency_ms": row.latency_ms,
        "iqr_ms": third - first,
        "n": len(row.rounds_ms),
        "test_peak_bytes": row.test_bytes,
        "train_peak_bytes": row.train_bytes,
        "max_difference": row.difference,
        "hilo_ratio": None if ratio is None else ratio.value,
        "hilo_ratio_low": None if ratio is None else ratio.interval[0],
        "hilo_ratio_high": None if ratio is None else ratio.interval[1],
        "hilo_ratio_iqr": None if ratio is None else ratio.iqr,
        "published_ratio": None if ratio is None else ratio.published,
        "verdict": None if ratio is None else ratio.verdict,
        "rounds_ms": list(row.rounds_ms),
    }


def _without_rounds(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "rounds_ms"}
