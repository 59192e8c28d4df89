"""The components of Swin Transformer, with their closed-form costs.

Structure: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"
(ICCV 2021), section 3. The modules of the same names are in `slimnas.nn.swin`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import Count
from slimnas.arch.shapes import NO_COST, Cost, FeatureShape, operator_cost
from slimnas.arch.vit import TransformerBlock, Width


def require_shift_within(window: int, shift: int) -> None:
    """Refuse windows that move by as much as they are wide.

    Raises:
        ValueError: says what must hold and what is given.
    """
    if shift >= window:
        raise ValueError(
            f"shift must be less than the window, {window}, got {shift}; half of the window is "
            "usual"
        )


class SwinBlock(TransformerBlock):
    """Attention inside (shifted) windows with a learned bias per offset, and FFN, on tokens.

    `window` is the side of a window in tokens. `shift` moves the windows down and right by that
    many tokens. Along a side that is no longer than `window`, the window is the whole side and
    nothing shifts. Maps are padded to whole windows.
    """

    type: Literal["swin"] = "swin"
    window: Count = 7
    shift: Width = 0

    @model_validator(mode="after")
    def _shifts_within(self) -> SwinBlock:
        require_shift_within(self.window, self.shift)
        return self

    def windows(self, shape: FeatureShape) -> tuple[int, int]:
        """Height and width of the windows on a map of `shape`."""
        return min(self.window, shape.height), min(self.window, shape.width)

    def shifts(self, shape: FeatureShape) -> tuple[int, int]:
        """By how many rows and columns the windows are moved on a map of `shape`."""
        rows = self.shift if shape.height > self.window else 0
        return rows, self.shift if shape.width > self.window else 0

    def padded(self, shape: FeatureShape) -> tuple[int, int]:
        """Height and width of the map after padding to whole windows."""
        high, wide = self.windows(shape)
        return -(-shape.height // high) * high, -(-shape.width // wide) * wide

    def attention_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention sub-layer, its LayerNorm included; padding is computed too."""
        if not self.heads:
            return NO_COST
        width, values = shape.channels, self.heads * self.v_dim
        (high, wide), (rows, columns) = self.windows(shape), self.padded(shape)
        tokens, inside = rows * columns, high * wide
        offsets = (2 * high - 1) * (2 * wide - 1)
        params = 2 * width + (width + 1) * self.qkv_width + (values + 1) * width
        linear = width * (self.qkv_width + values)
        products = inside * self.heads * (self.qk_dim + self.v_dim)
        outputs = self.qkv_width + values + width + self.heads * inside
        return operator_cost(
            params + offsets * self.heads, tokens * (linear + products), tokens * outputs
        )

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        return self.attention_cost(shape) + self.ffn_cost(shape)


class SwinStem(Spec):
    """Patch embedding by a convolution with stride and kernel `patch`, then LayerNorm.

    Images are padded at the right and lower edge to whole patches.
    """

    type: Literal["swin_stem"] = "swin_stem"
    width: Count
    patch: Count = 4

    def output_shape(self, shape: FeatureShape) -> FeatureShape:
        """Shape of the first map."""
        rows, columns = -(-shape.height // self.patch), -(-shape.width // self.patch)
        return FeatureShape(self.width, rows, columns)

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost for an input image of `shape`."""
        out = self.output_shape(shape)
        weights = shape.channels * self.patch**2 * self.width
        return operator_cost(
            weights + 3 * self.width, weights * out.positions, self.width * out.positions
        )


class PatchMerging(Spec):
    """Downsampling between stages: 2x2 neighbours side by side, LayerNorm, linear without bias.

    A map with an odd side is padded by one row or column.
    """

    type: Literal["patch_merging"] = "patch_merging"

    def output_shape(self, shape: FeatureShape, width: int) -> FeatureShape:
        """Shape after merging to `width` channels."""
        return shape.halved(width)

    def cost(self, shape: FeatureShape, width: int) -> Cost:
        """Cost for an input map of `shape`."""
        out = self.output_shape(shape, width)
        weights = 4 * shape.channels * width
        return operator_cost(
            8 * shape.channels + weights, weights * out.positions, width * out.positions
        )
