"""A network of MB4D blocks that trains on digits in seconds, its data, its settings, a listener."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrl_c import press_ctrl_c

from slimnas.arch.architecture import Architecture
from slimnas.data.splits import DataOptions
from slimnas.data.training import TrainingData, open_training
from slimnas.nn.build import Network, build
from slimnas.train.config import TrainConfig
from slimnas.train.devices import accelerator_for
from slimnas.train.history import Row
from slimnas.train.loop import StepReport
from slimnas.train.recipes import load_recipe, override_recipe
from slimnas.train.result import TrainResult
from slimnas.train.run import RunOptions, run_training
from slimnas.train.teacher import Teacher

NETWORK = """schema: slimnas/architecture/1
name: mini
input: {channels: 1, resolution: 16}
stem: {type: conv_stem, width: 8, act: relu}
stages:
- {width: 8, blocks: [{type: mb4d, repeat: 2}]}
- {width: 16, downsample: {type: conv3x3}, blocks: [{type: mb4d}]}
head: {type: linear, classes: 10, distilled: true}
"""
ARCHITECTURE = Architecture.from_yaml(NETWORK)
CPU = accelerator_for("cpu")
EPOCHS, BATCH, IMAGES = 3, 32, 200
STEPS = EPOCHS * (160 // BATCH)  # a fifth of the images is TEST
TRAIN = (
    *("train", "mini.yaml", "--data", "digits", "--max-images", IMAGES, "--epochs", EPOCHS),
    *("--batch-size", BATCH, "--train-on", "cpu"),
)


def images(count: int = IMAGES) -> TrainingData:
    """Some digits at 16 px."""
    options = DataOptions(resolution=(16, 16), channels=1, seed=0, max_images=count)
    return open_training("digits", options)


def config(**changes: Any) -> TrainConfig:
    """Settings of a run of a few seconds; `changes` are those of the recipe."""
    given = {"epochs": EPOCHS, "batch_size": BATCH, **changes}
    return TrainConfig(
        model="mini",
        architecture_digest=ARCHITECTURE.digest,
        resolution=(16, 16),
        recipe=override_recipe(load_recipe("quick"), given),
        max_images=IMAGES,
    )


class Watching:
    """A listener that keeps what it is told and may press Ctrl-C after a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.steps: list[StepReport] = []
        self.epochs: list[Sequence[Row]] = []

    def step(self, report: StepReport) -> None:
        self.steps.append(report)
        if report.step == self.stop_at:
            press_ctrl_c()

    def epoch(self, rows: Sequence[Row]) -> None:
        self.epochs.append(rows)


def train(
    folder: Path,
    data: TrainingData,
    given: TrainConfig | None = None,
    *,
    listener: Watching | None = None,
    network: Network | None = None,
    teacher: Teacher | None = None,
) -> TrainResult:
    """Train in `folder` on the CPU."""
    return run_training(
        given or config(),
        network or build(ARCHITECTURE, seed=0),
        data,
        folder,
        listener=listener or Watching(),
        options=RunOptions(CPU, teacher=teacher),
    )


def lay_out(folder: Path) -> None:
    """Write `mini.yaml`, and `photos/` with fifty coloured images in two classes."""
    import numpy as np
    from PIL import Image

    (folder / "mini.yaml").write_text(NETWORK)
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(25):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
