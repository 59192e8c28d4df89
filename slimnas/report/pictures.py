"""Pictures of networks: importance heat map, architecture, latency by part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from slimnas.arch.space import IDENTITY, SearchSpace
from slimnas.arch.walk import walk
from slimnas.latency.estimate import Estimate
from slimnas.report.figures import (
    HEAT_STEPS,
    NARROW_IN,
    WIDE_IN,
    canvas,
    drawing_style,
    heat,
    ink,
)
from slimnas.report.run import FoundNetwork, RunReport

LABELS = {"mb4d": "MB4D", "mb3d": "MB3D"}
PART_TYPES = {
    "mb4d": "MB4D blocks",
    "mb3d": "MB3D blocks",
    "down": "downsample",
    "other": "stem, head, overhead",
}


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def importance_figure(report: RunReport, width_in: float = WIDE_IN) -> Figure:
    """One cell per MetaPath: its importance, and the step that dropped it.

    Cells are coloured on a logarithmic scale from the least to the most important MetaPath.
    """
    space, record = report.space, report.importance
    values = {
        (stage, slot): record.path_importance(stage, slot)
        for stage, slots in enumerate(record.alphas)
        for slot in range(len(slots))
        if IDENTITY in space.stages[stage].choices
    }
    dropped = dropped_at(report)
    narrow = _is_narrow(width_in)
    columns = max(stage.slots for stage in space.stages)
    left, right = (42.0, 6.0) if narrow else (58.0, 76.0)
    cell = (width_in * 72 - left - right) / columns
    height = 30.0 if cell > 30 else 27.0
    with drawing_style():
        figure, axes = canvas(width_in, (34 + len(space.stages) * (height + 4) + 30) / 72)
        for slot in range(columns):
            _text(axes, left + (slot + 0.5) * cell, 22, str(slot + 1), size=7, colour="muted")
        _text(axes, left, 9, "slot", size=7, colour="muted", ha="left")
        if not narrow:
            _text(axes, width_in * 72 - 4, 22, "stage sum", size=7, colour="muted", ha="right")
        for stage, part in enumerate(space.stages):
            y = 32 + stage * (height + 4)
            _text(axes, 4, y + height / 2, f"stage {stage + 1}", ha="left", size=7.5)
            for slot in range(part.slots):
                box = _Box(left + slot * cell + 1, y, cell - 2, height)
                key = (stage, slot)
                _heat_cell(axes, box, values.get(key), values, dropped.get(key))
            if not narrow:
                total = record.stage_importance(stage)
                _text(axes, width_in * 72 - 4, y + height / 2, f"{total:.2f}", ha="right")
        _heat_scale(axes, values, left, 32 + len(space.stages) * (height + 4) + 8)
    return figure


def dropped_at(report: RunReport) -> dict[tuple[int, int], int]:
    """The step, from 1, at which each (stage, slot) became identity."""
    return {
        (step.taken.stage, step.taken.slot): number
        for number, step in enumerate(report.trajectory.steps, start=1)
        if step.taken.becomes == IDENTITY and step.taken.slot is not None
    }


def architecture_figure(
    network: FoundNetwork, space: SearchSpace, width_in: float = WIDE_IN
) -> Figure:
    """Stages as rows of blocks in slot order; identity slots ghosted; widths as gauges."""
    narrow = _is_narrow(width_in)
    total = width_in * 72
    row = 66.0 if narrow else 54.0
    left = 6.0 if narrow else 100.0
    right = 6.0 if narrow else 112.0
    slots = max(stage.slots for stage in space.stages) + 2
    pitch = min((total - left - right) / slots, 46.0)
    with drawing_style():
        figure, axes = canvas(width_in, (len(space.stages) * row + 30) / 72)
        latency = stage_latency(network.estimate)
        for stage in range(len(space.stages)):
            y = stage * row + (38 if narrow else 26)
            _stage_label(axes, network, space, stage, (4.0, y), narrow=narrow)
            gauge_x = total - 84 if narrow else total - right + 14
            gauge_y = y - 26 if narrow else y
            _width_gauge(axes, network, space, stage, _Box(gauge_x, gauge_y, 78, 4))
            _stage_row(axes, network, space, stage, _Box(left, y - 12, pitch, 24))
            share = f"{latency.get(stage, 0.0):.3f} ms"
            _text(axes, gauge_x + 78, gauge_y + 12, share, size=6.5, colour="muted", ha="right")
        _architecture_key(axes, left, len(space.stages) * row + 20, narrow=narrow)
    return figure


def latency_figure(report: RunReport, network: FoundNetwork, width_in: float = WIDE_IN) -> Figure:
    """Latency of each part of `network`, stacked by block type; a tick for the reference."""
    parts = latency_parts(network.estimate)
    reference = report.reference
    marks = {} if reference is None else latency_parts(reference.estimate)
    names = list(parts)
    sums = {name: sum(parts[name].values()) for name in names}
    ticks = {name: sum(marks[name].values()) for name in names if name in marks}
    narrow = _is_narrow(width_in)
    total_ms = network.estimate.latency_ms
    with drawing_style():
        figure = Figure(figsize=(width_in, 0.3 * len(names) + 0.95))
        height = figure.get_figheight()
        left = 0.75 / width_in
        axes = figure.add_axes((left, 0.45 / height, 1 - left - 0.03, (height - 0.85) / height))
        for place, name in enumerate(names):
            start = 0.0
            for kind, value_ms in parts[name].items():
                axes.barh(place, value_ms, left=start, height=0.62, color=ink(kind))
                start += value_ms
            end = max(start, ticks.get(name, 0.0))
            label = f"{sums[name]:.3f} ms · {100 * sums[name] / total_ms:.0f} %"
            offset = {"xytext": (5, 0), "textcoords": "offset points"}
            axes.annotate(label, (end, place), va="center", fontsize=7.5, **offset)
            if name in ticks:
                axes.plot([ticks[name]] * 2, [place - 0.4, place + 0.4], color=ink("ink"), lw=1.4)
        most = max([*sums.values(), *ticks.values()])
        axes.set(xlim=(0, most * (1.5 if narrow else 1.22)), ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0, labelcolor=ink("ink"))
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"latency by the {report.device.name} table, ms ({report.device.kind})")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        used = [kind for kind in PART_TYPES if any(kind in part for part in parts.values())]
        handles = [Rectangle((0, 0), 1, 1, color=ink(k), label=PART_TYPES[k]) for k in used]
        lines = axes.plot([], [], color=ink("ink"), lw=1.4) if reference is not None else []
        for line in lines:
            line.set_label(reference.architecture.name if reference is not None else "")
        figure.legend(
            handles=[*handles, *lines],
            loc="upper left",
            bbox_to_anchor=(0.01 if narrow else left, 1.0),
            ncols=3 if narrow else 5,
            frameon=False,
            fontsize=7.5,
            handlelength=1.0,
            columnspacing=1.2,
            borderaxespad=0.2,
        )
    return figure


def latency_parts(estimate: Estimate) -> dict[str, dict[str, float]]:
    """Milliseconds per part (`stem`, `stage 1`, ..., `head`, `overhead`) and block type."""
    parts: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in estimate.rows:
        if row.component.startswith("stages."):
            name = f"stage {int(row.component.split('.')[1]) + 1}"
        else:
            name = row.component
        kind = row.key.type if row.key.type in LABELS else "other"
        kind = "down" if row.key.component == "downsample" else kind
        parts[name][kind] += row.latency_ms
    return {name: {k: kinds[k] for k in PART_TYPES if k in kinds} for name, kinds in parts.items()}


def stage_latency(estimate: Estimate) -> dict[int, float]:
    """Milliseconds per stage index, its downsample included."""
    parts = latency_parts(estimate)
    return {
        int(name.split()[1]) - 1: sum(kinds.values())
        for name, kinds in parts.items()
        if name.startswith("stage ")
    }


def _is_narrow(width_in: float) -> bool:
    return width_in < (WIDE_IN + NARROW_IN) / 2


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = 8.0,
    colour: str = "ink",
    ha: str = "center",
) -> None:
    hexed = colour if colour.startswith("#") else ink(colour)
    axes.text(x, y, text, fontsize=size, color=hexed, ha=ha, va="center_baseline")


def _box(axes: Axes, box: _Box, *, fill: str | None, edge: str, dashed: bool = False) -> None:
    patch = FancyBboxPatch(
        (box.x, box.y),
        box.width,
        box.height,
        boxstyle="round,pad=0,rounding_size=3",
        facecolor=fill or "none",
        edgecolor=edge,
        linewidth=0.9,
        linestyle=(0, (3, 2)) if dashed else "-",
    )
    axes.add_patch(patch)


def _heat_step(value: float, values: Mapping[tuple[int, int], float]) -> int:
    low, high = math.log(min(values.values())), math.log(max(values.values()))
    if high - low < 1e-9:
        return HEAT_STEPS // 2
    return min(int((math.log(value) - low) / (high - low) * HEAT_STEPS), HEAT_STEPS - 1)


def _heat_cell(
    axes: Axes,
    box: _Box,
    value: float | None,
    values: Mapping[tuple[int, int], float],
    dropped: int | None,
) -> None:
    middle = box.x + box.width / 2
    small = 6.0 if box.width < 30 else 6.5
    if value is None:  # the slot may not become identity
        _box(axes, box, fill=None, edge=ink("ghost"))
        _text(axes, middle, box.y + box.height / 2, "fixed", size=small, colour="muted")
        return
    fill, text = heat(_heat_step(value, values))
    _box(axes, box, fill=fill, edge=fill)
    number = f"{value:.2f}" if value < 100 else f"{value:.0f}"
    _text(axes, middle, box.y + box.height * 0.34, number, size=7.5 if box.width > 26 else 6.2, colour=text)
    note = "kept" if dropped is None else f"out: {dropped}"
    _text(axes, middle, box.y + box.height * 0.74, note, size=small - 0.5, colour=text)


def _heat_scale(
    axes: Axes, values: Mapping[tuple[int, int], float], x: float, y: float
) -> None:
    if not values:
        return
    low, high = min(values.values()), max(values.values())
    _text(axes, x, y + 5, f"{low:.2f}", size=7, colour="muted", ha="left")
    for step in range(HEAT_STEPS):
        fill = heat(step)[0]
        axes.add_patch(Rectangle((x + 26 + step * 13, y), 13, 9, facecolor=fill, edgecolor="none"))
    _text(axes, x + 30 + HEAT_STEPS * 13, y + 5, f"{high:.2f}", size=7, colour="muted", ha="left")


def _stage_label(
    axes: Axes,
    network: FoundNetwork,
    space: SearchSpace,
    stage: int,
    at: tuple[float, float],
    *,
    narrow: bool,
) -> None:
    x, y = at
    shapes = [c.output for c in walk(network.architecture) if c.stage == stage and c.kind == "block"]
    size = f"{shapes[0].height} × {shapes[0].width}"
    depth = f"{network.architecture.depths[stage]} of {space.stages[stage].slots} blocks"
    if narrow:
        _text(axes, x, y - 24, f"Stage {stage + 1}", size=8.5, ha="left")
        _text(axes, x + 42, y - 24, f"{size} px, {depth}", size=7, colour="muted", ha="left")
        return
    _text(axes, x, y - 5, f"Stage {stage + 1}", size=9, ha="left")
    _text(axes, x, y + 7, f"{size} px, {depth}", size=7, colour="muted", ha="left")


def _width_gauge(
    axes: Axes, network: FoundNetwork, space: SearchSpace, stage: int, box: _Box
) -> None:
    """The stage's width on the line of the widths it could have had."""
    widths, width = space.stages[stage].width, network.selection.widths[stage]
    share = 1.0 if widths.max == widths.min else (width - widths.min) / (widths.max - widths.min)
    axes.add_patch(
        Rectangle((box.x, box.y), box.width, box.height, facecolor=ink("grid"), edgecolor="none")
    )
    filled = box.width * share
    axes.add_patch(
        Rectangle((box.x, box.y), filled, box.height, facecolor=ink("width"), edgecolor="none")
    )
    axes.plot([box.x + filled], [box.y + box.height / 2], "o", ms=5, color=ink("width"), mew=0)
    _text(axes, box.x, box.y - 7, f"{width} ch", size=8.5, colour="ink", ha="left")
    limits = f"{widths.min} to {widths.max}"
    _text(axes, box.x + box.width, box.y - 7, limits, size=6.5, colour="muted", ha="right")


