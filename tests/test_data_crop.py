"""Random resized crops: the boxes of torchvision, the pixels of Pillow, at any place the same."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin
from scipy.stats import ks_2samp

from slimnas.data import CropPolicy, ImageSet, Part, Split
from slimnas.data.ahead import cores
from slimnas.data.batches import LazyPixels
from slimnas.data.crop import CropDraw
from slimnas.data.decode import decode
from slimnas.data.sources import ArrayTable
from slimnas.errors import DataError


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some detail, as JPEG is made for."""
    rows, columns = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(seed)
    waves = [
        127 + 100 * np.sin(columns / rng.uniform(20, 60) + c) * np.cos(rows / rng.uniform(20, 60))
        for c in range(3)
    ]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} | options if kind == "JPEG" else options))
    return buffer.getvalue()


def boxes(policy: CropPolicy, width: int, height: int, count: int) -> np.ndarray:
    return np.array([CropDraw(policy, (0, 0, n)).choose(width, height)[0] for n in range(count)])


def features(left, top, right, bottom, width: int, height: int) -> dict[str, np.ndarray]:
    columns, rows = right - left, bottom - top
    return {
        "share": columns * rows / (width * height),
        "log ratio": np.log(columns / rows),
        "left": left / np.maximum(1, width - columns),
        "top": top / np.maximum(1, height - rows),
    }


@pytest.mark.parametrize("size", [(500, 375), (120, 400)])
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.35, 0.9), (0.5, 1.2))]
)
def test_boxes_are_distributed_as_those_of_torchvision(size, scale, ratio):
    transforms = pytest.importorskip("torchvision.transforms")
    width, height = size
    count = 1500
    torch.manual_seed(1)
    blank = torch.empty((1, height, width))
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(blank, list(scale), list(ratio))
            for _ in range(count)
        ]
    )
    top, left, rows, columns = theirs.T
    expected = features(left, top, left + columns, top + rows, width, height)
    found = features(*boxes(CropPolicy(scale, ratio), width, height, count).T, width, height)
    for name, values in found.items():
        assert ks_2samp(values, expected[name]).pvalue > 1e-4, name


@pytest.mark.parametrize(
    ("size", "ratio"),
    [((1000, 10), (3 / 4, 4 / 3)), ((10, 1000), (3 / 4, 4 / 3)), ((40, 40), (1, 1))],
)
def test_where_no_box_fits_the_centre_is_taken_as_torchvision_does(size, ratio):
    transforms = pytest.importorskip("torchvision.transforms")
    width, height = size
    blank = torch.empty((1, height, width))
    top, left, rows, columns = transforms.RandomResizedCrop.get_params(
        blank, [1.0, 1.0], list(ratio)
    )
    (box, _) = CropDraw(CropPolicy((1.0, 1.0), ratio), (5,)).choose(width, height)
    assert box == (left, top, left + columns, top + rows)


def test_every_box_lies_in_its_image():
    seen = 0
    for width in (1, 2, 3, 7, 50):
        for height in (1, 2, 5, 33):
            for left, top, right, bottom in boxes(CropPolicy(), width, height, 40).tolist():
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height
                seen += 1
    assert seen == 5 * 4 * 40


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("vectors", [False, True])
def test_pixels_are_those_of_pillow(kind, interpolation, vectors, monkeypatch):
    monkeypatch.setattr("slimnas.data.decode._VECTORS", vectors)
    raw = encoded(photograph(90, 70), kind)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for number in range(20):
        draw = CropDraw(CropPolicy(interpolation=interpolation), (number,))
        box, _ = draw.choose(90, 70)
        for channels, mode in ((3, "RGB"), (1, "L")):
            plain = Image.open(io.BytesIO(raw)).convert(mode)
            found = decode(raw, (32, 24), channels, draw)
            assert found.dtype == np.uint8
            if vectors and channels == 3:
                expected = plain.crop(box).resize((24, 32), filters[interpolation])
                difference = found.transpose(1, 2, 0).astype(int) - np.asarray(expected).astype(int)
                assert np.abs(difference).max() <= 2
                assert np.abs(difference).mean() < 0.05
            else:
                expected = plain.resize((24, 32), filters[interpolation], box=box)
                theirs = np.asarray(expected).reshape(32, 24, channels).transpose(2, 0, 1)
                np.testing.assert_array_equal(found, theirs)


