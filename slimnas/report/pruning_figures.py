"""Figures of pruning: channel ratios as in EfficientViT's Fig. 5, and accuracy against MACs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from slimnas.arch.cost import cost
from slimnas.prune.costs import amount_text
from slimnas.prune.ratios import TITLES, BlockRatios, ChannelRatios, RatioKind, RatioSet
from slimnas.report.figures import HEAT, WIDE_IN, drawing_style, ink, is_narrow

COLOURS: Mapping[str, str] = {
    "q": ink("mb4d"),
    "k": HEAT[3][0],  # of the queries' hue: the two are pruned as one
    "qk": ink("mb4d"),
    "v": ink("mb3d"),
    "ffn": ink("width"),
}
UNPRUNED = ink("grid")
PITCH = 0.84
"""Share of a block's place that its bars take."""

MARKERS = ("o", "s", "D", "^", "v", "P")
SERIES = ("target", "mb4d", "width", "mb3d", "other", "ink")
"""Colours of a Pareto figure's series, by name in the palette."""

SMALLEST_IN_G = 1e8
"""MACs from which networks are given in GMACs; smaller ones in millions."""

STAGE_IN = 0.38
"""Width that the word `stage` and its number take."""


@dataclass(frozen=True)
class ParetoPoint:
    """One network of a Pareto figure.

    Attributes:
        series: what it was treated with, such as `one shot` or `corrected`.
        macs: of the network.
        top1: in percent.
    """

    series: str
    macs: int
    top1: float


@dataclass(frozen=True)
class _Panel:
    """One axes of a row: the kinds it shows, its height and the gap below it, in inches."""

    kinds: tuple[RatioKind, ...]
    label: str
    height: float
    gap: float


@dataclass(frozen=True)
class BlockAxis:
    """The blocks of a network along an axis, at 0, 1, 2 and so on.

    Attributes:
        stages: index of the stage of each block.
    """

    stages: tuple[int, ...]

    @property
    def boundaries(self) -> list[float]:
        """Places between two stages."""
        pairs = zip(self.stages, self.stages[1:], strict=False)
        return [i + 0.5 for i, (a, b) in enumerate(pairs) if a != b]

    def mark(self, axes: Axes, *, numbers: bool, names: bool = False, narrow: bool = False) -> None:
        """Number the blocks from 1, part the stages, and name them above the axes."""
        count = len(self.stages)
        every = 1 if count <= (16 if narrow else 24) else 2
        places = range(0, count, every)
        axes.set_xlim(-0.6, count - 0.4)
        axes.set_xticks(places, [str(i + 1) if numbers else "" for i in places])
        axes.tick_params(axis="x", length=0, pad=2)
        for place in self.boundaries:
            axes.axvline(place, color=ink("edge"), lw=0.8, ls=(0, (2, 2)), zorder=0.6)
        if names and self.boundaries:
            for stage, run in groupby(range(count), key=self.stages.__getitem__):
                mine = list(run)
                room_in = axes.bbox.width / axes.figure.dpi * len(mine) / count
                axes.annotate(
                    f"stage {stage + 1}" if room_in > STAGE_IN else str(stage + 1),
                    ((mine[0] + mine[-1]) / 2, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=6.5,
                    color=ink("muted"),
                )


def channel_ratios_figure(ratios: RatioSet, width_in: float = WIDE_IN) -> Figure:
    """Bars of Q, K, V and FFN per block, unpruned behind pruned; a row for each budget.

    Q, K and V share an axis up to their unpruned ratio (1 in DeiT and Swin), FFN has its own (4).
    Blocks are numbered in execution order; a cross marks a part that is gone.
    """
    narrow = is_narrow(width_in)
    axis = BlockAxis(tuple(block.stage for block in ratios.budgets[0].blocks))
    panels = _panels(ratios)
    left, right, legend, bottom = 0.72, 0.1, 0.28, 0.2
    title = (0.46 if narrow else 0.3) + (0.14 if axis.boundaries else 0.0)
    row = title + sum(panel.height + panel.gap for panel in panels)
    height_in = legend + row * len(ratios.budgets) + bottom
    unpruned = cost(ratios.source).macs
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in))
        for number, budget in enumerate(ratios.budgets):
            top = legend + number * row + title
            _budget_title(figure, budget, unpruned, (left, top - title + 0.06), narrow=narrow)
            for place, panel in enumerate(panels):
                box = (
                    left / width_in,
                    1 - (top + panel.height) / height_in,
                    (width_in - left - right) / width_in,
                    panel.height / height_in,
                )
                axes = figure.add_axes(box, label=f"{budget.label} {panel.label}")
                _draw_bars(axes, budget.blocks, panel)
                axes.yaxis.set_label_coords(-0.36 / (width_in - left - right), 0.5)
                last = place == len(panels) - 1
                axis.mark(axes, numbers=last, names=place == 0, narrow=narrow)
                if last and number == len(ratios.budgets) - 1:
                    axes.set_xlabel("block")
                top += panel.height + panel.gap
        figure.text(
            0.03 / width_in,
            1 - (legend + (height_in - legend - bottom) / 2) / height_in,
            "output channels / embedding width",
            rotation=90,
            ha="left",
            va="center",
            color=ink("muted"),
        )
        _ratio_legend(figure, panels, 0.0 if narrow else left / width_in, narrow=narrow)
    return figure


