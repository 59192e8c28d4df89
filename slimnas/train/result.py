"""What a finished training run leaves: a model like any other, and `result.json`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from slimnas._files import atomic_write_text, read_text
from slimnas._versions import versions
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.data.training import TrainingData
from slimnas.errors import RunFolderError
from slimnas.measure.machine import this_machine
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.train.config import TrainConfig
from slimnas.train.history import FILE as HISTORY
from slimnas.train.history import Row, read_history
from slimnas.zoo.entry import ARCHITECTURE, WEIGHTS, save_model
from slimnas.zoo.metrics import TEST_TOP1, Metric, Metrics
from slimnas.zoo.preprocessing import KEY, preprocessing

SCHEMA = "slimnas/train-result/1"
FILE = "result.json"
BEST = "best.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        folder: the run folder.
        weights: averaged weights of the last epoch.
        architecture: of the network, with the data's classes.
        top1: of `weights` on TEST, in percent; None without TEST.
        best_top1: the highest of any epoch; picked on TEST, so it flatters.
        best_epoch: the first epoch that reached it, from 1; its weights are `best.safetensors`.
        epochs: passes over TRAIN.
        steps: optimiser steps.
        digest: SHA-256 over `weights`.
        train_images, test_images: how many there were.
        rows: one per epoch, as in `metrics.jsonl`.
        provenance: when, where and with what this was trained and measured.
    """

    folder: Path
    weights: Path
    architecture: Architecture
    top1: float | None
    best_top1: float | None
    best_epoch: int | None
    epochs: int
    steps: int
    digest: str
    train_images: int
    test_images: int
    rows: tuple[Row, ...]
    provenance: Mapping[str, Any]


def best_row(rows: tuple[Row, ...]) -> Row | None:
    """The first epoch of highest TEST top-1; none where nothing was measured."""
    judged = [row for row in rows if row.get("test_top1") is not None]
    return max(judged, key=lambda row: row["test_top1"] or 0.0, default=None)


def provenance_of(accelerator: Accelerator) -> dict[str, Any]:
    """When, where and with what a result is made."""
    machine, device = this_machine(), accelerator.device
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"{device.type} of {machine.cpu}",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        "system": machine.system,
        "versions": versions(),
    }


def save_result(
    folder: Path,
    config: TrainConfig,
    data: TrainingData,
    architecture: Architecture,
    state: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> TrainResult:
    """Write the model and then `result.json`, each atomically; the run is finished by that.

    Args:
        folder: the run folder, with its history.
        config: the settings.
        data: what it was trained and judged on.
        architecture: of the network that was trained.
        state: its averaged weights of the last epoch.
        provenance: see `provenance_of`.

    Raises:
        RunFolderError: the folder cannot be written, or its history is damaged.
    """
    rows = read_history(folder / HISTORY)
    last, best = rows[-1], best_row(rows)
    named = architecture.renamed(architecture.name, _origin(config, data))
    top1 = last.get("test_top1")
    metrics = _metrics(config, data, named, top1, provenance)
    save_model(folder, architecture=named, weights=state, metrics=metrics)
    body = {
        "schema": SCHEMA,
        "top1": top1,
        "best_top1": None if best is None else best["test_top1"],
        "best_epoch": None if best is None else best["epoch"],
        "epochs": config.recipe.epochs,
        "steps": last["step"],
        "digest": tensors_digest(state),
        "train_images": len(data.train),
        "test_images": 0 if data.test is None else len(data.test),
        "provenance": dict(provenance),
    }
    atomic_write_text(folder / FILE, json.dumps(body, indent=2, allow_nan=False) + "\n")
    result = load_result(folder)
    assert result is not None
    return result


def load_result(folder: Path) -> TrainResult | None:
    """What a finished run left; none where it is not finished.

    Raises:
        RunFolderError: `result.json` is damaged.
        SpecError: the architecture is.
    """
    path = folder / FILE
    if not (path.is_file() and (folder / WEIGHTS).is_file() and (folder / ARCHITECTURE).is_file()):
        return None
    try:
        body = json.loads(read_text(path, RunFolderError, "the result of a training run"))
        if body.pop("schema") != SCHEMA:
            raise ValueError(f"schema: must be {SCHEMA!r}")
        return TrainResult(
            folder=folder,
            weights=folder / WEIGHTS,
            architecture=Architecture.load(folder / ARCHITECTURE),
            rows=read_history(folder / HISTORY),
            **body,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{path}: is not the result of a training run ({error}); delete it, and the same "
            "command writes it again"
        ) from error


def _origin(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """What goes into the provenance of the trained architecture."""
    return {
        "source": f"slimnas train, recipe {config.recipe_name}",
        "trained_from": {
            "model": config.model,
            "weights": config.weights,
            "weights_digest": config.weights_digest,
        },
        "training": {
            "data": config.data,
            "digest": data.digest,
            "images": len(data.train),
            "epochs": config.recipe.epochs,
        },
        KEY: preprocessing(data.mean, data.std),
        "seed": config.seed,
    }


def _metrics(
    config: TrainConfig,
    data: TrainingData,
    architecture: Architecture,
    top1: float | None,
    provenance: Mapping[str, Any],
) -> Metrics:
    counted = cost(architecture)
    metrics = {
        "params": Metric(counted.params, "computed by closed form"),
        "macs": Metric(counted.macs, "computed by closed form, one image"),
    }
    if top1 is None or data.test is None:
        return metrics
    side = "x".join(str(number) for number in config.resolution)
    said = (
        f"measured on {len(data.test)} TEST images of {config.test_data or config.data} at {side} "
        f"px on {provenance['date']} with torch {provenance['versions']['torch']} on "
        f"{provenance['device']}, trained in {provenance['precision']}, judged in fp32; averaged "
        f"weights after {config.recipe.epochs} epochs (recipe {config.recipe_name}, seed "
        f"{config.seed}), not picked on TEST"
    )
    return {TEST_TOP1: Metric(top1, said), **metrics}
