from __future__ import annotations

import dataclasses
import gc
import io
import types

import numpy as np
import pytest
import torch
from PIL import Image

from slimnas.data import DataOptions, ImageSet, SearchData, Split, open_data, split_source
from slimnas.data.batches import LazyPixels
from slimnas.data.decode import decode
from slimnas.data.sources import ArrayTable, Source
from slimnas.data.splits import _sample
from slimnas.errors import DataError

SIZE = {"resolution": (8, 8), "channels": 1, "seed": 0}


class BytesTable:
    """Encoded images in a list."""

    def __init__(self, images: list[bytes | None], labels: list[int]) -> None:
        self.images, self.labels = images, np.array(labels, dtype=np.int64)

    def read(self, indexes):
        return [self.images[index] for index in indexes]

    def name(self, index: int) -> str:
        return f"row {index}"


def noise(count: int, classes: int) -> ArrayTable:
    """Images that all differ, so that each can be found again."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return ArrayTable(pixels, np.arange(count) % classes, "noise")


def source_of(train, test=None, classes: int = 3) -> Source:
    names = tuple(f"class{number}" for number in range(classes))
    return Source("made-up", "digits", train, test, names, flip=False)


def pixels_of(images: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.store.take(np.arange(len(images)))}


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def reachable(root: object) -> list[object]:
    """Everything a chain of references leads to, short of code and classes."""
    seen: dict[int, object] = {}
    queue = [root]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen[id(thing)] = thing
        queue.extend(gc.get_referents(thing))
    return list(seen.values())


@pytest.mark.parametrize("own_test", [False, True])
def test_splits_share_no_image_and_lose_none(own_test):
    table = noise(300, 3)
    test = ArrayTable(255 - table.pixels[:60], table.labels[:60], "noise") if own_test else None
    splits = split_source(source_of(table, test), DataOptions(**SIZE))
    sets = [splits.train, splits.search, splits.test]
    assert [s.split for s in sets] == [Split.TRAIN, Split.SEARCH, Split.TEST]
    found = [pixels_of(s) for s in sets]
    assert [len(f) for f in found] == ([240, 60, 60] if own_test else [192, 48, 60])
    everything = {image.tobytes() for image in table.pixels}
    if own_test:
        everything |= {image.tobytes() for image in test.pixels}
    assert set.union(*found) == everything
    assert sum(map(len, found)) == len(everything)


def test_images_keep_their_labels():
    table = noise(90, 3)
    label_of = {
        image.tobytes(): label for image, label in zip(table.pixels, table.labels, strict=True)
    }
    splits = split_source(source_of(table), DataOptions(**SIZE))
    for images in (splits.train, splits.search, splits.test):
        taken = images.store.take(np.arange(len(images)))
        assert [label_of[i.numpy().tobytes()] for i in taken] == images.labels.tolist()


def test_every_class_is_split_in_the_same_proportion():
    table = noise(1000, 2)
    labels = np.repeat([0, 1, 2], [700, 297, 3])
    splits = split_source(source_of(ArrayTable(table.pixels, labels, "noise")), DataOptions(**SIZE))
    counts = [
        np.bincount(s.labels, minlength=3).tolist()
        for s in (splits.train, splits.search, splits.test)
    ]
    assert counts == [[448, 190, 1], [112, 48, 1], [140, 59, 1]]


def test_the_search_gets_no_way_to_test():
    splits = split_source(source_of(noise(300, 3)), DataOptions(**SIZE))
    test_images = pixels_of(splits.test)
    handed = reachable(splits.for_search())
    tensors = [thing for thing in handed if isinstance(thing, torch.Tensor)]
    assert len(tensors) == 4  # pixels and labels of two splits
    stored = set()
    for tensor in tensors:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        if tensor.ndim == 4:  # what lies in memory below the tensor, not only its view
            stored |= {image.numpy().tobytes() for image in whole.view(-1, 8, 8)}
    assert len(stored) == len(splits.train) + len(splits.search)
    assert not stored & test_images
    assert Split.TEST not in [thing.split for thing in handed if isinstance(thing, ImageSet)]
    assert {field.name for field in dataclasses.fields(SearchData)} == {
        *("train", "search", "classes", "digest")
    }
    # The walk does find test images where there is a way to them.
    assert any(thing is splits.test.store for thing in reachable(splits))


@pytest.mark.parametrize("memory_bytes", [2 << 30, 0])
def test_same_seed_same_digest(memory_bytes):
    source = source_of(noise(120, 3))
    options = DataOptions(**SIZE, memory_bytes=memory_bytes)
    digest = split_source(source, options).digest
    assert split_source(source, options).digest == digest
    changed = source.train.pixels.copy()
    changed[:, 0, 0] ^= 1
    others = [
        split_source(source, dataclasses.replace(options, seed=1)),
        split_source(source, dataclasses.replace(options, resolution=(4, 8))),
        split_source(source, dataclasses.replace(options, max_images=100)),
        split_source(source_of(ArrayTable(changed, source.train.labels, "")), options),
    ]
    assert len({digest, *(other.digest for other in others)}) == 5


def test_digits_are_split_the_same_on_every_machine():
    splits = open_data("digits", **SIZE)
    assert [len(s) for s in (splits.train, splits.search, splits.test)] == [1151, 287, 359]
    assert splits.digest == "27449e7fa51221a031e8b0dbfe6d99e04b3f07dde8596673c641288c00dde616"
    assert splits.description == (
        "digits (digits): 10 classes, 1151 train, 287 search, 359 test images, test held out"
    )


def test_lazy_images_equal_those_in_memory():
    source = source_of(noise(120, 3))
    held = split_source(source, DataOptions(**SIZE))
    lazy = split_source(source, DataOptions(**SIZE, memory_bytes=120 * 64 - 1))
    assert isinstance(lazy.train.store, LazyPixels)
    assert (lazy.mean, lazy.std) == (held.mean, held.std)
    for name in ("train", "search", "test"):
        ours, theirs = getattr(lazy, name), getattr(held, name)
        indexes = np.arange(len(ours))[::-1].copy()
        assert torch.equal(ours.store.take(indexes), theirs.store.take(indexes))
        assert torch.equal(ours.labels, theirs.labels)
    drawn = [
        list(s.train.batches(10, device="cpu", seed=0, epoch=1, augment=True)) for s in (held, lazy)
    ]
    assert len(drawn[0]) == len(drawn[1]) == 7
    for (x, y), (u, v) in zip(*drawn, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_mean_and_deviation_are_those_of_train():
    splits = split_source(source_of(noise(300, 3)), DataOptions(**SIZE))
    pixels = splits.train.store.take(np.arange(len(splits.train))).double() / 255
    assert splits.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-12)
    assert splits.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-12)


@pytest.mark.parametrize("count", [7, 50, 299])
def test_max_images_are_drawn_evenly(count):
    labels = np.repeat([0, 1, 2], [150, 100, 50])
    rows = _sample(labels, count, (0, 1))
    assert len(np.unique(rows)) == count
    exact = count * np.array([150, 100, 50]) / 300
    assert (abs(np.bincount(labels[rows], minlength=3) - exact) < 1).all()
    assert not np.array_equal(rows, _sample(labels, count, (1, 1)))


def test_max_images_limits_the_own_test_split_too():
    splits = split_source(
        source_of(noise(300, 3), noise(90, 3)), DataOptions(**SIZE, max_images=60)
    )
    assert [len(s) for s in (splits.train, splits.search, splits.test)] == [48, 12, 60]


BROKEN = [b"", b"no image at all", png(7)[:40], None]


@pytest.mark.parametrize("memory_bytes", [2 << 30, 0])
def test_bad_images_are_counted_and_skipped_only_on_demand(memory_bytes):
    images = [*(png(value) for value in range(26)), *BROKEN]
    source = source_of(BytesTable(images, [i % 3 for i in range(30)]))
    options = DataOptions(**SIZE, memory_bytes=memory_bytes, skip_bad_images=True)
    splits = split_source(source, options)
    assert splits.skipped == 4
    assert len(splits.train) + len(splits.search) + len(splits.test) == 26
    assert "4 undecodable images skipped" in splits.description


@pytest.mark.parametrize("memory_bytes", [2 << 30, 0])
def test_bad_images_are_named_and_counted(memory_bytes):
    images = [*(png(value) for value in range(26)), *BROKEN]
    source = source_of(BytesTable(images, [i % 3 for i in range(30)]))
    with pytest.raises(
        DataError, match=r"4 of 30 are not, the first is row 26 \(.*skip-bad-images"
    ):
        split_source(source, DataOptions(**SIZE, memory_bytes=memory_bytes))


def test_a_lazy_image_with_a_sound_header_and_a_broken_body_ends_the_run():
    buffer = io.BytesIO()
    Image.fromarray(noise(1, 1).pixels[0]).resize((64, 64)).save(buffer, "PNG")
    images = [*(png(value) for value in range(29)), buffer.getvalue()[:1000]]
    source = source_of(BytesTable(images, [i % 3 for i in range(30)]))
    store = LazyPixels(source.train, np.arange(30), (8, 8), 1)
    assert store.take(np.arange(29)).shape == (29, 1, 8, 8)
    with pytest.raises(DataError, match=r"row 29 is not \(.*skip-bad-images"):
        store.take(np.array([3, 29]))
    skipping = DataOptions(**SIZE, memory_bytes=0, skip_bad_images=True)
    assert split_source(source, skipping).skipped == 1


def test_orientation_mode_and_depth_come_out_right():
    ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))  # grows to the right

    def saved(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    sixteen = Image.fromarray(ramp.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(saved(sixteen, "PNG"), (8, 8), 1)[0], ramp)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned = decode(saved(Image.fromarray(ramp), "PNG", exif=exif), (8, 8), 1)[0]
    np.testing.assert_array_equal(turned, ramp.T)
    rgb = decode(saved(Image.fromarray(ramp), "PNG"), (8, 8), 3)
    np.testing.assert_array_equal(rgb, np.stack([ramp] * 3))
    palette = Image.fromarray(ramp).convert("P")
    palette.info["transparency"] = b"\x00\xff"
    np.testing.assert_array_equal(decode(saved(palette, "PNG"), (8, 8), 3)[1], ramp)
    rgba = Image.merge("RGBA", [Image.fromarray(ramp)] * 4)
    np.testing.assert_array_equal(decode(saved(rgba, "PNG"), (8, 8), 3)[2], ramp)


def test_resizing_averages_as_torch_does_and_crops_the_centre():
    square = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    ours = decode(square, (8, 8), 1)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(square)[None, None].float(), (8, 8), mode="bilinear", antialias=True
    )
    assert np.abs(ours - theirs[0].numpy()).max() <= 1
    wide = np.zeros((32, 64), dtype=np.uint8)
    wide[:, 16:48] = square
    # Away from the edges, where the filter also sees what lies beyond the crop.
    np.testing.assert_array_equal(decode(wide, (8, 8), 1)[..., 1:-1], ours[..., 1:-1])
    assert decode(wide, (8, 16), 3).shape == (3, 8, 16)


@pytest.mark.parametrize(
    ("labels", "own_test", "message"),
    [
        ([1] * 9, False, "two classes, all 9 images are of class 'class1'"),
        ([0] * 9 + [1, 1], False, "at least 3 images.*1 of 2 have fewer.*'class1' with 2"),
        ([0] * 9 + [1], True, "at least 2 images.*'class1' with 1"),
        ([], False, "holds no images"),
    ],
)
def test_sets_that_cannot_be_split_are_refused(labels, own_test, message):
    table = BytesTable([png(value) for value in range(len(labels))], labels)
    with pytest.raises(DataError, match=message):
        split_source(source_of(table, noise(9, 2) if own_test else None), DataOptions(**SIZE))


def test_nothing_decodable_is_refused_even_when_skipping():
    table = BytesTable([b"x"] * 9, [0, 1, 2] * 3)
    with pytest.raises(DataError, match="holds no images that can be decoded"):
        split_source(source_of(table), DataOptions(**SIZE, skip_bad_images=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resolution", (0, 8)),
        ("channels", 2),
        ("seed", -1),
        ("search_fraction", 0.0),
        ("search_fraction", float("nan")),
        ("test_fraction", 1.0),
        ("max_images", 0),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(DataError, match=f"{name} must .*, got"):
        DataOptions(**{**SIZE, name: value})