def pareto_figure(
    points: Sequence[ParetoPoint],
    unpruned: ParetoPoint,
    width_in: float = WIDE_IN,
    *,
    error_points: float | None = None,
) -> Figure:
    """Top-1 against MACs: a line per series, a star for the unpruned network.

    Args:
        points: pruned networks.
        unpruned: the network they come from.
        width_in: width of the figure.
        error_points: standard error of an accuracy, in percentage points; drawn at the star.
    """
    series = list(dict.fromkeys(point.series for point in points))
    scale, unit = (1e9, "GMACs") if unpruned.macs >= SMALLEST_IN_G else (1e6, "MMACs")
    star = (unpruned.macs / scale, unpruned.top1)
    with drawing_style():
        figure = Figure(
            figsize=(width_in, 3.3 if is_narrow(width_in) else 3.6), layout="constrained"
        )
        axes = figure.add_subplot()
        for name, colour, marker in zip(series, SERIES, MARKERS, strict=False):
            mine = sorted((p.macs / scale, p.top1) for p in points if p.series == name)
            line = [*mine, star]
            axes.plot(*zip(*line, strict=True), color=ink(colour), lw=1.3, zorder=2)
            axes.plot(
                *zip(*mine, strict=True),
                color=ink(colour),
                ls="",
                marker=marker,
                ms=6,
                mec=ink("paper"),
                mew=0.6,
                label=name,
                zorder=3,
            )
            for macs, top1 in mine:
                rivals = [p.top1 for p in points if p.macs / scale == macs and p.series != name]
                _value(axes, (macs, top1), below=top1 < max(rivals, default=top1))
        if error_points is not None:
            axes.errorbar(*star, yerr=error_points, color=ink("edge"), lw=1.2, capsize=3, zorder=1)
        axes.plot(
            *([value] for value in star),
            ls="",
            marker="*",
            ms=13,
            color=ink("ink"),
            mew=0,
            label=unpruned.series,
            zorder=4,
        )
        _value(axes, star, below=False, left=True)  # of the error bar
        axes.set(xlabel=f"{unit} for one image", ylabel="top-1, %")
        axes.grid()
        axes.set_axisbelow(True)
        axes.margins(x=0.08, y=0.14)
        axes.legend(frameon=False, loc="lower right", fontsize=7.5)
    return figure


def _value(axes: Axes, at: tuple[float, float], *, below: bool, left: bool = False) -> None:
    axes.annotate(
        f"{at[1]:.1f}",
        at,
        xytext=(-5 if left else 0, -7 if below else 7),
        textcoords="offset points",
        ha="right" if left else "center",
        va="top" if below else "bottom",
        fontsize=7,
        color=ink("ink"),
        zorder=5,
    )


def _panels(ratios: RatioSet) -> list[_Panel]:
    blocks = ratios.budgets[0].blocks
    panels = []
    if any(block.kept("q") is not None for block in blocks):
        panels.append(_Panel(("q", "k", "v"), "Q, K, V", 1.05, 0.12))
    panels.append(_Panel(("ffn",), "FFN", 0.75 if panels else 1.3, 0.26))
    return panels