def test_random_interpolation_is_either():
    filters = [
        CropDraw(CropPolicy(interpolation="random"), (n,)).choose(9, 9)[1] for n in range(400)
    ]
    share = np.mean([chosen == Image.Resampling.BICUBIC for chosen in filters])
    assert 0.4 < share < 0.6
    assert set(filters) == {Image.Resampling.BICUBIC, Image.Resampling.BILINEAR}


def test_what_libjpeg_leaves_out_does_not_show(monkeypatch):
    raw = encoded(photograph(1200, 900))
    drafted: list[tuple[int, int]] = []
    plain = JpegImagePlugin.JpegImageFile.draft

    def spied(self, mode, size):
        result = plain(self, mode, size)
        drafted.append(self.size)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spied)
    for number in range(40):
        draw = CropDraw(CropPolicy((0.05, 1.0)), (number,))
        (left, top, right, bottom), resampling = draw.choose(1200, 900)
        drafted.clear()
        found = decode(raw, (64, 64), 3, draw).transpose(1, 2, 0).astype(int)
        if drafted:
            shrink = 1200 / drafted[0][0]
            # Twice the detail of the result is there, and no whole power of two more.
            assert min(right - left, bottom - top) / shrink >= 128 - 1e-9
        whole = Image.open(io.BytesIO(raw)).convert("RGB")
        expected = whole.resize((64, 64), resampling, box=(left, top, right, bottom))
        difference = np.abs(found - np.asarray(expected).astype(int))
        assert difference.mean() < 1.5
        assert difference.max() <= 24


def test_large_images_are_decoded_small(monkeypatch):
    sizes = []
    plain = JpegImagePlugin.JpegImageFile.draft

    def spied(self, mode, size):
        result = plain(self, mode, size)
        sizes.append(self.size)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spied)
    whole = CropDraw(CropPolicy((1.0, 1.0), (1.0, 1.0)), (0,))
    for side, expected in ((127, []), (256, [64]), (511, [128]), (600, [75])):
        sizes.clear()
        decode(encoded(photograph(side, side)), (32, 32), 3, whole)
        assert sizes == [(each, each) for each in expected]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_crops_are_of_the_upright_image(orientation):
    image = photograph(300, 200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: None,
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_270,
        8: Image.Transpose.ROTATE_90,
    }
    method = turned[orientation]
    upright = image if method is None else image.transpose(method)
    for number in range(5):
        draw = CropDraw(CropPolicy(), (number,))
        found = decode(encoded(image, "PNG", exif=exif), (40, 40), 3, draw)
        np.testing.assert_array_equal(found, decode(encoded(upright, "PNG"), (40, 40), 3, draw))
        close = decode(encoded(image, exif=exif), (16, 16), 3, draw).astype(int)
        whole = decode(encoded(upright, "PNG"), (16, 16), 3, draw).astype(int)
        assert np.abs(close - whole).mean() < 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (0.0, 1.0)}, "crop scale must"),
        ({"scale": (0.5, 0.4)}, "crop scale must"),
        ({"scale": (0.5, 1.5)}, "crop scale must"),
        ({"ratio": (0.0, 1.0)}, "crop ratio must"),
        ({"ratio": (2.0, 1.0)}, "crop ratio must"),
        ({"interpolation": "cubic"}, "one of bilinear, bicubic, random, got 'cubic'"),
    ],
)
def test_policies_out_of_range_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        CropPolicy(**settings)


