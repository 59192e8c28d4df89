"""All images that are not TEST, and TEST: the one that a search leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slimnas.data import (
    CropPolicy,
    DataOptions,
    ImageSet,
    open_data,
    open_training,
    require_full_batch,
)
from slimnas.data.batches import LazyPixels, MemoryPixels
from slimnas.errors import DataError

OPTIONS = DataOptions(resolution=(8, 8), channels=1, seed=3)


def folder_of(root: Path, classes: dict[str, int], *, start: int = 0) -> Path:
    """PNGs of 8 x 8 pixels, no two the same."""
    number = start
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
            number += 1
    return root


def contents(images: ImageSet) -> list[tuple[bytes, int]]:
    pixels = images.store.take(np.arange(len(images)))
    return sorted(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(pixels, images.labels, strict=True)
    )


def test_test_is_the_one_a_search_leaves_alone_and_train_is_the_rest(tmp_path):
    spec = str(folder_of(tmp_path, {"a": 20, "b": 11, "c": 3}))
    for options in (OPTIONS, replace(OPTIONS, seed=4, test_fraction=0.4, max_images=30)):
        searched = open_data(
            spec,
            resolution=(8, 8),
            channels=1,
            seed=options.seed,
            test_fraction=options.test_fraction,
            max_images=options.max_images,
        )
        for crop in (None, CropPolicy()):
            data = open_training(spec, options, crop=crop)
            assert contents(data.test) == contents(searched.test)
            together = contents(searched.train) + contents(searched.search)
            assert contents(data.train) == sorted(together)
            assert data.class_names == ("a", "b", "c")
            assert data.classes == 3


def test_digits_are_divided_the_same_on_every_machine():
    data = open_training("digits", OPTIONS)
    searched = open_data("digits", resolution=(8, 8), channels=1, seed=3)
    assert contents(data.test) == contents(searched.test)
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.description == (
        "digits (digits): 10 classes, 1438 images to train on, 359 to judge on, held out"
    )
    assert not data.train.flip


def test_a_test_split_of_the_source_is_taken_whole(tmp_path):
    folder_of(tmp_path / "train", {"a": 5, "b": 1})
    folder_of(tmp_path / "test", {"a": 4, "b": 3}, start=100)
    data = open_training(str(tmp_path), OPTIONS)
    assert (len(data.train), len(data.test)) == (6, 7)
    assert data.description.endswith("6 images to train on, 7 to judge on, its own test split")


def test_two_images_of_a_class_are_enough(tmp_path):
    data = open_training(str(folder_of(tmp_path, {"a": 8, "b": 2})), OPTIONS)
    assert sorted(data.test.labels.tolist()).count(1) == 1
    assert sorted(data.train.labels.tolist()).count(1) == 1


def test_images_to_judge_on_may_be_elsewhere(tmp_path):
    spec = str(folder_of(tmp_path / "one", {"a": 5, "b": 1, "c": 2}))
    other = str(folder_of(tmp_path / "two", {"b": 3, "c": 2}, start=100))
    data = open_training(spec, OPTIONS, test_spec=other)
    assert (len(data.train), len(data.test)) == (8, 5)
    assert sorted(data.test.labels.tolist()) == [1, 1, 1, 2, 2]
    assert data.description.endswith(f"8 images to train on, 5 to judge on, {other}")
    folder_of(tmp_path / "three" / "train", {"a": 2, "b": 2, "c": 2}, start=200)
    folder_of(tmp_path / "three" / "val", {"a": 1, "b": 1, "c": 2}, start=300)
    data = open_training(spec, OPTIONS, test_spec=str(tmp_path / "three"))
    assert data.test.labels.tolist() == [0, 1, 2, 2]
    with pytest.raises(DataError, match=r"classes must be those of .*'d' is not among") as caught:
        open_training(spec, OPTIONS, test_spec=str(folder_of(tmp_path / "four", {"a": 1, "d": 1})))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="must not be the images trained on"):
        open_training(spec, OPTIONS, test_spec=spec)


def test_mean_and_deviation_are_those_of_train_or_as_given(tmp_path):
    spec = str(folder_of(tmp_path, {"a": 30, "b": 30}))
    data = open_training(spec, OPTIONS)
    pixels = data.train.store.take(np.arange(len(data.train))).double() / 255
    assert data.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-12)
    assert data.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-12)
    given = open_training(spec, OPTIONS, normalisation=((0.25,), (0.5,)))
    assert given.mean == given.train.mean == given.test.mean == (0.25,)
    assert given.std == given.train.std == given.test.std == (0.5,)
    assert given.digest != data.digest


def test_crops_are_decoded_for_each_batch_and_judging_images_are_kept(tmp_path):
    spec = str(folder_of(tmp_path, {"a": 30, "b": 30}))
    plain, cropped = open_training(spec, OPTIONS), open_training(spec, OPTIONS, crop=CropPolicy())
    assert isinstance(plain.train.store, MemoryPixels)
    assert isinstance(cropped.train.store, LazyPixels)
    assert isinstance(cropped.test.store, MemoryPixels)
    assert cropped.train.cropped
    assert not cropped.test.cropped
    assert (plain.mean, plain.std, plain.digest) == (cropped.mean, cropped.std, cropped.digest)
    lazy = open_training(spec, replace(OPTIONS, memory_bytes=0))
    assert lazy.digest == plain.digest


def test_the_digest_tells_images_labels_and_division(tmp_path):
    spec = str(folder_of(tmp_path / "one", {"a": 9, "b": 9}))
    first = open_training(spec, OPTIONS)
    assert first.digest == open_training(spec, OPTIONS).digest
    digests = {first.digest}
    digests.add(open_training(spec, replace(OPTIONS, seed=4)).digest)
    digests.add(open_training(spec, replace(OPTIONS, resolution=(4, 8))).digest)
    digests.add(open_training(spec, replace(OPTIONS, max_images=12)).digest)
    other = folder_of(tmp_path / "two", {"a": 2, "b": 2}, start=100)
    digests.add(open_training(spec, OPTIONS, test_spec=str(other)).digest)
    Image.new("L", (8, 8), 7).save(other / "a" / "0.png")
    digests.add(open_training(spec, OPTIONS, test_spec=str(other)).digest)
    Image.new("L", (8, 8), 7).save(Path(spec) / "a" / "0.png")
    digests.add(open_training(spec, OPTIONS).digest)
    assert len(digests) == 7


@pytest.mark.parametrize("crop", [None, CropPolicy()])
def test_bad_images_are_skipped_on_demand_and_counted(tmp_path, crop):
    folder = folder_of(tmp_path, {"a": 9, "b": 9})
    (folder / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 18 are not, the first is .*0\.png.*skip-bad-images"):
        open_training(str(folder), OPTIONS, crop=crop)
    data = open_training(str(folder), replace(OPTIONS, skip_bad_images=True), crop=crop)
    assert data.skipped == 1
    assert len(data.train) + len(data.test) == 17
    assert data.description.endswith("held out, 1 undecodable images skipped")


def test_a_batch_must_be_filled():
    images = torch.zeros(40)
    require_full_batch(images, 40, processes=40)
    with pytest.raises(DataError, match=r"--batch-size.* got 41 for 40 images to train on; lower"):
        require_full_batch(images, 41)
    with pytest.raises(DataError, match=r"got 3 for 4 processes"):
        require_full_batch(images, 3, processes=4)
