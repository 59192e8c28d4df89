"""Augmentation against Pillow's and timm's, image by image, and as a function of its place."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from slimnas.data.batches import WHOLE, ImageSet, MemoryPixels, Part, Split
from slimnas.train.augment import (
    AugmentedImages,
    crop_boxes,
    crop_images,
    draw_mix,
    erase,
    mix,
    soft_targets,
)
from slimnas.train.network_recipe import Augmentation, CropSpec, RandAugmentSpec
from slimnas.train.randaugment import MOVES, NAMES, color_jitter, operate, rand_augment
from slimnas.train.recipe import TrainRecipe
from slimnas.train.recipes import load_recipe

FILL = (124, 116, 104)
TIMMS = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
EXACT = ("equalize", "invert", "posterize", "solarize", "solarize_add")
EVERYTHING = Augmentation(
    randaugment=RandAugmentSpec(),
    mixup=0.8,
    cutmix=1.0,
    erasing=0.5,
    repeats=2,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photograph(seed: int = 0, size: tuple[int, int] = (24, 40)) -> Image.Image:
    """A smooth picture with some noise, neither black nor white all over."""
    coarse = torch.rand((1, 3, 4, 4), generator=generator(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=True)
    noisy = (smooth + 0.1 * torch.rand((1, 3, *size), generator=generator(seed + 1))).clamp(0, 1)
    pixels = (20 + 200 * noisy[0]).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0


def image_set(count: int = 10, channels: int = 3, *, flip: bool = True) -> ImageSet:
    pixels = torch.randint(
        0, 256, (count, channels, 12, 8), generator=generator(), dtype=torch.uint8
    )
    mean, std = (0.4,) * channels, (0.2,) * channels
    return ImageSet(Split.TRAIN, MemoryPixels(pixels), torch.arange(count) % 4, mean, std, flip)


def all_batches(
    images: ImageSet | AugmentedImages, size: int = 4, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    place = {"device": "cpu", "seed": 3, "epoch": 1, "augment": True, **options}
    return list(images.batches(size, **place))


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    assert len(left) == len(right) > 0
    return all(
        torch.equal(a, b)
        for one, two in zip(left, right, strict=True)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0.0, 4.3, 9.0, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_timms(
    name: str, level: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    images = [photograph(seed) for seed in range(3)]
    level_of = auto_augment.LEVEL_TO_ARG[TIMMS[name]]
    arguments = level_of(level, {}) if level_of else ()
    if name == "posterize":  # timm asks Pillow for 0 bits at the strongest, which it refuses
        arguments = (max(1, *arguments),)
    wanted = torch.stack(
        [
            tensor_of(
                auto_augment.NAME_TO_OP[TIMMS[name]](
                    image, *arguments, resample=Image.Resampling.BILINEAR, fillcolor=FILL
                )
            )
            for image in images
        ]
    )
    given = operate(
        torch.stack([tensor_of(image) for image in images]),
        torch.full((3,), NAMES.index(name)),
        torch.full((3,), level / 10.0),
        torch.full((3,), float(sign)),
        torch.tensor(FILL) / 255.0,
    )
    off = (given - wanted).abs() * 255.0
    if name in EXACT:
        assert off.max() < 1e-3
    elif name in MOVES:  # Pillow rounds, and a pixel on the border may fall to the other side
        assert (off > 1.01).float().mean() < 0.002
    else:
        assert off.max() < 2.0
        assert off.mean() < 0.7


def test_every_operation_of_timms_is_there() -> None:
    assert len(NAMES) == len(set(NAMES)) == 15
    assert sorted(TIMMS[name] for name in NAMES) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)


def test_every_image_gets_its_own_operation() -> None:
    images = torch.stack([tensor_of(photograph(seed)) for seed in range(3)]).repeat(6, 1, 1, 1)
    drawn = torch.arange(18) - 3  # three get none
    strength = torch.linspace(0.1, 1.0, 18)
    sign = torch.where(torch.arange(18) % 2 == 0, -1.0, 1.0)
    fill = torch.tensor([0.2, 0.4, 0.6])
    before = images.clone()
    together = operate(images, drawn, strength, sign, fill)
    assert torch.equal(images, before)
    for i in range(18):
        mine = slice(i, i + 1)
        alone = operate(images[mine], drawn[mine], strength[mine], sign[mine], fill)
        torch.testing.assert_close(together[mine], alone)
        assert torch.equal(alone, images[mine]) == (i < 3), NAMES[drawn[i]]


def test_images_of_a_batch_differ_and_draws_are_the_generators() -> None:
    images = tensor_of(photograph()).repeat(200, 1, 1, 1)
    fill = torch.full((3,), 0.5)
    torch.manual_seed(1)
    first = rand_augment(images, generator(5), RandAugmentSpec(), fill)
    torch.manual_seed(2)
    assert torch.equal(rand_augment(images, generator(5), RandAugmentSpec(), fill), first)
    assert not torch.equal(rand_augment(images, generator(6), RandAugmentSpec(), fill), first)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 120
    untouched = (first == images).flatten(1).all(1).float().mean().item()
    assert untouched == pytest.approx(0.25, abs=0.08)
    assert 0.0 <= first.min() <= first.max() <= 1.0


def test_one_channel_is_augmented_too() -> None:
    images = torch.rand((60, 1, 2, 9), generator=generator())
    out = rand_augment(images, generator(), RandAugmentSpec(n=3), torch.tensor([0.5]))
    assert out.shape == images.shape
    assert not torch.equal(out, images)
    jittered = color_jitter(images, generator(), 0.4)
    assert (jittered != images).flatten(1).any(1).all()


def test_colour_jitter_stays_within_its_share() -> None:
    grey = torch.full((400, 3, 4, 4), 0.5)  # contrast and saturation leave it alone
    factors = (color_jitter(grey, generator(), 0.4) / grey)[:, 0, 0, 0]
    assert 0.6 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.4
    assert factors.mean().item() == pytest.approx(1.0, abs=0.04)
    colours = torch.tensor([0.6, 0.5, 0.4]).view(1, 3, 1, 1).expand(50, 3, 4, 4)
    spread = color_jitter(colours, generator(), 0.4)
    assert (spread[:, 0] - spread[:, 2]).std() > 0.01


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.77])
def test_mixup_is_timms(lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn((6, 3, 8, 10), generator=generator())
    labels = torch.tensor([0, 3, 3, 1, 2, 0])
    theirs = mixup.Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (lam, False))
    pixels, targets = theirs(images.clone(), labels)
    assert torch.equal(mix(images, lam, None), pixels)
    torch.testing.assert_close(soft_targets(labels, lam, classes=5, smoothing=0.1), targets)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_is_timms(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn((6, 3, 8, 10), generator=generator())
    labels = torch.tensor([0, 3, 3, 1, 2, 0])
    lam, box = draw_mix(Augmentation(cutmix=1.0, mix_switch=1.0), (8, 10), (seed,))
    assert box is not None
    theirs = mixup.Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    centre = iter([0, 0])

    def bbox(*_: Any, **__: Any) -> Any:
        next(centre)
        area = (box[1] - box[0]) * (box[3] - box[2])
        return box, 1.0 - area / 80.0

    monkeypatch.setattr(mixup, "cutmix_bbox_and_lam", bbox)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.5, True))
    pixels, targets = theirs(images.clone(), labels)
    assert torch.equal(mix(images, lam, box), pixels)
    torch.testing.assert_close(soft_targets(labels, lam, classes=5, smoothing=0.1), targets)


def test_mixes_are_drawn_as_asked() -> None:
    plan = Augmentation(mixup=0.8, cutmix=1.0, mix_prob=0.75, mix_switch=0.4)
    draws = [draw_mix(plan, (64, 48), (1, 2, batch)) for batch in range(4000)]
    shares = [lam for lam, box in draws if box is None and lam < 1.0]
    boxes = [(lam, box) for lam, box in draws if box is not None]
    assert len(shares) == pytest.approx(4000 * 0.75 * 0.6, rel=0.06)
    assert len(boxes) == pytest.approx(4000 * 0.75 * 0.4, rel=0.08)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)  # of Beta(a, a)
    for lam, (top, bottom, left, right) in boxes:
        assert 0 <= top <= bottom <= 64
        assert 0 <= left <= right <= 48
        assert lam == pytest.approx(1 - (bottom - top) * (right - left) / (64 * 48))
    np.random.seed(0)
    timms = [mixup.cutmix_bbox_and_lam((3, 64, 48), np.random.beta(1, 1))[1] for _ in range(4000)]
    ours = [lam for lam, _ in boxes]
    assert np.mean(ours) == pytest.approx(np.mean(timms), abs=0.03)
    assert np.var(ours) == pytest.approx(np.var(timms), rel=0.12)
    only = Augmentation(mixup=0.8)
    assert all(draw_mix(only, (8, 8), (batch,))[1] is None for batch in range(50))
    assert not Augmentation().mixes
    assert not Augmentation(mixup=1.0, mix_prob=0.0).mixes


def erased_boxes(change: Callable[[Tensor], Tensor], count: int) -> list[tuple[int, int]]:
    """Height and width of what is erased from each image that has something erased."""
    images = torch.full((count, 2, 20, 30), 7.0)
    masks = (change(images.clone()) != 7.0).all(dim=1)
    found = []
    for mask in masks[masks.flatten(1).any(1)]:
        high, wide = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert int(mask.sum()) == high * wide  # one rectangle
        found.append((high, wide))
    return found


def test_erasing_is_timms() -> None:
    count = 3000
    ours = erased_boxes(lambda images: erase(images, generator(), 0.25), count)
    theirs = erased_boxes(RandomErasing(0.25, mode="pixel", device="cpu"), count)
    assert len(ours) == pytest.approx(0.25 * count, rel=0.1)
    for sizes in zip(*ours, strict=True), zip(*theirs, strict=True):
        assert sizes is not None
    ours_area = np.array([high * wide for high, wide in ours]) / 600
    theirs_area = np.array([high * wide for high, wide in theirs]) / 600
    assert ours_area.mean() == pytest.approx(theirs_area.mean(), abs=0.02)
    assert ours_area.std() == pytest.approx(theirs_area.std(), abs=0.015)
    assert 0.01 < ours_area.min() < ours_area.max() < 0.36
    ratios = [np.log(np.array(found)[:, 1] / np.array(found)[:, 0]) for found in (ours, theirs)]
    assert ratios[0].mean() == pytest.approx(ratios[1].mean(), abs=0.1)
    assert ratios[0].std() == pytest.approx(ratios[1].std(), abs=0.06)


def test_erased_pixels_are_normal_noise() -> None:
    images = torch.full((200, 3, 32, 32), 9.0)
    out = erase(images.clone(), generator(1), 1.0)
    noise = out[out != 9.0]
    assert len(noise) > 50_000
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(erase(images.clone(), generator(1), 1.0), out)
    assert torch.equal(erase(images.clone(), generator(1), 0.0), images)


def test_crops_lie_within_their_ranges() -> None:
    crop = CropSpec(scale=(0.2, 0.7), ratio=(0.5, 1.5))
    boxes = crop_boxes(2000, (40, 30), generator(), crop)
    top, left, high, wide = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + high <= 40).all()
    assert (left + wide <= 30).all()
    area, ratio = high * wide / 1200, wide / high
    assert 0.18 < area.min() < 0.25
    assert 0.6 < area.max() < 0.72
    assert 0.47 < ratio.min() < 0.6
    assert 1.3 < ratio.max() < 1.56
    whole = crop_boxes(3, (4, 400), generator(), CropSpec(scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    assert whole.tolist() == [[0.0, 0.0, 4.0, 400.0]] * 3


@pytest.mark.parametrize("box", [(0, 0, 24, 40), (3, 5, 12, 20), (20, 1, 4, 39)])
def test_crops_are_pillows(box: tuple[int, int, int, int]) -> None:
    top, left, high, wide = box
    image = photograph()
    wanted = image.crop((left, top, left + wide, top + high)).resize(
        (40, 24), Image.Resampling.BILINEAR
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    given = crop_images(pixels, torch.tensor([box]).float(), "bilinear")
    off = (given[0] - 255.0 * tensor_of(wanted)).abs()
    # Along its border Pillow's crop does not see the pixels beyond it.
    rows, columns = -(-12 // high) + 1, -(-20 // wide) + 1
    assert off[:, rows:-rows, columns:-columns].max() < 1.01
    assert off.mean() < 3.0
    cubic = crop_images(pixels, torch.tensor([box]).float(), "bicubic")
    assert 0.0 <= cubic.min() <= cubic.max() <= 255.0


def test_without_anything_it_is_what_the_images_give() -> None:
    for images in (image_set(), image_set(flip=False)):
        plain = AugmentedImages(images, Augmentation(), 4)
        assert same(all_batches(plain), all_batches(images))
        assert len(plain) == 10
        assert plain.steps(4) == images.steps(4) == 2
        everything = AugmentedImages(images, EVERYTHING, 4, smoothing=0.1)
        assert same(all_batches(everything, augment=False), all_batches(images, augment=False))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_follows_from_its_place(channels: int) -> None:
    images = AugmentedImages(image_set(channels=channels), EVERYTHING, 4, smoothing=0.1)
    pixels = images.images.store.pixels.clone()  # type: ignore[attr-defined]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = all_batches(images, size=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(2)
    assert same(all_batches(images, size=2), first)
    assert same(all_batches(images, size=2, start_batch=3), first[3:])
    assert not same(all_batches(images, size=2, epoch=2), first)
    assert not same(all_batches(images, size=2, seed=4), first)
    assert torch.equal(images.images.store.pixels, pixels)  # type: ignore[attr-defined]
    for batch, targets in first:
        assert batch.dtype == targets.dtype == torch.float32
        assert batch.shape == (2, channels, 12, 8)
        assert torch.isfinite(batch).all()
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(2))
        assert targets.min() >= 0.1 / 4 - 1e-7


@pytest.mark.parametrize("crop", [None, CropSpec()])
def test_parts_are_shifted_as_the_whole_is(crop: CropSpec | None) -> None:
    images = AugmentedImages(image_set(), Augmentation(crop=crop), 4)
    whole = all_batches(images, size=5)
    parts = [all_batches(images, size=5, part=Part(index, 3)) for index in range(3)]
    for batch, (pixels, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[batch][1] for part in parts]), labels)
        torch.testing.assert_close(torch.cat([part[batch][0] for part in parts]), pixels)


def test_parts_draw_their_own_operations() -> None:
    images = image_set(8)
    equal = dataclasses.replace(images, store=MemoryPixels(images.store.take(np.zeros(8, int))))
    plan = Augmentation(randaugment=RandAugmentSpec(), mixup=0.8)
    augmented = AugmentedImages(equal, plan, 4)
    left, right = (all_batches(augmented, 8, part=Part(index, 2)) for index in range(2))
    assert left[0][0].shape == right[0][0].shape == (4, 3, 12, 8)
    assert not torch.allclose(left[0][0], right[0][0])
    assert same(all_batches(augmented, 8, part=Part(1, 2)), right)


def test_repeats_are_augmented_differently() -> None:
    plan = Augmentation(randaugment=RandAugmentSpec(), repeats=2)
    (pixels, labels), *_ = all_batches(AugmentedImages(image_set(), plan, 4), 8, part=WHOLE)
    assert sorted(labels[:4].tolist()) == sorted(labels[4:].tolist())
    assert not any(torch.equal(pixels[i], pixels[i + 4]) for i in range(4))


def test_crops_are_left_to_images_that_are_cropped() -> None:
    class Cropped:
        """Looks like images that were cropped where they were decoded."""

        cropped = True

        def __init__(self) -> None:
            self.inner = image_set(flip=False)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

    augmented = AugmentedImages(Cropped(), Augmentation(crop=CropSpec()), 4)
    assert same(all_batches(augmented), all_batches(image_set(), augment=False))


@pytest.mark.parametrize("name", ["efficientformer", "litv2", "quick"])
def test_a_recipe_augments_as_its_part_that_says_how(name: str) -> None:
    recipe = load_recipe(name)
    part = Augmentation(**{key: getattr(recipe, key) for key in Augmentation.model_fields})
    assert not set(Augmentation.model_fields) & set(TrainRecipe.model_fields)
    assert recipe.mixes == part.mixes == (name != "quick")
    whole, alone = (
        all_batches(AugmentedImages(image_set(), plan, 4, smoothing=0.1)) for plan in (recipe, part)
    )
    assert same(whole, alone)


def test_colour_jitter_gives_way_to_randaugment() -> None:
    images = image_set()
    spec = RandAugmentSpec()
    both = AugmentedImages(images, Augmentation(randaugment=spec, color_jitter=0.4), 4)
    alone = AugmentedImages(images, Augmentation(randaugment=spec), 4)
    assert same(all_batches(both), all_batches(alone))
    jitter = AugmentedImages(images, Augmentation(color_jitter=0.4), 4)
    assert not same(all_batches(jitter), all_batches(images))


def test_kornia_comes_when_it_is_needed_and_torchvision_never() -> None:
    code = """
import sys, torch
from slimnas.train.augment import AugmentedImages
from slimnas.train.network_recipe import Augmentation, RandAugmentSpec
from slimnas.train.randaugment import NAMES, operate
assert "kornia" not in sys.modules
n = len(NAMES)
operate(torch.rand(n, 3, 8, 8), torch.arange(n), torch.rand(n), torch.ones(n), torch.zeros(3))
assert "kornia" in sys.modules
assert "torchvision" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
