"""A run of `slimnas train`: one process of it, which may be one of several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slimnas.cli.output import note, shown_path
from slimnas.cli.runs import no_empty_folder, says_how_to_go_on
from slimnas.cli.train_inputs import Inputs, open_images

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slimnas.data.training import TrainingData
    from slimnas.nn.build import Network
    from slimnas.train.result import TrainResult
    from slimnas.train.run import Listener
    from slimnas.train.teacher import Teacher


def run_or_report(inputs: Inputs, folder: Path, as_json: bool) -> None:
    """Train, unless it is done, and print what came out; beside other processes in silence.

    Raises:
        SlimnasError: one line.
    """
    from slimnas._lock import folder_lock
    from slimnas.cli.train_output import print_result
    from slimnas.train.config import refuse_other_run
    from slimnas.train.devices import accelerator_for
    from slimnas.train.result import load_result
    from slimnas.train.trackers import LOGS, tracker_names

    config = inputs.config
    accelerator = accelerator_for(
        inputs.asked.train_on,
        precision=config.precision,
        log_dir=folder / LOGS,
        trackers=tracker_names(inputs.asked.trackers),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(accelerator.end_training)
        if accelerator.is_main_process:
            stack.enter_context(no_empty_folder(folder))
            stack.enter_context(folder_lock(folder))
        accelerator.wait_for_everyone()
        refuse_other_run(folder, config)
        result = load_result(folder) or _train(inputs, folder, accelerator)
        if accelerator.is_main_process:
            print_result(inputs, result, as_json)


def _train(inputs: Inputs, folder: Path, accelerator: Accelerator) -> TrainResult:
    from slimnas.cli.train_output import draw_curves
    from slimnas.cli.train_progress import TrainProgress
    from slimnas.train.run import RunOptions, Silent, run_training

    with _memory_suffices():
        data = open_images(inputs)
        network, teacher = _open_networks(inputs, data, folder, accelerator)
        options = RunOptions(accelerator=accelerator, teacher=teacher)

        def run(listener: Listener) -> TrainResult:
            return run_training(
                inputs.config, network, data, folder, listener=listener, options=options
            )

        if not accelerator.is_main_process:
            return run(Silent())
        try:
            with TrainProgress(folder) as progress, says_how_to_go_on():
                return run(progress)
        finally:
            draw_curves(folder)


def _open_networks(
    inputs: Inputs, data: TrainingData, folder: Path, accelerator: Accelerator
) -> tuple[Network, Teacher | None]:
    """The network to train and its teacher, in words on stderr."""
    from slimnas.train.config import refuse_other_run
    from slimnas.train.run import check_run, completed
    from slimnas.train.teacher import open_teacher
    from slimnas.zoo.preprocessing import TRAINED_AT

    config, start = inputs.config, inputs.start
    classes = len(data.class_names)
    note(f"data: {data.description}")
    check_run(config, data, accelerator)
    network = start.build(classes, seed=config.seed)
    note(f"weights: {start.words}")
    had = start.architecture.head.classes
    if start.weights is not None and had != classes:
        note(f"head: fresh, for the {classes} classes of the data in place of {had}")
    teacher, recipe = None, config.recipe
    if recipe.distillation != "none" and recipe.teacher is not None:
        normalisation = (tuple(data.mean), tuple(data.std))
        teacher = open_teacher(recipe.teacher, network.architecture, normalisation)
        note(f"teacher: {recipe.teacher}")
    refuse_other_run(folder, completed(config, data, teacher))
    height, width = config.resolution
    before = start.architecture.provenance.get(TRAINED_AT)
    if start.weights is not None and isinstance(before, int) and before != height:
        note(f"its weights are from images of {before} px; --resolution {before} stays there")
    note(f"training at {height}x{width} px; run folder {shown_path(folder)}")
    return network, teacher


@contextlib.contextmanager
def _memory_suffices() -> Iterator[None]:
    """One line where memory runs out, wherever that is.

    Raises:
        TrainingError: what to give up.
    """
    import torch

    from slimnas.errors import TrainingError

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TrainingError(
            "out of memory; give a smaller --batch-size, --set accumulation=2, fewer --max-images, "
            "or --stream"
        ) from error
