"""Accuracy and calibration: against scikit-learn, SciPy, PyTorch and plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score
from torch import Tensor

from slimnas.errors import DataError, TrainingError, WeightsError
from slimnas.train.evaluate import (
    BINS,
    Evaluation,
    Tally,
    evaluate,
    top1_percent,
    wilson_percent,
)
from slimnas.train.evaluation_compare import SHOWN, Disagreement, evaluate_all


def answers(classes: int, images: int, seed: int = 0, sure: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits and labels; the label's logit is raised, so that some answers are right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 1.0
    return sure * logits, labels


def batched(x: Tensor, labels: Tensor, size: int = 7) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(size), labels.split(size), strict=True)


def evaluated(logits: Tensor, labels: Tensor, size: int = 7) -> Evaluation:
    return evaluate(lambda x: x, batched(logits, labels, size), logits.shape[1])


@pytest.mark.parametrize(("classes", "images"), [(6, 200), (10, 33), (40, 150), (100, 64)])
def test_shares_are_scikit_learns(classes: int, images: int) -> None:
    logits, labels = answers(classes, images, seed=classes)
    found = evaluated(logits, labels)
    y, scores = labels.numpy(), logits.double().numpy()
    predicted = scores.argmax(axis=1)
    every = np.arange(classes)
    assert found.top1 == pytest.approx(100 * accuracy_score(y, predicted))
    assert found.top1 == pytest.approx(top1_percent(lambda x: x, batched(logits, labels)))
    assert found.top5 == pytest.approx(100 * top_k_accuracy_score(y, scores, k=5, labels=every))
    for k in (2, 3):
        expected = top_k_accuracy_score(y, scores, k=k, labels=every)
        assert found.top(k) == pytest.approx(100 * expected)
    matrix = confusion_matrix(y, predicted, labels=every)
    assert (found.confusion == matrix).all()
    assert {(i, j): n for i, j, n in found.cells} == {
        (i, j): matrix[i, j] for i, j in np.argwhere(matrix).tolist()
    }
    present = np.unique(y)
    recalls = recall_score(y, predicted, labels=present, average=None, zero_division=0.0)
    assert found.per_class[present] == pytest.approx(100 * recalls)
    assert np.isnan(np.delete(found.per_class, present)).all()
    assert found.class_mean == pytest.approx(100 * recalls.mean())
    assert found.class_images.tolist() == np.bincount(y, minlength=classes).tolist()
    assert found.images == images
    assert 0 < found.right < images


@pytest.mark.parametrize("sure", [0.3, 1.0, 5.0])
def test_calibration_is_what_a_loop_over_bins_finds(sure: float) -> None:
    logits, labels = answers(8, 300, seed=3, sure=sure)
    found = evaluated(logits, labels)
    probabilities = logits.double().softmax(dim=1).numpy()
    expected = largest = 0.0
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels.numpy(), strict=True)
            if low < row.max() <= high
        ]
        assert found.bins[number].images == len(inside)
        if inside:
            gap = abs(np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside]))
            expected += len(inside) / 300 * gap
            largest = max(largest, gap)
        else:
            assert found.bins[number].accuracy is None
    assert found.ece == pytest.approx(100 * expected)
    assert found.worst_gap == pytest.approx(100 * largest)
    assert found.confidence == pytest.approx(100 * probabilities.max(axis=1).mean())
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert found.nll == pytest.approx(float(loss))


def test_bins_are_closed_above_and_hold_everything() -> None:
    """Confidences of 1/15, 2/15, ... lie in the bin that ends there; 1 in the last."""
    shares = np.array([1 / 15, 0.2, 0.6, 1.0, 1e-9])
    zeros = np.zeros(5, dtype=np.int64)
    found = Evaluation(20, zeros, zeros, zeros, shares, np.zeros(5))
    assert [number for number, one in enumerate(found.bins) if one.images] == [0, 2, 8, 14]
    assert sum(one.images for one in found.bins) == 5
    assert found.bins[0].images == 2


def test_a_calibrated_network_has_no_error() -> None:
    """Probabilities 0.8 and 0.2 with 4 of 5 right."""
    logits = torch.log(torch.tensor([[0.8, 0.2]], dtype=torch.float64)).repeat(5, 1)
    found = evaluated(logits, torch.tensor([0, 0, 0, 0, 1]))
    assert found.ece == pytest.approx(0.0, abs=1e-9)
    assert found.top1 == pytest.approx(80.0)
    assert found.confidence == pytest.approx(80.0)


def test_equal_logits_go_to_the_first_class() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = evaluated(logits, torch.tensor([0, 1, 2]))
    assert found.predicted.tolist() == [0, 0, 0]
    assert found.places.tolist() == [0, 1, 2]
    assert found.right == 1


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_top5_of_few_classes_is_everything(classes: int) -> None:
    logits, labels = answers(classes, 40)
    found = evaluated(logits, labels)
    assert found.top5 == 100.0
    assert found.top1 < 100.0


def test_confusions_come_the_most_frequent_first() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    predicted = torch.tensor([1, 1, 0, 0, 0, 3, 3, 2, 2, 3])
    found = evaluated(torch.nn.functional.one_hot(predicted, 5).double(), labels)
    pairs = [(one.label, one.predicted, one.images, one.of) for one in found.confusions(10)]
    # Equally frequent: the larger share of its class first.
    assert pairs == [(1, 0, 2, 2), (0, 1, 2, 3), (2, 3, 2, 4)]
    assert len(found.confusions(2)) == 2


@pytest.mark.parametrize(
    ("right", "images"), [(531, 650), (0, 12), (12, 12), (1, 3), (9000, 10000)]
)
def test_the_interval_is_wilsons(right: int, images: int) -> None:
    expected = binomtest(right, images).proportion_ci(0.95, method="wilson")
    low, high = wilson_percent(right, images)
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)


def test_batches_do_not_matter() -> None:
    logits, labels = answers(12, 50)
    one, other = evaluated(logits, labels, 50), evaluated(logits, labels, 3)
    assert one.predicted.tolist() == other.predicted.tolist()
    assert one.ece == other.ece
    seen: list[int] = []
    evaluate(lambda x: x, batched(logits, labels, 20), 12, seen.append)
    assert seen == [20, 40, 50]


def test_huge_logits_have_finite_probabilities() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, 0.0]])
    found = evaluated(logits, torch.tensor([0, 0]))
    assert found.confidences.tolist() == [1.0, 1.0]
    assert found.nll == 0.0


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([[1.0, 0.0]], [2], DataError, r"labels must lie in 0\.\.1, 1 of 1 do not, .* is 2 of im"),
        ([[1.0, 0.0]] * 3, [0, -1, 1], DataError, r"1 of 3 do not, the first is -1 of image 1;"),
        ([[math.nan, 0.0]], [1], WeightsError, "its logits must be finite, those of 1 images"),
        ([[0.0, 1.0], [math.inf, 0.0]], [1, 0], WeightsError, "the first is image 1; the weights"),
        ([[1.0, 0.0, 0.0]], [0], WeightsError, r"must give 2 logits per image, gives shape \(1, 3"),
        ([1.0, 0.0], [0, 0], WeightsError, r"must give 2 logits per image, gives shape \(2,\)"),
    ],
)
def test_what_cannot_be_judged(logits: Any, labels: Any, error: Any, message: str) -> None:
    batch = torch.tensor(logits), torch.tensor(labels)
    with pytest.raises(error, match=message):
        evaluate(lambda x: x, [batch], 2)


def test_the_number_of_an_image_counts_from_the_first_batch() -> None:
    tally = Tally(2)
    tally.add(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="is 7 of image 5;"):
        tally.add(torch.zeros(2, 2), torch.tensor([0, 7]))


def test_no_images() -> None:
    with pytest.raises(DataError, match="at least one image, got none"):
        evaluate(lambda x: x, [], 2)


def compared(one: Tensor, other: Tensor, labels: Tensor) -> Disagreement:
    """Both columns of logits at once, in batches of 7."""
    both = torch.stack([one, other], dim=1)
    found, disagreement = evaluate_all(
        {"a": lambda x: x[:, 0], "b": lambda x: x[:, 1]}, batched(both, labels), one.shape[1]
    )
    assert disagreement is not None
    assert found["a"].predicted.tolist() == one.argmax(dim=1).tolist()
    assert found["b"].predicted.tolist() == other.argmax(dim=1).tolist()
    return disagreement


def test_two_that_agree() -> None:
    logits, labels = answers(9, 40)
    other = logits + 1e-6
    found = compared(logits, other, labels)
    assert (found.different, found.share_percent, found.first) == (0, 0.0, ())
    assert found.images == 40
    difference = (logits.double() - other.double()).abs()
    assert found.largest_difference == float(difference.max())
    assert found.largest_at == int(difference.amax(dim=1).argmax())
    assert found.largest_logit == float(logits.abs().max())


def test_two_that_do_not() -> None:
    logits, labels = answers(9, 60)
    other = logits.clone()
    changed = [2, 13, 14, *range(30, 45)]
    for row in changed:
        other[row, (int(logits[row].argmax()) + 1) % 9] = logits[row].max() + 0.5
    other[50, 3] -= 40.0  # no other answer, but the largest difference
    found = compared(logits, other, labels)
    assert int(logits[50].argmax()) != 3
    assert found.different == len(changed)
    assert found.share_percent == pytest.approx(100 * len(changed) / 60)
    assert [one.image for one in found.first] == changed[:SHOWN]
    first = found.first[0]
    mine = int(logits[2].argmax())
    assert first.answers == (mine, (mine + 1) % 9)
    assert first.label == int(labels[2])
    assert first.margins[1] == pytest.approx(0.5, abs=1e-5)
    assert first.margins[0] == pytest.approx(float(logits[2, mine] - logits[2, (mine + 1) % 9]))
    assert found.largest_at == 50
    assert found.largest_difference == pytest.approx(40.0)


def test_one_alone_has_nobody_to_disagree_with() -> None:
    logits, labels = answers(4, 10)
    found, disagreement = evaluate_all({"x": lambda x: x}, batched(logits, labels), 4)
    assert disagreement is None
    assert list(found) == ["x"]
    with pytest.raises(WeightsError, match="one or two predictors, got 0"):
        evaluate_all({}, batched(logits, labels), 4)


def test_messages_name_who_is_wrong() -> None:
    logits, labels = answers(4, 10)
    with pytest.raises(WeightsError, match=r"^onnx: must give 4 logits"):
        evaluate_all(
            {"pytorch": lambda x: x, "onnx": lambda x: x[:, :3]}, batched(logits, labels), 4
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_option(error: Exception) -> None:
    logits, labels = answers(4, 10)

    def full(_: Tensor) -> Tensor:
        raise error

    with pytest.raises(TrainingError, match="batches of 7 images; give a smaller --batch-size"):
        evaluate_all({"pytorch": full}, batched(logits, labels), 4)


def test_other_failures_are_not_hidden() -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate_all({"pytorch": broken}, [answers(4, 3)], 4)
