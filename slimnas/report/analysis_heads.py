"""What `slimnas analyze heads` writes: head similarity of every layer as data, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slimnas.analysis.heads import HeadReport, LayerHeads
from slimnas.arch.architecture import Architecture
from slimnas.report.analysis_files import write_csv, write_json
from slimnas.report.figures import WIDE_IN, drawing_style, ink, is_narrow, save_figure
from slimnas.report.pruning_figures import BlockAxis

SCHEMA = "slimnas/analysis-heads/1"
NAME = "heads"
PANELS = (("maps", "attention maps"), ("outputs", "head outputs"))
READINGS = (("max", "most alike pair"), ("mean", "mean over heads"))
COLOURS = (("mb3d", "mb4d"), ("target", "width"), ("ink", "other"))
"""Of both readings, by group of heads; names in the palette."""
MARKERS = ("D", "o")
CONTROL = "control"


def write_heads(
    found: HeadReport,
    control: HeadReport | None,
    architecture: Architecture,
    provenance: Mapping[str, Any],
    folder: Path,
) -> dict[str, Path]:
    """Write `heads.json`, `.csv`, `.svg` and `.png`, each atomically.

    Args:
        found: the trained network's.
        control: of the same network with random weights, if it was looked at.
        architecture: of both.
        provenance: model, weights, data and settings, for the JSON file.
        folder: where.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    document = {"schema": SCHEMA, **heads_document(found, control, provenance)}
    paths = {
        "json": write_json(folder / f"{NAME}.json", document),
        "csv": write_csv(folder / f"{NAME}.csv", document["layers"]),
    }
    paths["svg"], paths["png"] = save_figure(
        heads_figure(found, control, architecture), folder / NAME
    )
    return paths


def heads_document(
    found: HeadReport, control: HeadReport | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Head similarity as plain data."""
    controls = {_key(layer): layer for layer in control.layers} if control else {}
    return {
        **provenance,
        "images": found.images,
        "layers": [_row(layer, controls.get(_key(layer))) for layer in found.layers],
    }


def _key(layer: LayerHeads) -> tuple[str, str]:
    return layer.module, layer.branch


def _row(layer: LayerHeads, control: LayerHeads | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "module": layer.module,
        "component": layer.component,
        "type": layer.kind,
        "branch": layer.branch or None,
        "heads": layer.heads,
    }
    for name, stat in layer.measures.items():
        row[name] = stat.mean
        row[f"{name}_deviation"] = stat.deviation
        if control is not None and name in control.measures:
            row[f"{CONTROL}_{name}"] = control.measures[name].mean
    return row


def heads_figure(
    found: HeadReport,
    control: HeadReport | None,
    architecture: Architecture,
    width_in: float = WIDE_IN,
) -> Figure:
    """Head similarity along the depth, of maps and of outputs, in both readings.

    Bars are the standard deviation over images; grey is the network with random weights.
    """
    narrow = is_narrow(width_in)
    blocks = BlockAxis(
        tuple(i for i, stage in enumerate(architecture.stages) for _ in stage.blocks)
    )
    panels = [p for p in PANELS if any(f"{p[0]}_max" in layer.measures for layer in found.layers)]
    shape = (len(panels), 1) if narrow else (1, len(panels))
    with drawing_style():
        figure = Figure(figsize=(width_in, 2.5 * shape[0] + 0.55), layout="constrained")
        grid = figure.subplots(*shape, sharey=True, squeeze=False)
        for axes, (what, title) in zip(grid.flat, panels, strict=True):
            if control is not None:
                _draw(axes, control.layers, what, blocks, is_control=True)
            _draw(axes, found.layers, what, blocks, is_control=False)
            blocks.mark(axes, numbers=True, names=True, narrow=True)
            axes.set_title(title, loc="left", fontsize=8.5, pad=14 if blocks.boundaries else 6)
            axes.set_xlabel("block")
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        grid[0, 0].set_ylim(min(0.0, grid[0, 0].get_ylim()[0]), 1.02)
        grid[0, 0].set_ylabel("cosine similarity of heads")
        figure.legend(
            handles=_legend(found, control is not None),
            loc="outside upper left",
            ncols=2 if narrow else 6,
            frameon=False,
            fontsize=7.5,
            handletextpad=0.4,
            columnspacing=1.2,
        )
    return figure


def _draw(
    axes: Axes, layers: Sequence[LayerHeads], what: str, blocks: BlockAxis, *, is_control: bool
) -> None:
    for number, branch in enumerate(_branches(layers)):
        mine = [layer for layer in layers if layer.branch == branch]
        for reading, (word, _) in enumerate(READINGS):
            name = f"{what}_{word}"
            points = [(_place(x, blocks), x.measures[name]) for x in mine if name in x.measures]
            if not points:
                continue
            places, values = [x for x, _ in points], [stat.mean for _, stat in points]
            if is_control:
                style = (0, (4, 2)) if reading == 0 else (0, (1, 1.5))
                axes.plot(places, values, color=ink("edge"), lw=1.1, ls=style, zorder=1.5)
                continue
            colour = ink(COLOURS[number % len(COLOURS)][reading])
            axes.errorbar(
                places,
                values,
                yerr=[stat.deviation for _, stat in points],
                color=colour,
                lw=1.4,
                elinewidth=0.8,
                marker=MARKERS[reading],
                ms=4,
                mec=ink("paper"),
                mew=0.5,
                zorder=3,
            )


def _place(layer: LayerHeads, blocks: BlockAxis) -> float:
    """Where a layer stands; attention between stages stands between their blocks."""
    return blocks.stages.index(layer.stage) - 0.5 if layer.block is None else float(layer.block)


def _branches(layers: Sequence[LayerHeads]) -> list[str]:
    return list(dict.fromkeys(layer.branch for layer in layers))


def _legend(found: HeadReport, control: bool) -> list[Line2D]:
    handles = []
    for number, branch in enumerate(_branches(found.layers)):
        for reading, (_, words) in enumerate(READINGS):
            colour = ink(COLOURS[number % len(COLOURS)][reading])
            label = f"{branch}, {words}" if branch else words
            marker = MARKERS[reading]
            handles.append(Line2D([], [], color=colour, marker=marker, ms=4, lw=1.4, label=label))
    if control:
        for style, (_, words) in zip(((0, (4, 2)), (0, (1, 1.5))), READINGS, strict=True):
            label = f"random weights, {words}"
            handles.append(Line2D([], [], color=ink("edge"), lw=1.1, ls=style, label=label))
    return handles
