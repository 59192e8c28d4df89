"""How a supernet ranks networks: figure, table and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from slimnas.analysis.ranking import PREDICTORS, Ranking, row
from slimnas.analysis.ranking_stats import LEVEL, Interval
from slimnas.report.analysis_files import write_csv, write_json
from slimnas.report.figures import WIDE_IN, drawing_style, ink, is_narrow, save_figure

SCHEMA = "slimnas/analysis-ranking/1"
NAME = "ranking"

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "inherited": "inherited top-1",
        "importance": "importance sum",
        "params": "parameters",
        "macs": "MACs",
    }
)
"""What a predictor is called."""

LOG_SPAN = 4.0
"""From this ratio of largest to smallest value an axis is logarithmic."""


@dataclass(frozen=True)
class _Panel:
    """One scatter plot: its predictor, its axis, its colour, and the factor to the axis's unit."""

    predictor: str
    label: str
    colour: str
    factor: float = 1.0


PANELS = (
    _Panel("inherited", "inherited top-1 on SEARCH, %", "mb4d"),
    _Panel("importance", "sum of MetaPath importances", "width"),
    _Panel("params", "parameters, M", "other", 1e-6),
    _Panel("macs", "MACs, G", "other", 1e-9),
)


def with_interval(value: float | None, interval: Interval | None) -> str:
    """A correlation as text: `0.71 (0.42 to 0.90)`; a dash where there is none."""
    if value is None:
        return "-"
    if interval is None:
        return f"{value:.2f}"
    low, high = interval
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def ranking_document(found: Ranking, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study as plain data."""
    return {
        "n": len(found.networks),
        "seeds": list(found.seeds),
        "interval_level": LEVEL,
        "correlations": [
            {
                "predictor": one.predictor,
                "search": one.search.to_dict(),
                "test": one.test.to_dict(),
                "tau_beyond_macs": one.tau_beyond_macs,
            }
            for one in found.correlations
        ],
        "ceiling": None if found.ceiling is None else found.ceiling.to_dict(),
        "search_and_test": found.splits.to_dict(),
        "networks": [row(one) for one in found.networks],
        "provenance": dict(provenance),
    }


def write_ranking(found: Ranking, folder: Path, provenance: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write `ranking.json`, `.csv`, `.svg` and `.png`, each atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    document = {"schema": SCHEMA, **ranking_document(found, provenance)}
    return (
        write_csv(folder / f"{NAME}.csv", document["networks"]),
        write_json(folder / f"{NAME}.json", document),
        *save_figure(ranking_figure(found, str(provenance.get("space", ""))), folder / NAME),
    )


def ranking_figure(found: Ranking, space: str = "", width_in: float = WIDE_IN) -> Figure:
    """Own accuracy against each predictor, a dot per network; bars reach from seed to seed.

    Args:
        found: the study.
        space: name of the search space, for the legend.
        width_in: width in inches; a phone's has one column.
    """
    rows, columns = (len(PANELS), 1) if is_narrow(width_in) else (2, 2)
    with drawing_style():
        figure = Figure(figsize=(width_in, 2.9 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for panel, axes in zip(PANELS, (axes for line in grid for axes in line), strict=True):
            _frame(axes, panel, found, narrow=is_narrow(width_in))
            _draw(axes, panel, found)
        for line in grid:
            line[0].set_ylabel("top-1 on SEARCH, trained alone, %")
        figure.legend(
            handles=_legend(found, space),
            loc="outside upper left",
            ncols=1 if is_narrow(width_in) else 2,
            frameon=False,
            fontsize=7.5,
            handletextpad=0.4,
        )
    return figure


def _values(panel: _Panel, found: Ranking) -> list[float]:
    predict: Callable[[Any], float] = PREDICTORS[panel.predictor]
    return [panel.factor * predict(one) for one in found.networks]


def _frame(axes: Axes, panel: _Panel, found: Ranking, *, narrow: bool) -> None:
    agreement = found.of(panel.predictor).search
    tau = with_interval(agreement.tau, agreement.tau_interval)
    rho = "-" if agreement.spearman is None else f"{agreement.spearman:.2f}"
    names = ("τ", "ρ") if narrow else ("Kendall τ", "Spearman ρ")
    title = f"{WORDS[panel.predictor]}: {names[0]} {tau}, {names[1]} {rho}"
    axes.set_title(title, loc="left", fontsize=8.5, color=ink("ink"))
    axes.set_xlabel(panel.label)
    values = _values(panel, found)
    if min(values) > 0 and max(values) / min(values) >= LOG_SPAN:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_axisbelow(True)
    axes.grid()
    axes.tick_params(length=0)
    axes.margins(x=0.06, y=0.1)


def _draw(axes: Axes, panel: _Panel, found: Ranking) -> None:
    colour = ink(panel.colour)
    values = _values(panel, found)
    for value, one in zip(values, found.networks, strict=True):
        own = [accuracy.search_top1 for accuracy in one.own]
        if len(own) > 1:
            axes.vlines(value, min(own), max(own), color=colour, lw=1.0, alpha=0.5, zorder=2)
    top1 = [one.search_top1 for one in found.networks]
    axes.scatter(values, top1, s=26, color=colour, linewidths=0, zorder=3)


def _legend(found: Ranking, space: str) -> Sequence[Line2D]:
    dot: dict[str, Any] = {"marker": "o", "ms": 5, "color": ink("muted"), "ls": "", "mew": 0}
    empty: dict[str, Any] = {"ls": "", "color": ink("muted")}
    several = len(found.seeds) > 1
    what = f"{len(found.networks)} random networks{f' of {space}' if space else ''}"
    if several:
        what += f", mean of {len(found.seeds)} trainings"
    handles = [Line2D([], [], label=what, **dot)]
    if several:
        bar: dict[str, Any] = {"color": ink("muted"), "lw": 1.0, "alpha": 0.5}
        handles.append(Line2D([], [], label="from the worst training to the best", **bar))
    if found.ceiling is not None:
        ceiling = with_interval(found.ceiling.tau, found.ceiling.tau_interval)
        handles.append(Line2D([], [], label=f"one training and another: τ {ceiling}", **empty))
    return [*handles, Line2D([], [], label=f"in brackets: {100 * LEVEL:.0f} % interval", **empty)]
