"""Two forms of one network on the same images: do they disagree?

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimnas.errors import TrainingError, WeightsError
from slimnas.train.evaluate import Evaluation, Predict, Tally

SHOWN = 10
"""Images with different answers that are kept; the rest are counted."""


@dataclass(frozen=True)
class OtherAnswer:
    """An image that gets two answers.

    Attributes:
        image: its number, from 0.
        label: its class.
        answers: the class each of the two says.
        margins: how far each one's answer lies above the other's, in logits: near 0 it is rounding.
    """

    image: int
    label: int
    answers: tuple[int, int]
    margins: tuple[float, float]


@dataclass(frozen=True)
class Disagreement:
    """How two predictors differ.

    Attributes:
        names: of the two.
        images: images compared.
        different: images with another top-1.
        largest_difference: largest absolute difference between two logits.
        largest_at: the image it occurs on.
        largest_logit: largest absolute logit of the first, to judge the difference by.
        first: the first images with another top-1, at most `SHOWN`.
    """

    names: tuple[str, str]
    images: int
    different: int
    largest_difference: float
    largest_at: int
    largest_logit: float
    first: tuple[OtherAnswer, ...]

    @property
    def share_percent(self) -> float:
        """Share of images with another top-1, in percent."""
        return 100.0 * self.different / self.images


class Comparison:
    """Compares two predictors batch by batch.

    Args:
        names: of the two, for messages.
    """

    def __init__(self, names: tuple[str, str]) -> None:
        self._names = names
        self._images = self._different = self._largest_at = 0
        self._largest_difference, self._largest_logit = -1.0, 0.0
        self._first: list[OtherAnswer] = []

    def add(self, one: Tensor, other: Tensor, labels: Tensor) -> None:
        """Take the logits (B, K) of both and the labels (B,) of one batch."""
        a, b = one.detach().cpu().double(), other.detach().cpu().double()
        answers = a.argmax(dim=1), b.argmax(dim=1)
        for row in torch.nonzero(answers[0] != answers[1]).flatten().tolist():
            self._different += 1
            if len(self._first) < SHOWN:
                mine, theirs = int(answers[0][row]), int(answers[1][row])
                margins = float(a[row, mine] - a[row, theirs]), float(b[row, theirs] - b[row, mine])
                place = self._images + row
                self._first.append(OtherAnswer(place, int(labels[row]), (mine, theirs), margins))
        differences = (a - b).abs().amax(dim=1)
        worst = int(differences.argmax())
        if float(differences[worst]) > self._largest_difference:
            self._largest_difference = float(differences[worst])
            self._largest_at = self._images + worst
        self._largest_logit = max(self._largest_logit, float(a.abs().max()))
        self._images += len(labels)

    def result(self) -> Disagreement:
        """What was found, of at least one image."""
        return Disagreement(
            names=self._names,
            images=self._images,
            different=self._different,
            largest_difference=self._largest_difference,
            largest_at=self._largest_at,
            largest_logit=self._largest_logit,
            first=tuple(self._first),
        )


@torch.inference_mode()
def evaluate_all(
    predictors: Mapping[str, Predict],
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[dict[str, Evaluation], Disagreement | None]:
    """Ask one predictor, or two on the same images.

    Args:
        predictors: one or two, by name; images (B, c, H, W) -> logits (B, classes).
        batches: pairs of images and labels (B,); at least one image in all.
        classes: number of classes.
        on_batch: called after every batch with the images so far.

    Returns:
        The evaluation of each, and how they differ; None for one alone.

    Raises:
        DataError: no images, or a label outside the classes.
        WeightsError: logits of another number of classes, or not finite.
        TrainingError: out of memory.
    """
    names = tuple(predictors)
    if len(names) not in (1, 2):
        raise WeightsError(f"evaluation compares one or two predictors, got {len(names)}")
    tallies = {name: Tally(classes, name) for name in names}
    comparison = Comparison((names[0], names[1])) if len(names) == 2 else None
    seen = 0
    for images, labels in batches:
        logits = [_asked(predict, images) for predict in predictors.values()]
        for tally, given in zip(tallies.values(), logits, strict=True):
            tally.add(given, labels)
        if comparison is not None:
            comparison.add(logits[0], logits[1], labels)
        seen += len(labels)
        on_batch(seen)
    found = {name: tally.result() for name, tally in tallies.items()}
    return found, None if comparison is None else comparison.result()


def _asked(predict: Predict, images: Tensor) -> Tensor:
    try:
        return predict(images)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise TrainingError(
            f"out of memory with batches of {len(images)} images; give a smaller --batch-size"
        ) from error
