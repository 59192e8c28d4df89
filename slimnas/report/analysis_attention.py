"""Figures of the attention study: speed, HiLo's lead and memory; and the course over map sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from slimnas.analysis.attention_study import LayerRow, StudyResult
from slimnas.analysis.mechanisms import HILO, MECHANISMS
from slimnas.report.analysis_attention_files import attention_kernels
from slimnas.report.figures import WIDE_IN, drawing_style, ink

ROW_IN = 0.27
BAR = 0.62
MIB = 2**20
SMALLEST = 0.4
"""Where the axis of ratios ends at the left."""

FARTHEST = 5.0
LABEL_PT = 10.5
"""Least distance of two names."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X")
COLOURS = {"lofi": "mb4d", "hifi": "width"}
"""Mechanisms that have no colour of their name in the palette."""

_MEASURED: dict[str, Any] = {"color": ink("mb4d"), "lw": 1.4}
_PUBLISHED: dict[str, Any] = {
    "marker": "D",
    "ms": 5.5,
    "mfc": "none",
    "mec": ink("target"),
    "mew": 1.3,
    "ls": "",
}


def attention_figure(result: StudyResult, side: int, width_in: float = WIDE_IN) -> Figure:
    """One line per mechanism on maps of `side`, the fastest on top.

    Three panels: throughput with its interquartile range, HiLo's throughput over the mechanism's
    with its confidence interval and the published ratio, and peak memory where it was measured.
    """
    rows = sorted((row for row in result.rows if row.side == side), key=lambda r: r.latency_ms)
    memory = any(row.test_bytes is not None for row in rows)
    panels = 3 if memory else 2
    left_in, gap_in, top_in, bottom_in = 1.25, 0.25, 0.62, 0.5
    plot_in = ROW_IN * len(rows) + 0.1
    height_in = top_in + plot_in + bottom_in
    span_in = (width_in - left_in - 0.15 - gap_in * (panels - 1)) / panels
    with drawing_style():
        figure = Figure(figsize=(width_in, height_in))
        axes = [
            figure.add_axes(
                (
                    (left_in + i * (span_in + gap_in)) / width_in,
                    bottom_in / height_in,
                    span_in / width_in,
                    plot_in / height_in,
                )
            )
            for i in range(panels)
        ]
        for number, panel in enumerate(axes):
            _frame(panel, rows, named=number == 0)
        _draw_speed(axes[0], result, rows)
        _draw_ratios(axes[1], result, rows)
        if memory:
            _draw_memory(axes[2], rows)
        figure.text(
            0.12 / width_in,
            1 - 0.12 / height_in,
            _caption(result, side),
            ha="left",
            va="top",
            fontsize=7.5,
            color=ink("muted"),
        )
    return figure


def resolutions_figure(result: StudyResult, width_in: float = WIDE_IN) -> Figure:
    """Throughput of every mechanism over HiLo's, by the map's side, both logarithmic.

    Mechanisms more than `FARTHEST` times as fast are named, not drawn. Without HiLo it shows the
    throughput itself.
    """
    sides = sorted({row.side for row in result.rows})
    relative = all(result.row(HILO, side) is not None for side in sides)
    courses: dict[str, list[tuple[int, float]]] = {}
    for row in result.rows:
        ratio = result.ratio(row)
        speed = 1 / ratio.value if ratio is not None else 1.0
        value = speed if relative else result.images_per_s(row)
        courses.setdefault(row.mechanism.name, []).append((row.side, value))
    off = {n: c for n, c in courses.items() if relative and min(v for _, v in c) > FARTHEST}
    drawn = {name: sorted(course) for name, course in courses.items() if name not in off}
    with drawing_style():
        figure = Figure(figsize=(width_in, 3.9))
        axes = figure.add_axes((0.08, 0.13, 0.7, 0.76))
        axes.set(xscale="log", yscale="log", xlabel="side of the map in tokens")
        axes.set_ylabel("throughput over HiLo's" if relative else "throughput, images/s")
        for number, (name, course) in enumerate(drawn.items()):
            _draw_course(axes, name, course, MARKERS[number % len(MARKERS)])
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid()
        _label_courses(axes, drawn)
        note = f"; off the scale: {', '.join(MECHANISMS[name].title for name in off)}"
        figure.text(
            0.01,
            0.985,
            _caption(result, None) + (note if off else ""),
            ha="left",
            va="top",
            fontsize=7.5,
            color=ink("muted"),
        )
    return figure


def _draw_course(axes: Axes, name: str, course: Sequence[tuple[int, float]], marker: str) -> None:
    sides, values = zip(*course, strict=True)
    first = name == HILO
    axes.plot(
        sides,
        values,
        color=ink(COLOURS.get(name, name)),
        lw=2.4 if first else 1.1,
        marker=marker,
        ms=5 if first else 4,
        zorder=5 if first else 3,
    )


