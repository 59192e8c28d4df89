"""`slimnas train`: from an architecture, its weights if any, and images to a trained network."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from slimnas.cli.output import JsonOption
from slimnas.cli.processes import one_voice
from slimnas.cli.runs import RUNS, RunOn, plain_name
from slimnas.cli.seeds import seed_option
from slimnas.cli.train_inputs import Asked, find_inputs
from slimnas.cli.train_run import run_or_report


class Precision(str, Enum):
    """Number format of forward passes."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Distillation(str, Enum):
    """What is learned from a teacher."""

    NONE = "none"
    HARD = "hard"
    SOFT = "soft"


def train(
    model: Annotated[
        str, typer.Argument(help="Zoo name, architecture file, or run folder of another command.")
    ],
    data: Annotated[
        str, typer.Option(help="digits, image folder, parquet files, webdataset tars or hub id.")
    ] = "digits",
    recipe: Annotated[
        str,
        typer.Option(help="quick, finetune, efficientformer, efficientvit, litv2, or a YAML file."),
    ] = "quick",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step, over all processes.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices and kernels.")] = None,
    drop_path: Annotated[
        float | None, typer.Option(help="Stochastic depth of the last block, 0 to 1.")
    ] = None,
    distillation: Annotated[
        Distillation | None, typer.Option(help="Learn a teacher's class, or its probabilities.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Zoo name, run folder or file with weights, or timm:NAME."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any field of the recipe, KEY=VALUE, such as mixup=0.2; repeat."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights to begin with, in place of the model's own.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Begin with the model's published weights.")
    ] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with fresh weights, whatever there is.")
    ] = False,
    test_data: Annotated[
        str | None, typer.Option(help="Images to judge on; else those --data has, or a part of it.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images, pixels.", show_default="the model's own"),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many images of the data.")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the data while training; for what fits no disk.")
    ] = False,
    images_per_epoch: Annotated[
        int | None, typer.Option(min=1, help="When an epoch of --stream ends; else after all.")
    ] = None,
    train_on: Annotated[RunOn, typer.Option(help="Where it trains.")] = RunOn.AUTO,
    precision: Annotated[
        Precision, typer.Option(help="auto: bf16 where the GPU has it.")
    ] = Precision.AUTO,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            help="auto, none, tensorboard, wandb, ...; repeat.",
            show_default="auto: tensorboard if installed",
        ),
    ] = None,
    seed: Annotated[int, seed_option("Seed of everything random.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/train-MODEL-DATA")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network, or fine-tune one.

    What a search or pruning found begins with the weights it was found with, a published model
    with fresh ones unless you give --pretrained. Stop it at any moment and give the same command
    again: it goes on. On several GPUs: accelerate launch -m slimnas train ...

    Example: slimnas train efficientformer_l1 --data photos --resolution 64 --epochs 10
    """
    # Read by OpenMP when torch loads it; see slimnas.cli.search.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    flags = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "drop_path": drop_path,
        "distillation": None if distillation is None else distillation.value,
        "teacher": teacher,
    }
    asked = Asked(
        model=model,
        weights=weights,
        pretrained=pretrained,
        from_scratch=from_scratch,
        recipe=recipe,
        flags={key: value for key, value in flags.items() if value is not None},
        changes=tuple(changes or ()),
        settings={
            "data": data,
            "test_data": test_data,
            "max_images": max_images,
            "skip_bad_images": skip_bad_images,
            "stream": stream,
            "images_per_epoch": images_per_epoch,
            "precision": precision.value,
            "seed": seed,
        },
        resolution=resolution,
        train_on=train_on.value,
        trackers=tuple(tracker or ()),
    )
    folder = output or RUNS / f"train-{_model_name(model)}-{plain_name(data)}"
    with one_voice():
        run_or_report(find_inputs(asked), folder, as_json)


def _model_name(model: str) -> str:
    """A network's folder tells more than the name of the file in it."""
    path = Path(model)
    return plain_name(str(path.parent) if path.name == "architecture.yaml" else model)
