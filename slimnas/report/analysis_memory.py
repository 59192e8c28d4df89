"""What `slimnas analyze memory` writes: figures of run time as data, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from slimnas.analysis.memory import Profile, Row
from slimnas.analysis.operators import KINDS, Kind, is_memory_bound, ordered
from slimnas.analysis.places import Place
from slimnas.report.analysis_files import write_csv, write_json
from slimnas.report.figures import HEAT, WIDE_IN, drawing_style, ink, is_narrow, save_figure

SCHEMA = "slimnas/analysis-memory/1"
NAME = "memory"

# Arithmetic in blues, what is bound by memory in warm colours, what may be counted so in greens.
COLOURS: Mapping[Kind, str] = {
    "product": ink("mb4d"),
    "attention": HEAT[3][0],
    "copy": ink("mb3d"),
    "elementwise": "#e39a5b",
    "norm": ink("target"),
    "pool": "#d7a3cb",
    "softmax": ink("width"),
    "activation": "#7cc4ae",
    "other": ink("ghost"),
}
BETWEEN = "(between)"
"""What happens outside of all components is called."""
LEAST_LABELLED = 4.0
"""Percent of a bar from which a share is written into it."""
LAYER_IN = 1.5
INTENSITY_IN = 0.62


def write_memory(profiles: Sequence[Profile], folder: Path) -> dict[str, Path]:
    """Write `memory.json`, `kinds.csv`, `operators.csv`, `layers.csv`, `memory.svg` and `.png`.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    paths = {"json": write_json(folder / f"{NAME}.json", memory_document(profiles))}
    for name, rows in memory_tables(profiles).items():
        paths[name] = write_csv(folder / f"{name}.csv", rows)
    paths["svg"], paths["png"] = save_figure(memory_figure(profiles), folder / NAME)
    return paths


def memory_document(profiles: Sequence[Profile]) -> dict[str, Any]:
    """The profiles as plain data."""
    return {"schema": SCHEMA, "profiles": [_document(profile) for profile in profiles]}


