"""`timings.csv`: what every entry of a build took, beside the table that was made from it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from slimnas._files import atomic_write_text
from slimnas.latency.table import LEVEL
from slimnas.measure.plan import Plan
from slimnas.measure.results import Timing

SUMMARY_FILE = "timings.csv"
COLUMNS = (
    "entry",
    "use",
    "median_ms",
    "iqr_ms",
    "p10_ms",
    "p90_ms",
    f"low_{100 * LEVEL:.0f}_ms",
    f"high_{100 * LEVEL:.0f}_ms",
    "rounds",
)


def write_summary(folder: Path, plan: Plan, found: Mapping[str, Timing]) -> None:
    """Write median, spread, percentiles and confidence interval of every entry of `plan`.

    Blocks are differences of chains, so that single rounds may be negative. `use` is `part`,
    `call`, `calibration` or `held out`.

    Raises:
        RunFolderError: the place cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    uses = (
        *("part" for _ in plan.components),
        "call",
        *("calibration" for _ in plan.calibration),
        *("held out" for _ in plan.held_out),
    )
    for entry, use in zip(plan.entries, uses, strict=True):
        one = found[entry.name]
        low_ms, high_ms = one.interval_ms()
        values = (one.latency_ms, one.spread_ms, one.p10_ms, one.p90_ms, low_ms, high_ms)
        writer.writerow((entry.name, use, *(f"{value:.6f}" for value in values), one.n))
    atomic_write_text(folder / SUMMARY_FILE, text.getvalue())
