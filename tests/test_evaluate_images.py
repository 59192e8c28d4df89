"""The images of an evaluation: the run's TEST, timm's resizing, names, digests, bad input."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from slimnas.data.sources import ArrayTable, Source
from slimnas.data.splits import DataOptions, open_data
from slimnas.data.training import open_training
from slimnas.data.whole import open_whole
from slimnas.errors import DataError
from slimnas.train.evaluation_images import (
    IMAGENET,
    EvaluationImages,
    ImageRequest,
    open_images,
)
from slimnas.train.evaluation_transform import EvalTransform, PreparedTable

OPTIONS = DataOptions(resolution=(8, 8), channels=1, seed=3)
GREY = ((0.5,), (0.25,))


def request(**changes: Any) -> ImageRequest:
    given: dict[str, Any] = {"data": "digits", "split": "test", "options": OPTIONS, "classes": 10}
    return ImageRequest(**{**given, **changes})


def all_of(images: EvaluationImages, size: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = zip(*images.batches(size, device="cpu"), strict=True)
    return torch.cat(pixels), torch.cat(labels)


def write_folder(root: Path, counts: dict[str, int], *, size: tuple[int, int] = (8, 8)) -> Path:
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def test_test_is_what_a_search_with_that_seed_never_saw() -> None:
    splits = open_data("digits", resolution=(8, 8), channels=1, seed=3)
    images = open_images(request())
    assert images.normalisation == (splits.mean, splits.std)
    expected = list(splits.test.eval_batches(100, device="cpu"))
    pixels, labels = all_of(images)
    assert torch.equal(labels, torch.cat([y for _, y in expected]))
    assert torch.allclose(pixels, torch.cat([x for x, _ in expected]))
    assert len(images) == len(splits.test)
    assert "test held out" in images.description


def test_train_is_the_rest_and_all_is_both() -> None:
    test, train, everything = (
        open_images(request(split=split, normalisation=GREY)) for split in ("test", "train", "all")
    )
    names = [{images.name(i) for i in range(len(images))} for images in (test, train, everything)]
    assert len(names[2]) == 1797
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == names[2]
    splits = open_data("digits", resolution=(8, 8), channels=1, seed=3)
    assert len(train) == len(splits.train) + len(splits.search)


def test_the_limit_of_a_run_decides_what_it_held_out() -> None:
    options = DataOptions(resolution=(8, 8), channels=1, seed=3, max_images=200)
    splits = open_data("digits", resolution=(8, 8), channels=1, seed=3, max_images=200)
    images = open_images(request(options=options))
    _, labels = all_of(images)
    assert torch.equal(labels, splits.test.labels)
    assert len(images) == 40


@pytest.mark.parametrize("split", ["test", "all"])
def test_max_images_are_drawn_evenly(split: str) -> None:
    images = open_images(request(split=split, max_images=50, normalisation=GREY))
    counts = np.bincount(images.labels, minlength=10)
    assert counts.sum() == 50
    assert counts.min() >= 4
    assert counts.max() <= 6


def test_a_sources_own_test_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "d" / "train", {"cat": 6, "dog": 6})
    write_folder(tmp_path / "d" / "test", {"cat": 2, "dog": 3})
    options = DataOptions(resolution=(8, 8), channels=3, seed=0)
    given = request(data=str(tmp_path / "d"), options=options, classes=2)
    test = open_images(given)
    assert len(test) == 5
    assert "its own test split: 5 images of 2 classes" in test.description
    assert test.name(0) == str(tmp_path / "d" / "test" / "cat" / "00.png")
    splits = open_data(str(tmp_path / "d"), resolution=(8, 8), channels=3, seed=0)
    assert test.normalisation == (splits.mean, splits.std)
    both = open_images(request(data=str(tmp_path / "d"), options=options, classes=2, split="all"))
    assert len(both) == 17
    assert both.name(12) == test.name(0)
    with pytest.raises(IndexError, match="17"):
        both.name(17)
    pixels, labels = all_of(both, 4)
    assert torch.equal(pixels[12:], all_of(test)[0])
    assert labels.tolist() == both.labels.tolist()
    some = open_images(
        request(data=str(tmp_path / "d"), options=options, classes=2, split="all", max_images=9)
    )
    assert [len(part.labels) for _, part in some.parts] == [6, 3]


def test_the_digest_is_of_pixels_and_labels() -> None:
    images = open_images(request(normalisation=GREY, max_images=30))
    found = []
    for size in (7, 30):
        sha = hashlib.sha256()
        for _ in images.batches(size, device="cpu", digest=sha):
            pass
        found.append(sha.hexdigest())
    pixels, labels = all_of(images)
    raw = (pixels * 0.25 + 0.5) * 255.0
    content = raw.round().to(torch.uint8).numpy().tobytes() + labels.numpy().astype("<i8").tobytes()
    assert found == [hashlib.sha256(content).hexdigest()] * 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [(60, 41), (41, 60), (50, 50), (31, 97)])
@pytest.mark.parametrize("resolution", [(32, 32), (32, 24)])
def test_resizing_is_timms(
    resolution: tuple[int, int], size: tuple[int, int], crop_pct: float, interpolation: str
) -> None:
    random = np.random.default_rng(size[0])
    pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = transforms_imagenet_eval(
        resolution, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
    )
    ours = EvalTransform.of_crop(resolution, crop_pct, interpolation)
    expected = np.asarray(theirs(image)).transpose(1, 2, 0)
    assert (np.asarray(ours(image)) == expected).all()


def test_resizing_by_the_shorter_side() -> None:
    ours = EvalTransform((32, 32), (40, 40), "bilinear")
    assert ours.size(100, 50) == (80, 40)
    assert ours.size(50, 100) == (40, 80)
    assert ours.size(40, 40) == (40, 40)
    same = EvalTransform.of_crop((224, 224), 0.875, "bicubic")
    assert same.scale == (256, 256)


def encoded(image: Image.Image, kind: str = "png", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


class Given:
    """Encoded images as a table."""

    def __init__(self, *images: Any) -> None:
        self.images = images
        self.labels = np.zeros(len(images), dtype=np.int64)

    def read(self, indexes: Any) -> list[Any]:
        return [self.images[index] for index in indexes]

    def name(self, index: int) -> str:
        return f"given {index}"


def test_images_of_every_kind_are_prepared() -> None:
    random = np.random.default_rng(0)
    wide = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    grey = Image.fromarray(random.integers(0, 256, (20, 30), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    transform = EvalTransform((12, 12), (14, 14), "bicubic")
    table = PreparedTable(
        Given(
            encoded(wide),
            encoded(grey),
            encoded(wide.convert("RGBA")),
            np.asarray(grey),
            encoded(wide, "png", exif=turned),
            b"no image",
            None,
        ),
        transform,
        3,
    )
    colour, repeated, plain, raw, upright, broken, missing = table.read(range(7))
    assert (colour == np.asarray(transform(wide))).all()
    assert (plain == colour).all()
    assert (repeated == np.asarray(transform(grey.convert("RGB")))).all()
    assert (raw == repeated).all()
    rotated = wide.transpose(Image.Transpose.ROTATE_270)
    assert (upright == np.asarray(transform(rotated))).all()
    assert (broken, missing) == (b"no image", None)
    assert table.name(3) == "given 3"
    assert len(table.labels) == 7
    (one,) = PreparedTable(Given(encoded(wide)), transform, 1).read([0])
    assert (one == np.asarray(transform(wide.convert("L")))).all()


def test_a_transform_reaches_the_batches(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", {"cat": 3, "dog": 3}, size=(20, 30))
    options = DataOptions(resolution=(16, 16), channels=3, seed=0)
    transform = EvalTransform.of_crop((16, 16), 0.8, "bicubic")
    images = open_images(ImageRequest(str(folder), "all", options, 2, IMAGENET, transform))
    pixels, _ = all_of(images, 4)
    with Image.open(folder / "cat" / "01.png") as image:
        plain = torch.from_numpy(np.array(transform(image.convert("RGB")))).permute(2, 0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    assert torch.allclose(pixels[1], (plain / 255.0 - mean) / std)


@pytest.mark.parametrize(
    ("scale", "interpolation", "message"),
    [
        ((30, 30), "bicubic", r"--resize: must be at least the resolution, 32, got 30"),
        ((40, 40), "lanczos", r"interpolation must be one of bilinear, bicubic, got 'lanczos'"),
    ],
)
def test_transforms_that_cannot_be(
    scale: tuple[int, int], interpolation: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        EvalTransform((32, 32), scale, interpolation)


def test_other_classes_than_the_networks() -> None:
    with pytest.raises(
        DataError, match=r"--data digits: must have the 7 classes of the network, has 10; give"
    ):
        open_images(request(classes=7))


def test_labels_outside_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ArrayTable(np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 5]), "made up")
    source = Source("made-up", "digits", table, None, ("a", "b", "c"), False)
    monkeypatch.setattr("slimnas.train.evaluation_images.load_source", lambda _: source)
    with pytest.raises(
        DataError, match=r"--data d: labels must lie in 0\.\.2, 1 of 4 do not, .* is 5 of image 3"
    ):
        open_images(request(data="d", split="all", classes=3, normalisation=GREY))


def test_too_few_images_to_hold_any_out(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "d", {"cat": 1, "dog": 4}))
    options = DataOptions(resolution=(8, 8), channels=3, seed=0)
    given = {"data": folder, "options": options, "classes": 2}
    with pytest.raises(DataError, match=r"first is 'cat' with 1; .*judge on all .*: --split all"):
        open_images(request(**given, normalisation=IMAGENET))
    assert len(open_images(request(**given, split="all", normalisation=IMAGENET))) == 5
    with pytest.raises(DataError, match="--normalisation imagenet"):
        open_images(request(**given, split="all"))


def test_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", {"cat": 5, "dog": 5})
    whole = (folder / "dog" / "02.png").read_bytes()
    (folder / "cat" / "01.png").write_bytes(b"nothing")
    options = DataOptions(resolution=(8, 8), channels=3, seed=0)
    given = {"data": str(folder), "classes": 2, "split": "all", "normalisation": IMAGENET}
    with pytest.raises(DataError, match=r"1 of 10 are not, the first is .*01\.png \(not an image"):
        open_images(request(**given, options=options))
    skipping = DataOptions(resolution=(8, 8), channels=3, seed=0, skip_bad_images=True)
    images = open_images(request(**given, options=skipping))
    assert len(images) == 9
    assert images.description.endswith(", 1 undecodable images skipped")
    assert len(open_images(request(**{**given, "split": "test"}, options=skipping))) == 2
    # A broken body behind a sound header is found while the images are looked at.
    (folder / "cat" / "01.png").write_bytes(whole)
    (folder / "dog" / "02.png").write_bytes(whole[: len(whole) // 2])
    images = open_images(request(**given, options=options))
    with pytest.raises(DataError, match=r"02\.png is not .*--skip-bad-images"):
        all_of(images)


def test_other_ways_to_take_test() -> None:
    options = DataOptions(resolution=(8, 8), channels=1, seed=3)
    pruned = open_whole("digits", options, hold_out=True, normalisation=GREY)
    assert pruned.test is not None
    images = open_images(request(divide="by_row", normalisation=GREY))
    assert torch.equal(all_of(images)[1], pruned.test.labels)
    assert torch.allclose(
        all_of(images)[0], next(iter(pruned.test.eval_batches(2000, device="cpu")))[0]
    )
    rest = open_images(request(divide="by_row", split="train", normalisation=GREY))
    assert len(rest) == len(pruned.images)
    names = {rest.name(i) for i in range(len(rest))}
    assert names.isdisjoint(images.name(i) for i in range(len(images)))
    undivided = open_images(request(divide="no", normalisation=GREY))
    assert len(undivided) == 1797


def test_test_is_what_training_never_saw(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "d", {"cat": 2, "dog": 9}))
    options = DataOptions(resolution=(8, 8), channels=3, seed=1)
    trained = open_training(folder, options, normalisation=IMAGENET)
    images = open_images(request(data=folder, options=options, classes=2, normalisation=IMAGENET))
    assert trained.test is not None
    expected = next(iter(trained.test.eval_batches(100, device="cpu")))
    pixels, labels = all_of(images)
    assert torch.equal(labels, expected[1])
    assert torch.allclose(pixels, expected[0])
