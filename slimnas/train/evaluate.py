"""Accuracy and calibration of a network on labelled images.

Calibration: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 2,
equations 2 to 5.

Shapes: B batch, N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimnas.data.sources import LongArray
from slimnas.errors import DataError, WeightsError

FEW = 5
"""A label counts for top-5 among this many best answers."""
BINS = 15
"""Bins of confidence, as in Guo et al."""
NORMAL_95 = 1.959964
"""Quantile of the normal distribution for intervals of 95 %."""

FloatArray = NDArray[np.float64]
Predict = Callable[[Tensor], Tensor]
"""Images (B, c, H, W) -> logits (B, K)."""


@torch.inference_mode()
def top1_percent(predict: Predict, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images whose largest logit is the label's, in percent.

    Args:
        predict: images (B, c, H, W) -> logits (B, K).
        batches: pairs of images and labels (B,); at least one image in all.
    """
    right = total = 0
    for images, labels in batches:
        right += int((predict(images).argmax(dim=1) == labels).sum())
        total += len(labels)
    return 100.0 * right / total


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies above `low` and up to `high`.

    Attributes:
        low, high: its ends, from 0 to 1.
        images: how many.
        accuracy: share of them that is right; None without images.
        confidence: their mean confidence; None without images.
    """

    low: float
    high: float
    images: int
    accuracy: float | None
    confidence: float | None


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another.

    Attributes:
        label: their class.
        predicted: what they were taken for.
        images: how many.
        of: images of the class in all.
    """

    label: int
    predicted: int
    images: int
    of: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network answered to every image, and what follows from it.

    Attributes:
        classes: K.
        labels: class numbers (N,).
        predicted: the class of the largest logit (N,), the first of equal ones.
        places: place of the label among the answers (N,), 0 is the best.
        confidences: largest softmax probability (N,).
        surprisals: -log of the label's probability (N,), nats.
    """

    classes: int
    labels: LongArray
    predicted: LongArray
    places: LongArray
    confidences: FloatArray
    surprisals: FloatArray

    @property
    def images(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def right(self) -> int:
        """Images whose largest logit is the label's."""
        return int((self.places == 0).sum())

    @property
    def top1(self) -> float:
        """Share of right answers, in percent."""
        return self.top(1)

    @property
    def top5(self) -> float:
        """Share of labels among the five best answers, in percent; 100 with up to 5 classes."""
        return self.top(FEW)

    def top(self, k: int) -> float:
        """Share of images whose label is among the `k` best answers, in percent."""
        return 100.0 * int((self.places < k).sum()) / self.images

    @property
    def top1_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `top1`: images drawn anew would give another share."""
        return wilson_percent(self.right, self.images)

    @property
    def class_images(self) -> LongArray:
        """Images of each class (K,)."""
        return np.bincount(self.labels, minlength=self.classes).astype(np.int64)

    @property
    def class_right(self) -> LongArray:
        """Right answers of each class (K,)."""
        return np.bincount(self.labels[self.places == 0], minlength=self.classes).astype(np.int64)

    @property
    def per_class(self) -> FloatArray:
        """Share of each class's images that is right (K,), in percent; NaN without images."""
        images = self.class_images
        return np.where(images > 0, 100.0 * self.class_right / np.maximum(images, 1), np.nan)

    @property
    def class_mean(self) -> float:
        """Mean of `per_class` over the classes that have images, in percent."""
        return float(np.nanmean(self.per_class))

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        """Cells of the confusion matrix that are not zero: class, predicted class, images."""
        pairs = self.labels * self.classes + self.predicted
        found, counts = np.unique(pairs, return_counts=True)
        return [
            (int(pair) // self.classes, int(pair) % self.classes, int(count))
            for pair, count in zip(found, counts, strict=True)
        ]

    @property
    def confusion(self) -> LongArray:
        """Images by class (rows) and predicted class (columns), (K, K)."""
        matrix = np.zeros((self.classes, self.classes), dtype=np.int64)
        np.add.at(matrix, (self.labels, self.predicted), 1)
        return matrix

    def confusions(self, most: int) -> list[Confusion]:
        """The `most` frequent mistakes, the most frequent first."""
        images = self.class_images
        wrong = [cell for cell in self.cells if cell[0] != cell[1]]
        wrong.sort(key=lambda cell: (-cell[2], -cell[2] / images[cell[0]], cell))
        return [Confusion(*cell, of=int(images[cell[0]])) for cell in wrong[:most]]

    @property
    def bins(self) -> tuple[Bin, ...]:
        """The images by confidence, in `BINS` bins of equal width."""
        # Bins are closed above: ((m - 1) / M, m / M].
        which = np.clip(np.ceil(self.confidences * BINS).astype(np.int64) - 1, 0, BINS - 1)
        found = []
        for number in range(BINS):
            mine = which == number
            count = int(mine.sum())
            right = float((self.places[mine] == 0).mean()) if count else None
            confidence = float(self.confidences[mine].mean()) if count else None
            found.append(Bin(number / BINS, (number + 1) / BINS, count, right, confidence))
        return tuple(found)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |accuracy - confidence| of an image's bin, percent."""
        return 100.0 * sum(one.images * _gap(one) for one in self.bins) / self.images

    @property
    def worst_gap(self) -> float:
        """Largest |accuracy - confidence| of a bin (maximum calibration error), percent."""
        return 100.0 * max(_gap(one) for one in self.bins)

    @property
    def confidence(self) -> float:
        """Mean confidence, in percent; above `top1` the network is overconfident."""
        return 100.0 * float(self.confidences.mean())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the labels (cross-entropy), nats."""
        return float(self.surprisals.mean())


class Tally:
    """Collects what a network answers, batch by batch.

    Args:
        classes: K; labels must lie in 0..K-1.
        who: what answers, for messages.
    """

    def __init__(self, classes: int, who: str = "the network") -> None:
        self._classes, self._who = classes, who
        self._parts: list[tuple[LongArray, LongArray, LongArray, FloatArray, FloatArray]] = []
        self._seen = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take one batch.

        Args:
            logits: (B, K), on any device.
            labels: class numbers (B,).

        Raises:
            DataError: a label outside the classes.
            WeightsError: logits of another number of classes, or not finite.
        """
        scores, given = _plain(logits), labels.cpu().numpy().astype(np.int64)
        if scores.ndim != 2 or scores.shape[1] != self._classes:
            shape = tuple(scores.shape)
            raise WeightsError(
                f"{self._who}: must give {self._classes} logits per image, gives shape {shape}"
            )
        check_labels(given, self._classes, first=self._seen)
        finite = np.isfinite(scores).all(axis=1)
        if not finite.all():
            raise WeightsError(
                f"{self._who}: its logits must be finite, those of {int((~finite).sum())} images "
                f"of a batch are not, the first is image {self._seen + int(np.argmin(finite))}; "
                "the weights are damaged, or training went wrong"
            )
        rows = np.arange(len(given))
        own = scores[rows, given][:, None]
        earlier = np.arange(self._classes)[None] < given[:, None]
        places = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
        shifted = scores - scores.max(axis=1, keepdims=True)
        total = np.log(np.exp(shifted).sum(axis=1))
        self._parts.append(
            (
                given,
                scores.argmax(axis=1).astype(np.int64),
                places.astype(np.int64),
                np.exp(-total),
                total - shifted[rows, given],
            )
        )
        self._seen += len(given)

    def result(self) -> Evaluation:
        """What was collected.

        Raises:
            DataError: there was no image.
        """
        if not self._seen:
            raise DataError("evaluation: must have at least one image, got none")
        labels, predicted, places, confidences, surprisals = map(
            np.concatenate, zip(*self._parts, strict=True)
        )
        return Evaluation(self._classes, labels, predicted, places, confidences, surprisals)


@torch.inference_mode()
def evaluate(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Ask `predict` for every image.

    Args:
        predict: images (B, c, H, W) -> logits (B, classes), in evaluation mode.
        batches: pairs of images and labels (B,); at least one image in all.
        classes: number of classes.
        on_batch: called after every batch with the images so far.

    Raises:
        DataError: no images, or a label outside the classes.
        WeightsError: logits of another number of classes, or not finite.
    """
    tally, seen = Tally(classes), 0
    for images, labels in batches:
        tally.add(predict(images), labels)
        seen += len(labels)
        on_batch(seen)
    return tally.result()


def check_labels(labels: LongArray, classes: int, *, what: str = "", first: int = 0) -> None:
    """Refuse labels outside 0..classes-1.

    Args:
        labels: class numbers (N,).
        classes: number of classes.
        what: where they are from, for the message.
        first: number of the first image, for the message.

    Raises:
        DataError: names the first.
    """
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        at = int(np.argmax(outside))
        raise DataError(
            f"{what}{': ' if what else ''}labels must lie in 0..{classes - 1}, "
            f"{int(outside.sum())} of {len(labels)} do not, the first is {int(labels[at])} of "
            f"image {first + at}; correct them, or give the network they are for"
        )


def wilson_percent(right: int, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent (Wilson 1927)."""
    share, z2 = right / images, NORMAL_95**2
    centre = (share + z2 / (2 * images)) / (1 + z2 / images)
    spread = math.sqrt(share * (1 - share) / images + z2 / (4 * images**2))
    half = NORMAL_95 * spread / (1 + z2 / images)
    return max(0.0, 100.0 * (centre - half)), min(100.0, 100.0 * (centre + half))


def _gap(one: Bin) -> float:
    if one.accuracy is None or one.confidence is None:
        return 0.0
    return abs(one.accuracy - one.confidence)


def _plain(logits: Tensor) -> FloatArray:
    found: FloatArray = logits.detach().cpu().double().numpy()
    return found
