"""Figures of what units are worth: importance per block and kind, and sensitivity to pruning."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from slimnas.arch.architecture import Architecture
from slimnas.prune.scores import BlockScores, FloatArray, Scores
from slimnas.prune.sensitivity import KINDS, Sensitivity, SensitivityKind, SensitivityPoint
from slimnas.prune.widths import BlockPlan, WidthPlan, block_components
from slimnas.report.figures import HEAT, HEAT_STEPS, WIDE_IN, drawing_style, heat, ink, is_narrow
from slimnas.report.pruning_figures import COLOURS, BlockAxis

TITLES: Mapping[SensitivityKind, str] = {"qk": "Q and K dims", "v": "V dims", "ffn": "FFN units"}
BINS = 36
FLOOR = 0.004
"""Share of the units that may stand at the lower end of an axis of importance."""

SMOOTHING = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
DROP_EDGES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Drops of top-1, in points, at which a heat map's colour changes; one fewer than its colours."""

LABELLED = 3
"""Curves of a panel that are named: the ones that end lowest."""


def importance_figure(
    scores: Scores,
    architecture: Architecture,
    plan: WidthPlan | None = None,
    width_in: float = WIDE_IN,
) -> Figure:
    """How important the units of each block are, on a log scale; a panel per kind of unit.

    With a plan, units that go are drawn to the left and units that stay to the right of a block's
    line, both on one scale of counts, and the share that stays is written above. A tick marks the
    median. Units of importance 0 cannot be drawn; `zero_units` counts them.
    """
    narrow = is_narrow(width_in)
    axis, names = _blocks(architecture)
    kinds = [kind for kind in KINDS if any(_units(scores.blocks[n], kind).size for n in names)]
    row_in, top_in, bottom_in, left_in = 1.75, 0.36, 0.2, 0.66
    height_in = top_in + row_in * len(kinds) + bottom_in
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in))
        for place, kind in enumerate(kinds):
            low = 1 - (top_in + row_in * (place + 1) - 0.36) / height_in
            size = ((width_in - left_in - 0.1) / width_in, (row_in - 0.5) / height_in)
            axes = figure.add_axes((left_in / width_in, low, *size), label=kind)
            _draw_violins(axes, scores, names, kind, plan)
            axis.mark(axes, numbers=True, narrow=narrow)
            axes.set_ylabel("importance")
            axes.set_title(TITLES[kind], loc="left", fontsize=8.5, color=ink("ink"), pad=13)
            if plan is not None:
                _write_kept(axes, plan, scores, names, kind)
        parted = "; dashed lines part the stages" if axis.boundaries else ""
        axes.set_xlabel(f"block{parted}")
        _importance_legend(figure, plan, kinds, left_in / width_in)
    return figure


def zero_units(scores: Scores) -> dict[SensitivityKind, int]:
    """How many units of each kind have importance 0."""
    return {
        kind: int(sum((_units(block, kind) <= 0).sum() for block in scores.blocks.values()))
        for kind in KINDS
    }


def sensitivity_figure(
    found: Sensitivity, architecture: Architecture, width_in: float = WIDE_IN
) -> Figure:
    """Drop of top-1 by block and share (heat map), and the curves of top-1 and loss.

    A row per kind of unit; the stronger a curve, the later its block.
    """
    narrow = is_narrow(width_in)
    axis, names = _blocks(architecture)
    kinds = [kind for kind in KINDS if any(found.of(name, kind) for name in names)]
    with drawing_style():
        heights = [1.25, 1.45] if narrow else [1.0]
        figure = Figure(
            figsize=(width_in, (3.3 if narrow else 2.15) * len(kinds) + 0.45), layout="constrained"
        )
        ratios = [*[1.0] * len(kinds), 0.13]
        rows: Any = figure.subfigures(len(kinds) + 1, 1, height_ratios=ratios)
        for part, kind in zip(rows, kinds, strict=False):
            if narrow:
                grid = part.add_gridspec(2, 2, height_ratios=heights)
                spots = (grid[0, :], grid[1, 0], grid[1, 1])
            else:
                grid = part.add_gridspec(1, 3, width_ratios=[2.1, 1.0, 1.0])
                spots = (grid[0, 0], grid[0, 1], grid[0, 2])
            title = f"{TITLES[kind]}: drop of top-1, points"
            axes = part.add_subplot(spots[0], label=f"{kind} heat")
            axes.set_title(title, loc="left", fontsize=8.5, color=ink("ink"))
            _draw_heat(axes, found, names, kind, room_in=width_in * (0.9 if narrow else 0.45))
            axis.mark(axes, numbers=True, narrow=True)
            for spot, field, words in zip(
                spots[1:], ("top1", "loss"), ("top-1, %", "loss"), strict=True
            ):
                axes = part.add_subplot(spot, label=f"{kind} {field}")
                axes.set_title(words, loc="left", fontsize=8.5, color=ink("ink"))
                _draw_curves(axes, found, names, kind, field)
        _heat_legend(rows[-1].add_subplot(), narrow=narrow)
    return figure


