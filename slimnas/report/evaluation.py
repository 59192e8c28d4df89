"""What `slimnas evaluate` writes: accuracy, confusions and calibration as data, and drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from slimnas.report.analysis_files import write_csv, write_json
from slimnas.report.figures import HEAT, drawing_style, ink, save_figure
from slimnas.train.evaluate import BINS, FEW, Confusion, Evaluation, wilson_percent
from slimnas.train.evaluation_compare import Disagreement

SCHEMA = "slimnas/evaluation/1"
NAME = "evaluation"
LISTED = 20
"""Confusions that are listed; all of them are in the matrix."""
MOST_CLASSES = 24
"""Classes in the drawn matrix; of more, those that are confused most."""
NUMBERED = 12
"""Classes up to which the drawn matrix says how many images a cell holds."""
NAME_LENGTH = 20
RELIABILITY_IN = 4.6


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Everything an evaluation found.

    Attributes:
        evaluations: by what was asked, `pytorch` or `onnx`; of both, `pytorch` comes first.
        disagreement: how the two differ, if there are two.
        class_names: of the data.
        image_name: what to call the image of a number.
        provenance: weights, data, settings, place and time.
    """

    evaluations: Mapping[str, Evaluation]
    disagreement: Disagreement | None
    class_names: Sequence[str]
    image_name: Callable[[int], str]
    provenance: Mapping[str, Any]

    @property
    def main(self) -> Evaluation:
        """Whose numbers come first."""
        return next(iter(self.evaluations.values()))

    def confusion_words(self, one: Confusion) -> str:
        """`3 of 12 images of 'tabby' were taken for 'tiger cat'`."""
        label, predicted = self.class_names[one.label], self.class_names[one.predicted]
        was = "was" if one.images == 1 else "were"
        return (
            f"{one.images} of {one.of} image{'s' * (one.of != 1)} of {label!r} {was} taken for "
            f"{predicted!r}"
        )


