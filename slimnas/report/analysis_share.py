"""What an MHSA-share study found: figure, table, JSON and the networks themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from slimnas.analysis.share_run import ShareResult, SubNetwork, row
from slimnas.report.analysis_files import write_csv, write_json
from slimnas.report.figures import WIDE_IN, drawing_style, ink, is_narrow, save_figure

SCHEMA = "slimnas/analysis-mhsa-share/1"
NAME = "mhsa_share"
NETWORKS = "networks"
BEST = (20.0, 40.0)
"""Shares of MHSA in percent that do best in the published study."""

SERIES = (("mb4d", "o"), ("mb3d", "D"), ("width", "s"), ("target", "^"), ("other", "v"))
"""Colour, by name in the palette, and marker of each speed-up."""


@dataclass(frozen=True)
class _Panel:
    """One axes: its title, and its value of a network (None where there is none)."""

    title: str
    value: Callable[[SubNetwork], float | None]
    kind: str = ""


PANELS = (
    _Panel("top-1 after the same training, %", lambda one: one.mean_top1, "top1"),
    _Panel(
        "memory-bound operators, % of run time",
        lambda one: None if one.memory_share is None else 100 * one.memory_share,
    ),
    _Panel("measured throughput over the base's", lambda one: _speedup(one), "speed"),
    _Panel("width over the base's", lambda one: one.scale),
)


def mhsa_share_document(result: ShareResult, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study as plain data."""
    return {
        "base": row(result.base),
        "networks": [row(one) for one in result.networks],
        "provenance": dict(provenance),
    }


def write_mhsa_share(
    result: ShareResult, folder: Path, provenance: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Write `mhsa_share.json`, `.csv`, `.svg` and `.png`, and every network, each atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    document = {"schema": SCHEMA, **mhsa_share_document(result, provenance)}
    for one in result.networks:
        one.architecture.save(folder / NETWORKS / f"{one.architecture.name}.yaml")
    return (
        write_csv(folder / f"{NAME}.csv", [document["base"], *document["networks"]]),
        write_json(folder / f"{NAME}.json", document),
        *save_figure(mhsa_share_figure(result), folder / NAME),
    )


def mhsa_share_figure(result: ShareResult, width_in: float = WIDE_IN) -> Figure:
    """Accuracy, memory-bound time, throughput and width against the share of MHSA layers.

    A line per speed-up. A hollow marker stands for a network outside the tolerance, a star for the
    base; what was not looked at has no panel.
    """
    everything = (result.base, *result.networks)
    panels = [one for one in PANELS if any(one.value(x) is not None for x in result.networks)]
    wide = 2 if len(panels) == 4 else len(panels)
    columns = 1 if is_narrow(width_in) else wide
    rows = -(-len(panels) // columns)
    with drawing_style():
        figure = Figure(figsize=(width_in, 2.5 * rows + 0.5), layout="constrained")
        grid = figure.add_gridspec(rows, columns)
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(grid[number // columns, number % columns])
            _frame(axes, panel, everything)
            for place, speedup in enumerate(_speedups(result)):
                colour, marker = SERIES[place % len(SERIES)]
                line = [one for one in result.networks if one.asked_speedup == speedup]
                _draw_line(axes, panel, line, ink(colour), marker)
            base = panel.value(result.base)
            if base is not None:
                axes.plot([_percent(result.base)], [base], ls="", zorder=5, **_STAR)
            if number >= len(panels) - columns:
                axes.set_xlabel("MHSA layers, % of MHSA and FFN layers")
        figure.legend(
            handles=_legend(result),
            loc="outside upper left",
            ncols=3 if is_narrow(width_in) else 6,
            frameon=False,
            fontsize=7.5,
            handletextpad=0.4,
            columnspacing=1.2,
        )
    return figure


_STAR: dict[str, Any] = {"marker": "*", "ms": 9, "color": ink("ink"), "mew": 0}


def _frame(axes: Axes, panel: _Panel, networks: Sequence[SubNetwork]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=8.5, color=ink("ink"))
    axes.axvspan(*BEST, color=ink("grid"), alpha=0.45, lw=0, zorder=0.5)
    shares = [_percent(one) for one in networks]
    axes.set_xlim(min(0.0, *shares), max(*shares, BEST[1]) + 5)
    axes.set_axisbelow(True)
    axes.grid()
    axes.tick_params(length=0)
    axes.margins(y=0.15)


def _draw_line(
    axes: Axes, panel: _Panel, line: Sequence[SubNetwork], colour: str, marker: str
) -> None:
    values = [(one, panel.value(one)) for one in sorted(line, key=_percent)]
    known = [(one, value) for one, value in values if value is not None]
    if panel.kind == "speed" and known:
        axes.axhline(known[0][0].asked_speedup, color=colour, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.plot(
        [_percent(one) for one, _ in known], [value for _, value in known], color=colour, lw=1.3
    )
    for one, value in known:
        share = _percent(one)
        if panel.kind == "speed" and one.speed is not None:
            axes.vlines(share, one.speed.low, one.speed.high, color=colour, lw=1.0, zorder=2)
        if panel.kind == "top1" and len(one.top1) > 1:
            seeds = [share] * len(one.top1)
            axes.scatter(seeds, one.top1, s=9, color=colour, alpha=0.45, linewidths=0, zorder=2)
        fill = colour if one.met else ink("paper")
        axes.plot([share], [value], marker=marker, ms=5, color=colour, mfc=fill, zorder=4)


def _legend(result: ShareResult) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [Line2D([], [], ls="", label=_base_words(result), **_STAR)]
    for place, speedup in enumerate(_speedups(result)):
        colour, marker = SERIES[place % len(SERIES)]
        handles.append(
            Line2D([], [], color=ink(colour), lw=1.3, marker=marker, ms=5, label=f"{speedup:g} x")
        )
    if not all(one.met for one in result.networks):
        hollow: dict[str, Any] = {"marker": "o", "ms": 5, "color": ink("muted"), "ls": ""}
        label = "speed-up outside the tolerance"
        handles.append(Line2D([], [], mfc=ink("paper"), label=label, **hollow))
    label = "best in EfficientViT's study"
    handles.append(Patch(color=ink("grid"), alpha=0.45, lw=0, label=label))
    return handles


def _base_words(result: ShareResult) -> str:
    return result.base.architecture.name


def _speedups(result: ShareResult) -> list[float]:
    return sorted({one.asked_speedup for one in result.networks})


def _speedup(network: SubNetwork) -> float:
    return 1.0 if network.speed is None else network.speed.speedup


def _percent(network: SubNetwork) -> float:
    return 100 * network.layers.share
