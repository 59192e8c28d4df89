"""The images of a pruning run: some that importance is estimated on, others to judge on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from slimnas.data.batches import ImageSet
from slimnas.data.photos import NAME as PHOTOS
from slimnas.data.splits import DataOptions
from slimnas.data.whole import Normalisation, open_whole
from slimnas.errors import DataError
from slimnas.nn.build import Network
from slimnas.nn.tensorfiles import tensors_digest

EVAL_BATCH = 100

Labels = Literal["data", "model"]


@dataclass(frozen=True)
class DataRequest:
    """Which images a run wants.

    Attributes:
        data: what `--data` names.
        test_data: what `--test-data` names; None for a part of `data`.
        images: at most this many for importance.
        labels: `data`, `model`, or `auto`: the data's where its classes are the model's.
        normalisation: the model's; None for the data's own.
        foreign: the data's classes are never the model's, however many they are.
        seed: of the split.
        skip_bad_images: leave out images that cannot be decoded.
        for_training: also open every image of `data` that is not held out.
    """

    data: str
    test_data: str | None
    images: int
    labels: Literal["auto", "data", "model"]
    normalisation: Normalisation | None
    foreign: bool
    seed: int
    skip_bad_images: bool = False
    for_training: bool = False


@dataclass(frozen=True, eq=False)
class Calibration:
    """Images for importance, and others for accuracy.

    Attributes:
        images: importance is estimated on them.
        test: accuracy is measured on them, and nothing else.
        training: what fine-tuning sees: `images`, or every one of the data that is not held out.
        class_names: of the data.
        labels: of `images`: the data's or the model's predictions.
        test_labels: of `test`; accuracy against the model's own is agreement with it.
        description: both sets in words.
        digest: of `images` with their labels.
        test_digest: of the labels of `test`.
    """

    images: ImageSet
    test: ImageSet
    training: ImageSet
    class_names: tuple[str, ...]
    labels: Labels
    test_labels: Labels
    description: str
    digest: str
    test_digest: str

    @property
    def is_stand_in(self) -> bool:
        """Whether these are crops of two photographs for want of data."""
        return self.description.startswith(PHOTOS)


class Batches:
    """Minibatches of an `ImageSet` in its own order, every image once; can be gone over again.

    Args:
        images: the set.
        batch_size: images per minibatch.
        device: where they are wanted.
        start: minibatches left out at the beginning.
        limit: images after which it ends, to whole minibatches; None for all.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        device: torch.device | str,
        *,
        start: int = 0,
        limit: int | None = None,
    ) -> None:
        self._images, self._batch_size, self._device = images, batch_size, device
        self._start = start
        self._stop = -(-min(limit or len(images), len(images)) // batch_size)

    def __len__(self) -> int:
        return max(0, self._stop - self._start)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._images.eval_batches(
            self._batch_size, device=self._device, start_batch=self._start
        )
        return itertools.islice(batches, len(self))


def open_calibration(
    request: DataRequest, network: Network, device: torch.device | str
) -> Calibration:
    """Open the images of a run, decoded for `network`.

    Args:
        request: which images.
        network: the unpruned one, on any device; where labels are not the model's classes, its
            predictions take their place.
        device: where it predicts.

    Raises:
        DataError: the data is missing, damaged, too small, or has other classes than asked for.
    """
    shape = network.architecture.input.shape
    options = DataOptions(
        resolution=(shape.height, shape.width),
        channels=shape.channels,
        seed=request.seed,
        skip_bad_images=request.skip_bad_images,
        max_images=request.images,
    )
    whole = open_whole(
        request.data,
        options,
        normalisation=request.normalisation,
        hold_out=request.test_data is None,
    )
    images, test, test_names = whole.images, whole.test, whole.class_names
    training = images
    description, names = whole.description, whole.class_names
    same = (images.mean, images.std)
    everything = replace(options, max_images=None)
    if request.for_training and request.data != PHOTOS:
        hold_out = request.test_data is None
        training = open_whole(
            request.data, everything, normalisation=same, hold_out=hold_out
        ).images
    if request.test_data is not None:
        try:
            other = open_whole(request.test_data, everything, normalisation=same)
        except DataError as error:  # names the option that most data come from
            raise DataError(str(error).replace("--data ", "--test-data ", 1)) from error
        test, test_names = other.images, other.class_names
        description += f"; judged on {other.description}"
    assert test is not None
    data = f"--data {request.data}"
    labels = _labels(request, names, network, data)
    judged = data if request.test_data is None else f"--test-data {request.test_data}"
    test_labels = _labels(request, test_names, network, judged)
    if labels == "model":
        found = predicted(images, network, device)
        training = predicted(training, network, device) if training is not images else found
        images = found
    if test_labels == "model":
        test = predicted(test, network, device)
    given = tensors_digest({"labels": images.labels})
    return Calibration(
        images=images,
        test=test,
        training=training,
        class_names=names,
        labels=labels,
        test_labels=test_labels,
        description=description,
        digest=f"{whole.digest[:32]}{given[:32]}",
        test_digest=tensors_digest({"labels": test.labels}),
    )


@torch.inference_mode()
def predicted(images: ImageSet, network: Network, device: torch.device | str) -> ImageSet:
    """The same images, labelled with what `network` takes them for."""
    network.to(device).eval()
    found = [network(x).argmax(dim=1).cpu() for x, _ in Batches(images, EVAL_BATCH, device)]
    return replace(images, labels=torch.cat(found))


def _labels(request: DataRequest, names: tuple[str, ...], network: Network, given: str) -> Labels:
    classes = network.architecture.head.classes
    fits = len(names) == classes and not request.foreign
    if request.labels == "model" or (request.labels == "auto" and not fits):
        return "model"
    if not fits:
        other = "classes of its own" if len(names) == classes else f"{len(names)} classes"
        raise DataError(
            f"{given}: must have the {classes} classes of {network.architecture.name} for "
            f"--labels data, has {other}; use --labels model to go by the model's own predictions"
        )
    return "data"