def memory_tables(profiles: Sequence[Profile]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the CSV files by file."""
    kinds, operators, layers = [], [], []
    for profile in profiles:
        kinds += [{"model": profile.model, **row} for row in _kinds(profile)]
        operators += [{"model": profile.model, **row} for row in _operators(profile)]
        layers += [{"model": profile.model, **row} for row in _parts(profile)]
    return {"kinds": kinds, "operators": operators, "layers": layers}


def layer_name(component: str) -> str:
    """The name to show of a component, or of what is between them."""
    return component or BETWEEN


def _document(profile: Profile) -> dict[str, Any]:
    settings = asdict(profile.settings)
    return {
        "model": profile.model,
        "resolution": list(profile.resolution),
        **settings,
        "version": profile.recording.version,
        "compute_unit": profile.recording.compute_unit,
        "forward_ms": profile.forward_ms,
        "operators_ms": profile.total_ms,
        "memory_bound": _values(profile.memory_bound(nonlinear=False)),
        "memory_bound_with_softmax_and_activation": _values(profile.memory_bound(nonlinear=True)),
        "kinds": _kinds(profile),
        "operators": _operators(profile),
        "layers": [
            {"component": layer_name(name), **_values(row)}
            for name, row in profile.by_layer().items()
        ],
        "parts": _parts(profile),
    }


def _kinds(profile: Profile) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "memory_bound": is_memory_bound(kind), **_values(row)}
        for kind, row in profile.by_kind().items()
    ]


def _operators(profile: Profile) -> list[dict[str, Any]]:
    return [
        {"operator": operator.name, "kind": operator.kind, **_values(row)}
        for operator, row in profile.by_operator().items()
    ]


def _parts(profile: Profile) -> list[dict[str, Any]]:
    def where(place: Place) -> dict[str, str]:
        return {"component": layer_name(place.component), "part": place.part}

    return [{**where(place), **_values(row)} for place, row in profile.by_part().items()]


def _values(row: Row) -> dict[str, Any]:
    return {**asdict(row), "macs_per_byte": row.intensity}


def memory_figure(profiles: Sequence[Profile], width_in: float = WIDE_IN) -> Figure:
    """Share of run time by kind for every network; below, the layers of each, in ms.

    Under the layers of a network: the arithmetic intensity of each.
    """
    narrow = is_narrow(width_in)
    kinds = ordered([kind for profile in profiles for kind in profile.by_kind()])
    columns = 3 if narrow else 5
    legend_in = 0.16 + 0.16 * -(-len(kinds) // columns)
    bars_in = 0.3 + 0.34 * len(profiles)
    panel_in = LAYER_IN + INTENSITY_IN + 0.5
    height_in = legend_in + bars_in + panel_in * len(profiles) + 0.5
    longest = max(len(profile.model) for profile in profiles)
    left_in, right_in = max(0.85, 0.2 + 0.075 * longest), 0.14 if narrow else 0.95
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in))

        def axes_at(top_in: float, tall_in: float, label: str) -> Axes:
            box = (
                left_in / width_in,
                1 - (top_in + tall_in) / height_in,
                (width_in - left_in - right_in) / width_in,
                tall_in / height_in,
            )
            return figure.add_axes(box, label=label)

        _draw_shares(axes_at(legend_in, bars_in - 0.3, "shares"), profiles, kinds, narrow=narrow)
        for number, profile in enumerate(profiles):
            top_in = legend_in + bars_in + 0.5 + number * panel_in
            layers = axes_at(top_in, LAYER_IN, f"{profile.model} layers")
            below = axes_at(top_in + LAYER_IN + 0.06, INTENSITY_IN, f"{profile.model} intensity")
            _draw_layers(layers, profile, kinds, narrow=narrow)
            _draw_intensity(below, profile, narrow=narrow)
            for axes in (layers, below):
                axes.yaxis.set_label_coords(-0.44 / (width_in - left_in - right_in), 0.5)
        figure.legend(
            handles=[Rectangle((0, 0), 1, 1, color=COLOURS[k], label=KINDS[k]) for k in kinds],
            loc="upper left",
            bbox_to_anchor=(0.0 if narrow else left_in / width_in, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=7.0 if narrow else 7.5,
            handlelength=1.0,
            handletextpad=0.4,
            columnspacing=1.0,
            borderaxespad=0.2,
        )
    return figure


def _draw_shares(
    axes: Axes, profiles: Sequence[Profile], kinds: Sequence[Kind], *, narrow: bool
) -> None:
    for place, profile in enumerate(profiles):
        start = 0.0
        rows = profile.by_kind()
        for kind in kinds:
            if kind not in rows:
                continue
            share = rows[kind].share_percent
            axes.barh(place, share, 0.66, left=start, color=COLOURS[kind], lw=0)
            if share >= LEAST_LABELLED * (2 if narrow else 1):
                axes.text(
                    start + share / 2,
                    place,
                    f"{share:.0f}" if narrow else f"{share:.1f}",
                    ha="center",
                    va="center_baseline",
                    fontsize=6.5,
                    color=ink("paper"),
                )
            start += share
        if not narrow:
            bound = profile.memory_bound(nonlinear=False)
            words = f"{bound.share_percent:.1f} ± {bound.spread_percent / 2:.1f}"
            axes.text(101, place, words, va="center_baseline", fontsize=7)
    axes.set_yticks(range(len(profiles)), [profile.model for profile in profiles])
    axes.tick_params(axis="both", length=0)
    for label in axes.get_yticklabels():
        label.set_color(ink("ink"))
        label.set_fontsize(7.5)
    axes.set(xlim=(0, 100), ylim=(len(profiles) - 0.5, -0.5))
    axes.set_xlabel("share of the time in operators, %", labelpad=2)
    if not narrow:
        axes.text(101, -0.62, "memory-bound", fontsize=6.5, color=ink("muted"), va="bottom")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _draw_layers(axes: Axes, profile: Profile, kinds: Sequence[Kind], *, narrow: bool) -> None:
    by_layer = profile.by_layer()
    cells = profile.rows(lambda cell: (cell.place.component, cell.operator.kind))
    for place, name in enumerate(by_layer):
        start = 0.0
        for kind in kinds:
            row = cells.get((name, kind))
            if row is None:
                continue
            axes.bar(place, row.ms, 0.8, bottom=start, color=COLOURS[kind], lw=0)
            start += row.ms
        if not narrow and len(by_layer) <= 26:
            axes.annotate(
                f"{by_layer[name].memory_bound_percent:.0f}",
                (place, start),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6,
                color=ink("muted"),
            )
    axes.set_xlim(-0.6, len(by_layer) - 0.4)
    axes.set_xticks([])
    axes.margins(y=0.12)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_ylabel("ms")
    axes.set_title(_title(profile, narrow=narrow), loc="left", fontsize=8, color=ink("ink"))


def _draw_intensity(axes: Axes, profile: Profile, *, narrow: bool) -> None:
    by_layer = profile.by_layer()
    points = [(i, row.intensity) for i, row in enumerate(by_layer.values()) if row.intensity]
    axes.vlines([x for x, _ in points], 0, [y for _, y in points], color=ink("grid"), lw=1.0)
    axes.plot(*zip(*points, strict=True), ls="", marker="o", ms=3, color=ink("ink"))
    axes.set_xlim(-0.6, len(by_layer) - 0.4)
    axes.set_ylim(0, 1.25 * max(y for _, y in points))
    axes.set_ylabel("MACs\nper byte")
    names = [_short(name) for name in by_layer]
    every = 1 if len(names) <= (14 if narrow else 30) else 2
    axes.set_xticks(range(0, len(names), every), names[::every], fontsize=6, rotation=0)
    axes.tick_params(axis="x", length=0, pad=2)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _short(component: str) -> str:
    """A name for an axis: `2.5` for stages.2.blocks.5, `2↓` for stages.2.downsample."""
    words = component.split(".")
    if len(words) == 4:
        return f"{int(words[1]) + 1}.{int(words[3]) + 1}"
    if len(words) == 3:
        return f"↓{int(words[1]) + 1}"
    return component or "rest"


def _title(profile: Profile, *, narrow: bool) -> str:
    rows, columns = profile.resolution
    settings = profile.settings
    words = [
        f"{profile.model}: {_ms(profile.total_ms)} ms",
        f"batch {settings.batch} of {rows}x{columns}",
    ]
    if not narrow:
        threads = "" if settings.device == "cuda" else f", {_plural(settings.threads, 'thread')}"
        unit = profile.recording.compute_unit
        runtime = f"{settings.runtime} {profile.recording.version.partition('+')[0]}"
        words.append(f"{runtime} on {unit}{threads}, {settings.dtype}")
        words.append("above the bars: memory-bound %")
    return "; ".join(words)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
