from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from slimnas.data import ImageSet, Split
from slimnas.data.batches import MemoryPixels, permutation, shift_and_flip


def make(count: int = 50, *, channels: int = 3, flip: bool = True, side: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator
    )
    labels = torch.arange(count)
    mean, std = (0.25,) * channels, (0.5,) * channels
    return ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, mean, std, flip)


def batches(images: ImageSet, **changes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings = {"device": "cpu", "seed": 3, "epoch": 2, "augment": True, **changes}
    return list(images.batches(8, **settings))


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("start_batch", range(7))
def test_resuming_inside_an_epoch_gives_the_batches_of_an_uninterrupted_one(start_batch):
    images = make()
    whole = batches(images)
    assert len(whole) == images.steps(8) == 6
    torch.rand(5)  # the global random state plays no part
    assert same(batches(images, start_batch=start_batch), whole[start_batch:])


@pytest.mark.parametrize("changes", [{"seed": 4}, {"epoch": 3}])
def test_order_and_augmentation_change_with_seed_and_epoch(changes):
    images = make()
    ours, theirs = batches(images), batches(images, **changes)
    assert [y.tolist() for _, y in ours] != [y.tolist() for _, y in theirs]


def test_an_epoch_has_each_image_once_at_most():
    labels = torch.cat([y for _, y in batches(make())]).tolist()
    assert len(labels) == len(set(labels)) == 48
    left_out = [
        set(range(50)) - set(torch.cat([y for _, y in batches(make(), epoch=e)]).tolist())
        for e in range(3)
    ]
    assert len({frozenset(rest) for rest in left_out}) == 3


def test_a_set_smaller_than_a_batch_is_one_batch():
    found = batches(make(5))
    assert [len(y) for _, y in found] == [5]


def test_batches_are_normalised_pixels_with_their_labels():
    images = make()
    pixels = images.store.take(np.arange(50)).double() / 255
    found = batches(images, augment=False)
    assert len(found) == 6
    for x, y in found:
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        torch.testing.assert_close(x.double(), (pixels[y] - 0.25) / 0.5, rtol=0, atol=1e-6)


def test_eval_batches_give_every_image_in_order():
    images = make()
    found = list(images.eval_batches(8, device="cpu"))
    assert [len(y) for _, y in found] == [8] * 6 + [2]
    assert torch.cat([y for _, y in found]).tolist() == list(range(50))
    expected = images.normalise(images.store.take(np.arange(50)))
    assert torch.equal(torch.cat([x for x, _ in found]), expected)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 32), (8, 24)])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_crop_of_the_reflected_image(height, width, flip):
    images = torch.rand(64, 2, height, width, generator=torch.Generator().manual_seed(1))
    out = shift_and_flip(images, torch.Generator().manual_seed(5), flip=flip)
    up, left = height // 8, width // 8
    padded = torch.nn.functional.pad(images, (left, left, up, up), mode="reflect")
    kinds = {}
    for top, start, mirror in itertools.product(
        range(2 * up + 1), range(2 * left + 1), (False, True)
    ):
        crop = padded[:, :, top : top + height, start : start + width]
        crop = crop.flip(3) if mirror else crop
        for which in torch.nonzero((crop == out).flatten(1).all(1)).flatten().tolist():
            kinds[which] = (top, start, mirror)
    assert len(kinds) == 64  # each image is one of the crops
    mirrored = sum(mirror for *_, mirror in kinds.values())
    assert 16 <= mirrored <= 48 if flip else mirrored == 0
    assert len({kind[:2] for kind in kinds.values()}) > 6


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_images_can_be_augmented(side):
    images = torch.rand(4, 1, side, side)
    out = shift_and_flip(images, torch.Generator().manual_seed(0), flip=True)
    assert out.shape == images.shape
    assert torch.isin(out, images).all()


def test_augmentation_on_another_device_draws_the_same():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    images = make()
    here, there = batches(images), batches(images, device="cuda")
    assert all(y.is_cuda and x.is_cuda for x, y in there)
    for (x, y), (u, v) in zip(here, there, strict=True):
        torch.testing.assert_close(u.cpu(), x, rtol=0, atol=1e-6)
        assert torch.equal(v.cpu(), y)


def test_permutation_is_a_fixed_uniform_one():
    assert permutation(10, 0, 0, 1).tolist() == [7, 6, 4, 5, 3, 9, 1, 0, 2, 8]
    first = np.array([permutation(5, seed)[0] for seed in range(2000)])
    counts = np.bincount(first, minlength=5)
    # chi-square with 4 degrees of freedom, 99.9 % point
    assert ((counts - 400) ** 2 / 400).sum() < 18.5
