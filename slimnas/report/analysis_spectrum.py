"""What `slimnas analyze spectrum` writes: spectra of parts of a network as data, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from slimnas.analysis.spectrum import HIGH, Spectrum
from slimnas.report.analysis_files import write_csv, write_json
from slimnas.report.figures import HEAT, WIDE_IN, drawing_style, ink, is_narrow, save_figure

SCHEMA = "slimnas/analysis-spectrum/1"
NAME = "spectrum"
SERIES = (
    ("mb3d", "D"),
    ("mb4d", "o"),
    ("width", "s"),
    ("target", "^"),
    ("ink", "v"),
    ("other", "P"),
)
"""Colour, by name in the palette, and marker of each group of parts."""
PICTURES = 4
"""Groups whose spectra are shown as pictures, at most."""
ONE_PER_DECADE = 100.0
"""Range of a logarithmic axis from which only powers of ten are labelled."""
CUT = (2, 98)
"""Percentiles that the pictures' common scale spans."""

Picture = NDArray[np.float64]


def write_spectra(
    found: Sequence[Spectrum],
    control: Sequence[Spectrum],
    provenance: Mapping[str, Any],
    folder: Path,
) -> dict[str, Path]:
    """Write `spectrum.json`, `spectrum.csv`, `rings.csv`, `spectrum.svg` and `.png`.

    Args:
        found: the trained network's.
        control: of the same parts with random weights; none if they were not looked at.
        provenance: model, weights, data and settings, for the JSON file.
        folder: where.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    document = {"schema": SCHEMA, **spectra_document(found, control, provenance)}
    rows = [{k: v for k, v in part.items() if k not in _ARRAYS} for part in document["parts"]]
    paths = {
        "json": write_json(folder / f"{NAME}.json", document),
        "csv": write_csv(folder / f"{NAME}.csv", rows),
        "rings": write_csv(folder / "rings.csv", _rings(document["parts"])),
    }
    paths["svg"], paths["png"] = save_figure(spectra_figure(found, control), folder / NAME)
    return paths


_ARRAYS = ("frequencies", "power", "control_power")


def spectra_document(
    found: Sequence[Spectrum], control: Sequence[Spectrum], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The spectra as plain data."""
    controls = {spectrum.part: spectrum for spectrum in control}
    parts = []
    for one in found:
        other = controls.get(one.part)
        row: dict[str, Any] = {
            "part": one.part.name,
            "group": one.part.group,
            "map": list(one.size),
            "channels": one.channels,
            "mean_percent": one.mean_percent,
            "high_percent": one.high_percent,
            "high_deviation": one.high_deviation,
            "white_noise_percent": one.white_percent,
            "frequencies": list(one.frequencies),
            "power": list(one.power),
        }
        if other is not None:
            row["control_mean_percent"] = other.mean_percent
            row["control_high_percent"] = other.high_percent
            row["control_power"] = list(other.power)
        parts.append(row)
    return {**provenance, "images": found[0].images, "high_from_nyquist": HIGH, "parts": parts}


