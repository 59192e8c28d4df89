"""What an ablation of Q/K dimension and V ratio found: figure, table and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from slimnas.analysis.ablate import AXES, Ablation, AblationPoint, Axis, own_values, row
from slimnas.analysis.gates import Kept
from slimnas.arch.architecture import Architecture
from slimnas.report.analysis_files import write_csv, write_json
from slimnas.report.figures import HEAT, WIDE_IN, drawing_style, ink, is_narrow, save_figure

SCHEMA = "slimnas/analysis-ablate/1"
NAME = "ablate"
IMPORTANCE = "ablate_importance"
COLOURS: Mapping[Axis, str] = {"qk_dim": "mb4d", "v_ratio": "mb3d"}


def ablation_document(found: Ablation, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return an ablation as plain data."""
    return {
        "model": found.base.name,
        "what": "accuracy",
        "cascade_off_on_v_axis": found.cascade_off,
        "points": [row(one) for one in found.points],
        "provenance": dict(provenance),
    }


def importance_document(
    base: Architecture, found: Sequence[Kept], blocks: Sequence[str], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the importance that stays along both axes as plain data."""
    points = [
        {
            "axis": one.axis,
            "value": one.value,
            "kept_importance": one.share,
            "kept_by_block": list(one.by_block),
        }
        for one in found
    ]
    return {
        "model": base.name,
        "what": "importance",
        "blocks": list(blocks),
        "points": points,
        "provenance": dict(provenance),
    }


def write_ablation(
    found: Ablation, folder: Path, provenance: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Write `ablate.json`, `.csv`, `.svg` and `.png`, each atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    document = {"schema": SCHEMA, **ablation_document(found, provenance)}
    return (
        write_csv(folder / f"{NAME}.csv", document["points"]),
        write_json(folder / f"{NAME}.json", document),
        *save_figure(ablation_figure(found), folder / NAME),
    )


def write_importance(
    base: Architecture,
    found: Sequence[Kept],
    blocks: Sequence[str],
    folder: Path,
    provenance: Mapping[str, Any],
) -> tuple[Path, ...]:
    """Write `ablate_importance.json`, `.csv`, `.svg` and `.png`, each atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    document = {"schema": SCHEMA, **importance_document(base, found, blocks, provenance)}
    return (
        write_csv(folder / f"{IMPORTANCE}.csv", document["points"]),
        write_json(folder / f"{IMPORTANCE}.json", document),
        *save_figure(importance_figure(base, found), folder / IMPORTANCE),
    )


def ablation_figure(found: Ablation, width_in: float = WIDE_IN) -> Figure:
    """Top-1 against each axis, a dot per seed; a ring marks what the model itself has."""
    axes_of = [axis for axis in AXES if found.of(axis)]
    with drawing_style():
        figure, panels = _panels(axes_of, width_in)
        for axis, axes in zip(axes_of, panels, strict=True):
            points = found.of(axis)
            note = ", cascade off" if axis == "v_ratio" and found.cascade_off else ""
            _frame(axes, axis, [one.point.value for one in points], note)
            _draw(axes, axis, points)
            _ring(axes, points, own_values(found.base, axis))
        panels[0].set_ylabel("top-1 after the same training, %")
        several = any(len(one.top1) > 1 for one in found.points)
        figure.legend(handles=_legend(found.base, several), loc="outside upper left", **_LEGEND)
    return figure


def importance_figure(
    base: Architecture, found: Sequence[Kept], width_in: float = WIDE_IN
) -> Figure:
    """Share of the Taylor importance that stays, against each axis; thin lines are blocks."""
    axes_of = [axis for axis in AXES if any(one.axis == axis for one in found)]
    with drawing_style():
        figure, panels = _panels(axes_of, width_in)
        for axis, axes in zip(axes_of, panels, strict=True):
            points = [one for one in found if one.axis == axis]
            values = [one.value for one in points]
            _frame(axes, axis, values, "")
            blocks = len(points[0].by_block)
            for place in range(blocks):
                depth = place / max(blocks - 1, 1)
                shade = HEAT[min(1 + int(depth * (len(HEAT) - 1)), len(HEAT) - 1)][0]
                shares = [one.by_block[place] for one in points]
                line = [100 * share for share in shares if share is not None]
                if len(line) == len(values):  # else nothing in that block is of importance
                    axes.plot(values, line, color=shade, lw=0.8, zorder=2)
            whole = [100 * one.share for one in points]
            axes.plot(values, whole, color=ink(COLOURS[axis]), lw=1.8, marker="o", ms=4, zorder=4)
            axes.set_ylim(0, 103)
        panels[0].set_ylabel("importance that stays, %")
        handles = [
            Line2D(
                [], [], color=ink(COLOURS[axes_of[0]]), lw=1.8, marker="o", ms=4, label=base.name
            ),
            Line2D([], [], color=HEAT[1][0], lw=0.8, label="first block"),
            Line2D([], [], color=HEAT[-1][0], lw=0.8, label="last block"),
        ]
        figure.legend(handles=handles, loc="outside upper left", **_LEGEND)
    return figure


_LEGEND: dict[str, Any] = {"ncols": 3, "frameon": False, "fontsize": 7.5, "handletextpad": 0.4}


def _panels(axes_of: Sequence[Axis], width_in: float) -> tuple[Figure, list[Axes]]:
    narrow = is_narrow(width_in)
    rows, columns = (len(axes_of), 1) if narrow else (1, len(axes_of))
    figure = Figure(figsize=(width_in, 2.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=not narrow)
    return figure, [axes for line in grid for axes in line]


def _frame(axes: Axes, axis: Axis, values: Sequence[float], note: str) -> None:
    axes.set_xlabel(AXES[axis] + note)
    if axis == "qk_dim" and min(values) > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_axisbelow(True)
    axes.grid()
    axes.tick_params(length=0)
    axes.margins(x=0.08, y=0.15)


def _draw(axes: Axes, axis: Axis, points: Sequence[AblationPoint]) -> None:
    colour = ink(COLOURS[axis])
    values = [one.point.value for one in points]
    axes.plot(
        values, [p.mean_top1 for p in points], color=colour, lw=1.5, marker="o", ms=5, zorder=3
    )
    for one in points:
        if len(one.top1) > 1:
            places = [one.point.value] * len(one.top1)
            axes.scatter(places, one.top1, s=10, color=colour, alpha=0.45, linewidths=0, zorder=2)


def _ring(axes: Axes, points: Sequence[AblationPoint], own: Sequence[float]) -> None:
    for one in points:
        if any(abs(one.point.value - value) < 1e-9 for value in own):
            at = ([one.point.value], [one.mean_top1])
            axes.plot(*at, color=ink("target"), zorder=4, **_RING)


_RING: dict[str, Any] = {"marker": "o", "ms": 11, "mfc": "none", "mew": 1.5, "ls": ""}


def _legend(base: Architecture, several: bool) -> list[Line2D]:
    handles = [
        Line2D([], [], color=ink("target"), label=f"the value of {base.name} itself", **_RING)
    ]
    if several:
        dot: dict[str, Any] = {"marker": ".", "ms": 6, "color": ink("muted"), "ls": ""}
        handles.append(Line2D([], [], label="one seed; the line is their mean", **dot))
    return handles