def write_evaluation(report: EvaluationReport, folder: Path) -> dict[str, Path]:
    """Write the JSON document, both tables and both figures (SVG and PNG), each atomically.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    document = evaluation_document(report)
    names = report.class_names
    cells = [
        {
            "label": label,
            "label_name": names[label],
            "predicted": predicted,
            "predicted_name": names[predicted],
            "images": images,
        }
        for label, predicted, images in report.main.cells
    ]
    paths = {
        "json": write_json(folder / f"{NAME}.json", {"schema": SCHEMA, **document}),
        "per_class": write_csv(folder / "per_class.csv", document["per_class"]),
        "confusion": write_csv(folder / "confusion.csv", cells),
    }
    for name, figure in (
        ("confusion", confusion_figure(report)),
        ("reliability", reliability_figure(report.main)),
    ):
        paths[f"{name}_svg"], paths[f"{name}_png"] = save_figure(figure, folder / name)
    return paths


def evaluation_document(report: EvaluationReport) -> dict[str, Any]:
    """The evaluation as plain data."""
    found = report.main
    low, high = found.top1_interval
    document: dict[str, Any] = {
        "top1": found.top1,
        "top5": found.top5,
        "images": found.images,
        "classes": found.classes,
        "right": found.right,
        "top1_interval": [low, high],
        "top5_note": top5_note(found),
        "class_mean": found.class_mean,
        "calibration": _calibration(found),
        "confusions": [_confusion(report, one) for one in found.confusions(LISTED)],
        "per_class": _per_class(report),
        "confusion": [list(cell) for cell in found.cells],
        "evaluated": next(iter(report.evaluations)),
        "disagreement": None,
        "provenance": dict(report.provenance),
    }
    for name, other in list(report.evaluations.items())[1:]:
        document[name] = {
            "top1": other.top1,
            "top5": other.top5,
            "images": other.images,
            "class_mean": other.class_mean,
            "calibration": _calibration(other),
        }
    if report.disagreement is not None:
        document["disagreement"] = _disagreement(report, report.disagreement)
    return document


def top5_note(found: Evaluation) -> str | None:
    """Why top-5 says nothing, where it does not."""
    if found.classes > FEW:
        return None
    return f"there are only {found.classes} classes, so every label is among the {FEW} best answers"


def _calibration(found: Evaluation) -> dict[str, Any]:
    return {
        "ece": found.ece,
        "largest_gap": found.worst_gap,
        "mean_confidence": found.confidence,
        "nll": found.nll,
        "bins": [asdict(one) for one in found.bins],
    }


def _confusion(report: EvaluationReport, one: Confusion) -> dict[str, Any]:
    return {
        **asdict(one),
        "label_name": report.class_names[one.label],
        "predicted_name": report.class_names[one.predicted],
        "words": report.confusion_words(one),
    }


def _per_class(report: EvaluationReport) -> list[dict[str, Any]]:
    found = report.main
    images, right, shares = found.class_images, found.class_right, found.per_class
    worst: dict[int, Confusion] = {}
    for one in found.confusions(len(found.labels)):
        worst.setdefault(one.label, one)
    rows = []
    for number, name in enumerate(report.class_names):
        share = float(shares[number])
        mistaken = worst.get(number)
        rows.append(
            {
                "class": number,
                "name": name,
                "images": int(images[number]),
                "right": int(right[number]),
                "top1": None if math.isnan(share) else share,
                "mostly_taken_for": None if mistaken is None else mistaken.predicted,
            }
        )
    return rows


def _disagreement(report: EvaluationReport, found: Disagreement) -> dict[str, Any]:
    names = report.class_names
    return {
        "between": list(found.names),
        "agree": found.different == 0,
        "images": found.images,
        "different": found.different,
        "share_percent": found.share_percent,
        "largest_logit_difference": found.largest_difference,
        "largest_logit_difference_at": report.image_name(found.largest_at),
        "largest_logit": found.largest_logit,
        "first": [
            {
                "image": report.image_name(one.image),
                "label": names[one.label],
                "answers": [names[answer] for answer in one.answers],
                "margins": list(one.margins),
            }
            for one in found.first
        ],
    }


def confusion_figure(report: EvaluationReport) -> Figure:
    """The confusion matrix, shares of each class's images; of many classes the confused ones."""
    found = report.main
    chosen = _shown_classes(found)
    counts = found.confusion[np.ix_(chosen, chosen)].astype(np.float64)
    images = found.class_images[chosen]
    shares = 100.0 * counts / np.maximum(images, 1)[:, None]
    labels = [_short(report.class_names[number]) for number in chosen]
    side_in = min(7.6, max(3.4, 0.34 * len(chosen) + 1.2))
    shades = LinearSegmentedColormap.from_list("heat", [light for light, _ in HEAT])
    with drawing_style():
        figure = Figure(figsize=(side_in + 1.0, side_in + 0.6))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
        axes = figure.add_subplot()
        image = axes.imshow(
            np.ma.masked_equal(shares, 0.0),
            cmap=shades,
            norm=PowerNorm(0.5, 0.0, 100.0),  # mistakes are few: a linear scale would hide them
            interpolation="nearest",
        )
        if len(chosen) <= NUMBERED:
            _number_cells(axes, counts, shares)
        places = range(len(chosen))
        size = 7 if len(chosen) <= NUMBERED else 6
        turn = 90 if max(map(len, labels)) > 3 else 0
        axes.set_xticks(places, labels, rotation=turn, fontsize=size)
        axes.set_yticks(places, labels, fontsize=size)
        borders = np.arange(len(chosen) - 1) + 0.5
        axes.set_xticks(borders, minor=True)
        axes.set_yticks(borders, minor=True)
        axes.grid(which="minor")
        axes.tick_params(which="both", length=0)
        axes.set(xlabel="predicted", ylabel="class")
        axes.set_title(_matrix_title(found, len(chosen)), loc="left", fontsize=8.5)
        bar = figure.colorbar(
            image, ax=axes, fraction=0.035, pad=0.02, ticks=[0, 1, 5, 20, 50, 100]
        )
        bar.set_label("share of the class's images, %", fontsize=7)
        bar.ax.tick_params(labelsize=6.5, length=0)
        bar.outline.set_visible(False)
    return figure


