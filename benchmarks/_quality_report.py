"""What the comparison says: fronts and verdicts, a Markdown table, a line and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimnas.report.figures import drawing_style, ink

OURS = "found"
TITLES = {
    OURS: "found by slimming",
    "uniform": "EfficientFormer-L1 scaled",
    "random": "best of the random",
    "nsga2": "NSGA-II",
}
SERIES = {
    OURS: ("mb3d", "o"),
    "uniform": ("mb4d", "s"),
    "random": ("other", "^"),
    "nsga2": ("width", "D"),
}
NOISE = 2.0
"""Standard errors within which two accuracies are called level."""

ONE_SEED = (
    "- One training per network: these errors count the TEST images alone, and another seed moves "
    "a network too, which decides nothing until several are trained (--seeds)"
)


@dataclass(frozen=True)
class Place:
    """An accuracy at a latency, with the accuracy's standard error."""

    latency_ms: float
    top1: float
    error: float


@dataclass(frozen=True)
class Verdict:
    """A found network beside a baseline's front.

    Attributes:
        target_ms: the target.
        arm: the baseline.
        margin: points of top-1 above the front at the found network's latency; infinite where the
            baseline has nothing as fast.
        error: standard error of the margin.
    """

    target_ms: float
    arm: str
    margin: float
    error: float

    @property
    def holds(self) -> bool:
        """On or above the front."""
        return self.margin >= 0

    @property
    def words(self) -> str:
        """`above`, `below`, or `level` where noise explains the difference."""
        if abs(self.margin) <= NOISE * self.error:
            return "level"
        return "above" if self.margin > 0 else "below"


def place_of(row: Mapping[str, Any], test_images: int) -> Place:
    """Where a row lies: its measured latency, else the predicted one, and its mean TEST top-1.

    The standard error is that over seeds; of one seed, that of a share of the TEST images.
    """
    latency_ms = row["measured_ms"] if row["measured_ms"] is not None else row["predicted_ms"]
    values = row["test_top1"]
    mean = statistics.mean(values)
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    else:
        error = math.sqrt(mean * (100 - mean) / test_images)
    return Place(latency_ms, mean, error)


def front_at(places: Sequence[Place], latency_ms: float) -> Place | None:
    """A front at a latency, by straight lines between its members; None where it begins later.

    Members are places that no faster one equals; beyond the slowest the front stays level.
    """
    front: list[Place] = []
    for one in sorted(places, key=lambda place: (place.latency_ms, -place.top1)):
        if not front or one.top1 > front[-1].top1:
            front.append(one)
    before = [one for one in front if one.latency_ms <= latency_ms]
    after = [one for one in front if one.latency_ms > latency_ms]
    if not before:
        return None
    low = before[-1]
    if not after:
        return Place(latency_ms, low.top1, low.error)
    high = after[0]
    share = (latency_ms - low.latency_ms) / (high.latency_ms - low.latency_ms)
    return Place(
        latency_ms,
        low.top1 + share * (high.top1 - low.top1),
        math.hypot((1 - share) * low.error, share * high.error),
    )


