"""Training a supernet once: weights and architecture parameters in the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.arch.space import SearchSpace
from slimnas.data.batches import ImageSet
from slimnas.data.splits import SearchData
from slimnas.errors import WeightsError
from slimnas.nn.tensorfiles import load_tensors, save_tensors, tensors_digest
from slimnas.supernet.gumbel import temperature
from slimnas.supernet.supernet import Supernet
from slimnas.train.evaluate import top1_percent
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, fit
from slimnas.train.recipe import Positive, TrainRecipe

SCHEMA = "slimnas/supernet/1"
WHAT = "a supernet checkpoint"
EVAL_BATCH = 256
_ROUTES = 3  # keeps this random stream apart from those of the data


class SupernetRecipe(TrainRecipe):
    """`TrainRecipe` and what only a supernet has.

    Attributes:
        mixing: `sampled` runs one path per MetaPath and step, `soft` mixes all (the paper).
        noise: `gumbel`, or the paper's literal `uniform`.
        tau_start: temperature at the beginning.
        tau_end: temperature at the end.
        alpha_lr: peak learning rate of the architecture parameters.
        alpha_weight_decay: their weight decay.
        layer_scale: initial value of every layer scale.
    """

    mixing: Literal["sampled", "soft"] = "sampled"
    noise: Literal["gumbel", "uniform"] = "gumbel"
    tau_start: Positive = 4.0
    tau_end: Positive = 1.0
    alpha_lr: Positive = 1e-2
    alpha_weight_decay: float = 0.0
    layer_scale: Positive = 0.1

    def tau(self, step: int, steps: int) -> float:
        """Temperature of `step` (from 0) of `steps`."""
        return temperature(step / max(1, steps - 1), self.tau_start, self.tau_end)


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
        accelerator: where.
        seed: of batches and routes.
        checkpoint: state file; the run goes on from it if it exists.
        on_progress: called after every step and epoch.

    Raises:
        WeightsError: the checkpoint is not this run's, or the loss is no longer finite.
    """
    task = supernet_task(supernet, data.train, recipe, seed=seed)

    def tau_at(step: int) -> float:
        return recipe.tau(step, task.steps)

    def on_epoch(averaged: nn.Module, report: StepReport) -> None:
        assert isinstance(averaged, Supernet)
        routes = averaged.likeliest_routes()
        batches = data.search.eval_batches(EVAL_BATCH, device=accelerator.device)
        top1 = top1_percent(lambda images: _logits(averaged, images, routes), batches)
        on_progress(Progress(report, tau_at(report.step - 1), top1))

    provenance = {
        "space": supernet.space.name,
        "resolution": supernet.resolution,
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "data": data.digest,
    }
    identity = json.dumps({**provenance, "space": supernet.space.to_yaml()}, sort_keys=True)
    averaged = fit(
        task,
        accelerator,
        checkpoint=checkpoint,
        identity=hashlib.sha256(identity.encode()).hexdigest(),
        watch=Watch(
            lambda report: on_progress(Progress(report, tau_at(report.step - 1))), on_epoch
        ),
    )
    assert isinstance(averaged, Supernet)
    return TrainedSupernet(averaged, weights_digest(averaged), provenance)


def supernet_task(
    supernet: Supernet, images: ImageSet, recipe: SupernetRecipe, *, seed: int
) -> TrainTask:
    """What training a supernet is: its parameter groups, and a loss that draws routes."""

    def loss(images: Tensor, labels: Tensor, step: int) -> Tensor:
        routes = supernet.draw_routes(
            recipe.tau(step, task.steps),
            mixing=recipe.mixing,
            noise=recipe.noise,
            generator=route_generator(seed, step),
        )
        logits = supernet(images, routes)
        return cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)

    task = TrainTask(supernet, _groups(supernet, recipe), loss, images, recipe, seed)
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
        "betas": (0.5, 0.999),  # as DARTS: architecture gradients are noisy and change early
    }
    return [*decay_groups(weights, recipe), alpha_group]


def _logits(supernet: Supernet, images: Tensor, routes: list[Any]) -> Tensor:
    logits: Tensor = supernet(images, routes)
    return logits
