"""Losses of whole networks: labels or shares of classes, and distillation from a teacher.

Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), equation 1 and
section 2.1; Touvron et al., "Training data-efficient image transformers" (ICML 2021), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.errors import WeightsError
from slimnas.train.loop import Loss
from slimnas.train.network_recipe import NetworkRecipe


def network_loss(recipe: NetworkRecipe, teacher: nn.Module | None = None) -> Loss:
    """The loss that `recipe` asks for.

    A network with a distillation head gives two outputs in training. With a teacher the first
    learns the targets and the second the teacher; without one both learn the targets. A network
    with one output learns both with it.

    With hard distillation the teacher's part is the cross entropy with its likeliest class, with
    soft distillation T^2 * KL(teacher || student) at temperature T, a mean over images.

    Args:
        recipe: label smoothing, and kind, weight and temperature of the distillation. Targets that
            are shares of classes are taken as they are: whoever mixes images smooths them.
        teacher: images (B, c, H, W) -> logits (B, K), on the device of the training; it is put
            into evaluation mode and its parameters are frozen.

    Raises:
        WeightsError: the recipe asks for a teacher and none is given, or, when the loss is called,
            it knows another number of classes.
    """
    if recipe.distillation == "none":
        return _plain_loss(recipe.label_smoothing)
    if teacher is None:
        raise WeightsError(
            f"distillation {recipe.distillation!r} needs a teacher and got none; name one with "
            "--teacher, or train with --distillation none"
        )
    guide = teacher.requires_grad_(False).eval()

    def loss(model: nn.Module, images: Tensor, targets: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            wanted = outputs(guide(images))[0]
        given = outputs(model(images))
        check_teacher(wanted.shape[1], given[-1].shape[1])
        by_labels = target_loss(given[0], targets, recipe.label_smoothing)
        if recipe.distillation == "hard":
            by_teacher = F.cross_entropy(given[-1], wanted.argmax(dim=1))
        else:
            divergence = teacher_divergence(given[-1:], wanted, recipe.temperature)
            by_teacher = recipe.temperature**2 * divergence
        weight = recipe.distillation_weight
        return (1.0 - weight) * by_labels + weight * by_teacher

    return loss


def check_teacher(teacher_classes: int, classes: int) -> None:
    """Refuse a teacher that cannot teach this data's classes.

    Raises:
        WeightsError: its number of classes is another.
    """
    if teacher_classes != classes:
        raise WeightsError(
            f"a teacher must know the classes of the training data: it has {teacher_classes}, the "
            f"data {classes}; fine-tune the teacher on this data first, or train with "
            "--distillation none"
        )


def target_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy, a mean over images.

    Args:
        logits: (B, K).
        targets: class numbers (B,), which are smoothed, or shares of classes (B, K), which are not.
        label_smoothing: share of the target spread over all classes.
    """
    smoothing = 0.0 if targets.is_floating_point() else label_smoothing
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def teacher_divergence(given: Sequence[Tensor], target: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) with both logits divided by `temperature`, a mean over images.

    Times the temperature's square it has gradients as large as the labels' (Hinton et al., 2.1).

    Args:
        given: logits (B, K) of the student's outputs, which are averaged over.
        target: of the teacher, (B, K).
        temperature: above 0.
    """
    soft = F.log_softmax(target.float() / temperature, dim=1)
    return torch.stack(
        [
            F.kl_div(
                F.log_softmax(mine.float() / temperature, dim=1),
                soft,
                reduction="batchmean",
                log_target=True,
            )
            for mine in given
        ]
    ).mean()


def outputs(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a network gives, as a tuple: one output, or two of a distilled head in training."""
    return given if isinstance(given, tuple) else (given,)


def _plain_loss(label_smoothing: float) -> Loss:
    def loss(model: nn.Module, images: Tensor, targets: Tensor, step: int) -> Tensor:
        losses = [target_loss(x, targets, label_smoothing) for x in outputs(model(images))]
        return torch.stack(losses).mean()

    return loss
