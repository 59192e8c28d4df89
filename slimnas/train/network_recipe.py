"""How a whole network is trained: `TrainRecipe` with augmentation, drop path and distillation.

`Augmentation` is the part of it that `slimnas.train.augment` goes by.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimnas.arch.documents import Spec
from slimnas.train.recipe import NotNegative, Positive, Share, TrainRecipe, Whole

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Interpolation = Literal["bilinear", "bicubic"]


class RandAugmentSpec(Spec):
    """RandAugment (Cubuk et al. 2020) as timm's `rand-m9-mstd0.5-inc1`, whose values are defaults.

    Attributes:
        n: operations drawn per image, each then done with probability 0.5.
        magnitude: mean strength of an operation, of 10.
        std: standard deviation of the strength.
    """

    n: Whole = 2
    magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = 9.0
    std: NotNegative = 0.5


class CropSpec(Spec):
    """Random resized crop (Szegedy et al. 2015), with torchvision's defaults.

    Attributes:
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width by height.
        interpolation: how the crop is resized.
    """

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    @model_validator(mode="after")
    def _check_ranges(self) -> CropSpec:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} must be [smallest, largest], got [{low:g}, {high:g}]")
        if self.scale[1] > 1.0:
            raise ValueError(f"scale must lie within the image, at most 1, got {self.scale[1]:g}")
        return self


class Augmentation(Spec):
    """What is done to training images, beside the shift and mirror of `TrainRecipe.augment`.

    Attributes:
        crop: random resized crop; None shifts each image by up to an eighth of its side instead.
        randaugment: operations drawn per image; None for none.
        color_jitter: largest change of brightness, contrast and saturation, as a share. As in
            timm it is left out where there is RandAugment.
        mixup: alpha of mixup (Zhang et al. 2018); 0 for none.
        cutmix: alpha of CutMix (Yun et al. 2019); 0 for none.
        mix_prob: share of batches that are mixed.
        mix_switch: share of mixed batches that CutMix gets where both are on.
        erasing: share of images with a rectangle of noise in them (Zhong et al. 2020).
        repeats: copies of each image in a batch, augmented differently (Hoffer et al. 2020).
    """

    crop: CropSpec | None = None
    randaugment: RandAugmentSpec | None = None
    color_jitter: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    mix_prob: Probability = 1.0
    mix_switch: Probability = 0.5
    erasing: Probability = 0.0
    repeats: Whole = 1

    @property
    def mixes(self) -> bool:
        """Whether batches may be mixed, so that targets are shares of classes."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0


class NetworkRecipe(Augmentation, TrainRecipe):
    """`TrainRecipe`, `Augmentation` and what else only the training of a whole network has.

    Attributes:
        lr_reference_batch: images per step that `lr` is meant for; the learning rate then grows
            linearly with `batch_size`. None for `lr` as it is.
        drop_path: stochastic depth of the last block, from 0 at the first (Huang et al. 2016).
        layer_scale: what every layer scale starts at, and BatchNorms that would start at 0; None
            leaves both as the architecture has them.
        distillation: what is learned from a teacher: its class (`hard`), its probabilities
            (`soft`), or `none`.
        teacher: zoo name, file or run folder of a network, or the name of one of timm's.
        distillation_weight: the teacher's share of the loss; the labels' is one minus it.
        temperature: that logits are divided by for `soft`.
    """

    lr_reference_batch: Whole | None = None
    drop_path: Share = 0.0
    layer_scale: Positive | None = None
    distillation: Literal["none", "hard", "soft"] = "none"
    teacher: str | None = None
    distillation_weight: Probability = 0.5
    temperature: Positive = 1.0

    @model_validator(mode="after")
    def _check_distillation(self) -> NetworkRecipe:
        if self.distillation != "none" and self.teacher is None:
            raise ValueError(
                f"distillation {self.distillation!r} needs a teacher; name one, or set "
                "distillation to 'none'"
            )
        return self

    def scaled(self) -> NetworkRecipe:
        """The same recipe with the learning rate of its own batch size.

        As in the released codes, `warmup_lr` and `min_lr` stay, and so does a `lr` that the
        scaling would bring below them.
        """
        if self.lr_reference_batch is None:
            return self
        lr = max(self.lr * self.batch_size / self.lr_reference_batch, self.min_lr)
        return self.model_copy(update={"lr": lr, "lr_reference_batch": None})