def _stage_row(
    axes: Axes, network: FoundNetwork, space: SearchSpace, stage: int, first: _Box
) -> None:
    """One row: entry (stem or downsample), a box per slot, and the head after the last stage."""
    slots = network.selection.paths[stage]
    last = stage == len(space.stages) - 1
    pitch, middle = first.width, first.y + first.height / 2
    end = first.x + (len(slots) + 1 + last) * pitch
    axes.plot([first.x, end - 2], [middle, middle], color=ink("edge"), lw=1.0, zorder=0.5)
    entry = _Box(first.x, first.y + 4, pitch - 4, first.height - 8)
    _box(axes, entry, fill=ink("other" if stage == 0 else "down"), edge=ink("edge"))
    caption = first.y + first.height + 7
    name = "stem" if stage == 0 else "down"
    _text(axes, first.x + (pitch - 4) / 2, caption, name, size=6.2, colour="muted")
    for slot, choice in enumerate(slots):
        box = _Box(first.x + (slot + 1) * pitch, first.y, pitch - 4, first.height)
        if choice == IDENTITY:
            _box(axes, box, fill=ink("paper"), edge=ink("ghost"), dashed=True)
            axes.plot([box.x, box.x + box.width], [middle, middle], color=ink("ghost"), lw=1.0)
            continue
        _box(axes, box, fill=ink(choice), edge=ink(choice))
        label = LABELS[choice] if box.width > 27 else LABELS[choice][2:]
        size = 7.2 if box.width > 27 else 6.5
        if box.width > 11:
            _text(axes, box.x + box.width / 2, middle, label, size=size, colour=f"on_{choice}")
    if last:
        box = _Box(first.x + (len(slots) + 1) * pitch, first.y + 4, pitch - 4, first.height - 8)
        _box(axes, box, fill=ink("other"), edge=ink("edge"))
        _text(axes, box.x + box.width / 2, caption, "head", size=6.2, colour="muted")


def _architecture_key(axes: Axes, x: float, y: float, *, narrow: bool) -> None:
    entries: list[tuple[str, str | None]] = [
        ("MB4D, convolution", "mb4d"),
        ("MB3D, attention", "mb3d"),
        ("slot not used", None),
    ]
    if not narrow:
        entries += [("downsample", "down"), ("stem, head", "other"), ("width in its range", "width")]
    for words, colour in entries:
        box = _Box(x, y - 4, 10, 8)
        if colour is None:
            _box(axes, box, fill=None, edge=ink("ghost"), dashed=True)
        else:
            _box(axes, box, fill=ink(colour), edge=ink(colour))
        _text(axes, x + 14, y, words, size=7, colour="muted", ha="left")
        x += 24 + 3.9 * len(words)
