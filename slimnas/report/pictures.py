"""Pictures of networks: importance heat map, architecture, latency by part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle

from slimnas.arch.space import IDENTITY, SearchSpace
from slimnas.arch.templates import TITLES
from slimnas.arch.walk import walk
from slimnas.latency.estimate import Estimate
from slimnas.report.figures import (
    HEAT_STEPS,
    WIDE_IN,
    canvas,
    drawing_style,
    heat,
    ink,
    is_narrow,
    latency_label,
)
from slimnas.report.run import FoundNetwork, RunReport

LABELS = {
    "mb4d": "MB4D",
    "mb3d": "MB3D",
    "hilo": "HiLo",
    "cga": "CGA",
    "mhsa": "MHSA",
    "window": "Win",
    "shifted_window": "SWin",
    "sra": "SRA",
    "linear_sra": "LSRA",
    "tmsa": "TMSA",
    "strided": "Str",
    "lka": "LKA",
    "conv_ffn": "CFFN",
    "pool": "Pool",
}
"""What stands in a block of the architecture figure."""

NARROW_LABELS = {"mb4d": "4D", "mb3d": "3D"}
PART_TYPES = {
    **{kind: f"{TITLES[kind]} blocks" for kind in LABELS},
    "down": "downsample",
    "other": "stem, head, overhead",
}
KEY_LINE_PT = 12.0


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
    narrow = is_narrow(width_in)
    columns = max(stage.slots for stage in space.stages)
    left, right = (42.0, 6.0) if narrow else (58.0, 76.0)
    cell = (width_in * 72 - left - right) / columns
    height = 30.0
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
    """The step, from 1, at which each (stage, slot) became identity and stayed so."""
    found: dict[tuple[int, int], int] = {}
    for number, step in enumerate(report.trajectory.steps, start=1):
        action = step.taken
        if action.slot is not None:
            found.pop((action.stage, action.slot), None)
            if action.becomes == IDENTITY:
                found[action.stage, action.slot] = number
    return found


def architecture_figure(
    network: FoundNetwork, space: SearchSpace, width_in: float = WIDE_IN
) -> Figure:
    """Stages as rows of blocks in slot order; identity slots ghosted; widths as gauges.

    The height of a block grows with the square root of its stage's width.
    """
    narrow = is_narrow(width_in)
    total = width_in * 72
    row = 80.0 if narrow else 58.0
    left, right = (16.0, 2.0) if narrow else (122.0, 112.0)
    slots = max(stage.slots for stage in space.stages) + 2
    pitch = min((total - left - right) / slots, 46.0)
    latency = stage_latency(network.estimate)
    first = 46.0 if narrow else 26.0
    key = _key_lines(_key_entries(space, narrow=narrow), total - left)
    foot = (len(key) - 1) * KEY_LINE_PT - (16 if narrow else 4)
    with drawing_style():
        figure, axes = canvas(width_in, (first + len(space.stages) * row + foot) / 72)
        for stage in range(len(space.stages)):
            middle = stage * row + first
            _stage_label(axes, network, space, stage, middle, narrow=narrow)
            gauge = _Box(total - 84, middle - 32 if narrow else middle, 78, 4)
            _width_gauge(axes, network, space, stage, gauge)
            share = f"{latency.get(stage, 0.0):.3f} ms"
            _text(axes, gauge.x + 78, gauge.y + 12, share, size=6.5, colour="muted", ha="right")
            end = _stage_row(axes, network, space, stage, _Box(left, middle, pitch, 0))
            if stage + 1 < len(space.stages):
                _turn(axes, (end, middle), (left, middle + row), 24 if narrow else row / 2)
        _architecture_key(axes, key, left, first + len(space.stages) * row - (30 if narrow else 20))
    return figure


def latency_figure(report: RunReport, network: FoundNetwork, width_in: float = WIDE_IN) -> Figure:
    """Latency of each part of `network`, stacked by block type; a tick for the reference."""
    parts = latency_parts(network.estimate)
    reference = report.reference
    names = list(parts)
    marks = {} if reference is None else latency_parts(reference.estimate)
    ticks = {name: sum(marks[name].values()) for name in names if name in marks}
    narrow = is_narrow(width_in)
    left_in, top_in, bottom_in = 0.75, 0.62 if narrow else 0.5, 0.45
    right_in = (1.55 if reference is not None else 0.95) * (1.0 if narrow else 1.2)
    height_in = 0.29 * len(names) + top_in + bottom_in
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in))
        plot_in = (width_in - left_in - right_in, height_in - top_in - bottom_in)
        axes = figure.add_axes(
            (
                left_in / width_in,
                bottom_in / height_in,
                plot_in[0] / width_in,
                plot_in[1] / height_in,
            )
        )
        for place, name in enumerate(names):
            start = 0.0
            for kind, value_ms in parts[name].items():
                axes.barh(place, value_ms, left=start, height=0.62, color=ink(kind))
                start += value_ms
            if name in ticks:
                axes.plot([ticks[name]] * 2, [place - 0.42, place + 0.42], color=ink("ink"), lw=1.4)
        most = max([*(sum(kinds.values()) for kinds in parts.values()), *ticks.values()])
        axes.set(xlim=(0, most * 1.02), ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0, labelcolor=ink("ink"))
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(latency_label(report.device))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        _latency_columns(axes, parts, ticks, right_in * 72)
        figure.legend(
            handles=_latency_handles(report, parts),
            loc="upper left",
            bbox_to_anchor=(0.0 if narrow else left_in / width_in, 1.0),
            ncols=3 if narrow else 5,
            frameon=False,
            fontsize=7.5,
            handlelength=1.0,
            handletextpad=0.5,
            columnspacing=1.2,
            borderaxespad=0.0,
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
    if box.width < 17:  # a phone, and a stage of many slots
        if dropped is not None:
            _text(axes, middle, box.y + box.height / 2, str(dropped), size=6.0, colour=text)
        return
    number = f"{value:.2f}" if value < 100 else f"{value:.0f}"
    size = 7.5 if box.width > 26 else 6.2
    _text(axes, middle, box.y + box.height * 0.34, number, size=size, colour=text)
    note = "kept" if dropped is None else f"step {dropped}"
    _text(axes, middle, box.y + box.height * 0.74, note, size=small, colour=text)


def _heat_scale(axes: Axes, values: Mapping[tuple[int, int], float], x: float, y: float) -> None:
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
    middle: float,
    *,
    narrow: bool,
) -> None:
    blocks = (c for c in walk(network.architecture) if c.stage == stage and c.kind == "block")
    shape = next(blocks).output
    size = f"{shape.height} × {shape.width}"
    depth = f"{network.architecture.depths[stage]} of {space.stages[stage].slots} blocks"
    if narrow:
        _text(axes, 12, middle - 36, f"Stage {stage + 1}", size=8.5, ha="left")
        _text(axes, 52, middle - 36, f"{size}, {depth}", size=7, colour="muted", ha="left")
        return
    _text(axes, 4, middle - 5, f"Stage {stage + 1}", size=9, ha="left")
    _text(axes, 4, middle + 7, f"{size}, {depth}", size=7, colour="muted", ha="left")


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
) -> float:
    """Draw one row: stem or downsample, a box per slot, the head at the end of the last stage.

    Args:
        axes: where.
        network: the network.
        space: its search space.
        stage: which stage.
        first: left edge and middle of the row, and the distance between boxes.

    Returns:
        The right edge of the row.
    """
    entry = ("stem", "other", "on_other") if stage == 0 else ("down", "down", "ink")
    boxes: list[tuple[str, str | None, str]] = [entry]
    wide = first.width > 30
    for choice in network.selection.paths[stage]:
        if choice == IDENTITY:
            boxes.append(("", None, "muted"))
        else:
            label = LABELS[choice] if wide else NARROW_LABELS.get(choice, LABELS[choice])
            boxes.append((label, choice, _text_on(choice)))
    if stage == len(space.stages) - 1:
        boxes.append(("head", "other", "on_other"))
    width = network.selection.widths[stage]
    widest = max(part.width.max for part in space.stages)
    height = 13 + 18 * math.sqrt(width / widest)
    middle, gap = first.y, 4.0 if wide else 3.0
    end = first.x + len(boxes) * first.width - gap
    axes.plot([first.x, end], [middle, middle], color=ink("edge"), lw=1.0, zorder=0.5)
    for place, (label, fill, text) in enumerate(boxes):
        x = first.x + place * first.width
        box = _Box(x, middle - height / 2, first.width - gap, height)
        if fill is None:
            _box(axes, box, fill=ink("paper"), edge=ink("edge"), dashed=True)
            axes.plot([x, x + box.width], [middle, middle], color=ink("ghost"), lw=1.0)
            continue
        _box(axes, box, fill=ink(fill), edge=ink(fill))
        small = 4.4 * len(label) > box.width - 2  # at size 7.2
        if box.width > 3.6 * len(label):
            _text(axes, x + box.width / 2, middle, label, size=6.0 if small else 7.2, colour=text)
    return end


def _turn(axes: Axes, start: tuple[float, float], end: tuple[float, float], down: float) -> None:
    """The way from the end of one row to the start of the next."""
    (x, y), (next_x, next_y) = start, end
    out, back = x + 5, next_x - 11
    line: dict[str, Any] = {"color": ink("edge"), "lw": 1.0, "zorder": 0.4}
    axes.plot([x, out, out, back, back, next_x], [y, y, y + down, y + down, next_y, next_y], **line)
    axes.plot([next_x - 3.5], [next_y], marker=">", ms=4, color=ink("edge"), mew=0)


def _latency_columns(
    axes: Axes,
    parts: Mapping[str, Mapping[str, float]],
    ticks: Mapping[str, float],
    room_pt: float,
) -> None:
    """Right of the bars: milliseconds, share of the network, and the reference's milliseconds."""
    total_ms = sum(sum(kinds.values()) for kinds in parts.values())
    columns = [("ms", {name: f"{sum(kinds.values()):.3f}" for name, kinds in parts.items()})]
    shares = {name: f"{100 * sum(k.values()) / total_ms:.0f} %" for name, k in parts.items()}
    columns.append(("share", shares))
    if ticks:
        last = "reference" if room_pt > 120 else "ref."
        columns.append((last, {name: f"{value:.3f}" for name, value in ticks.items()}))
    for index, (title, cells) in enumerate(columns, start=1):
        style: dict[str, Any] = {
            "xytext": (room_pt * index / len(columns) - 4, 0),
            "textcoords": "offset points",
            "xycoords": ("axes fraction", "data"),
            "ha": "right",
            "va": "center_baseline",
        }
        axes.annotate(title, (1.0, -0.85), fontsize=7, color=ink("muted"), **style)
        colour = ink("muted" if index > 2 else "ink")
        for place, name in enumerate(parts):
            axes.annotate(cells.get(name, ""), (1.0, place), fontsize=7.5, color=colour, **style)


