"""What `slimnas train` leaves on screen: JSON or a summary, and the curves in the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slimnas.cli.output import print_json, shown_path

if TYPE_CHECKING:
    from slimnas.cli.train_inputs import Inputs
    from slimnas.train.result import TrainResult

CURVES = "training.png"


def draw_curves(folder: Path) -> None:
    """Draw the run's history so far, if it has any.

    Raises:
        RunFolderError: the history is damaged, or the folder cannot be written.
    """
    from slimnas.report.training import draw_training
    from slimnas.train.history import FILE, read_history

    draw_training(read_history(folder / FILE), folder / CURVES)


def print_result(inputs: Inputs, result: TrainResult, as_json: bool) -> None:
    """Print what came out, for people or as one JSON object."""
    if as_json:
        print_json(json_body(inputs, result))
    else:
        typer.echo("\n".join(_lines(inputs, result)))


def json_body(inputs: Inputs, result: TrainResult) -> dict[str, Any]:
    """What `--json` prints."""
    from slimnas.arch.cost import cost
    from slimnas.zoo.entry import ARCHITECTURE

    config, counted = inputs.config, cost(result.architecture)
    return {
        "run": shown_path(result.folder),
        "model": config.model,
        "data": config.data,
        "recipe": config.recipe_name,
        "top1": result.top1,
        "best_top1": result.best_top1,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "steps": result.steps,
        "digest": result.digest,
        "images": {"train": result.train_images, "test": result.test_images},
        "params": counted.params,
        "macs": counted.macs,
        "architecture": shown_path(result.folder / ARCHITECTURE),
        "weights": shown_path(result.weights),
        "provenance": dict(result.provenance),
        "files": _files(result.folder),
    }


def _lines(inputs: Inputs, result: TrainResult) -> Iterator[str]:
    from slimnas.arch.cost import cost

    config, counted = inputs.config, cost(result.architecture)
    made = result.provenance
    yield (
        f"{result.architecture.name}: {counted.params / 1e6:.2f} M parameters, "
        f"{counted.macs / 1e6:,.1f} M multiply-adds, trained on {result.train_images} images of "
        f"{config.data} for {result.epochs} epochs (recipe {config.recipe_name})"
    )
    if result.top1 is None:
        yield "no TEST images: top-1 unknown; give --test-data next time"
    else:
        yield (
            f"top-1 {result.top1:.2f} % on {result.test_images} TEST images: averaged weights of "
            f"the last epoch ({made['date']}, {made['device']}, {made['precision']})"
        )
        if result.best_top1 is not None and result.best_top1 > result.top1:
            yield (
                f"highest {result.best_top1:.2f} % after epoch {result.best_epoch}: picked on TEST,"
                " so it flatters"
            )
    yield from _files(result.folder)
    yield f"keep it: slimnas zoo add {shown_path(result.folder)} --name NAME"


def _files(folder: Path) -> dict[str, str]:
    """The run's files by path, and what each is."""
    from slimnas.train import config, history, result, run, trackers
    from slimnas.zoo import entry

    named = {
        entry.ARCHITECTURE: "the network",
        entry.WEIGHTS: "averaged weights of the last epoch",
        result.BEST: "averaged weights of the epoch that was best on TEST",
        entry.METRICS: "accuracy and cost, with provenance",
        result.FILE: "the result",
        config.FILE: "settings",
        history.FILE: "one line per epoch",
        CURVES: "curves",
        run.STATE: "state of the training, to go on from",
        trackers.LOGS: "for TensorBoard and the like",
    }
    return {
        shown_path(folder / name): what for name, what in named.items() if (folder / name).exists()
    }