def _draw_bars(axes: Axes, blocks: Sequence[BlockRatios], panel: _Panel) -> None:
    step = PITCH / len(panel.kinds)
    # One bar alone would be a wall: two thirds of the place.
    width = step * (0.86 if len(panel.kinds) > 1 else 0.66)
    for number, kind in enumerate(panel.kinds):
        shift = (number - (len(panel.kinds) - 1) / 2) * step
        mine = [(i + shift, b) for i, b in enumerate(blocks) if b.kept(kind) is not None]
        if not mine:
            continue
        places = [place for place, _ in mine]
        before = [block.ratio(kind, pruned=False) for _, block in mine]
        after = [block.ratio(kind) for _, block in mine]
        axes.bar(
            places,
            before,
            width,
            facecolor=UNPRUNED,
            edgecolor=ink("ghost"),
            lw=0.6,
            label=f"{kind} unpruned",
        )
        axes.bar(places, after, width, color=COLOURS[kind], label=kind, zorder=2)
        gone = [place for place, value in zip(places, after, strict=True) if value == 0]
        high = 0.06 * max(before)
        axes.plot(gone, [high] * len(gone), ls="", marker="x", ms=3.5, mew=1, color=ink("muted"))
    top = max(block.ratio(kind, pruned=False) for block in blocks for kind in panel.kinds)
    axes.set_ylim(0, top * 1.04)
    axes.yaxis.set_major_locator(MaxNLocator(2 if top > 2 else 3, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    _say_without(axes, [block.kept(panel.kinds[0]) is None for block in blocks])
    axes.set_ylabel(panel.label, color=ink("ink"), fontsize=7.5)


def _say_without(axes: Axes, lacking: Sequence[bool]) -> None:
    """Name the runs of blocks that never had the part, where there is room for words."""
    for lacks, run in groupby(range(len(lacking)), key=lacking.__getitem__):
        mine = list(run)
        if lacks and len(mine) >= 3:
            middle = (mine[0] + mine[-1]) / 2
            words = "blocks without attention"
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink("muted")}
            at = axes.get_xaxis_transform()
            axes.text(middle, 0.5, words, fontsize=7, transform=at, **style)


def _budget_title(
    figure: Figure,
    budget: ChannelRatios,
    unpruned: int,
    at_in: tuple[float, float],
    *,
    narrow: bool,
) -> None:
    width_in, height_in = figure.get_size_inches()
    x, y = at_in[0] / width_in, 1 - at_in[1] / height_in
    share = f"{100 * budget.macs / unpruned:.0f} %"
    figure.text(
        x,
        y,
        f"{budget.label}: {amount_text('macs', budget.macs)}, {share} of unpruned",
        fontsize=8.5,
        va="top",
    )
    kept = []
    for kind, name in (("q", "Q, K"), ("v", "V"), ("ffn", "FFN")):
        mean = budget.mean_kept(kind)  # type: ignore[arg-type]
        if mean is not None:
            kept.append(f"{name} {100 * mean:.0f} %")
    figure.text(
        x if narrow else 1 - 0.1 / width_in,
        y - (0.17 / height_in if narrow else 0),
        f"kept on average: {', '.join(kept)}",
        fontsize=7.5,
        color=ink("muted"),
        ha="left" if narrow else "right",
        va="top",
    )


def _ratio_legend(figure: Figure, panels: Sequence[_Panel], x: float, *, narrow: bool) -> None:
    handles: list[Rectangle | Line2D] = [
        Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=TITLES[kind])
        for panel in panels
        for kind in panel.kinds
    ]
    outline: dict[str, Any] = {"facecolor": UNPRUNED, "edgecolor": ink("ghost"), "lw": 0.6}
    handles.append(Rectangle((0, 0), 1, 1, label="unpruned", **outline))
    gone: dict[str, Any] = {"marker": "x", "ms": 4, "mew": 1, "ls": "", "color": ink("muted")}
    handles.append(Line2D([], [], label="gone", **gone))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(x, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=7.0 if narrow else 7.5,
        handlelength=1.0,
        handletextpad=0.4,
        columnspacing=0.8 if narrow else 1.2,
        borderaxespad=0.1,
    )
