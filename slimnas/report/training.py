"""Curves of a training run: what is logged after every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimnas.report.figures import WIDE_IN, drawing_style, ink, is_narrow, save_png

DENSE = 40
"""From so many points on a curve is drawn without dots."""


@dataclass(frozen=True)
class Panel:
    """One curve.

    Attributes:
        key: of the logged number.
        title: above the curve.
        colour: in the palette of `slimnas.report.figures`.
    """

    key: str
    title: str
    colour: str


TOP1 = "test_top1"
PANELS = (
    Panel("loss", "training loss", "mb4d"),
    Panel(TOP1, "TEST top-1 of averaged weights, %", "width"),
    Panel("lr", "learning rate", "mb3d"),
)


def draw_training(rows: Sequence[Mapping[str, float | None]], path: Path) -> bool:
    """Write the curves of `metrics.jsonl` as a PNG; returns whether there was anything to draw.

    Raises:
        RunFolderError: the file cannot be written.
    """
    figure = training_curves(rows)
    if figure is not None:
        save_png(figure, path)
    return figure is not None


def training_curves(
    rows: Sequence[Mapping[str, float | None]], width_in: float = WIDE_IN
) -> Figure | None:
    """Loss, TEST top-1 and learning rate by epoch, the best epoch marked; none without rows."""
    panels = [panel for panel in PANELS if _points(rows, panel.key, "epoch")]
    figure = curves_figure(rows, panels, x="epoch", x_title="epoch", width_in=width_in)
    points = _points(rows, TOP1, "epoch")
    if figure is not None and points:
        index = [panel.key for panel in panels].index(TOP1)
        with drawing_style():
            _mark_best(figure.axes[index], points)
    return figure


def curves_figure(
    rows: Sequence[Mapping[str, float | None]],
    panels: Sequence[Panel],
    *,
    x: str,
    x_title: str,
    width_in: float = WIDE_IN,
) -> Figure | None:
    """One panel per curve, beside each other or, on a phone, below; none where nothing was logged.

    Args:
        rows: what was logged, oldest first.
        panels: what to draw; those without a finite number are left out.
        x: key of the horizontal axis.
        x_title: its title.
        width_in: of the figure, inches.
    """
    curves = [(panel, points) for panel in panels if (points := _points(rows, panel.key, x))]
    if not curves:
        return None
    narrow = is_narrow(width_in)
    columns = 1 if narrow else len(curves)
    lines = len(curves) if narrow else 1
    height_in = 1.7 * lines + 0.3 if narrow else 2.4
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        for index, (panel, points) in enumerate(curves, start=1):
            axes = figure.add_subplot(lines, columns, index)
            places, values = zip(*points, strict=True)
            marker = "" if len(points) > DENSE else "o"
            axes.plot(places, values, color=ink(panel.colour), lw=1.5, marker=marker, ms=3)
            axes.set_title(panel.title, loc="left", fontsize=8.5, color=ink("ink"))
            axes.set_xlabel(x_title)
            axes.grid(axis="y")
            axes.margins(x=0.02, y=0.12)
    return figure


def _points(
    rows: Sequence[Mapping[str, float | None]], key: str, x: str
) -> list[tuple[float, float]]:
    pairs = [(row.get(x), row.get(key)) for row in rows]
    return [
        (float(place), float(value))
        for place, value in pairs
        if place is not None and value is not None and math.isfinite(value)
    ]


def _mark_best(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Ring the highest point and say in words what it is, beside the last one."""
    epoch, top1 = max(points, key=lambda point: point[1])
    colour = ink("target")
    axes.plot([epoch], [top1], marker="o", ms=9, mfc="none", mec=colour, mew=1.5, ls="")
    axes.text(
        0.98,
        0.06,
        f"last {points[-1][1]:.1f} %\nbest {top1:.1f} % (epoch {epoch:g})",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8,
        color=colour,
    )
