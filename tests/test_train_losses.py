"""Losses against formulas written out, timm's and DeiT's."""

from __future__ import annotations

import math

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from slimnas.errors import WeightsError
from slimnas.prune.finetune import FinetuneRecipe, distillation_loss
from slimnas.train.losses import check_teacher, network_loss, target_loss, teacher_divergence
from slimnas.train.network_recipe import NetworkRecipe

CLASSES = 5


def randoms(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([3, 0, 4])
CLASS_LOGITS, TEACHER_LOGITS = randoms(1, 3, CLASSES), randoms(2, 3, CLASSES)
OTHER_LOGITS = randoms(3, 3, CLASSES)


class Says(nn.Module):
    """Gives the same outputs for any images, and notes how it was called."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = nn.ParameterList(nn.Parameter(part.clone()) for part in given)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.calls.append((self.training, torch.is_grad_enabled()))
        given = tuple(1.0 * part for part in self.given)
        return given if len(given) > 1 else given[0]


def log_softmax(logits: Tensor) -> list[list[float]]:
    rows = []
    for row in logits.tolist():
        log_sum = math.log(sum(math.exp(value) for value in row))
        rows.append([value - log_sum for value in row])
    return rows


def cross_entropy(logits: Tensor, shares: list[list[float]]) -> float:
    rows = log_softmax(logits)
    return -sum(
        share * value
        for row, wanted in zip(rows, shares, strict=True)
        for value, share in zip(row, wanted, strict=True)
    ) / len(rows)


def one_hot(labels: Tensor, smoothing: float = 0.0) -> list[list[float]]:
    spread = smoothing / CLASSES
    return [
        [spread + (1 - smoothing) * (k == label) for k in range(CLASSES)]
        for label in labels.tolist()
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_smoothed(smoothing: float) -> None:
    loss = target_loss(CLASS_LOGITS, LABELS, smoothing)
    assert loss.item() == pytest.approx(cross_entropy(CLASS_LOGITS, one_hot(LABELS, smoothing)))
    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(smoothing)(CLASS_LOGITS, LABELS))


def test_shares_of_classes_are_taken_as_they_are() -> None:
    shares = mixup_target(LABELS, CLASSES, lam=0.3, smoothing=0.1)
    loss = target_loss(CLASS_LOGITS, shares, 0.1)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(CLASS_LOGITS, shares))
    assert loss.item() == pytest.approx(cross_entropy(CLASS_LOGITS, shares.tolist()))


def test_both_outputs_learn_the_labels_where_there_is_no_teacher() -> None:
    loss = network_loss(NetworkRecipe(label_smoothing=0.1))
    images = torch.zeros(3, 1, 2, 2)
    one = loss(Says(CLASS_LOGITS), images, LABELS, 0).item()
    two = loss(Says(CLASS_LOGITS, OTHER_LOGITS), images, LABELS, 0).item()
    first, second = (
        cross_entropy(logits, one_hot(LABELS, 0.1)) for logits in (CLASS_LOGITS, OTHER_LOGITS)
    )
    assert one == pytest.approx(first)
    assert two == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_hard_distillation_is_deits(weight: float) -> None:
    recipe = NetworkRecipe(
        distillation="hard", teacher="t", distillation_weight=weight, label_smoothing=0.1
    )
    student, teacher = Says(CLASS_LOGITS, OTHER_LOGITS).train(), Says(TEACHER_LOGITS).train()
    loss = network_loss(recipe, teacher)(student, torch.zeros(3, 1, 2, 2), LABELS, 0)
    by_labels = cross_entropy(CLASS_LOGITS, one_hot(LABELS, 0.1))
    by_teacher = cross_entropy(OTHER_LOGITS, one_hot(TEACHER_LOGITS.argmax(1)))
    assert loss.item() == pytest.approx((1 - weight) * by_labels + weight * by_teacher)
    loss.backward()
    assert all(part.grad is not None for part in student.given)
    assert all(part.grad is None for part in teacher.given)
    assert teacher.calls == [(False, False)]
    assert student.calls == [(True, True)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_is_hintons(temperature: float) -> None:
    recipe = NetworkRecipe(distillation="soft", teacher="t", temperature=temperature)
    given = Says(CLASS_LOGITS, OTHER_LOGITS)
    loss = network_loss(recipe, Says(TEACHER_LOGITS))(given, torch.zeros(3, 1, 2, 2), LABELS, 0)
    student, teacher = (
        log_softmax(logits / temperature) for logits in (OTHER_LOGITS, TEACHER_LOGITS)
    )
    divergence = sum(
        math.exp(t) * (t - s)
        for mine, theirs in zip(student, teacher, strict=True)
        for s, t in zip(mine, theirs, strict=True)
    ) / len(student)
    by_labels = cross_entropy(CLASS_LOGITS, one_hot(LABELS, recipe.label_smoothing))
    wanted = 0.5 * by_labels + 0.5 * temperature**2 * divergence
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_one_output_learns_labels_and_teacher() -> None:
    recipe = NetworkRecipe(distillation="hard", teacher="t", label_smoothing=0.0)
    loss = network_loss(recipe, Says(TEACHER_LOGITS))
    given = loss(Says(CLASS_LOGITS), torch.zeros(3, 1, 2, 2), LABELS, 0).item()
    targets = [one_hot(LABELS), one_hot(TEACHER_LOGITS.argmax(1))]
    assert given == pytest.approx(sum(cross_entropy(CLASS_LOGITS, t) for t in targets) / 2)


def test_mixed_targets_and_a_teacher() -> None:
    recipe = NetworkRecipe(distillation="hard", teacher="t")
    shares = mixup_target(LABELS, CLASSES, lam=0.3, smoothing=0.1)
    given = Says(CLASS_LOGITS, OTHER_LOGITS)
    loss = network_loss(recipe, Says(TEACHER_LOGITS))(given, torch.zeros(3, 1, 2, 2), shares, 0)
    by_teacher = cross_entropy(OTHER_LOGITS, one_hot(TEACHER_LOGITS.argmax(1)))
    by_labels = cross_entropy(CLASS_LOGITS, shares.tolist())
    assert loss.item() == pytest.approx(0.5 * by_labels + 0.5 * by_teacher)


@pytest.mark.parametrize("pair", [False, True])
def test_pruning_shares_the_teachers_part(pair: bool) -> None:
    recipe = FinetuneRecipe(temperature=2.5, distillation=0.6)
    given = (CLASS_LOGITS, OTHER_LOGITS) if pair else (CLASS_LOGITS,)
    loss = distillation_loss(given if pair else given[0], TEACHER_LOGITS, LABELS, recipe)
    by_labels = target_loss(CLASS_LOGITS, LABELS, recipe.label_smoothing)
    by_teacher = teacher_divergence(given, TEACHER_LOGITS, 2.5)
    assert torch.equal(loss, 0.4 * by_labels + 0.6 * 2.5**2 * by_teacher)


def test_a_teacher_with_other_classes_is_refused() -> None:
    check_teacher(CLASSES, CLASSES)
    with pytest.raises(
        WeightsError, match=r"^a teacher must know the classes .* has 10, the data 5"
    ):
        check_teacher(10, CLASSES)
    recipe = NetworkRecipe(distillation="soft", teacher="t")
    loss = network_loss(recipe, Says(randoms(4, 3, 10)))
    with pytest.raises(WeightsError, match="it has 10, the data 5"):
        loss(Says(CLASS_LOGITS), torch.zeros(3, 1, 2, 2), LABELS, 0)


def test_distillation_without_a_teacher_is_refused() -> None:
    recipe = NetworkRecipe(distillation="hard", teacher="t")
    with pytest.raises(WeightsError, match=r"^distillation 'hard' needs a teacher and got none"):
        network_loss(recipe)
