"""Writes the run report: one self-contained HTML page, and its figures as files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

import slimnas
from slimnas._files import atomic_write_text
from slimnas.arch.templates import TITLES
from slimnas.report import tables
from slimnas.report.figures import (
    NARROW_IN,
    WIDE_IN,
    css_variables,
    inline_svg,
    save_figure,
)
from slimnas.report.pictures import architecture_figure, importance_figure, latency_figure
from slimnas.report.plots import off_scale, training_figure, trajectory_figure
from slimnas.report.run import FoundNetwork, RunReport

PAGE = "report.html"
FIGURES = "figures"
TEMPLATE = "report.html.j2"

Draw = Callable[[float], Figure]


@dataclass(frozen=True)
class Picture:
    """One figure of the report: its file name, what it shows, how to draw it at a width."""

    name: str
    label: str
    draw: Draw

    def inline(self) -> Markup:
        """Both layouts for the page; CSS shows the one that fits."""
        parts = []
        for layout, width_in in (("wide", WIDE_IN), ("narrow", NARROW_IN)):
            svg = inline_svg(self.draw(width_in), f"{self.name}-{layout}", self.label)
            parts.append(f'<div class="{layout}">{svg}</div>')
        return Markup("".join(parts))  # matplotlib has escaped the text it drew


def write_report(report: RunReport, folder: Path) -> tuple[Path, ...]:
    """Write `report.html` and `figures/*.svg`, `figures/*.png` into `folder`.

    Every file is written atomically, the page last; the same report gives the same bytes.

    Returns:
        The paths written, the page first.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    folder = Path(folder)
    pictures = _pictures(report)
    written: list[Path] = []
    for picture in pictures:
        written += save_figure(picture.draw(WIDE_IN), folder / FIGURES / picture.name)
    page = folder / PAGE
    atomic_write_text(page, _render(report, pictures))
    return (page, *written)


def page_environment() -> Environment:
    """Jinja for the templates beside this file, with the formats that every page uses."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=tables.fixed,
        compact=tables.compact,
        millions=tables.millions,
        giga=tables.giga,
        flatten=lambda mapping: list(tables.flatten(mapping)),
    )
    return environment


def themes() -> dict[str, str]:
    """CSS declarations of the light and the dark theme."""
    return {"light": css_variables(False), "dark": css_variables(True)}


def _pictures(report: RunReport) -> list[Picture]:
    pictures = [
        Picture(
            "trajectory",
            "Top-1 against latency for every slimming step and candidate",
            lambda width: trajectory_figure(report, width),
        ),
        Picture(
            "importance",
            "Importance of every MetaPath, by stage and slot",
            lambda width: importance_figure(report, width),
        ),
    ]
    for network in report.found:
        pictures += _network_pictures(report, network)
    if training_figure(report.training) is not None:
        pictures.append(
            Picture("training", "Supernet training by step", lambda w: _training(report, w))
        )
    return pictures


def _network_pictures(report: RunReport, network: FoundNetwork) -> list[Picture]:
    suffix, name = target_slug(network), f"{network.target_ms:g} ms"
    return [
        Picture(
            f"architecture-{suffix}",
            f"Blocks and widths of the network found for {name}",
            lambda width: architecture_figure(network, report.space, width),
        ),
        Picture(
            f"latency-{suffix}",
            f"Latency by part of the network found for {name}",
            lambda width: latency_figure(report, network, width),
        ),
    ]


def target_slug(network: FoundNetwork) -> str:
    """A target as part of a file name and of an id: `1.6ms`."""
    return f"{network.target_ms:g}ms"


def _training(report: RunReport, width_in: float) -> Figure:
    figure = training_figure(report.training, width_in)
    if figure is None:
        raise ValueError("nothing was logged, so there is no training figure to draw")
    return figure


def _render(report: RunReport, pictures: list[Picture]) -> str:
    environment = page_environment()
    environment.filters.update(
        interval=tables.interval,
        slug=target_slug,
        mix=tables.block_mix,
        title_of=lambda choice: TITLES[choice],
    )
    offered = {choice for stage in report.space.stages for choice in stage.choices}
    top1 = [network.search_top1 for network in report.found]
    return environment.get_template(TEMPLATE).render(
        report=report,
        networks=tables.network_rows(report),
        steps=tables.step_rows(report),
        choices=[choice for choice in TITLES if choice in offered],
        figures={picture.name: picture.inline() for picture in pictures},
        figure_files=[f"{FIGURES}/{p.name}.{kind}" for p in pictures for kind in ("svg", "png")],
        off_scale=off_scale(report.trajectory),
        error_points=tables.standard_error_points(
            top1[0] if top1 else report.trajectory.top1, report.data.evaluated_images
        ),
        themes=themes(),
        version=slimnas.__version__,
    )
