"""Data that cannot be used: one line that says what, where and what to do."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_cases import grey, tar_members, write_folder, write_parquet, write_tar
from PIL import Image

from slimnas.data import CropPolicy, DataOptions, StreamOptions, load_source, open_training
from slimnas.errors import DataError

OPTIONS = DataOptions(resolution=(8, 8), channels=3, seed=0)
STREAM = StreamOptions(buffer=8)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def one_class(root: Path) -> None:
    write_folder(root, {"a": range(5)})


def a_lone_image(root: Path) -> None:
    write_folder(root, {"a": range(5), "b": [9]})


def label_outside(root: Path) -> None:
    write_parquet(root / "x.parquet", {0: 0, 1: 1, 2: 2}, names=["a", "b"])


def negative_label(root: Path) -> None:
    write_parquet(root / "x.parquet", {0: 0, 1: 1, 2: -7}, names=["a", "b"])


def no_label(root: Path) -> None:
    write_parquet(root / "x.parquet", {0: 0, 1: 1, 2: None})


def empty_parquet(root: Path) -> None:
    write_parquet(root / "a.parquet", {0: 0, 1: 1})
    full = write_parquet(root / "b.parquet", {0: 0})
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(full).slice(0, 0), full)


def cut_parquet(root: Path) -> None:
    write_parquet(root / "a.parquet", {0: 0, 1: 1})
    cut = write_parquet(root / "b.parquet", {n: n for n in range(20)})
    cut.write_bytes(cut.read_bytes()[:-40])


def spoilt_parquet(root: Path) -> None:
    write_parquet(root / "a.parquet", {n: n % 2 for n in range(20)})
    noise = np.random.default_rng(0).bytes(4000)
    spoilt = write_parquet(root / "b.parquet", {0: 0, 1: 1}, broken={0: noise, 1: noise})
    content = bytearray(spoilt.read_bytes())
    content[4:3000] = bytes(2996)
    spoilt.write_bytes(content)


def empty_tar(root: Path) -> None:
    write_tar(root / "a.tar", tar_members({0: 0, 1: 1}))
    write_tar(root / "b.tar", [])


def cut_tar(root: Path) -> None:
    write_tar(root / "a.tar", tar_members({n: n % 2 for n in range(6)}))
    cut = write_tar(root / "b.tar", tar_members({n: n % 2 for n in range(6)}))
    cut.write_bytes(cut.read_bytes()[: 512 + 20])


def no_tar(root: Path) -> None:
    write_tar(root / "a.tar", tar_members({0: 0, 1: 1}))
    (root / "b.tar").write_bytes(b"not a tar at all, but some text" * 40)


def tar_without_images(root: Path) -> None:
    write_tar(root / "a.tar", tar_members({0: 0, 1: 1}))
    write_tar(root / "b.tar", [("0.txt", b"words"), ("0.cls", b"0")])


def tar_with_words(root: Path) -> None:
    write_tar(root / "a.tar", [("0.png", grey(0)), ("0.cls", b"cat")])


BOTH: list[tuple[Callable[[Path], None], str]] = [
    (label_outside, r"one of the classes, 0\.\.1, not 2 as .*image 2.* has; correct it"),
    (negative_label, r"one of the classes, 0\.\.1, not -7 as .*image 2.* has; correct it"),
    (no_label, r"every training image must be labelled, .*image 2"),
    (empty_parquet, r"b\.parquet: holds no images"),
    (cut_parquet, r"b\.parquet: not a whole parquet file"),
    (spoilt_parquet, r"b\.parquet: cannot be read"),
    (empty_tar, r"b\.tar: holds no images"),
    (cut_tar, r"b\.tar: cannot be read"),
    (no_tar, r"b\.tar: cannot be read"),
    (tar_with_words, r"a\.tar: cannot be read"),
]
READ: list[tuple[Callable[[Path], None], str]] = [
    *BOTH,
    (one_class, "at least two classes, all 5 images are of class 'a'"),
    (a_lone_image, "at least 2 images, one for each split; 1 of 2 have fewer.*'b' with 1"),
]
STREAMED: list[tuple[Callable[[Path], None], str]] = [
    *BOTH,
    (one_class, "at least two classes"),
    (tar_without_images, r"b\.tar: holds no images"),
]


@pytest.mark.parametrize(("make", "message"), READ)
def test_data_that_cannot_be_read_are_refused_in_one_line(tmp_path, make, message, capsys):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_training(str(tmp_path), OPTIONS)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("make", "message"), STREAMED)
def test_data_that_cannot_be_streamed_are_refused_in_one_line(tmp_path, make, message, capsys):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_training(str(tmp_path), OPTIONS, stream=STREAM)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_streams_have_no_numbers_and_digits_no_shards(tmp_path):
    write_folder(tmp_path, {"a": [0, 1], "b": [2, 3]})
    options = DataOptions(resolution=(8, 8), channels=1, seed=0, max_images=2)
    with pytest.raises(DataError, match=r"--max-images .*give --images-per-epoch"):
        open_training(str(tmp_path), options, stream=STREAM)
    with pytest.raises(DataError, match="too small to be streamed; leave out --stream"):
        open_training("digits", OPTIONS, stream=STREAM)


RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))  # grows to the right


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(RAMP), Image.new("L", (32, 32), 255), Image.new("L", (32, 32), 0)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def coloured(mode: str) -> Image.Image:
    return Image.fromarray(RAMP).convert("RGB").convert(mode)


UNUSUAL = {
    "grey": (saved(Image.fromarray(RAMP), "PNG"), 0),
    "grey JPEG": (saved(Image.fromarray(RAMP), "JPEG", quality=100), 3),
    "CMYK": (saved(coloured("CMYK"), "JPEG", quality=100), 6),
    "CMYK, plain": (saved(coloured("CMYK"), "TIFF"), 1),
    "16 bit": (saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"), 0),
    "16 bit TIFF": (saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"), 0),
    "1 bit": (
        saved(Image.fromarray(np.where(RAMP > 127, 255, 0).astype(np.uint8)).convert("1"), "PNG"),
        128,
    ),
    "palette": (saved(coloured("RGB").quantize(64), "PNG"), 4),
    "transparent": (saved(coloured("RGBA"), "PNG"), 0),
    "grey, transparent": (saved(Image.fromarray(RAMP).convert("LA"), "PNG"), 0),
    "animated GIF": (animated("GIF"), 0),
    "animated WebP": (animated("WEBP"), 2),
    "animated PNG": (animated("PNG"), 0),
}


@pytest.mark.parametrize("what", list(UNUSUAL))
@pytest.mark.parametrize("crop", [None, CropPolicy((1.0, 1.0), (1.0, 1.0), "bilinear")])
@pytest.mark.parametrize("channels", [1, 3])
def test_unusual_images_come_out_as_what_they_show(what, crop, channels):
    from slimnas.data.crop import CropDraw
    from slimnas.data.decode import decode

    raw, tolerance = UNUSUAL[what]
    draw = None if crop is None else CropDraw(crop, (0,))
    found = decode(raw, (32, 32), channels, draw)
    assert found.shape == (channels, 32, 32)
    assert np.abs(found.astype(int) - RAMP.astype(int)).max() <= tolerance


def test_images_of_all_sizes_and_shapes_are_scaled(tmp_path):
    write_folder(tmp_path, {"a": [10, 11], "b": [12, 13]})
    sizes = [(1, 1), (3, 200), (200, 3), (64, 48), (8, 8), (500, 501)]
    for number, size in enumerate(sizes):
        (tmp_path / "a" / f"x{number}.png").write_bytes(grey(50, size=size))
    data = open_training(str(tmp_path), OPTIONS, crop=CropPolicy())
    batches = list(data.train.raw_batches(4, device="cpu", seed=0, epoch=0))
    assert len(batches) == len(data.train) // 4
    assert all(x.shape == (4, 3, 8, 8) for x, _ in batches)
    assert set(np.concatenate([x.numpy().ravel() for x, _ in batches])) <= {10, 11, 12, 13, 50}


def cut(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), kind)
    return whole[: len(whole) // 2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_images_are_named(tmp_path, kind):
    write_folder(tmp_path, {"a": range(4), "b": range(4, 8)})
    name = f"cut.{kind.lower()}"
    (tmp_path / "a" / name).write_bytes(cut(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            DataError, match=rf"1 of 9 are not, the first is .*{name} \(.*skip-bad"
        ) as caught:
            open_training(str(tmp_path), OPTIONS)
    assert "\n" not in str(caught.value)


def run_into(spec: str, stream: StreamOptions | None) -> None:
    data = open_training(spec, OPTIONS, crop=CropPolicy(), stream=stream)
    for epoch in range(9):
        list(data.train.raw_batches(4, device="cpu", seed=0, epoch=epoch))


@pytest.mark.parametrize("stream", [None, STREAM])
def test_truncated_images_end_a_run_that_crops(tmp_path, stream):
    write_folder(tmp_path, {"a": range(4), "b": range(4, 8)})
    (tmp_path / "a" / "cut.jpg").write_bytes(cut("JPEG"))
    with pytest.raises(
        DataError, match=r"every image must be decodable, .*cut\.jpg.* is not \("
    ) as caught:
        run_into(str(tmp_path), stream)
    assert "\n" not in str(caught.value)


def test_a_folder_that_fills_with_other_things_is_told_what_is_expected(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="one sub-folder of images per class; no images in it"):
        load_source(str(tmp_path))