def _label_courses(axes: Axes, courses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Name every line at its right end, moved apart where they would overlap."""
    points = 72 / axes.figure.dpi
    ends = sorted(
        (axes.transData.transform(course[-1])[1] * points, name) for name, course in courses.items()
    )
    places = [y for y, _ in ends]
    for _ in range(200):  # pushes neighbours apart until none overlaps
        moved = False
        for i in range(len(places) - 1):
            gap = LABEL_PT - (places[i + 1] - places[i])
            if gap > 0.01:
                places[i], places[i + 1] = places[i] - gap / 2, places[i + 1] + gap / 2
                moved = True
        if not moved:
            break
    for place, (end, name) in zip(places, ends, strict=True):
        axes.annotate(
            MECHANISMS[name].title,
            courses[name][-1],
            xytext=(24, place - end),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=ink(COLOURS.get(name, name)),
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": ink("edge"), "relpos": (0.0, 0.5)},
        )


def _frame(axes: Axes, rows: Sequence[LayerRow], *, named: bool) -> None:
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), [row.mechanism.title if named else "" for row in rows])
    axes.tick_params(axis="y", length=0, pad=4, labelcolor=ink("ink"), labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _colour(row: LayerRow) -> str:
    return ink("hilo" if row.mechanism.name == HILO else "mb4d")


def _draw_speed(axes: Axes, result: StudyResult, rows: Sequence[LayerRow]) -> None:
    batch = result.study.batch
    speeds = [result.images_per_s(row) for row in rows]
    # A mechanism without arithmetic would squeeze the others: its bar is cut, its number stays.
    second = sorted(speeds)[-2] if len(speeds) > 1 else speeds[0]
    end = 1.25 * (second if max(speeds) > 2 * second else max(speeds))
    axes.set_xlim(0, end)
    axes.barh(range(len(rows)), speeds, BAR, color=[_colour(row) for row in rows])
    for place, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        slow, fast = (1e3 * batch / ms for ms in reversed(row.quartiles_ms))
        cut = speed > end
        if not cut:
            axes.plot([slow, fast], [place, place], color=ink("ink"), lw=1.0)
        axes.annotate(
            f"{speed:,.0f} \u2192" if cut else _plain(round(speed, 1)),
            (end if cut else max(speed, fast), place),
            xytext=(-4 if cut else 4, 0),
            textcoords="offset points",
            ha="right" if cut else "left",
            va="center",
            fontsize=7,
            color=ink("paper" if cut else "muted"),
        )
    axes.set_xlabel("throughput, images/s")


def _draw_ratios(axes: Axes, result: StudyResult, rows: Sequence[LayerRow]) -> None:
    found = [(place, result.ratio(row)) for place, row in enumerate(rows)]
    ratios = [(place, ratio) for place, ratio in found if ratio is not None]
    axes.set_xscale("log")
    axes.axvline(1, color=ink("edge"), lw=1.0)
    low = max(SMALLEST, min([1.0, *(ratio.value for _, ratio in ratios)]) / 1.3)
    for place, ratio in ratios:
        ends = [max(low, end) for end in ratio.interval]
        marker = "o" if ratio.value > low else "<"  # off the scale
        axes.plot(ends, [place, place], **_MEASURED)
        axes.plot([max(low, ratio.value)], [place], marker=marker, ms=4.5, **_MEASURED)
        if ratio.published is not None:
            axes.plot([ratio.published], [place], **_PUBLISHED)
        axes.annotate(
            f"{ratio.value:.2f}",
            (max(ends[1], ratio.published or 0.0), place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=ink("muted"),
        )
    published = [ratio.published for _, ratio in ratios if ratio.published is not None]
    high = max([1.0, *(ratio.interval[1] for _, ratio in ratios), *published])
    axes.set_xlim(low / 1.1, high * (high / low) ** 0.2)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_locator(NullLocator())
    handles = [Line2D([], [], marker="o", ms=4.5, label="measured, 95 % interval", **_MEASURED)]
    if published:
        handles.append(Line2D([], [], label="published", **_PUBLISHED))
    _legend(axes, handles)
    axes.set_xlabel("HiLo is so many times as fast")


def _draw_memory(axes: Axes, rows: Sequence[LayerRow]) -> None:
    test = [(row.test_bytes or 0) / MIB for row in rows]
    train = [(row.train_bytes or 0) / MIB for row in rows]
    places = range(len(rows))
    axes.barh(places, train, BAR, color=ink("down"))
    axes.barh(places, test, BAR * 0.5, color=ink("width"))
    axes.set_xlim(0, 1.08 * max([*train, *test, 1.0]))
    _legend(
        axes,
        [
            Patch(facecolor=ink("width"), label="inference"),
            Patch(facecolor=ink("down"), label="training"),
        ],
    )
    axes.set_xlabel("peak memory, MiB")


def _legend(axes: Axes, handles: Sequence[Line2D | Patch]) -> None:
    axes.legend(
        handles=list(handles),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        frameon=False,
        fontsize=7,
        handlelength=1.4,
        handletextpad=0.4,
        columnspacing=1.0,
        borderaxespad=0.1,
    )


def _caption(result: StudyResult, side: int | None) -> str:
    study = result.study
    where = result.machine.cpu if study.device == "cpu" else result.compute_unit
    threads = f", {study.threads} thread(s)" if study.device == "cpu" else ""
    layer = f"{study.width} channels, {study.heads} heads, batch {study.batch}"
    grid = "" if side is None else f"{side}x{side} tokens, "
    name, version = result.runtime
    return f"{grid}{layer}; {where}{threads}, {name} {version}, fp32, {attention_kernels(result)}"


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"
