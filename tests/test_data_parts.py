"""Batches in parts, one for each process, and with repeated augmentation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from slimnas.data import ImageSet, Part, Split
from slimnas.data.batches import MemoryPixels, flip_some, normalise, permutation
from slimnas.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor]


def make(count: int) -> ImageSet:
    """Images of one colour, their number, so that a shift leaves them as they are."""
    numbers = torch.arange(count)
    pixels = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 6).contiguous()
    return ImageSet(Split.TRAIN, MemoryPixels(pixels), numbers, (0.5,), (0.25,), True)


def noise(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(
        Split.TRAIN, MemoryPixels(pixels), torch.arange(count), (0.5,) * 3, (1.0,) * 3, True
    )


def drawn(images: ImageSet, batch_size: int, **changes: object) -> list[Batch]:
    settings = {"device": "cpu", "seed": 3, "epoch": 1, "augment": True, **changes}
    return list(images.batches(batch_size, **settings))


def raw(images: ImageSet, batch_size: int, **changes: object) -> list[Batch]:
    settings = {"device": "cpu", "seed": 3, "epoch": 1, **changes}
    return list(images.raw_batches(batch_size, **settings))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("augment", [False, True])
def test_parts_side_by_side_are_the_whole_batch(count, augment):
    images = noise(50)
    whole = drawn(images, 16, augment=augment)
    parts = [drawn(images, 16, augment=augment, part=Part(i, count)) for i in range(count)]
    assert len(whole) == 3
    for number, (x, y) in enumerate(whole):
        slices = [part[number] for part in parts]
        assert torch.equal(torch.cat([u for u, _ in slices]), x)
        assert torch.equal(torch.cat([v for _, v in slices]), y)
        assert [len(v) for _, v in slices] == [
            (i + 1) * 16 // count - i * 16 // count for i in range(count)
        ]


def test_a_part_can_be_resumed_inside_an_epoch():
    images = noise(40)
    whole = drawn(images, 8, part=Part(1, 2))
    rest = drawn(images, 8, part=Part(1, 2), start_batch=3)
    assert len(rest) == 2
    for (x, y), (u, v) in zip(whole[3:], rest, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


@pytest.mark.parametrize(("index", "count"), [(1, 1), (-1, 2), (0, 0)])
def test_a_part_must_exist(index, count):
    with pytest.raises(DataError, match=r"a part must be one of 0\.\."):
        Part(index, count)


def test_raw_batches_are_the_bytes_of_the_same_images():
    images = noise(50)
    batches = raw(images, 8)
    assert len(batches) == 6
    for (x, y), (u, v) in zip(batches, drawn(images, 8, augment=False), strict=True):
        assert x.dtype == torch.uint8
        assert torch.equal(images.normalise(x), u)
        assert torch.equal(y, v)


def ra_sampler(count: int, repeats: int, replicas: int, rank: int, order: np.ndarray) -> list[int]:
    """What timm's sampler gives this rank of images in `order`."""
    distributed_sampler = pytest.importorskip("timm.data.distributed_sampler")
    sampler = distributed_sampler.RepeatAugSampler(
        range(count), replicas, rank, shuffle=False, num_repeats=repeats, selected_round=8
    )
    return [int(order[index]) for index in sampler]


@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
def test_repeats_are_those_of_the_ra_sampler_of_timm(repeats):
    images, batch_size = make(72), 8
    order = permutation(72, 3, 1, 1)
    ours = [y.tolist() for _, y in raw(images, batch_size, repeats=repeats)]
    flat = ra_sampler(72, repeats, 1, 0, order)
    theirs = [flat[at : at + batch_size] for at in range(0, len(flat), batch_size)]
    assert len(ours) == len(theirs) == 9
    assert [Counter(batch) for batch in ours] == [Counter(batch) for batch in theirs]


def test_processes_get_different_copies_as_with_the_ra_sampler():
    images, repeats = make(72), 3
    order = permutation(72, 3, 1, 1)
    for rank in range(3):
        ours = [y.tolist() for _, y in raw(images, 24, repeats=repeats, part=Part(rank, 3))]
        flat = ra_sampler(72, repeats, 3, rank, order)
        assert len(ours) == 3
        assert [set(batch) for batch in ours] == [set(flat[at : at + 8]) for at in (0, 8, 16)]
        assert all(len(set(batch)) == 8 for batch in ours)


@pytest.mark.parametrize("shape", [(3, 3, 224, 200), (70, 3, 32, 32), (0, 1, 8, 8), (5, 1, 1, 1)])
def test_normalising_in_pieces_gives_the_bits_of_the_plain_formula(shape):
    mean, std = (0.485, 0.456, 0.406)[: shape[1]], (0.229, 0.224, 0.225)[: shape[1]]
    pixels = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    centre, spread = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    found = normalise(pixels, mean, std)
    assert found.dtype == torch.float32
    assert torch.equal(found, (pixels.float() / 255.0 - centre) / spread)


def test_half_of_a_batch_is_mirrored_and_parts_agree():
    pixels = torch.randint(0, 256, (40, 3, 5, 7), dtype=torch.uint8)
    whole = flip_some(pixels, torch.Generator().manual_seed(1), flip=True)
    mirrored = (whole == pixels.flip(3)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(whole == pixels).flatten(1).all(1))
    assert 10 <= int(mirrored.sum()) <= 30
    halves = [
        flip_some(
            pixels[Part(i, 2).of(40)],
            torch.Generator().manual_seed(1),
            flip=True,
            part=Part(i, 2),
            total=40,
        )
        for i in range(2)
    ]
    assert torch.equal(torch.cat(halves), whole)
    assert flip_some(pixels, torch.Generator(), flip=False) is pixels