def reliability_figure(found: Evaluation) -> Figure:
    """Accuracy against confidence in bins of equal width, and how many images lie in each.

    Whiskers are 95 % intervals of a bin's accuracy (Wilson); the figure is that of Guo et al.
    (2017), figure 1.
    """
    bins = [one for one in found.bins if one.images]
    width = 100.0 / BINS
    with drawing_style():
        figure = Figure(figsize=(RELIABILITY_IN, 5.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        upper.plot([0, 100], [0, 100], color=ink("muted"), lw=1.0, ls=(0, (4, 2)), zorder=6)
        for one in bins:
            assert one.accuracy is not None
            assert one.confidence is not None
            middle = 50.0 * (one.low + one.high)
            share, said = 100.0 * one.accuracy, 100.0 * one.confidence
            upper.bar(middle, share, width * 0.94, color=ink("mb4d"), zorder=3)
            upper.bar(
                middle,
                said - share,
                width * 0.94,
                bottom=share,
                color="none",
                edgecolor=ink("mb3d"),
                hatch="////",
                lw=0.8,
                zorder=4,
            )
            low, high = wilson_percent(round(one.accuracy * one.images), one.images)
            upper.plot([middle, middle], [low, high], color=ink("ink"), lw=0.9, zorder=5)
            lower.bar(
                middle,
                100.0 * one.images / found.images,
                width * 0.94,
                color=ink("other"),
                zorder=3,
            )
        _mark_means(lower, found)
        upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="right answers, %")
        lower.set(xlabel="confidence (largest probability), %", ylabel="images, %")
        for axes in (upper, lower):
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        upper.set_title(
            f"expected calibration error {found.ece:.1f} % ({BINS} bins, {found.images} images)",
            loc="left",
            fontsize=8.5,
        )
        figure.legend(
            handles=_legend(),
            loc="outside lower left",
            ncols=3,
            frameon=False,
            fontsize=7,
            handletextpad=0.4,
            columnspacing=1.0,
        )
    return figure


def _shown_classes(found: Evaluation) -> list[int]:
    """Classes that occur, ascending; of too many those in the most frequent confusions."""
    present = sorted(set(found.labels.tolist()) | set(found.predicted.tolist()))
    if len(present) <= MOST_CLASSES:
        return present
    chosen: dict[int, None] = {}
    for one in found.confusions(found.images):
        pair = dict.fromkeys((one.label, one.predicted))
        if len(chosen | pair) > MOST_CLASSES:
            break
        chosen |= pair
    return sorted(chosen or present[:MOST_CLASSES])


def _matrix_title(found: Evaluation, shown: int) -> str:
    right = f"top-1 {found.top1:.1f} % of {found.images} images"
    present = len(set(found.labels.tolist()) | set(found.predicted.tolist()))
    if shown < present:
        return f"{right}; {shown} classes of {present}, those confused most"
    return right


def _number_cells(axes: Axes, counts: Any, shares: Any) -> None:
    for (row, column), count in np.ndenumerate(counts):
        if count:
            light = shares[row, column] > 25.0  # the darker half of the square-root scale
            axes.text(
                column,
                row,
                f"{int(count)}",
                ha="center",
                va="center",
                fontsize=6.5,
                color=ink("paper" if light else "ink"),
            )


def _mark_means(axes: Axes, found: Evaluation) -> None:
    for value, colour, style in (
        (found.top1, "mb4d", "-"),
        (found.confidence, "mb3d", (0, (3, 2))),
    ):
        axes.axvline(value, color=ink(colour), lw=1.3, ls=style, zorder=4)


def _legend() -> list[Any]:
    return [
        Patch(color=ink("mb4d"), label="right answers"),
        Patch(facecolor="none", edgecolor=ink("mb3d"), hatch="////", label="gap to confidence"),
        Line2D([], [], color=ink("muted"), lw=1.0, ls=(0, (4, 2)), label="calibrated"),
        Line2D([], [], color=ink("mb4d"), lw=1.3, label="top-1"),
        Line2D([], [], color=ink("mb3d"), lw=1.3, ls=(0, (3, 2)), label="mean confidence"),
        Line2D([], [], color=ink("ink"), lw=0.9, label="95 % interval"),
    ]


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
