"""Every component a search space can contain, to check a table before a long run starts."""

from __future__ import annotations

from collections.abc import Iterator

from slimnas.arch.efficientformer import ConvStem
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import Component


def space_components(space: SearchSpace) -> Iterator[Component]:
    """Yield each stem, downsample, block and head of `space`, once per width or pair of widths.

    Components are named by place and not by slot (`stages.2.blocks`), since the slots of a
    stage offer the same blocks.
    """
    image = space.input.shape
    shape = image  # the stem is what makes the first stage's map
    for i, stage in enumerate(space.stages):
        widths = stage.width.values
        if i == 0:
            for width in widths:
                stem = ConvStem(width=width, act=space.stem.act)
                shape = stem.output_shape(image)
                yield Component("stem", "stem", 0, stem, image, shape)
        before, entering = shape, space.stages[max(i - 1, 0)].width.values
        if stage.downsample is not None:
            shape = stage.downsample.output_shape(before, widths[-1])
            for width_in in entering:
                for width in widths:
                    if width_in <= width or not space.limits.monotone_widths:
                        name, after = f"stages.{i}.downsample", shape.with_channels(width)
                        incoming = before.with_channels(width_in)
                        yield Component(name, "downsample", i, stage.downsample, incoming, after)
        for choice in stage.blocks:
            for width in widths:
                block, at = space.blocks.block(choice, width), shape.with_channels(width)
                yield Component(f"stages.{i}.blocks", "block", i, block, at, at)
    logits = FeatureShape(space.head.classes, 1, 1)
    for width in space.stages[-1].width.values:
        last = len(space.stages) - 1
        yield Component("head", "head", last, space.head, shape.with_channels(width), logits)
