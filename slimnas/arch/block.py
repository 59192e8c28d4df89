"""What the specs of all blocks have in common."""

from __future__ import annotations

from typing import TypeVar

from slimnas.arch.documents import Spec
from slimnas.arch.shapes import Cost, FeatureShape, operator_cost

BlockT = TypeVar("BlockT", bound="Block")


class Block(Spec):
    """A part of a stage whose output has the shape of its input.

    A subclass has the fields `type` (a literal), `ffn_dim` and `repeat`. A file may leave widths
    out that follow from the stage's; `filled` fills them in.
    """

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN in a stage of `width` channels."""
        raise NotImplementedError

    def filled(self: BlockT, width: int) -> BlockT:
        """The same block once, all its widths written out."""
        return self.model_copy(update={"repeat": 1, "ffn_dim": self.hidden(width)})

    def check(self, shape: FeatureShape) -> None:
        """Refuse a map that the block cannot take.

        Raises:
            ValueError: says what must hold and what is given.
        """

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        raise NotImplementedError


def ffn_cost(shape: FeatureShape, hidden: int, *, conv: bool = False) -> Cost:
    """Cost of two linear layers on the positions of `shape`, with the LayerNorm before them.

    Args:
        shape: of the map, its extra tokens counted.
        hidden: width between the layers.
        conv: with a depthwise 3x3 convolution between them, as in LITv2.
    """
    width, tokens = shape.channels, shape.positions
    params, macs, outputs = 2 * width * hidden + hidden + width, 2 * width * hidden, hidden
    if conv:
        params, macs, outputs = params + 10 * hidden, macs + 9 * hidden, 2 * hidden
    return operator_cost(2 * width + params, macs * tokens, (outputs + width) * tokens)
