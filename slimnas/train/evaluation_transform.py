"""Resize and centre crop as timm does it for evaluation, in place of the largest centred crop.

timm's `transforms_imagenet_eval`: the shorter side is resized to floor(side / crop_pct), and the
centre is cut out; for inputs that are not square the image is resized until it covers both.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from slimnas.data.decode import try_decode
from slimnas.data.sources import ImageTable, LongArray, RawImage
from slimnas.errors import DataError

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TURNED = range(5, 9)
"""Orientation tags that swap width and height."""


@dataclass(frozen=True)
class EvalTransform:
    """Resize, then cut out the centre.

    Attributes:
        resolution: height and width of the result, pixels.
        scale: height and width that the resized image must cover, pixels.
        interpolation: `bilinear` or `bicubic`, antialiased.
    """

    resolution: tuple[int, int]
    scale: tuple[int, int]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Refuse what leaves no image.

        Raises:
            DataError: the resized image would be smaller than the result, or an unknown filter.
        """
        if self.interpolation not in _FILTERS:
            raise DataError(
                f"interpolation must be one of {', '.join(_FILTERS)}, got {self.interpolation!r}"
            )
        if any(have < want for have, want in zip(self.scale, self.resolution, strict=True)):
            raise DataError(
                f"--resize: must be at least the resolution, {max(self.resolution)}, got "
                f"{min(self.scale)}; give a larger one, or a smaller --resolution"
            )

    @classmethod
    def of_crop(
        cls, resolution: tuple[int, int], crop_pct: float, interpolation: str
    ) -> EvalTransform:
        """timm's `crop_pct`: the share of the resized image's side that is kept."""
        height, width = (math.floor(side / crop_pct) for side in resolution)
        return cls(resolution, (height, width), interpolation)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image of this size is resized to."""
        down, across = self.scale
        if down != across:
            ratio = min(height / down, width / across)
            return round(width / ratio), round(height / ratio)
        if width <= height:
            return down, int(down * height / width)
        return int(down * width / height), down

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, resized and its centre cut out."""
        size = self.size(*image.size)
        if image.size != size:
            image = image.resize(size, _FILTERS[self.interpolation])
        height, width = self.resolution
        top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
        return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True, eq=False)
class PreparedTable:
    """A table whose images are resized and cropped already when they are read.

    Attributes:
        table: the images as they lie.
        transform: what is done to them.
        channels: 1 or 3.
    """

    table: ImageTable
    transform: EvalTransform
    channels: int

    @property
    def labels(self) -> LongArray:
        """Class numbers (N,)."""
        return self.table.labels

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        """Return these images as pixels; one that cannot be decoded as it lies."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._prepared, self.table.read(indexes)))

    def name(self, index: int) -> str:
        """Return what to call this row."""
        return self.table.name(index)

    def _prepared(self, raw: RawImage) -> RawImage:
        size = _upright_size(raw)
        if size is None:
            return raw
        pixels = try_decode(raw, size, self.channels)
        if isinstance(pixels, str):
            return raw
        image = Image.fromarray(pixels[0] if self.channels == 1 else pixels.transpose(1, 2, 0))
        prepared: NDArray[np.uint8] = np.asarray(self.transform(image), dtype=np.uint8)
        return prepared


def _upright_size(raw: RawImage) -> tuple[int, int] | None:
    """Height and width after the orientation tag is honoured; None where there is no image."""
    if raw is None:
        return None
    if isinstance(raw, np.ndarray):
        return raw.shape[0], raw.shape[1]
    try:
        with Image.open(raw if isinstance(raw, Path) else io.BytesIO(raw)) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation) in _TURNED
            width, height = opened.size
    except (OSError, ValueError, SyntaxError):
        return None
    return (width, height) if turned else (height, width)
