"""The components of LITv2, with their closed-form costs: HiLo attention, ConvFFN, token merging.

Structure and formulas: Pan et al., "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022),
sections 3 and 4, and the released code. Stem and head are `SwinStem` and `LinearHead`; there is no
position encoding anywhere. The modules of the same names are in `slimnas.nn.litv2`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimnas.arch.block import Block, ffn_cost
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MLP_RATIO, Count
from slimnas.arch.shapes import Cost, FeatureShape, operator_cost
from slimnas.arch.vit import Width

TAPS = 4
"""Weights per channel of a 2x2 kernel."""


class ConvFFNBlock(Block):
    """FFN with a depthwise 3x3 convolution inside, pre-norm and residual, on tokens (B, N, C).

    `ffn_dim` is filled in as 4 x the stage's width where a file leaves it out.
    """

    type: Literal["conv_ffn"] = "conv_ffn"
    ffn_dim: Count | None = None
    repeat: Count = 1

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or MLP_RATIO * width

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        return ffn_cost(shape, self.hidden(shape.channels), conv=True)


class HiLoBlock(Block):
    """HiLo attention and FFN, both pre-norm and residual, on tokens (B, N, C).

    Of `heads` heads of dimension width / heads, `lo_heads` attend from every token to the averages
    of `window` x `window` tokens (Lo-Fi), the others inside such windows (Hi-Fi). `lo_heads_of`
    gives their number from the paper's alpha. With `window: 1` all are Lo-Fi heads, which is plain
    attention. Maps are padded with zeros, right and below, to whole windows.

    `ffn: conv` has a depthwise 3x3 convolution inside the FFN, `ffn: mlp` none.
    """

    type: Literal["hilo"] = "hilo"
    heads: Count
    lo_heads: Width
    window: Count = 2
    ffn_dim: Count | None = None
    ffn: Literal["conv", "mlp"] = "conv"
    qkv_bias: Annotated[bool, Field(strict=True)] = True
    repeat: Count = 1

    @model_validator(mode="after")
    def _heads_split(self) -> HiLoBlock:
        if self.lo_heads > self.heads:
            raise ValueError(f"lo_heads must be at most heads, {self.heads}, got {self.lo_heads}")
        if self.window == 1 and self.lo_heads != self.heads:
            raise ValueError(
                f"lo_heads must be heads, {self.heads}, where window is 1: a window of one token "
                f"has nothing to attend to; got {self.lo_heads}"
            )
        return self

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or MLP_RATIO * width

    def check(self, shape: FeatureShape) -> None:
        """Refuse a width that the heads do not divide.

        Raises:
            ValueError: says both.
        """
        if shape.channels % self.heads:
            raise ValueError(
                f"heads must divide the width of the stage, {shape.channels}, got {self.heads}"
            )

    def padded(self, shape: FeatureShape) -> tuple[int, int]:
        """Height and width of the map after padding to whole windows."""
        return -(-shape.height // self.window) * self.window, (
            -(-shape.width // self.window) * self.window
        )

    def attention_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention without the LayerNorm before it; padding is computed too.

        Averaging has no MACs by the usual count.
        """
        width, bias = shape.channels, int(self.qkv_bias)
        lo = self.lo_heads * (width // self.heads)
        hi, hi_heads = width - lo, self.heads - self.lo_heads
        rows, columns = self.padded(shape)
        tokens, inside = rows * columns, self.window**2
        averages = tokens // inside
        params = (width + bias) * 3 * (hi + lo) + (hi + 1) * hi + (lo + 1) * lo
        local = tokens * (3 * width * hi + 2 * inside * hi + hi**2)
        distant = tokens * (width * lo + 2 * averages * lo + lo**2) + averages * 2 * width * lo
        local_outputs = tokens * (5 * hi + hi_heads * inside)
        distant_outputs = tokens * (3 * lo + self.lo_heads * averages) + averages * 2 * lo
        return operator_cost(params, local + distant, local_outputs + distant_outputs)

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        ffn = ffn_cost(shape, self.hidden(shape.channels), conv=self.ffn == "conv")
        return operator_cost(2 * shape.channels, 0, 0) + self.attention_cost(shape) + ffn


class ConvMerging(Spec):
    """Downsampling between stages: 2x2 stride-2 convolution, BN, GELU.

    `deformable: true` moves each of the four pixels that an output sees by an offset that a second
    2x2 convolution predicts, as LITv2 was published; that one starts at zero, so a fresh network
    computes the same either way. The last row or column of an odd side is not seen.
    """

    type: Literal["dtm"] = "dtm"
    deformable: Annotated[bool, Field(strict=True)] = False

    def output_shape(self, shape: FeatureShape, width: int) -> FeatureShape:
        """Shape after merging to `width` channels.

        Raises:
            ValueError: the map is smaller than 2x2.
        """
        if min(shape.height, shape.width) < 2:
            raise ValueError(
                f"a dtm downsample merges 2x2 tokens, got a map of {shape.height}x{shape.width}; "
                "use a larger input or fewer stages"
            )
        return FeatureShape(width, shape.height // 2, shape.width // 2)

    def cost(self, shape: FeatureShape, width: int) -> Cost:
        """Cost for an input map of `shape`; bilinear sampling has no MACs by the usual count."""
        out = self.output_shape(shape, width)
        weights = TAPS * shape.channels * width
        made = operator_cost(weights + 3 * width, weights * out.positions, width * out.positions)
        if not self.deformable:
            return made
        offsets = 2 * TAPS
        moving = TAPS * shape.channels * offsets
        return made + operator_cost(
            moving + offsets, moving * out.positions, offsets * out.positions
        )


def lo_heads_of(heads: int, alpha: float) -> int:
    """Number of Lo-Fi heads for the paper's `alpha`, the share of heads they get.

    Rounded down as the released code does: 0.9 of 12 heads are 10.

    Raises:
        ValueError: alpha is no share.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    return int(heads * alpha)
