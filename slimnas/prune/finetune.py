"""Training of whole networks for pruning: fine-tuning with distillation, and plain training.

Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), equation 1 and
section 2; the unpruned network is the teacher.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from slimnas.data.batches import ImageSet
from slimnas.nn.build import Network
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.prune.calibration import EVAL_BATCH
from slimnas.train.evaluate import top1_percent
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, fit
from slimnas.train.losses import teacher_divergence
from slimnas.train.recipe import Positive, Share, TrainRecipe

OnStep = Callable[[StepReport], None]


class FinetuneRecipe(TrainRecipe):
    """`TrainRecipe` with gentle defaults, and distillation from the unpruned network.

    Attributes:
        distillation: weight of the teacher's part of the loss; the labels' is one minus it.
        temperature: that both networks' logits are divided by.
    """

    epochs: Annotated[int, Field(strict=True, ge=1)] = 5
    batch_size: Annotated[int, Field(strict=True, ge=1)] = 32
    lr: Positive = 1e-4
    min_lr: Positive = 1e-6
    ema_decay: Share = 0.98
    distillation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    temperature: Positive = 2.0


def finetune(
    network: Network,
    teacher: Network,
    images: ImageSet,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_step: OnStep = lambda report: None,
) -> Network:
    """A trained copy of `network`; both networks are left as they are, but moved to the device.

    Args:
        network: the pruned one.
        teacher: the unpruned one, of the same classes.
        images: to train on, normalised as both networks expect.
        recipe: how.
        accelerator: where.
        seed: of the batches.
        checkpoint: state file; the run goes on from it if it is there.
        on_step: called after every step.

    Raises:
        WeightsError: the checkpoint is another run's, or the loss is no longer finite.
    """
    student = copy.deepcopy(network)
    guide = copy.deepcopy(teacher).requires_grad_(False).eval().to(accelerator.device)
    identity = json.dumps(
        {
            "student": tensors_digest(student.state_dict()),
            "architecture": student.architecture.digest,
            "teacher": tensors_digest(guide.state_dict()),
            "recipe": recipe.model_dump(mode="json"),
            "seed": seed,
            "images": len(images),
            "labels": tensors_digest({"labels": images.labels}),
        },
        sort_keys=True,
    )

    def loss(model: nn.Module, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            target = guide(pixels)
        return distillation_loss(model(pixels), target, labels, recipe)

    return _fit(
        TrainTask(student, _groups(student, recipe), loss, images, recipe, seed),
        accelerator,
        checkpoint,
        hashlib.sha256(identity.encode()).hexdigest(),
        on_step,
    )


def distillation_loss(
    logits: Tensor | tuple[Tensor, Tensor], target: Tensor, labels: Tensor, recipe: FinetuneRecipe
) -> Tensor:
    """(1 - w) * cross entropy + w * T^2 * KL(teacher || student), at temperature T.

    T^2 keeps the teacher's gradients as large as the labels' (Hinton et al., section 2.1). Of a
    pair of logits, as distilled heads give in training, the first learn the labels and both the
    teacher.

    Args:
        logits: of the student, (B, K), or a pair of such.
        target: of the teacher, (B, K).
        labels: class numbers (B,).
        recipe: weight, temperature and label smoothing.
    """
    given = logits if isinstance(logits, tuple) else (logits,)
    by_labels = F.cross_entropy(given[0], labels, label_smoothing=recipe.label_smoothing)
    by_teacher = teacher_divergence(given, target, recipe.temperature)
    weight = recipe.distillation
    return (1.0 - weight) * by_labels + weight * recipe.temperature**2 * by_teacher


def train_on_labels(
    network: Network,
    images: ImageSet,
    recipe: TrainRecipe,
    accelerator: Accelerator,
    *,
    seed: int,
    checkpoint: Path,
    identity: str,
    on_step: OnStep,
) -> Network:
    """Train `network` in place by cross entropy; returns its averaged weights, evaluating.

    Raises:
        WeightsError: the checkpoint is another run's, or the loss is no longer finite.
    """

    def loss(model: nn.Module, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        logits = model(pixels)
        given = logits if isinstance(logits, tuple) else (logits,)
        losses = [F.cross_entropy(x, labels, label_smoothing=recipe.label_smoothing) for x in given]
        return torch.stack(losses).mean()

    task = TrainTask(network, _groups(network, recipe), loss, images, recipe, seed)
    return _fit(task, accelerator, checkpoint, identity, on_step)


def evaluate(network: Network, images: ImageSet, device: torch.device | str) -> float:
    """Share of `images` whose label `network` gives, in percent; moves it to `device`."""
    network.to(device).eval()
    return top1_percent(network, images.eval_batches(EVAL_BATCH, device=device))


def _fit(
    task: TrainTask,
    accelerator: Accelerator,
    checkpoint: Path | None,
    identity: str,
    on_step: OnStep,
) -> Network:
    averaged = fit(
        task, accelerator, checkpoint=checkpoint, identity=identity, watch=Watch(on_step=on_step)
    )
    assert isinstance(averaged, Network)
    return averaged.requires_grad_().eval()  # averages are kept out of autograd


def _groups(network: Network, recipe: TrainRecipe) -> list[dict[str, object]]:
    return decay_groups(dict(network.named_parameters()), recipe)