def _latency_handles(report: RunReport, parts: Mapping[str, Mapping[str, float]]) -> list[Artist]:
    used = [kind for kind in PART_TYPES if any(kind in kinds for kinds in parts.values())]
    handles: list[Artist] = [
        Rectangle((0, 0), 1, 1, color=ink(kind), label=PART_TYPES[kind]) for kind in used
    ]
    if report.reference is not None:
        name = f"reference: {report.reference.architecture.name}"
        line: dict[str, Any] = {"marker": "|", "ms": 9, "mew": 1.4, "ls": "", "color": ink("ink")}
        handles.append(Line2D([], [], label=name, **line))
    return handles


def _text_on(choice: str) -> str:
    """The colour of text on a block's."""
    return f"on_{choice}" if choice in NARROW_LABELS else "on_block"


def _key_entries(space: SearchSpace, *, narrow: bool) -> list[tuple[str, str | None]]:
    """What the colours of the architecture figure mean: words and colour, none for a ghost."""
    entries: list[tuple[str, str | None]] = [
        ("MB4D (pooling)", "mb4d"),
        ("MB3D (attention)", "mb3d"),
        ("slot not used", None),
    ]
    if not space.counts_attention:
        offered = dict.fromkeys(choice for stage in space.stages for choice in stage.blocks)
        entries = [*((TITLES[choice], choice) for choice in offered), ("slot not used", None)]
    if not narrow:
        entries += [
            ("downsample", "down"),
            ("stem, head", "other"),
            ("width in its range", "width"),
        ]
    return entries


def _key_lines(
    entries: Sequence[tuple[str, str | None]], room_pt: float
) -> list[list[tuple[str, str | None]]]:
    """The entries on as many lines as they need."""
    lines: list[list[tuple[str, str | None]]] = [[]]
    used = 0.0
    for entry in entries:
        needed = _key_pt(entry[0])
        if lines[-1] and used + needed > room_pt:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += needed
    return lines


def _key_pt(words: str) -> float:
    return 24 + 4.3 * len(words)


def _architecture_key(
    axes: Axes, lines: Sequence[Sequence[tuple[str, str | None]]], left: float, y: float
) -> None:
    for number, entries in enumerate(lines):
        x, middle = left, y + number * KEY_LINE_PT
        for words, colour in entries:
            box = _Box(x, middle - 4, 10, 8)
            if colour is None:
                _box(axes, box, fill=None, edge=ink("ghost"), dashed=True)
            else:
                _box(axes, box, fill=ink(colour), edge=ink(colour))
            _text(axes, x + 14, middle, words, size=7, colour="muted", ha="left")
            x += _key_pt(words)