def verdicts(rows: Sequence[Mapping[str, Any]], test_images: int) -> list[Verdict]:
    """Each found network beside each baseline's front, by target."""
    places: dict[str, list[Place]] = {}
    for row in rows:
        places.setdefault(row["arm"], []).append(place_of(row, test_images))
    found = []
    for row in rows:
        if row["arm"] != OURS:
            continue
        ours = place_of(row, test_images)
        for arm, theirs in places.items():
            if arm == OURS:
                continue
            front = front_at(theirs, ours.latency_ms)
            margin = math.inf if front is None else ours.top1 - front.top1
            error = 0.0 if front is None else math.hypot(ours.error, front.error)
            found.append(Verdict(row["target_ms"], arm, margin, error))
    return found


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """Markdown: a row per network, then a line per target."""
    lines = [
        "| target ms | network | widths | depths | MB3D | params M | GMACs | predicted ms "
        "| measured ms | inherited, SEARCH % | trained, SEARCH % | trained, TEST % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        measured = "-"
        if row["measured_ms"] is not None:
            measured = f"{row['measured_ms']:.2f} ± {row['measured_error_ms']:.2f}"
        inherited = "-" if row["inherited_top1"] is None else f"{row['inherited_top1']:.1f}"
        lines.append(
            f"| {row['target_ms']:g} | {TITLES[row['arm']]}"
            f" | {'-'.join(map(str, row['widths']))} | {'-'.join(map(str, row['depths']))} "
            f"| {row['mb3d']} | {row['params'] / 1e6:.2f} | {row['macs'] / 1e9:.3f} "
            f"| {row['predicted_ms']:.2f} | {measured} | {inherited} "
            f"| {spread(row['search_top1'])} | {spread(row['test_top1'])} |"
        )
    ranking = result["ranking"]
    ranked = (
        f"- The supernet's order of {ranking['networks']} networks beside that of their own "
        f"trainings: Kendall tau {ranking['kendall_tau']:.2f}, Spearman {ranking['spearman']:.2f}"
    )
    single = all(len(row["test_top1"]) == 1 for row in result["rows"])
    return [*lines, "", *verdict_lines(result), *([ONE_SEED] if single else []), ranked]


def verdict_lines(result: Mapping[str, Any]) -> list[str]:
    """Per target, how the found network stands to each baseline's front."""
    lines = []
    for target_ms in dict.fromkeys(one["target_ms"] for one in result["verdicts"]):
        here = [one for one in result["verdicts"] if one["target_ms"] == target_ms]
        parts = [f"{TITLES[one['arm']]}: {_margin(one)}" for one in here]
        judged = {OURS, *(one["arm"] for one in here)}
        parts += [f"{TITLES[arm]}: met no target" for arm in TITLES if arm not in judged]
        holds = all(one["holds"] for one in here)
        lines.append(
            f"- {target_ms:g} ms: {'on or above' if holds else 'not above'} every baseline's front "
            f"({'; '.join(parts)})"
        )
    return lines


def _margin(verdict: Mapping[str, Any]) -> str:
    margin = verdict["margin"]
    if margin is None:
        return "has nothing as fast"
    return f"{margin:+.2f} ± {verdict['error']:.2f} points, {verdict['words']}"


def spread(values: Sequence[float]) -> str:
    """Mean, and deviation over seeds where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f} (n = {len(values)})"


def summary(result: Mapping[str, Any]) -> str:
    """One line for RESULTS.md."""
    settings, runtime = result["settings"], result["table"]["runtime"]
    top1 = {
        (row["arm"], row["target_ms"]): f"{statistics.mean(row['test_top1']):.1f}"
        for row in result["rows"]
    }
    by_arm = {
        arm: " / ".join(top1.get((arm, target_ms), "none") for target_ms in result["targets_ms"])
        for arm in TITLES
    }
    targets = "/".join(f"{one:g}" for one in result["targets_ms"])
    held = [line.split(":")[0][2:] for line in verdict_lines(result) if ": on or above" in line]
    more = ", --quick" if settings["quick"] else ""
    searched = result["data"]["of_the_search"]["train_images"]
    if searched != result["data"]["train_images"]:
        more += f", searched on {searched} of the images"
    return (
        f"| {result['date']} | search_quality | {result['machine']['cpu']}, latency: "
        f"{settings['threads']} thread, {runtime['name']} {runtime['version']}; training: "
        f"{result['trained_on']} | {settings['space']}, {result['data']['description']}, "
        f"{result['data']['resolution']} px, {settings['epochs']} epochs, seeds "
        f"{settings['seeds']}{more} | TEST top-1 % at {targets} ms: "
        + ", ".join(f"{TITLES[arm]} {values}" for arm, values in by_arm.items())
        + f"; on or above every baseline's front at: {', '.join(held) or 'none'} |"
    )


def quality_figure(result: Mapping[str, Any], width_in: float = 7.0) -> Figure:
    """TEST accuracy against latency, a line per way of finding networks; error bars over seeds."""
    measured = all(row["measured_ms"] is not None for row in result["rows"])
    with drawing_style():
        figure = Figure(figsize=(width_in, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid()
        axes.tick_params(length=0)
        for target_ms in result["targets_ms"]:
            axes.axvline(target_ms, color=ink("target"), lw=0.9, ls=(0, (4, 3)), zorder=1)
        for arm in reversed(TITLES):
            rows = [row for row in result["rows"] if row["arm"] == arm]
            if rows:
                _draw_arm(axes, arm, rows, result["data"]["test_images"])
        axes.set_xlim(left=0)
        axes.margins(x=0.06, y=0.12)
        runtime = result["table"]["runtime"]
        how = "measured" if measured else "by the table"
        axes.set_xlabel(
            f"latency of one {result['deployed_at']} px image, ms ({how}: {runtime['name']}, "
            f"{result['settings']['threads']} thread, {result['machine']['cpu']})"
        )
        axes.set_ylabel(f"TEST top-1 after training alone, % ({result['data']['title']})")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="best", framealpha=0.8, edgecolor="none")
        axes.set_title(_caption(result), loc="left", fontsize=7.5, color=ink("muted"))
    return figure


def _draw_arm(axes: Axes, arm: str, rows: Sequence[Mapping[str, Any]], test_images: int) -> None:
    colour, marker = SERIES[arm]
    ordered = sorted(rows, key=lambda row: place_of(row, test_images).latency_ms)
    places = [place_of(row, test_images) for row in ordered]
    several = any(len(row["test_top1"]) > 1 for row in ordered)
    heights = [
        statistics.stdev(row["test_top1"]) if len(row["test_top1"]) > 1 else 0.0 for row in ordered
    ]
    axes.errorbar(
        [one.latency_ms for one in places],
        [one.top1 for one in places],
        yerr=heights if several else None,
        xerr=[row["measured_error_ms"] or 0.0 for row in ordered],
        color=ink(colour),
        marker=marker,
        ms=5.5 if arm == OURS else 4.5,
        lw=1.8 if arm == OURS else 1.1,
        elinewidth=0.9,
        capsize=2.5,
        label=TITLES[arm],
        zorder=4 if arm == OURS else 3,
    )


def _caption(result: Mapping[str, Any]) -> str:
    settings, data = result["settings"], result["data"]
    seeds = settings["seeds"]
    over = f"deviation over {seeds} seeds" if seeds > 1 else "one seed"
    searched = data["of_the_search"]["train_images"]
    images = f"{data['train_images']} images"
    if searched != data["train_images"]:
        images = f"searched on {searched} images, trained on {data['train_images']}"
    return (
        f"{images} at {data['resolution']} px, {settings['epochs']} epochs, "
        f"{over}\n{settings['random']} random networks, {result['evaluations']} evaluations; "
        "dashed: targets"
    )
