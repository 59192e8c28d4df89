"""The components of EfficientFormer (V1), with their closed-form costs.

Structure and formulas: Li et al., "EfficientFormer: Vision Transformers at MobileNet Speed"
(NeurIPS 2022), sections 3.2 and 4.1, and the released code.

Each spec gives the shape it produces (`output_shape`) and what it costs (`cost`); the modules
of the same names are in `slimnas.nn.efficientformer`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from slimnas.arch.block import Block
from slimnas.arch.documents import Spec
from slimnas.arch.shapes import Cost, FeatureShape, operator_cost

MOST = 1_000_000
"""Upper bound of every count, so that a typing error does not fill the memory."""

Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]
"""A width, a number of heads, a repeat: a whole number of at least one."""

MLP_RATIO = 4
"""Hidden over outer width of the FFN where a file gives none (EfficientFormer's choice)."""


class ConvStem(Spec):
    """Two 3x3 stride-2 convolutions with BN and activation: in -> width/2 -> width, stride 4."""

    type: Literal["conv_stem"] = "conv_stem"
    width: Count
    act: Literal["relu", "gelu"] = "relu"

    @field_validator("width")
    @classmethod
    def _even(cls, width: int) -> int:
        if width % 2:
            raise ValueError(f"must be even, its first convolution has half of it; got {width}")
        return width

    def output_shape(self, shape: FeatureShape) -> FeatureShape:
        """Shape after both convolutions."""
        return shape.halved(self.width // 2).halved(self.width)

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost for an input image of `shape`."""
        middle = shape.halved(self.width // 2)
        out = self.output_shape(shape)
        first, second = 9 * shape.channels * middle.channels, 9 * middle.channels * out.channels
        params = first + second + 3 * middle.channels + 3 * out.channels
        outputs = middle.channels * middle.positions + out.channels * out.positions
        return operator_cost(params, first * middle.positions + second * out.positions, outputs)


class Conv3x3(Spec):
    """Downsampling between stages: 3x3 stride-2 convolution and BN, no activation."""

    type: Literal["conv3x3"] = "conv3x3"

    def output_shape(self, shape: FeatureShape, width: int) -> FeatureShape:
        """Shape after downsampling to `width` channels."""
        return shape.halved(width)

    def cost(self, shape: FeatureShape, width: int) -> Cost:
        """Cost for an input map of `shape`."""
        out = self.output_shape(shape, width)
        weights = 9 * shape.channels * width
        return operator_cost(weights + 3 * width, weights * out.positions, width * out.positions)


class MB4D(Block):
    """Pool mixer and convolutional FFN, both residual with layer scale, on (B, C, H, W).

    `ffn_dim` is filled in as 4 x the stage's width where a file leaves it out.
    """

    type: Literal["mb4d"] = "mb4d"
    ffn_dim: Count | None = None
    repeat: Count = 1

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`; pooling has no MACs by the usual count."""
        width, hidden = shape.channels, self.hidden(shape.channels)
        params = 2 * width * hidden + 3 * hidden + 5 * width
        macs = 2 * width * hidden * shape.positions
        return operator_cost(params, macs, (hidden + width) * shape.positions)

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or MLP_RATIO * width


class MB3D(Block):
    """Attention with a learned bias per offset, and FFN, both residual, on tokens (B, N, C)."""

    type: Literal["mb3d"] = "mb3d"
    heads: Count = 8
    qk_dim: Count = 32
    v_dim: Count = 128
    ffn_dim: Count | None = None
    repeat: Count = 1

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`, whose positions are the tokens."""
        width, tokens, hidden = shape.channels, shape.positions, self.hidden(shape.channels)
        qkv, values = self.heads * (2 * self.qk_dim + self.v_dim), self.heads * self.v_dim
        params = width * (qkv + values + 2 * hidden + 8) + qkv + hidden + self.heads * tokens
        linear = width * (qkv + values + 2 * hidden)
        products = self.heads * (self.qk_dim + self.v_dim)
        outputs = qkv + values + 2 * width + hidden + self.heads * tokens
        return operator_cost(params, tokens * linear + tokens**2 * products, tokens * outputs)

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or MLP_RATIO * width


class LinearHead(Spec):
    """LayerNorm, mean over positions, linear classifier; a second one when `distilled`."""

    type: Literal["linear"] = "linear"
    classes: Count
    distilled: Annotated[bool, Field(strict=True)] = False

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a last map of `shape`."""
        heads = 2 if self.distilled else 1
        macs = heads * shape.channels * self.classes
        params = 2 * shape.channels + macs + heads * self.classes
        return operator_cost(params, macs, heads * self.classes)
