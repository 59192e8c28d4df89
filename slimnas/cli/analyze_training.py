"""What analyses that train have in common: lists of numbers, the training budget, progress."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID

from slimnas.cli.bars import RunProgress
from slimnas.cli.output import note
from slimnas.cli.runs import RunOn
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from slimnas.analysis.budget import TrainingBudget
    from slimnas.analysis.share_run import Step
    from slimnas.arch.architecture import Architecture
    from slimnas.train.loop import StepReport

TrainDataOption = Annotated[
    str, typer.Option(help="digits, image folder, parquet files, webdataset tars or hub id.")
]
StepImagesOption = Annotated[int, typer.Option(min=1, help="Images per training step.")]
LrOption = Annotated[float, typer.Option(help="Peak learning rate.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Trainings per network.")]
FirstSeedOption = Annotated[int, seed_option("First seed.")]
MaxImagesOption = Annotated[
    int | None, typer.Option(min=1, help="Use at most this many images of the data.")
]
TrainOnOption = Annotated[RunOn, typer.Option(help="Where networks train.")]

JOURNAL = "finished.jsonl"
LINE_SECONDS = 10.0


@dataclass(frozen=True)
class AskedBudget:
    """The training that the command line asks for.

    Attributes:
        data: what `--data` names.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate.
        resolution: side of the images; None for the model's own, of digits a smaller one.
        max_images: at most this many images of the data.
        skip_bad_images: leave out what cannot be decoded.
        train_on: auto, cpu, cuda or mps.
    """

    data: str
    epochs: int
    batch_size: int
    lr: float
    resolution: int | None
    max_images: int | None
    skip_bad_images: bool
    train_on: str


class StudyProgress(RunProgress):
    """Draws the networks of a study, and the training of the one under way."""

    def __init__(self) -> None:
        super().__init__()
        self._study: TaskID | None = None
        self._training: TaskID | None = None
        self._said_at = time.monotonic()

    def step(self, step: Step) -> None:
        """Move the study's bar; without a terminal write a line."""
        if self._study is None:
            self._study = self._bars.add_task("study", total=step.total, state="")
        self._bars.update(self._study, completed=step.done, total=step.total, state=step.what)
        self._log(f"{step.done}/{step.total} {step.what}")

    def training(self, report: StepReport) -> None:
        """Move the training's bar; without a terminal write a line now and then."""
        state = f"{report.images_per_s:.0f} images/s loss {report.loss:.3f}"
        if self._training is None:
            self._training = self._bars.add_task("training", total=report.steps, state=state)
        self._bars.update(self._training, completed=report.step, total=report.steps, state=state)
        if time.monotonic() - self._said_at > LINE_SECONDS:
            self._said_at = time.monotonic()
            self._log(f"training step {report.step}/{report.steps} {state}")


def quiet_threads() -> None:
    """Let waiting threads sleep: on shared cores several times faster; before torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def numbers(text: str, option: str) -> list[float]:
    """The numbers of a list such as `1.25,1.5`.

    Raises:
        AnalysisError: something else is in it, or nothing.
    """
    from slimnas.errors import AnalysisError

    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        found = [float(word) for word in words]
    except ValueError:
        found = []
    if not found or not all(abs(value) < float("inf") for value in found):
        raise AnalysisError(f"{option}: must be numbers between commas, got {text!r}")
    return found


def whole_numbers(text: str, option: str) -> list[int]:
    """The whole numbers of a list such as `4,8,16`.

    Raises:
        AnalysisError: something else is in it, or nothing.
    """
    from slimnas.errors import AnalysisError

    found = numbers(text, option)
    if any(value != int(value) for value in found):
        raise AnalysisError(f"{option}: must be whole numbers between commas, got {text!r}")
    return [int(value) for value in found]


def open_budget(
    asked: AskedBudget,
    architecture: Architecture,
    folder: Path,
    progress: StudyProgress,
    *,
    seed: int,
) -> TrainingBudget:
    """Open the data and say what will be trained on.

    Raises:
        DataError: no such data.
        SpecError: settings out of range, or the model cannot be built for the resolution.
        RuntimeUnavailableError: this machine lacks the device.
    """
    import torch

    from slimnas.analysis.budget import DIGITS_RESOLUTION, TrainingBudget
    from slimnas.arch.documents import parse_spec
    from slimnas.data.splits import open_data
    from slimnas.train.devices import accelerator_for
    from slimnas.train.recipe import TrainRecipe

    shape = architecture.input.shape
    side: int | tuple[int, int] = architecture.input.resolution
    if asked.resolution is not None:
        side = asked.resolution
    elif asked.data == "digits" and min(shape.height, shape.width) > DIGITS_RESOLUTION:
        side = DIGITS_RESOLUTION
    architecture.with_resolution(side)  # refuses one that the model cannot take
    recipe = parse_spec(
        TrainRecipe,
        {
            "epochs": asked.epochs,
            "batch_size": asked.batch_size,
            "lr": asked.lr,
            "ema_decay": 0.98,
            "weight_decay": 0.05,
            "augment": asked.data != "digits",  # shifts are slow to learn from 8x8 pixels
        },
        source="command line",
    )
    accelerator = accelerator_for(asked.train_on)
    data = open_data(
        asked.data,
        resolution=side if isinstance(side, tuple) else (side, side),
        channels=shape.channels,
        seed=seed,
        max_images=asked.max_images,
        skip_bad_images=asked.skip_bad_images,
    )
    shown = f"{side[0]}x{side[1]}" if isinstance(side, tuple) else side
    note(f"data: {data.description}, at {shown} px")
    return TrainingBudget(
        data=data,
        recipe=recipe,
        accelerator=accelerator,
        resolution=side,
        folder=folder,
        threads=torch.get_num_threads(),
        on_step=progress.training,
    )


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first to the left, the others to the right, however narrow the screen."""
    lines = [headers, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(headers))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        typer.echo("  ".join(cells).rstrip())