def lazy(count: int, crop: CropPolicy | None, *, flip: bool = False) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 30), dtype=np.uint8)
    table = ArrayTable(pixels, np.arange(count), "noise")
    store = LazyPixels(table, np.arange(count), (8, 8), 1, crop)
    return ImageSet(Split.TRAIN, store, torch.arange(count), (0.5,), (0.5,), flip)


def batches(images: ImageSet, **changes: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings = {"device": "cpu", "seed": 3, "epoch": 2, "augment": True, **changes}
    return list(images.batches(8, **settings))


def by_label(found: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[int, torch.Tensor]:
    return {int(label): image for x, y in found for image, label in zip(x, y, strict=True)}


def test_a_crop_follows_from_seed_epoch_and_image_alone():
    images = lazy(20, CropPolicy())
    whole = by_label(batches(images))
    assert len(whole) == 16
    for part in (Part(0, 2), Part(1, 2)):
        for label, image in by_label(batches(images, part=part)).items():
            assert torch.equal(image, whole[label])
    for label, image in by_label(batches(images, start_batch=1)).items():
        assert torch.equal(image, whole[label])
    for changes in ({"seed": 4}, {"epoch": 3}):
        other = by_label(batches(images, **changes))
        common = other.keys() & whole.keys()
        assert len(common) > 10
        assert not any(torch.equal(other[label], whole[label]) for label in common)


def test_crops_are_taken_only_where_augmentation_is_asked_for():
    plain, cropped = lazy(20, None), lazy(20, CropPolicy())
    assert cropped.cropped
    assert not plain.cropped
    for (x, _), (u, _) in zip(
        batches(plain, augment=False), batches(cropped, augment=False), strict=True
    ):
        assert torch.equal(x, u)
    for (x, _), (u, _) in zip(
        plain.eval_batches(8, device="cpu"), cropped.eval_batches(8, device="cpu"), strict=True
    ):
        assert torch.equal(x, u)


def test_copies_of_an_image_are_cropped_differently():
    images = lazy(24, CropPolicy())
    pairs = 0
    for x, y in images.raw_batches(12, device="cpu", seed=0, epoch=0, repeats=3):
        for label in y.unique().tolist():
            copies = x[y == label]
            assert len(copies) == 3
            assert not torch.equal(copies[0], copies[1])
            assert not torch.equal(copies[1], copies[2])
            pairs += 2
    assert pairs == 2 * 2 * 4


def test_half_of_the_crops_are_mirrored_where_that_is_allowed():
    plain, flipped = (
        by_label(batches(lazy(80, CropPolicy()))),
        by_label(batches(lazy(80, CropPolicy(), flip=True))),
    )
    mirrored = sum(torch.equal(flipped[label], plain[label].flip(2)) for label in plain)
    same = sum(torch.equal(flipped[label], plain[label]) for label in plain)
    assert mirrored + same == len(plain) == 80
    assert 20 <= mirrored <= 60


def test_raw_batches_are_crops_by_hand():
    images = lazy(20, CropPolicy(interpolation="bilinear"))
    table = images.store.table
    seen = 0
    for x, y in images.raw_batches(10, device="cpu", seed=5, epoch=7):
        for image, label in zip(x.numpy(), y.tolist(), strict=True):
            box, _ = CropDraw(CropPolicy(interpolation="bilinear"), (5, 7, 3, label, 0)).choose(
                30, 20
            )
            pixels = Image.fromarray(table.pixels[label])
            expected = pixels.resize((8, 8), Image.Resampling.BILINEAR, box=box)
            np.testing.assert_array_equal(image[0], np.asarray(expected))
            seen += 1
    assert seen == 20


@pytest.mark.parametrize(("beside", "expected"), [("", 8), ("1", 8), ("3", 2), ("16", 1), ("x", 8)])
def test_processes_of_one_machine_share_its_cores(beside, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert cores() == expected
