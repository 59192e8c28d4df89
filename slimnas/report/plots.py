"""Plots of a run: the slimming trajectory and the supernet's training curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slimnas.arch.templates import IDENTITY
from slimnas.report.figures import WIDE_IN, drawing_style, ink, is_narrow, latency_label
from slimnas.report.run import RunReport
from slimnas.report.training import Panel, curves_figure
from slimnas.search.actions import Action
from slimnas.search.trajectory import Trajectory

# kind: (words, colour, marker); shape and colour both tell the kinds apart
KINDS = {
    "drop_block": ("drop a block", "mb4d", "o"),
    "remove_attention": ("MB3D to MB4D", "mb3d", "D"),
    "replace_block": ("a cheaper block", "mb3d", "D"),
    "narrow_stage": ("narrow a stage", "width", "s"),
    "restore_block": ("a block back", "mb4d", "P"),
    "add_attention": ("MB4D to MB3D", "mb3d", "^"),
    "upgrade_block": ("a costlier block", "mb3d", "^"),
    "widen_stage": ("widen a stage", "width", "X"),
}
OPPOSITES = {
    "restore_block": "drop_block",
    "add_attention": "remove_attention",
    "upgrade_block": "replace_block",
    "widen_stage": "narrow_stage",
}
"""Kinds that share a lane, each with its own marker."""
TRAINING = (
    Panel("loss", "training loss", "mb4d"),
    Panel("search_top1", "SEARCH top-1, %", "width"),
    Panel("tau", "Gumbel temperature", "mb3d"),
)
"""What is logged while a supernet trains."""
LANE_IN = 0.17
LABEL_GAP_PT = 11.0
LINE_PT = 11.0
CHARACTER_PT = 4.8
"""Width of a character of a label in DejaVu Sans, the widest of the fonts it may be shown in."""

FLOOR_POINTS = 2.0
"""The accuracy axis reaches at least this far below the path, in percentage points."""


@dataclass(frozen=True)
class _Mark:
    """A vertical line of the trajectory and its label, `line` lines above the plot."""

    latency_ms: float
    text: str
    colour: str
    line: int


def action_kind(action: Action) -> str:
    """The kind to show; an MB3D that becomes identity is a dropped block."""
    if action.kind == "remove_attention" and action.becomes == IDENTITY:
        return "drop_block"
    return action.kind


def trajectory_figure(report: RunReport, width_in: float = WIDE_IN) -> Figure:
    """Accuracy against latency, every step and candidate; below, a lane per kind of action."""
    trajectory = report.trajectory
    lanes = _lanes(trajectory)
    narrow = is_narrow(width_in)
    left_in, right_in = 1.02, 0.15
    span_in = width_in - left_in - right_in
    marks = _marks(report, span_in * 72)
    legend, columns = _legend(trajectory), 3 if narrow else 5
    legend_in = 0.12 + 0.12 * math.ceil(len(legend) / columns)
    top_in = legend_in + 0.08 + LINE_PT * (1 + max((m.line for m in marks), default=0)) / 72
    plot_in, gap_in, bottom_in = 3.0 if narrow else 3.6, 0.12, 0.5
    lane_in = max(len(lanes), 1) * LANE_IN + 0.1
    height_in = top_in + plot_in + gap_in + lane_in + bottom_in
    left, span = left_in / width_in, span_in / width_in
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in))
        main = figure.add_axes(
            (left, 1 - (top_in + plot_in) / height_in, span, plot_in / height_in)
        )
        below = figure.add_axes((left, bottom_in / height_in, span, lane_in / height_in))
        _frame_trajectory(main, below, report)
        _draw_candidates(main, trajectory)
        _draw_path(main, trajectory)
        _draw_marks(main, below, marks)
        _draw_found(main, report)
        _draw_lanes(below, trajectory, lanes)
        _number_steps(main, report)
        figure.legend(
            handles=legend,
            loc="upper left",
            bbox_to_anchor=(0.0 if narrow else left, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=7.5,
            handletextpad=0.3,
            columnspacing=1.0,
            borderaxespad=0.0,
        )
    return figure


def off_scale(trajectory: Trajectory) -> int:
    """How many candidates lie below the plotted range of `trajectory_figure`."""
    floor = _top1_limits(trajectory)[0]
    return sum(c.top1 < floor for step in trajectory.steps for c in step.candidates)


def training_figure(
    training: Sequence[Mapping[str, float | None]], width_in: float = WIDE_IN
) -> Figure | None:
    """Loss, SEARCH top-1 and temperature by training step; none where nothing was logged."""
    return curves_figure(training, TRAINING, x="step", x_title="training step", width_in=width_in)


def _lanes(trajectory: Trajectory) -> list[tuple[str, int]]:
    order = list(KINDS)
    used = {_lane(step.taken) for step in trajectory.steps}
    return sorted(used, key=lambda lane: (order.index(lane[0]), lane[1]))


def _lane(action: Action) -> tuple[str, int]:
    kind = action_kind(action)
    kind = OPPOSITES.get(kind, kind)
    return kind, -1 if kind == "remove_attention" else action.stage


def _lane_name(lane: tuple[str, int]) -> str:
    kind, stage = lane
    if kind == "remove_attention":
        return "MB3D, MB4D"
    what = {"drop_block": "block", "replace_block": "kind", "narrow_stage": "width"}[kind]
    return f"{what}, stage {stage + 1}"


def _latency_limits(report: RunReport) -> tuple[float, float]:
    latencies = [latency_ms for _, latency_ms, _ in report.trajectory.states]
    latencies += [network.target_ms for network in report.found]
    if report.reference is not None:
        latencies.append(report.reference.estimate.latency_ms)
    low, high = min(latencies), max(latencies)
    pad = 0.04 * (high - low) or 0.05 * high
    return low - pad, high + pad


def _top1_limits(trajectory: Trajectory) -> tuple[float, float]:
    """Room for the path; candidates far below it do not squeeze it flat."""
    path = [top1 for _, _, top1 in trajectory.states]
    weighed = [c.top1 for step in trajectory.steps for c in step.candidates]
    reach = max(FLOOR_POINTS, 0.8 * (max(path) - min(path)))
    low, high = max(min([*path, *weighed]), min(path) - reach), max([*path, *weighed])
    margin = 0.06 * max(high - low, 1.0)
    return low - margin, high + 2 * margin


def _frame_trajectory(main: Axes, below: Axes, report: RunReport) -> None:
    for axes in (main, below):
        axes.set_xlim(*_latency_limits(report))
        axes.set_axisbelow(True)
    main.set_ylim(*_top1_limits(report.trajectory))
    main.grid()
    main.tick_params(labelbottom=False, length=0)
    main.set_ylabel("top-1 on SEARCH split, %")
    below.grid(axis="x")
    below.set_xlabel(latency_label(report.device))


def _draw_candidates(axes: Axes, trajectory: Trajectory) -> None:
    floor = axes.get_ylim()[0]
    others = [c for s in trajectory.steps for c in s.candidates if c.action != s.taken]
    shown = [c for c in others if c.top1 >= floor]
    hidden = [c for c in others if c.top1 < floor]
    axes.scatter(
        [c.latency_ms for c in shown],
        [c.top1 for c in shown],
        s=7,
        color=ink("muted"),
        alpha=0.3,
        linewidths=0,
        zorder=2,
    )
    if hidden:
        axes.scatter(
            [c.latency_ms for c in hidden],
            [floor] * len(hidden),
            s=16,
            marker="v",
            color=ink("muted"),
            alpha=0.5,
            linewidths=0,
            clip_on=False,
            zorder=2,
        )


def _draw_path(axes: Axes, trajectory: Trajectory) -> None:
    latencies = [latency_ms for _, latency_ms, _ in trajectory.states]
    top1 = [accuracy for _, _, accuracy in trajectory.states]
    axes.plot(latencies, top1, color=ink("edge"), lw=1.2, zorder=3)
    axes.plot(latencies[:1], top1[:1], marker="*", ms=10, color=ink("ink"), ls="", mew=0, zorder=5)
    size = 5.0 if len(trajectory.steps) <= 30 else 3.8
    for step in trajectory.steps:
        _, colour, marker = KINDS[action_kind(step.taken)]
        style: dict[str, Any] = {"color": ink(colour), "mec": ink("paper"), "mew": 0.5, "zorder": 4}
        axes.plot([step.latency_ms], [step.top1], marker=marker, ms=size, **style)


def _marks(report: RunReport, span_pt: float) -> list[_Mark]:
    """Targets and reference as vertical lines, their labels on lines that do not collide."""
    named = [(n.target_ms, f"target {n.target_ms:g} ms", "target") for n in report.found]
    if report.reference is not None:
        name = report.reference.architecture.name
        named.append((report.reference.estimate.latency_ms, name, "muted"))
    low, high = _latency_limits(report)
    ends: list[float] = []  # right end of the last label on each line
    marks = []
    for latency_ms, text, colour in sorted(named):
        middle = (latency_ms - low) / (high - low) * span_pt
        half = CHARACTER_PT * len(text) / 2
        line = next((i for i, end in enumerate(ends) if middle - half > end + 4), len(ends))
        ends[line : line + 1] = [middle + half]
        marks.append(_Mark(latency_ms, text, colour, line))
    return marks


def _draw_marks(main: Axes, below: Axes, marks: Sequence[_Mark]) -> None:
    for mark in marks:
        dashes = (0, (5, 3)) if mark.colour == "target" else (0, (1, 2))
        for axes in (main, below):
            axes.axvline(mark.latency_ms, color=ink(mark.colour), lw=1.2, ls=dashes, zorder=1)
        main.annotate(
            mark.text,
            (mark.latency_ms, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + mark.line * LINE_PT),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=ink(mark.colour),
        )


def _draw_found(axes: Axes, report: RunReport) -> None:
    ring: dict[str, Any] = {"marker": "o", "ms": 11, "mfc": "none", "mew": 1.5, "ls": ""}
    for network in report.found:
        at = ([network.estimate.latency_ms], [network.search_top1])
        axes.plot(*at, color=ink("target"), zorder=6, **ring)


def _draw_lanes(axes: Axes, trajectory: Trajectory, lanes: list[tuple[str, int]]) -> None:
    axes.set_yticks(range(len(lanes)), [_lane_name(lane) for lane in lanes])
    axes.set_ylim(max(len(lanes), 1) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=7)
    axes.spines["left"].set_visible(False)
    for row in range(len(lanes)):
        axes.axhline(row, color=ink("grid"), lw=0.7, zorder=1)
    for step in trajectory.steps:
        kind = action_kind(step.taken)
        row = lanes.index(_lane(step.taken))
        _, colour, marker = KINDS[kind]
        axes.plot([step.latency_ms], [row], marker=marker, ms=3.8, color=ink(colour), mew=0)


def _number_steps(axes: Axes, report: RunReport) -> None:
    """Write step numbers where there is room; those that answer a target always."""
    points = 72 / axes.figure.dpi
    states = report.trajectory.states
    places = [axes.transData.transform((ms, top1)) * points for _, ms, top1 in states]
    answers = {network.steps for network in report.found}
    labelled = [places[0], *(places[step] for step in sorted(answers))]
    for step in range(1, len(states)):
        gaps = [math.dist(places[step], place) for place in labelled]
        if step in answers or min(gaps) > LABEL_GAP_PT:
            labelled.append(places[step])
            bold = step in answers
            axes.annotate(
                str(step),
                states[step][1:],
                xytext=(-7, 4) if bold else (0, 5),
                textcoords="offset points",
                ha="right" if bold else "center",
                va="bottom",
                fontsize=8 if bold else 6.5,
                color=ink("target" if bold else "ink"),
                zorder=7,
            )


def _legend(trajectory: Trajectory) -> list[Line2D]:
    taken = {action_kind(step.taken) for step in trajectory.steps}
    handles = [Line2D([], [], marker="*", ms=9, color=ink("ink"), ls="", label="largest network")]
    handles += [
        Line2D([], [], marker=marker, ms=5, color=ink(colour), ls="", label=words)
        for kind, (words, colour, marker) in KINDS.items()
        if kind in taken
    ]
    other: dict[str, Any] = {"marker": ".", "ms": 6, "color": ink("muted"), "ls": "", "alpha": 0.6}
    return [*handles, Line2D([], [], label="weighed, not taken", **other)]
