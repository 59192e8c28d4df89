"""What a validation of a latency table found: figures as JSON, and predicted against measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from slimnas._files import atomic_write_text
from slimnas.latency.table import LatencyTable
from slimnas.measure.validate import Validation
from slimnas.report.figures import WIDE_IN, drawing_style, ink, is_narrow, save_figure

SCHEMA = "slimnas/latency-validation/1"
NAME = "validation"
BANDS = ((10, 0.35), (5, 0.75))
"""Relative errors in percent, and how strongly their band is drawn."""


def validation_document(found: Validation, table: LatencyTable) -> dict[str, Any]:
    """Return a validation as plain data: the figures, then every network."""
    figure = found.figure.model_dump()
    what = figure.pop("what")
    networks = [
        {
            "architecture": check.architecture.digest,
            "predicted_ms": check.predicted_ms,
            "interval_ms": list(check.interval_ms or ()),
            "measured_ms": check.measured_ms,
            "error_percent": 100 * check.error,
            "repeats_ms": list(halves),
        }
        for check, halves in zip(
            found.checks, found.halves_ms or [()] * len(found.checks), strict=True
        )
    ]
    return {
        "device": {"name": table.device.name, "kind": table.device.kind},
        "what": what,
        **figure,
        "repeat_percent": found.repeat_percent,
        "pace": found.pace,
        "as_clocked": found.unscaled.model_dump(exclude={"what", "networks"}),
        "architectures": networks,
    }


def write_validation(found: Validation, table: LatencyTable, folder: Path) -> tuple[Path, ...]:
    """Write `validation.json`, `.svg` and `.png` to `folder`, each atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    drawn = save_figure(validation_figure(found, table), folder / NAME)
    path = folder / f"{NAME}.json"
    document = {"schema": SCHEMA, **validation_document(found, table)}
    atomic_write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path, *drawn


def validation_figure(found: Validation, table: LatencyTable, width_in: float = WIDE_IN) -> Figure:
    """Predicted against measured latency of every network; below, the error in percent."""
    narrow = is_narrow(width_in)
    height_in = 5.6 if narrow else 6.4
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        main, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
        _frame(main, below, found, table)
        _draw_bands(main, below)
        _draw_networks(main, below, found)
        main.set_title(_title(found, table, narrow=narrow), loc="left", fontsize=8.5)
        main.legend(
            handles=_legend(table), loc="upper left", frameon=False, fontsize=7.5, labelspacing=0.3
        )
    return figure


def _title(found: Validation, table: LatencyTable, *, narrow: bool) -> str:
    figure, device = found.figure, table.device
    name = f"{device.name}, {device.runtime.name}"
    errors = (
        f"mean error {figure.mape_percent:.1f} %, worst {figure.max_percent:.1f} %, "
        f"{figure.within_5_percent or 0:.0f} % within 5 %"
    )
    between = "\n" if narrow else ", "
    return f"{name}: {figure.networks} networks{between}{errors}"


def _limits_ms(found: Validation) -> tuple[float, float]:
    values = [ms for check in found.checks for ms in (check.measured_ms, check.predicted_ms)]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.1 * high
    return max(low - pad, 0.0), high + pad


def _frame(main: Axes, below: Axes, found: Validation, table: LatencyTable) -> None:
    limits = _limits_ms(found)
    main.set(xlim=limits, ylim=limits)
    main.set_ylabel(f"predicted by the {table.device.name} table, ms")
    reach = max(12.0, 1.15 * found.figure.max_percent)
    below.set_ylim(-reach, reach)
    below.set_ylabel("error, %")
    below.set_xlabel("measured, ms")
    for axes in (main, below):
        axes.set_axisbelow(True)
        axes.grid()
        axes.tick_params(length=0)


def _draw_bands(main: Axes, below: Axes) -> None:
    ends = np.array(main.get_xlim())
    for percent, strength in BANDS:
        style: dict[str, Any] = {"color": ink("grid"), "alpha": strength, "lw": 0, "zorder": 0.5}
        share = percent / 100
        main.fill_between(ends, ends * (1 - share), ends * (1 + share), **style)
        below.fill_between(ends, -percent, percent, **style)
    main.plot(ends, ends, color=ink("edge"), lw=1.0, zorder=1)
    below.axhline(0.0, color=ink("edge"), lw=1.0, zorder=1)


def _draw_networks(main: Axes, below: Axes, found: Validation) -> None:
    for check in found.checks:
        covered = check.covered or check.interval_ms is None
        colour = ink("mb4d" if covered else "mb3d")
        low_ms, high_ms = check.interval_ms or (check.predicted_ms, check.predicted_ms)
        errors = [100 * (ms / check.measured_ms - 1) for ms in (low_ms, high_ms)]
        for axes, at, ends in (
            (main, check.predicted_ms, (low_ms, high_ms)),
            (below, 100 * check.error, errors),
        ):
            axes.vlines(check.measured_ms, *ends, color=colour, lw=0.8, alpha=0.5, zorder=2)
            axes.plot(
                [check.measured_ms],
                [at],
                marker="o" if covered else "D",
                ms=4.0,
                color=colour,
                mec=ink("paper"),
                mew=0.5,
                zorder=3,
            )


def _legend(table: LatencyTable) -> list[Line2D | Patch]:
    level = table.device.interval.level if table.device.interval else 0.9
    bar = f"{100 * level:.0f} % interval"
    point: dict[str, Any] = {"lw": 0.8, "ms": 4.0}
    return [
        Line2D([], [], color=ink("edge"), lw=1.0, label="predicted = measured"),
        *(
            Patch(
                fc=ink("grid"), ec=ink("edge"), alpha=strength, lw=0.5, label=f"within {percent} %"
            )
            for percent, strength in reversed(BANDS)
        ),
        Line2D([], [], color=ink("mb4d"), marker="o", label=f"its {bar} holds", **point),
        Line2D([], [], color=ink("mb3d"), marker="D", label=f"outside its {bar}", **point),
    ]
