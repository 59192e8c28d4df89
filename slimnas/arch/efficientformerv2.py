"""The components of EfficientFormerV2, with their closed-form costs.

Structure: Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed" (ICCV 2023),
section 3, and the released code. Its stem and its first downsamplings are those of
`slimnas.arch.efficientformer`; the modules of the same names are in
`slimnas.nn.efficientformerv2`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slimnas.arch.block import Block
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MLP_RATIO, Count
from slimnas.arch.shapes import Cost, FeatureShape, operator_cost


class V2FFN(Block):
    """1x1 convolution, 3x3 depthwise convolution and 1x1 convolution, residual with layer scale.

    `ffn_dim` is filled in as 4 x the stage's width where a file leaves it out.
    """

    type: Literal["v2_ffn"] = "v2_ffn"
    ffn_dim: Count | None = None
    repeat: Count = 1

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or MLP_RATIO * width

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        return _ffn_cost(shape, self.hidden(shape.channels))


class V2Attention(Block):
    """Attention on a map with local values and talking heads, then the FFN of `V2FFN`.

    Both are residual with layer scale. With `stride: 2` the attention sees the map halved and
    its output is upsampled again, which takes maps of even sides.
    """

    type: Literal["v2_attention"] = "v2_attention"
    heads: Count = 8
    qk_dim: Count = 32
    v_dim: Count = 128
    stride: Literal[1, 2] = 1
    ffn_dim: Count | None = None
    repeat: Count = 1

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or MLP_RATIO * width

    def check(self, shape: FeatureShape) -> None:
        """Refuse maps that halving and upsampling would not give back.

        Raises:
            ValueError: an odd side, with `stride: 2`.
        """
        if shape.height % self.stride or shape.width % self.stride:
            raise ValueError(
                "with stride 2 attention takes maps whose sides are even, got "
                f"{shape.height}x{shape.width}; choose an input resolution whose sides are "
                "multiples of 32"
            )

    def grid(self, shape: FeatureShape) -> FeatureShape:
        """The map that attention sees of a map of `shape`."""
        return shape.halved(shape.channels) if self.stride == 2 else shape

    def attention_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention sub-layer, its layer scale included."""
        width, tokens = shape.channels, self.grid(shape).positions
        keys, values, heads = self.heads * self.qk_dim, self.heads * self.v_dim, self.heads
        qkv, biases = 2 * keys + values, heads * tokens
        params = (width + 3) * qkv + 12 * values + 2 * heads * (heads + 1) + biases
        params += (values + 4) * width
        products = keys + values + 2 * heads**2  # and two layers over the heads
        macs = tokens * (width * qkv + 9 * values) + tokens**2 * products
        macs += values * width * shape.positions
        outputs = tokens * (qkv + 2 * values) + 3 * heads * tokens**2 + width * shape.positions
        cost = operator_cost(params, macs, outputs)
        if self.stride == 2:
            cost += operator_cost(12 * width, 9 * width * tokens, width * tokens)
        return cost

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        return self.attention_cost(shape) + _ffn_cost(shape, self.hidden(shape.channels))


class V2AttentionDownsample(Spec):
    """Downsampling between stages by a 3x3 stride-2 convolution plus attention.

    The queries of the attention are one per output position, its keys one per input position.
    """

    type: Literal["conv3x3_attention"] = "conv3x3_attention"
    heads: Count = 8
    qk_dim: Count = 16
    v_dim: Count = 64

    def output_shape(self, shape: FeatureShape, width: int) -> FeatureShape:
        """Shape after downsampling to `width` channels."""
        return shape.halved(width)

    def cost(self, shape: FeatureShape, width: int) -> Cost:
        """Cost for an input map of `shape`."""
        before, tokens = shape.channels, shape.positions
        queries = self.output_shape(shape, width).positions
        keys, values = self.heads * self.qk_dim, self.heads * self.v_dim
        params = (2 * before + 6) * keys + (before + width + 15) * values + self.heads * tokens
        params += 10 * before + 3 * width
        macs = queries * (before * (9 + keys) + values * (9 + width))
        macs += tokens * before * (keys + values) + queries * tokens * (keys + values)
        outputs = queries * (before + keys + 2 * values + width)
        outputs += tokens * (keys + values) + self.heads * queries * tokens
        attention = operator_cost(params, macs, outputs)
        weights = 9 * before * width
        convolution = operator_cost(weights + 3 * width, weights * queries, width * queries)
        return convolution + attention


class V2Head(Spec):
    """BatchNorm, mean over positions, linear classifier; a second one when `distilled`."""

    type: Literal["bn_linear"] = "bn_linear"
    classes: Count
    distilled: Annotated[bool, Field(strict=True)] = False

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a last map of `shape`."""
        heads = 2 if self.distilled else 1
        macs = heads * shape.channels * self.classes
        params = 2 * shape.channels + macs + heads * self.classes
        return operator_cost(params, macs, heads * self.classes)


def _ffn_cost(shape: FeatureShape, hidden: int) -> Cost:
    """Cost of the FFN of both blocks, its layer scale included."""
    width, positions = shape.channels, shape.positions
    return operator_cost(
        2 * width * hidden + 15 * hidden + 4 * width,
        (2 * width + 9) * hidden * positions,
        (2 * hidden + width) * positions,
    )
