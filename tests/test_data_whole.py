"""All images of a source: one per class will do, and those held out stay out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from slimnas.data import DataOptions, open_whole
from slimnas.data.batches import ImageSet, MemoryPixels
from slimnas.data.photos import photo_source
from slimnas.errors import DataError

OPTIONS = DataOptions(resolution=(8, 8), channels=1, seed=0)


def pixels(images: ImageSet) -> np.ndarray:
    assert isinstance(images.store, MemoryPixels)
    return images.store.pixels.numpy()


def folder_of(tmp_path: Path, *, per_class: int, classes: int = 4, inside: str = "") -> Path:
    """Images whose grey level tells class and number."""
    for label in range(classes):
        for number in range(per_class):
            grey = np.full((8, 8), 10 * label + number, dtype=np.uint8)
            path = tmp_path / inside / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(path)
    return tmp_path


def test_all_images_come_once_in_a_random_order() -> None:
    whole = open_whole("digits", OPTIONS)
    assert whole.test is None
    assert len(whole.images) == 1797
    truth = load_digits()
    expected = np.rint(truth.images * 255 / 16).astype(np.uint8)
    key = [image.tobytes() for image in pixels(whole.images)[:, 0]]
    assert sorted(key) == sorted(image.tobytes() for image in expected)
    assert key != [image.tobytes() for image in expected]
    by_pixels = {
        image.tobytes(): label for image, label in zip(expected, truth.target, strict=True)
    }
    assert [by_pixels[k] for k in key] == whole.images.labels.tolist()


def test_one_image_per_class_is_enough(tmp_path: Path) -> None:
    whole = open_whole(str(folder_of(tmp_path, per_class=1)), OPTIONS)
    assert sorted(whole.images.labels.tolist()) == [0, 1, 2, 3]
    held = open_whole(str(tmp_path), OPTIONS, hold_out=True)
    assert held.test is not None
    assert (len(held.images), len(held.test)) == (3, 1)


def test_held_out_images_are_others_and_the_same_each_time() -> None:
    first, again = (open_whole("digits", OPTIONS, hold_out=True) for _ in range(2))
    assert first.test is not None
    assert again.test is not None
    assert len(first.test) == round(0.2 * 1797)
    assert len(first.images) + len(first.test) == 1797
    assert np.array_equal(pixels(first.images), pixels(again.images))
    assert np.array_equal(pixels(first.test), pixels(again.test))
    few = open_whole("digits", replace(OPTIONS, max_images=50), hold_out=True)
    assert few.test is not None
    assert np.array_equal(pixels(few.test), pixels(first.test))
    assert np.array_equal(pixels(few.images), pixels(first.images)[:50])
    other = open_whole("digits", replace(OPTIONS, seed=1), hold_out=True)
    assert other.digest != first.digest == again.digest
    assert few.digest != first.digest


def test_a_test_split_of_the_source_is_taken(tmp_path: Path) -> None:
    folder_of(tmp_path, per_class=3, inside="train")
    folder_of(tmp_path, per_class=2, inside="test")
    whole = open_whole(str(tmp_path), OPTIONS, hold_out=True)
    assert whole.test is not None
    assert (len(whole.images), len(whole.test)) == (12, 8)
    assert "its own test split" in whole.description


def test_normalisation_is_the_data_s_or_as_given() -> None:
    own = open_whole("digits", OPTIONS).images
    batch = torch.cat([images for images, _ in own.eval_batches(500, device="cpu")])
    assert float(batch.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(batch.std()) == pytest.approx(1.0, abs=1e-3)
    given = open_whole("digits", OPTIONS, normalisation=((0.5,), (0.25,)), hold_out=True)
    assert given.test is not None
    raw = pixels(given.test)[:3]
    images, _ = next(given.test.eval_batches(3, device="cpu"))
    assert np.allclose(images.numpy(), (raw / 255 - 0.5) / 0.25, atol=1e-6)


def test_photographs_are_cropped_from_two() -> None:
    options = replace(OPTIONS, channels=3, resolution=(24, 24), max_images=40)
    whole = open_whole("photos", options, hold_out=True)
    assert whole.test is not None
    assert (len(whole.images), len(whole.test)) == (40, 10)
    distinct = {image.tobytes() for image in pixels(whole.images)}
    assert len(distinct) == 40
    assert np.array_equal(
        pixels(whole.images), pixels(open_whole("photos", options, hold_out=True).images)
    )
    photographs = load_sample_images().images
    table = photo_source(6, seed=0).train
    for row, crop in enumerate(table.read(range(6))):
        assert isinstance(crop, np.ndarray)
        side = crop.shape[0]
        source = photographs[row % 2]
        windows = np.lib.stride_tricks.sliding_window_view(source[:, :, 0], (side, side))
        either = [crop[:, :, 0], crop[:, ::-1, 0]]
        corner = [np.argwhere(windows[:, :, 0, 0] == c[0, 0]) for c in either]
        assert any(
            np.array_equal(windows[top, left], c)
            for c, corners in zip(either, corner, strict=True)
            for top, left in corners
        )
        assert table.name(row) == f"photos crop {row}"


def test_a_pass_can_begin_at_any_batch() -> None:
    images = open_whole("digits", replace(OPTIONS, max_images=25)).images
    batches = list(images.eval_batches(10, device="cpu"))
    assert [len(labels) for _, labels in batches] == [10, 10, 5]
    for start in range(4):
        rest = list(images.eval_batches(10, device="cpu", start_batch=start))
        assert len(rest) == 3 - start
        for (left, _), (right, _) in zip(rest, batches[start:], strict=True):
            assert torch.equal(left, right)


def test_too_few_images_and_broken_ones(tmp_path: Path) -> None:
    folder_of(tmp_path / "one", per_class=1, classes=1)
    with pytest.raises(DataError, match=r"at least 2 images, got 1.*--test-data"):
        open_whole(str(tmp_path / "one"), OPTIONS, hold_out=True)
    folder = folder_of(tmp_path / "bad", per_class=2)
    (folder / "class0" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="--skip-bad-images"):
        open_whole(str(folder), OPTIONS)
    assert len(open_whole(str(folder), replace(OPTIONS, skip_bad_images=True)).images) == 7
