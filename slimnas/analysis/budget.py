"""The same small training budget for every network of a study, and the accuracy it gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimnas.arch.architecture import Architecture
from slimnas.data.splits import DataSplits
from slimnas.nn.build import Network, build
from slimnas.nn.regularisation import set_layer_scale
from slimnas.train.evaluate import top1_percent
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, fit
from slimnas.train.recipe import TrainRecipe

EVAL_BATCH = 100
CALIBRATION_BATCHES = 10
"""Batches of TRAIN that BatchNorm's statistics are taken from."""

DIGITS_RESOLUTION = 64
"""Side to which digits, 8x8 pixels each, are enlarged unless told otherwise."""


@torch.no_grad()
def recalibrate_norms(network: Network, batches: Iterable[Tensor]) -> None:
    """Take BatchNorm's statistics anew, from `batches` of images (B, c, H, W).

    After a short training the running ones, averaged once more with the weights, lag far behind
    the weights: accuracies would tell of that alone.
    """
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    network.train()
    for images in batches:
        network(images)
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@dataclass(frozen=True)
class TrainingBudget:
    """How every network of a study is trained.

    Attributes:
        data: images at `resolution`; trained on TRAIN, accuracy on TEST, on which nothing is
            chosen.
        recipe: see `TrainRecipe`.
        accelerator: where, in which precision.
        resolution: side or (height, width) that networks are built for.
        folder: of the state of a training that is under way.
        threads: of torch on a CPU; timing before may have left it at fewer.
        on_step: called after every step.
        layer_scale: where every layer scale starts; None for where its block puts it.
    """

    data: DataSplits
    recipe: TrainRecipe
    accelerator: Accelerator
    resolution: int | tuple[int, int]
    folder: Path
    threads: int
    on_step: Callable[[StepReport], None] = lambda report: None
    layer_scale: float | None = None

    def settings(self) -> dict[str, Any]:
        """Everything a result depends on but network and seed, as plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "data_digest": self.data.digest,
            "resolution": self.resolution,
            "layer_scale": self.layer_scale,
        }

    def adapted(self, architecture: Architecture) -> Architecture:
        """`architecture` for the data's classes and the budget's resolution.

        Raises:
            SpecError: it cannot be built for that resolution.
        """
        resized = architecture.with_resolution(self.resolution)
        return resized.with_head(classes=self.data.classes)

    def train(self, architecture: Architecture, *, seed: int) -> Network:
        """A network of `architecture`, adapted and trained from random weights.

        Stopped at any moment, the same call goes on where it was.

        Args:
            architecture: what to train.
            seed: of weights and batches.

        Raises:
            WeightsError: the loss is no longer finite.
            KeyboardInterrupt: Ctrl-C; the state is on disk.
        """
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        network = build(self.adapted(architecture), seed=seed)
        if self.layer_scale is not None:
            set_layer_scale(network, self.layer_scale)

        def loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
            logits = model(images)
            given = logits if isinstance(logits, tuple) else (logits,)
            smoothing = self.recipe.label_smoothing
            losses = [F.cross_entropy(one, labels, label_smoothing=smoothing) for one in given]
            return torch.stack(losses).mean()

        groups = decay_groups(dict(network.named_parameters()), self.recipe)
        task = TrainTask(network, groups, loss, self.data.train, self.recipe, seed)
        identity = json.dumps([network.architecture.digest, seed, self.settings()])
        key = hashlib.sha256(identity.encode()).hexdigest()
        averaged = fit(
            task,
            self.accelerator,
            checkpoint=self.folder / f"training-{key[:16]}.safetensors",
            identity=key,
            watch=Watch(on_step=self.on_step),
        )
        assert isinstance(averaged, Network)
        recalibrate_norms(averaged, self._calibration())
        return averaged.requires_grad_().eval()  # averages are kept out of autograd

    def _calibration(self) -> Iterator[Tensor]:
        device, size = self.accelerator.device, min(EVAL_BATCH, len(self.data.train))
        batches = self.data.train.batches(size, device=device, seed=0, epoch=0, augment=False)
        return (images for images, _ in islice(batches, CALIBRATION_BATCHES))

    def top1(self, network: Network) -> float:
        """Top-1 of `network` on TEST, in percent."""
        device = self.accelerator.device
        batches = self.data.test.eval_batches(EVAL_BATCH, device=device)
        return top1_percent(network.to(device).eval(), batches)

    def trained_top1(self, architecture: Architecture, *, seed: int) -> float:
        """Train and give the top-1 on TEST, in percent; leaves no file behind."""
        top1 = self.top1(self.train(architecture, seed=seed))
        self.clean_up()
        return top1

    def clean_up(self) -> None:
        """Remove the states of trainings whose result is known."""
        for path in self.folder.glob("training-*.safetensors"):
            path.unlink(missing_ok=True)
