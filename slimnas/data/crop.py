"""Random resized crops: which box of an image a training step sees.

The box follows from a key (seed, epoch, image, copy) alone, so it does not matter which process,
thread or resumed run decodes the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL.Image import Resampling

from slimnas.errors import DataError

Box: TypeAlias = "tuple[int, int, int, int]"
"""Left, top, right, bottom, pixels."""

_TRIES = 10
_FILTERS = {
    "bilinear": (Resampling.BILINEAR,),
    "bicubic": (Resampling.BICUBIC,),
    "random": (Resampling.BILINEAR, Resampling.BICUBIC),
}


@dataclass(frozen=True)
class CropPolicy:
    """A random part of an image, scaled to the resolution (Szegedy et al. 2015, figure 8 of v1).

    Attributes:
        scale: least and largest share of the image's area.
        ratio: least and largest width / height, drawn evenly in the logarithm.
        interpolation: bilinear, bicubic, or random (either, as timm does it).
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Refuse what no crop can meet.

        Raises:
            DataError: a range is empty or out of bounds, or the interpolation is unknown.
        """
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise DataError(f"crop scale must be two shares of 0..1, rising, got {self.scale}")
        low, high = self.ratio
        if not 0 < low <= high < math.inf:
            raise DataError(f"crop ratio must be two numbers above 0, rising, got {self.ratio}")
        if self.interpolation not in _FILTERS:
            raise DataError(
                f"crop interpolation must be one of {', '.join(_FILTERS)}, "
                f"got {self.interpolation!r}"
            )


@dataclass(frozen=True)
class CropDraw:
    """One draw from a policy; the same key, non-negative numbers, gives the same crop."""

    policy: CropPolicy
    key: tuple[int, ...]

    def choose(self, width: int, height: int) -> tuple[Box, Resampling]:
        """Return the box and the filter for an image of this size.

        Ten tries for a box that fits, then the largest centred one whose ratio is allowed, as
        torchvision and timm do it.
        """
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.key)))
        filters = _FILTERS[self.policy.interpolation]
        chosen = filters[int(draw.random() * len(filters))]
        (small, large), (narrow, wide) = self.policy.scale, self.policy.ratio
        for _ in range(_TRIES):
            share, place = draw.random(2).tolist()
            area = width * height * (small + (large - small) * share)
            aspect = math.exp(math.log(narrow) + math.log(wide / narrow) * place)
            columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < columns <= width and 0 < rows <= height:
                across, down = draw.random(2).tolist()
                left = int(across * (width - columns + 1))
                top = int(down * (height - rows + 1))
                return (left, top, left + columns, top + rows), chosen
        return _centre(width, height, self.policy.ratio), chosen


def _centre(width: int, height: int, ratio: tuple[float, float]) -> Box:
    narrow, wide = ratio
    columns = max(1, min(width, round(height * wide)))
    rows = max(1, min(height, round(width / narrow)))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows
