"""`slimnas evaluate`: what a trained network is worth, and whether its ONNX file agrees."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimnas.cli.evaluate_inputs import AUTO, NONE, Asked
from slimnas.cli.output import JsonOption, print_json, shown_path
from slimnas.cli.runs import RunOn, no_empty_folder, require_writable
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slimnas.cli.evaluate_inputs import Inputs
    from slimnas.report.evaluation import EvaluationReport
    from slimnas.train.evaluate import Evaluation
    from slimnas.train.evaluation_compare import Disagreement

WORST = 5
"""Classes that are named where there are too many to list."""
LISTED_CLASSES = 20
CONFUSIONS = 5


class Part(str, Enum):
    """Which images are judged on."""

    TEST = "test"
    TRAIN = "train"
    ALL = "all"


class Interpolation(str, Enum):
    """How images are resized."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Normalised(str, Enum):
    """What images are normalised with."""

    AUTO = "auto"
    IMAGENET = "imagenet"
    DATA = "data"


def evaluate(
    model: Annotated[str, typer.Argument(help="Zoo name, architecture file or run folder.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, folder, parquet, tars or hub id.", show_default="what the run used"
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="auto: published or the model's own; a weights file; none: the --onnx file alone."
        ),
    ] = AUTO,
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", help="Published or the model's own weights: --weights auto."),
    ] = False,
    onnx: Annotated[
        Path | None, typer.Option(help="Exported file to evaluate on the same images.")
    ] = None,
    split: Annotated[
        Part, typer.Option(help="test: the data's own, else held out; train: the rest; all.")
    ] = Part.TEST,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Input side in pixels.", show_default="what it was trained at"),
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="As timm: resize to resolution / this, crop centre."),
    ] = None,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Resize the shorter side to this, crop centre.")
    ] = None,
    interpolation: Annotated[
        Interpolation, typer.Option(help="For --crop-pct and --resize.")
    ] = Interpolation.BICUBIC,
    normalisation: Annotated[
        Normalised, typer.Option(help="auto: the model's own, else of the data's TRAIN images.")
    ] = Normalised.AUTO,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="At most this many, evenly from the classes.")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded.")
    ] = False,
    device: Annotated[
        RunOn, typer.Option("--device", "--train-on", help="Where the network runs.")
    ] = RunOn.AUTO,
    seed: Annotated[
        int | None, seed_option("Of the held-out images.", show_default="the run's")
    ] = None,
    fail_on_disagreement: Annotated[
        bool,
        typer.Option("--fail-on-disagreement", help="Exit with 1 if any top-1 differs."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for tables and figures.", show_default="none")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Top-1, top-5, every class, confusions and calibration of a trained network.

    With --onnx the exported file answers for the same images too, and where the two differ is said.

    Example: slimnas evaluate runs/efficientformer_tiny-digits-iphone12-1.6ms --data digits
    """
    from slimnas.cli.evaluate_inputs import open_inputs

    _refuse_contradictions(weights, pretrained, onnx, crop_pct, resize, fail_on_disagreement)
    asked = Asked(
        model=model,
        weights=weights,
        data=data,
        onnx=onnx,
        split=split.value,
        resolution=resolution,
        crop_pct=crop_pct,
        resize=resize,
        interpolation=interpolation.value,
        normalisation=normalisation.value,
        batch_size=batch_size,
        max_images=max_images,
        skip_bad_images=skip_bad_images,
        device=device.value,
        seed=seed,
    )
    inputs = open_inputs(asked)
    files: dict[str, Path] = {}
    if output is None:
        report = _evaluate(inputs)
    else:
        from slimnas.report.evaluation import write_evaluation

        with no_empty_folder(output):
            require_writable(output)
            report = _evaluate(inputs)
            files = write_evaluation(report, output)
    if as_json:
        from slimnas.report.evaluation import evaluation_document

        shown = {key: shown_path(path) for key, path in files.items()}
        print_json({**evaluation_document(report), "files": shown})
    else:
        for line in _lines(inputs, report):
            typer.echo(line)
        for path in files.values():
            typer.echo(shown_path(path))
    if fail_on_disagreement:
        _refuse_disagreement(report.disagreement, onnx)


def _refuse_contradictions(
    weights: str,
    pretrained: bool,
    onnx: Path | None,
    crop_pct: float | None,
    resize: int | None,
    fail_on_disagreement: bool,
) -> None:
    if pretrained and weights != AUTO:
        raise typer.BadParameter("--pretrained and --weights exclude each other")
    if crop_pct is not None and resize is not None:
        raise typer.BadParameter("--crop-pct and --resize exclude each other")
    if weights == NONE and onnx is None:
        raise typer.BadParameter(
            "--weights none is for --onnx FILE alone: random weights have no accuracy to speak of"
        )
    if fail_on_disagreement and (onnx is None or weights == NONE):
        raise typer.BadParameter("--fail-on-disagreement needs weights and --onnx FILE to compare")


def _evaluate(inputs: Inputs) -> EvaluationReport:
    """Go over the images once."""
    from slimnas.cli.prune_progress import PruneProgress
    from slimnas.report.evaluation import EvaluationReport
    from slimnas.train.evaluation_compare import evaluate_all

    images, asked = inputs.images, inputs.asked
    with PruneProgress() as progress:

        def on_batch(seen: int) -> None:
            progress.stage("evaluating", seen, len(images), "images")

        found, disagreement = evaluate_all(
            inputs.predictors,
            images.batches(asked.batch_size, device=inputs.device, digest=inputs.digest),
            inputs.classes,
            on_batch,
        )
    return EvaluationReport(
        evaluations=found,
        disagreement=disagreement,
        class_names=images.class_names,
        image_name=images.name,
        provenance=inputs.provenance(),
    )


def _refuse_disagreement(found: Disagreement | None, onnx: Path | None) -> None:
    from slimnas.errors import ExportError

    if found is not None and found.different:
        raise ExportError(
            f"{onnx}: must give PyTorch's top-1, gives another for {found.different} of "
            f"{found.images} images; export the network again, or leave --fail-on-disagreement out"
        )


def _lines(inputs: Inputs, report: EvaluationReport) -> Iterator[str]:
    from slimnas.report.evaluation import top5_note

    found = report.main
    side = "x".join(str(size) for size in dict.fromkeys(inputs.resolution))
    yield f"{inputs.name}, {inputs.weights}; {inputs.images.description}, {side} px"
    low, high = found.top1_interval
    yield (
        f"top-1              {found.top1:5.1f} %  {found.right} of {found.images} images; "
        f"95 % interval {low:.1f}-{high:.1f} %"
    )
    why = top5_note(found)
    yield f"top-5              {found.top5:5.1f} %{f'  {why}' if why else ''}"
    present = int((found.class_images > 0).sum())
    yield f"mean over classes  {found.class_mean:5.1f} %  {present} classes have images"
    yield (
        f"calibration error  {found.ece:5.1f} %  largest gap of a bin {found.worst_gap:.1f} %, "
        f"mean confidence {found.confidence:.1f} %: {_confidence_words(found)}"
    )
    yield from _class_lines(report)
    confusions = found.confusions(CONFUSIONS)
    if confusions:
        yield "most frequent mistakes:"
    for one in confusions:
        yield f"  {report.confusion_words(one)}"
    if report.disagreement is not None:
        yield from _disagreement_lines(report, report.disagreement)


def _confidence_words(found: Evaluation) -> str:
    if abs(found.confidence - found.top1) < 1.0:
        return "about as sure as it is right"
    return "surer than it is right" if found.confidence > found.top1 else "less sure than right"


def _class_lines(report: EvaluationReport) -> Iterator[str]:
    found = report.main
    images, shares = found.class_images, found.per_class
    present = [number for number in range(found.classes) if images[number]]
    if len(present) > LISTED_CLASSES:
        present.sort(key=lambda number: (shares[number], -images[number], number))
        present = present[:WORST]
        yield f"worst of the classes ({WORST} of {int((images > 0).sum())}):"
    else:
        yield "classes:"
    width = max(len(report.class_names[number]) for number in present)
    for number in present:
        yield (
            f"  {report.class_names[number]:<{width}}  {shares[number]:5.1f} %  of "
            f"{images[number]} images"
        )


def _disagreement_lines(report: EvaluationReport, found: Disagreement) -> Iterator[str]:
    names = report.class_names
    other = report.evaluations["onnx"]
    if found.different:
        yield (
            f"ONNX file and PyTorch disagree: another top-1 for {found.different} of "
            f"{found.images} images ({found.share_percent:.2g} %); the file's top-1 is "
            f"{other.top1:.1f} %"
        )
    else:
        yield f"ONNX file and PyTorch agree: the same top-1 for all {found.images} images"
    yield (
        f"  largest logit difference {found.largest_difference:.2g} (largest logit "
        f"{found.largest_logit:.3g}), of {report.image_name(found.largest_at)}"
    )
    for one in found.first:
        mine, theirs = (names[answer] for answer in one.answers)
        yield (
            f"  {report.image_name(one.image)}: PyTorch {mine!r} by {one.margins[0]:.2g}, file "
            f"{theirs!r} by {one.margins[1]:.2g}; label {names[one.label]!r}"
        )
    if len(found.first) < found.different:
        yield f"  and {found.different - len(found.first)} more"
