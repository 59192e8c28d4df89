"""What a backbone gives: one map per stage, with its channels, stride and module."""

from __future__ import annotations

from dataclasses import dataclass

from slimnas.arch.architecture import Architecture
from slimnas.arch.shapes import FeatureShape

FAR = 4096
"""A side in pixels so large that rounding at the borders does not touch a stride."""


@dataclass(frozen=True)
class FeatureInfo:
    """One map of a backbone.

    Attributes:
        channels: of the map.
        stride: pixels of the image per position of the map, 4 or 16, say.
        module: name of the module it comes from.
    """

    channels: int
    stride: int
    module: str


def feature_info(architecture: Architecture) -> tuple[FeatureInfo, ...]:
    """Describe the map of every stage of `architecture`, whatever the size of its images."""
    image = FeatureShape(architecture.input.channels, FAR, FAR)
    shape = architecture.stem.output_shape(image)
    found = []
    for index, stage in enumerate(architecture.stages):
        if stage.downsample is not None:
            shape = stage.downsample.output_shape(shape, stage.width)
        stride = round(FAR / shape.height)
        found.append(FeatureInfo(stage.width, stride, f"stages.{index}"))
    return tuple(found)