def _blocks(architecture: Architecture) -> tuple[BlockAxis, list[str]]:
    parts = [part for part, _ in block_components(architecture)]
    return BlockAxis(tuple(part.stage for part in parts)), [part.name for part in parts]


def _units(scores: BlockScores, kind: SensitivityKind) -> FloatArray:
    array: FloatArray = getattr(scores, kind)
    return array.ravel()


def _kept(plan: BlockPlan, scores: BlockScores, kind: SensitivityKind) -> Any:
    """A mask over the units, flat: which stay."""
    if kind == "ffn":
        mask = np.zeros(scores.ffn.shape, bool)
        mask[list(plan.ffn)] = True
        return mask
    mask = np.zeros(getattr(scores, kind).shape, bool)
    for head, dims in zip(plan.heads, getattr(plan, kind), strict=True):
        mask[head, list(dims)] = True
    return mask.ravel()


def _draw_violins(
    axes: Axes,
    scores: Scores,
    names: Sequence[str],
    kind: SensitivityKind,
    plan: WidthPlan | None,
) -> None:
    every = np.concatenate([_units(scores.blocks[name], kind) for name in names])
    drawn = np.log10(every[every > 0]) if (every > 0).any() else np.zeros(1)
    # A few units of next to no importance would squeeze all others flat: they stand at the floor.
    low, high = np.quantile(drawn, FLOOR), drawn.max()
    room = max(0.1, 3 / BINS * (high - low))  # smoothing spreads a unit over two bins either way
    edges = np.linspace(low - 0.1, high + room, BINS + 1)
    middles = 10 ** ((edges[:-1] + edges[1:]) / 2)
    for place, name in enumerate(names):
        units = _units(scores.blocks[name], kind)
        if not units.size:
            continue
        mask = np.ones(units.size, bool)
        if plan is not None:
            mask = _kept(plan.blocks[name], scores.blocks[name], kind)
        stay, go = (_density(units[part], edges) for part in (mask, ~mask))
        scale = 0.42 / max(stay.max(), go.max(), 1e-12)
        right = place + scale * stay
        left = place - scale * (stay if plan is None else go)
        style: dict[str, Any] = {"lw": 0.5, "zorder": 2}
        if plan is None:
            shown = stay > 0
            axes.fill_betweenx(middles, left, right, where=shown, color=COLOURS[kind], **style)
        else:
            axes.fill_betweenx(middles, left, place, where=go > 0, color=ink("ghost"), **style)
            axes.fill_betweenx(middles, place, right, where=stay > 0, color=COLOURS[kind], **style)
        median = float(np.median(units))
        if median > 0:
            axes.plot([place - 0.3, place + 0.3], [median] * 2, color=ink("ink"), lw=1.1, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(10 ** edges[0], 10 ** edges[-1])
    axes.tick_params(axis="y", which="minor", left=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _density(units: FloatArray, edges: FloatArray) -> FloatArray:
    """Smoothed counts per bin of log10 importance."""
    drawn = np.maximum(np.log10(units[units > 0]), edges[0])
    counts, _ = np.histogram(drawn, bins=edges)
    smooth: FloatArray = np.convolve(counts, SMOOTHING, mode="same")
    return smooth


def _write_kept(
    axes: Axes, plan: WidthPlan, scores: Scores, names: Sequence[str], kind: SensitivityKind
) -> None:
    for place, name in enumerate(names):
        mask = _kept(plan.blocks[name], scores.blocks[name], kind)
        if mask.size and len(names) <= 24:
            axes.annotate(
                f"{100 * mask.mean():.0f}",
                (place, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=6.5,
                color=ink("muted"),
            )


def _importance_legend(
    figure: Figure, plan: WidthPlan | None, kinds: Sequence[SensitivityKind], x: float
) -> None:
    if plan is None:
        return
    handles: list[Any] = [
        Rectangle((0, 0), 1, 1, color=ink("ghost")),
        tuple(Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in kinds),
        Rectangle((0, 0), 0, 0, alpha=0),
    ]
    figure.legend(
        handles=handles,
        labels=["goes", "stays", "above each block: share that stays, %"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="upper left",
        bbox_to_anchor=(x, 1.0),
        ncols=3,
        frameon=False,
        fontsize=7.5,
        handlelength=1.6,
        handletextpad=0.4,
        columnspacing=1.2,
        borderaxespad=0.1,
    )


def _draw_heat(
    axes: Axes,
    found: Sensitivity,
    names: Sequence[str],
    kind: SensitivityKind,
    *,
    room_in: float,
) -> None:
    shares = sorted({point.share for point in found.points if point.kind == kind})
    for place, name in enumerate(names):
        for point in found.of(name, kind):
            row, drop = shares.index(point.share), found.top1 - point.top1
            fill, text = heat(bisect_right(DROP_EDGES, drop))
            axes.add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, facecolor=fill, lw=0))
            if room_in / len(names) > 0.25:
                axes.text(
                    place,
                    row,
                    _short(drop),
                    ha="center",
                    va="center_baseline",
                    fontsize=5.5,
                    color=text,
                )
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_yticks(range(len(shares)), [f"{100 * share:.0f} %" for share in shares])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="block", ylabel="pruned")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _short(drop: float) -> str:
    """A drop in points for a small cell: 0.4, 12; a gain has its sign."""
    text = f"{drop:.1f}" if abs(drop) < 9.95 else f"{drop:.0f}"
    return "0" if text in ("0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def _draw_curves(
    axes: Axes, found: Sensitivity, names: Sequence[str], kind: SensitivityKind, field: str
) -> None:
    start = getattr(found, field)
    ends: list[tuple[float, SensitivityPoint, int]] = []
    for place, name in enumerate(names):
        points = found.of(name, kind)
        if not points:
            continue
        shares = [0.0, *(100 * point.removed / point.units for point in points)]
        values = [start, *(getattr(point, field) for point in points)]
        depth = place / max(len(names) - 1, 1)
        colour = HEAT[min(2 + int(depth * (HEAT_STEPS - 2)), HEAT_STEPS - 1)][0]
        axes.plot(shares, values, color=colour, lw=1.2)
        ends.append((values[-1], points[-1], place))
    ends.sort(key=lambda end: end[0], reverse=field == "loss")
    span = abs(axes.get_ylim()[1] - axes.get_ylim()[0])
    taken: list[float] = []
    for value, point, place in ends[:LABELLED]:
        if all(abs(value - other) > 0.09 * span for other in taken):
            taken.append(value)
            axes.annotate(
                str(place + 1),
                (100 * point.removed / point.units, value),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=ink("ink"),
            )
    axes.set_xlim(0, 100)
    axes.set_xlabel("pruned, %")
    axes.grid()
    axes.set_axisbelow(True)


def _heat_legend(axes: Axes, *, narrow: bool) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 10 if narrow else 22), ylim=(0, 1))
    for step in range(HEAT_STEPS):
        fill, text = heat(step)
        low = DROP_EDGES[step - 1] if step else None
        words = f"< {DROP_EDGES[0]:g}" if low is None else f"{low:g}"
        words = f"{words} +" if step == HEAT_STEPS - 1 else words
        axes.add_patch(Rectangle((step, 0), 1, 1, facecolor=fill, lw=0))
        axes.text(step + 0.5, 0.5, words, ha="center", va="center_baseline", fontsize=6, color=text)
    axes.text(
        HEAT_STEPS + 0.25,
        0.5,
        "points lost"
        if narrow
        else "points of top-1 lost, from; curves: the later a block, the stronger",
        va="center_baseline",
        fontsize=7,
        color=ink("muted"),
    )
