"""Training a supernet once: weights and architecture parameters in the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.arch.space import SearchSpace
from slimnas.data.batches import TrainImages
from slimnas.data.splits import SearchData
from slimnas.errors import WeightsError
from slimnas.nn.tensorfiles import load_tensors, save_tensors, tensors_digest
from slimnas.supernet.inherit import ChannelOrder, own_order
from slimnas.supernet.recipe import SupernetRecipe
from slimnas.supernet.sandwich import Sandwich, sandwich_loss
from slimnas.supernet.supernet import Supernet
from slimnas.train.evaluate import top1_percent
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, fit

__all__ = [
    "Progress",
    "SupernetRecipe",
    "TrainedSupernet",
    "load_supernet",
    "route_generator",
    "save_supernet",
    "supernet_task",
    "train_supernet",
    "weights_digest",
]

SCHEMA = "slimnas/supernet/1"
WHAT = "a supernet checkpoint"
EVAL_BATCH = 256
_ROUTES = 3  # keeps this random stream apart from those of the data


@dataclass(frozen=True)
class Progress:
    """Where supernet training is.

    Attributes:
        report: step, loss and speed.
        tau: temperature.
        search_top1: of the likeliest path on SEARCH, in percent; only after an epoch.
    """

    report: StepReport
    tau: float
    search_top1: float | None = None


@dataclass(frozen=True)
class TrainedSupernet:
    """A supernet with its averaged weights, and where it came from.

    Attributes:
        supernet: in evaluation mode.
        digest: SHA-256 over every weight.
        provenance: recipe, seed, data digest and the like.
    """

    supernet: Supernet
    digest: str
    provenance: dict[str, Any]

    @property
    def recipe(self) -> SupernetRecipe | None:
        """How it was trained; None where that is not on record, or in words not known here."""
        try:
            return SupernetRecipe.model_validate(self.provenance.get("recipe"))
        except ValidationError:
            return None

    def channel_order(self) -> ChannelOrder | None:
        """Which channels narrower networks keep, if it was trained with narrower networks.

        None where it was not, and they are better chosen by importance.
        """
        recipe = self.recipe
        return own_order(self.supernet) if recipe is not None and recipe.sandwich > 1 else None


def train_supernet(
    supernet: Supernet,
    data: SearchData,
    recipe: SupernetRecipe,
    accelerator: Accelerator,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TrainedSupernet:
    """Train `supernet` on TRAIN; SEARCH is only looked at after each epoch.

    Args:
        supernet: trained in place.
        data: TRAIN and SEARCH at the supernet's resolution.
        recipe: how.
        accelerator: where; all its processes call this.
        seed: of batches and routes.
        checkpoint: state file; the run goes on from it if it exists.
        on_progress: called after every step and epoch, in the main process alone.

    Raises:
        WeightsError: the checkpoint is not this run's, or the loss is no longer finite.
        TrainingError: out of memory, or a batch cannot be divided among the processes.
    """
    task = supernet_task(supernet, data.train, recipe, seed=seed)

    def tell(report: StepReport, search_top1: float | None = None) -> None:
        if accelerator.is_main_process:
            tau = recipe.tau(report.step - 1, task.steps)
            on_progress(Progress(report, tau, search_top1))

    def on_epoch(averaged: nn.Module, report: StepReport) -> None:
        if not accelerator.is_main_process:
            return
        assert isinstance(averaged, Supernet)
        routes = averaged.likeliest_routes()
        batches = data.search.eval_batches(EVAL_BATCH, device=accelerator.device)
        tell(report, top1_percent(lambda images: _logits(averaged, images, routes), batches))

    provenance = {
        "space": supernet.space.name,
        "resolution": supernet.resolution,
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "data": data.digest,
    }
    content = supernet.space.without_recipe().to_yaml()  # of recipes the one followed counts
    identity = json.dumps({**provenance, "space": content}, sort_keys=True)
    averaged = fit(
        task,
        accelerator,
        checkpoint=checkpoint,
        identity=hashlib.sha256(identity.encode()).hexdigest(),
        watch=Watch(tell, on_epoch),
    )
    assert isinstance(averaged, Supernet)
    return TrainedSupernet(averaged, weights_digest(averaged), provenance)


def supernet_task(
    supernet: Supernet, images: TrainImages, recipe: SupernetRecipe, *, seed: int
) -> TrainTask:
    """What training a supernet is: its parameter groups, and a loss that draws routes."""
    sandwich = None
    if recipe.sandwich:
        sandwich = Sandwich(supernet, recipe.sandwich, seed=seed, sync_bn=recipe.sync_bn)

    def loss(model: nn.Module, images: Tensor, targets: Tensor, step: int) -> Tensor:
        routes = supernet.draw_routes(
            recipe.tau(step, task.steps),
            mixing=recipe.mixing,
            noise=recipe.noise,
            generator=route_generator(seed, step),
            gradient=recipe.alpha_gradient,
        )
        if step < recipe.waiting_steps(task.steps):
            # Without a gradient AdamW passes the architecture parameters over, moments and all;
            # they are still 0, so that every choice is as likely.
            routes = [route.without_gradient() for route in routes]
        if sandwich is None:
            logits = model(images, routes)
            return cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        return sandwich_loss(
            model(images, routes, sandwich.passes(step)),
            targets,
            label_smoothing=recipe.label_smoothing,
            distil=recipe.sandwich_distillation,
        )

    task = TrainTask(supernet, _groups(supernet, recipe), loss, images, recipe, seed, partial=True)
    return task


def route_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's routes: a function of (seed, step) alone."""
    state = np.random.SeedSequence((seed, _ROUTES, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def weights_digest(module: nn.Module) -> str:
    """SHA-256 (hex) over names and values of every weight and buffer."""
    return tensors_digest(module.state_dict())


def save_supernet(path: str | Path, trained: TrainedSupernet) -> None:
    """Write a trained supernet with its space atomically.

    Raises:
        RunFolderError: the place cannot be written.
    """
    metadata = {
        "schema": SCHEMA,
        "space": trained.supernet.space.to_yaml(),
        "resolution": trained.supernet.resolution,
        "digest": trained.digest,
        "provenance": trained.provenance,
    }
    save_tensors(path, trained.supernet.state_dict(), metadata)


def load_supernet(path: str | Path) -> TrainedSupernet:
    """Read what `save_supernet` wrote.

    Raises:
        WeightsError: missing, damaged, of another schema, or altered.
    """
    tensors, metadata = load_tensors(path, WHAT)
    if metadata.get("schema") != SCHEMA:
        raise WeightsError(
            f"{path}: schema: must be {SCHEMA!r}, got {metadata.get('schema')!r}; expected {WHAT}"
        )
    try:
        space = SearchSpace.from_yaml(metadata["space"], source=f"{path} (space)")
        supernet = Supernet(space, resolution=int(metadata["resolution"]), seed=0).eval()
        supernet.load_state_dict(tensors)
        provenance = dict(metadata["provenance"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise WeightsError(f"{path}: not {WHAT} ({first}); train it again") from error
    digest = weights_digest(supernet)
    if digest != metadata.get("digest"):
        raise WeightsError(f"{path}: its weights do not match its digest; train it again")
    return TrainedSupernet(supernet, digest, provenance)


def _groups(supernet: Supernet, recipe: SupernetRecipe) -> list[dict[str, Any]]:
    named = dict(supernet.named_parameters())
    alphas = [parameter for name, parameter in named.items() if name.endswith(".alpha")]
    weights = {name: p for name, p in named.items() if not name.endswith(".alpha")}
    alpha_group = {
        "params": alphas,
        "lr": recipe.alpha_lr,
        "weight_decay": recipe.alpha_weight_decay,
        "betas": recipe.alpha_betas,
    }
    return [*decay_groups(weights, recipe), alpha_group]


def _logits(supernet: Supernet, images: Tensor, routes: list[Any]) -> Tensor:
    logits: Tensor = supernet(images, routes)
    return logits