def _rings(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every ring of every part."""
    rows = []
    for part in parts:
        for number, frequency in enumerate(part["frequencies"]):
            row = {"part": part["part"], "frequency": frequency, "power": part["power"][number]}
            if "control_power" in part:
                row["control_power"] = part["control_power"][number]
            rows.append(row)
    return rows


def spectra_figure(
    found: Sequence[Spectrum], control: Sequence[Spectrum], width_in: float = WIDE_IN
) -> Figure:
    """Radial spectra, the share of high frequencies along the depth, and spectra as pictures.

    Thin lines are parts, thick ones the mean of a group; dashed is the network with random
    weights. All pictures share one scale.
    """
    narrow = is_narrow(width_in)
    groups = list(dict.fromkeys(one.part.group for one in found))
    pictures = groups[: 2 if narrow else PICTURES]
    down = 2 if control and narrow else 1
    across = len(pictures) * (2 if control and not narrow else 1)
    upper_in = (2.4 + 2.2) if narrow else 2.7
    side_in = min(1.5, (width_in - 1.0) / across)
    lower_in = (side_in + 0.35) * down
    with drawing_style():
        figure = Figure(figsize=(width_in, upper_in + lower_in + 0.3), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(upper_in + 0.3, lower_in))
        top, bottom = parts
        first, second = top.subplots(2, 1) if narrow else top.subplots(1, 2, width_ratios=(1.35, 1))
        _draw_curves(first, found, control, groups)
        _draw_shares(second, found, control, groups)
        top.legend(
            handles=_legend(groups, bool(control)),
            loc="outside upper left",
            ncols=2 if narrow else 5,
            frameon=False,
            fontsize=7.5,
            handletextpad=0.4,
            columnspacing=1.2,
        )
        wide_in = min(width_in, across * (side_in + 0.15) + 0.8)
        if wide_in < 0.9 * width_in:  # else the pictures would lie far apart
            bottom = bottom.subfigures(1, 2, width_ratios=(wide_in, width_in - wide_in))[0]
        _draw_pictures(bottom, found, control, pictures, (down, across))
    return figure


def _draw_curves(
    axes: Axes, found: Sequence[Spectrum], control: Sequence[Spectrum], groups: Sequence[str]
) -> None:
    for spectra, style in ((control, (0, (3, 2))), (found, "-")):
        for number, group in enumerate(groups):
            mine = [s for s in spectra if s.part.group == group and s.high_percent is not None]
            if not mine:
                continue
            colour = ink(SERIES[number % len(SERIES)][0])
            if len(mine) > 1 and style == "-":
                for one in mine:
                    axes.plot(one.frequencies, one.power, color=colour, lw=0.6, alpha=0.45)
            alike = [one for one in mine if one.frequencies == mine[0].frequencies]
            # Of logarithms, as they are drawn: else the strongest part would be the mean.
            mean = np.exp(np.mean([np.log(np.maximum(s.power, 1e-12)) for s in alike], axis=0))
            width = 1.9 if style == "-" else 1.1
            axes.plot(alike[0].frequencies, mean, color=colour, lw=width, ls=style, zorder=3)
    axes.axhline(1.0, color=ink("edge"), lw=0.8, zorder=1)
    axes.axvline(HIGH, color=ink("edge"), lw=0.8, ls=(0, (2, 2)), zorder=1)
    axes.set_yscale("log")
    axes.tick_params(axis="y", which="minor", left=False)
    low, high = axes.get_ylim()
    several = high / low < ONE_PER_DECADE
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if several else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="spatial frequency / Nyquist", ylabel="power / mean power")
    axes.grid()
    axes.set_axisbelow(True)
    axes.margins(x=0.02)


def _draw_shares(
    axes: Axes, found: Sequence[Spectrum], control: Sequence[Spectrum], groups: Sequence[str]
) -> None:
    modules = list(dict.fromkeys(one.part.module for one in found))
    for spectra, is_control in ((control, True), (found, False)):
        for number, group in enumerate(groups):
            colour, marker = SERIES[number % len(SERIES)]
            points = [
                (modules.index(s.part.module), s.high_percent, s.high_deviation)
                for s in spectra
                if s.part.group == group and s.high_percent is not None
            ]
            if not points:
                continue
            places, shares, deviations = zip(*points, strict=True)
            axes.errorbar(
                places,
                shares,
                yerr=None if is_control else deviations,
                color=ink(colour),
                ls=(0, (3, 2)) if is_control else "-",
                lw=0.9 if is_control else 1.3,
                elinewidth=0.8,
                marker=marker,
                ms=4.5,
                mfc=ink("paper") if is_control else ink(colour),
                mew=0.9 if is_control else 0.0,
                zorder=2 if is_control else 3,
            )
    white = [next(one.white_percent for one in found if one.part.module == m) for m in modules]
    ends = [-0.5, *range(len(modules)), len(modules) - 0.5]
    axes.plot(ends, [white[0], *white, white[-1]], color=ink("edge"), lw=0.8, zorder=1)
    every = -(-len(modules) // 12)
    axes.set_xticks(range(0, len(modules), every), [_short(m) for m in modules[::every]])
    axes.set_xlim(-0.5, len(modules) - 0.5)
    axes.set_ylim(0, 102)
    axes.tick_params(length=0)
    axes.set(xlabel="stage.block", ylabel=f"energy above {HIGH:g} Nyquist, %")
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _short(module: str) -> str:
    """`3.2` for stages.2.blocks.1, with what is named inside it."""
    words = module.split(".")
    if len(words) >= 4 and words[0] == "stages" and words[2] == "blocks":
        name = f"{int(words[1]) + 1}.{int(words[3]) + 1}"
        inside = [word for word in words[4:] if word not in ("attn", "token_mixer")]
        return "\n".join([name, *inside])
    return module


def _draw_pictures(
    part: Any,
    found: Sequence[Spectrum],
    control: Sequence[Spectrum],
    groups: Sequence[str],
    shape: tuple[int, int],
) -> None:
    shown = [(group, _picture(found, group)) for group in groups]
    if control:
        shown += [(f"{group}, random", _picture(control, group)) for group in groups]
    values = np.concatenate([p[np.isfinite(p)] for _, p in shown])
    low, high = np.percentile(values, CUT)
    shades = LinearSegmentedColormap.from_list("heat", [light for light, _ in HEAT])
    colours = shades.with_extremes(bad=ink("paper"))
    grid = part.subplots(*shape, squeeze=False)
    image = None
    for axes, (title, picture) in zip(grid.flat, shown, strict=False):
        image = axes.imshow(picture, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(title, fontsize=7.5, loc="left", pad=3)
        axes.set_axis_off()
    bar = part.colorbar(image, ax=list(grid.flat), fraction=0.02, pad=0.01)
    bar.set_label("log10 of power / mean", fontsize=7)
    bar.ax.tick_params(labelsize=6.5, length=0)
    bar.outline.set_visible(False)


def _picture(spectra: Sequence[Spectrum], group: str) -> Picture:
    """Mean of a group's pictures, of those the size of the first."""
    mine = [one for one in spectra if one.part.group == group]
    alike = [np.array(s.picture, dtype=np.float64) for s in mine if s.size == mine[0].size]
    mean: Picture = np.mean(alike, axis=0)
    return mean


def _legend(groups: Sequence[str], control: bool) -> list[Line2D]:
    handles = [
        Line2D([], [], color=ink(colour), marker=marker, ms=4.5, mew=0, lw=1.6, label=group)
        for group, (colour, marker) in zip(groups, SERIES, strict=False)
    ]
    if control:
        dashes = (0, (3, 2))
        handles.append(
            Line2D([], [], color=ink("muted"), lw=1.1, ls=dashes, label="with random weights")
        )
    handles.append(Line2D([], [], color=ink("edge"), lw=0.8, label="white noise"))
    return handles
