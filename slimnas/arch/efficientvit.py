"""The components of EfficientViT (the memory-efficient one), with their closed-form costs.

Structure: Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
Attention" (CVPR 2023), section 3, and the released code. The modules of the same names are in
`slimnas.nn.efficientvit`. Another network of that name, of MIT, is not this one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from slimnas.arch.block import Block
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import Count
from slimnas.arch.shapes import NO_COST, Cost, FeatureShape, operator_cost

GroupT = TypeVar("GroupT", bound="GroupAttentionBlock")

FFN_RATIO = 2
"""Hidden over outer width of an FFN where a file gives none (section 3.3)."""

EXPANSION = 4
"""Inner over outer width of the subsample block's inverted residual; the released value."""

SE_DIVISOR = 8
"""Its squeeze-excitation has a quarter of the inner width, rounded to a multiple of this."""


def _odd(side: int) -> int:
    if side % 2 == 0:
        raise ValueError(f"must be odd, or the map would change its size; got {side}")
    return side


def _one_for_all(value: Any) -> Any:
    return (value,) if type(value) is int else value


Kernels = Annotated[
    tuple[Annotated[Count, AfterValidator(_odd)], ...],
    Field(min_length=1),
    BeforeValidator(_one_for_all),
]
"""Sides of kernels; a file may write one that is alone as a number."""


def conv_norm_cost(
    width_in: int, width_out: int, kernel: int, positions: int, *, groups: int = 1
) -> Cost:
    """Cost of a convolution without bias and its BatchNorm, for `positions` of output."""
    weights = width_in * width_out * kernel**2 // groups
    return operator_cost(weights + 2 * width_out, weights * positions, width_out * positions)


def interaction_ffn_cost(shape: FeatureShape, hidden: int) -> Cost:
    """Cost of a depthwise 3x3 convolution and an FFN of two 1x1 convolutions, all with BN."""
    width, positions = shape.channels, shape.positions
    depthwise = conv_norm_cost(width, width, 3, positions, groups=width)
    inner = conv_norm_cost(width, hidden, 1, positions)
    return depthwise + inner + conv_norm_cost(hidden, width, 1, positions)


class GroupAttentionBlock(Block):
    """What blocks with (cascaded) group attention have in common.

    Each head sees its share of the channels. In a cascade it also sees, added to that, what the
    head before it gives, so that `v_dim` must be width / heads, which is also what is filled in.

    `kernels` are the sides of the depthwise convolutions on the queries, one per head, or one for
    all. `window` is the side of a window; on a map with a shorter side, that side is. Maps are
    padded to whole windows.
    """

    heads: Count
    qk_dim: Count = 16
    v_dim: Count | None = None
    kernels: Kernels = (5,)
    window: Count = 7
    cascade: Annotated[bool, Field(strict=True)] = True
    ffn_dim: Count | None = None
    repeat: Count = 1

    @model_validator(mode="after")
    def _kernel_per_head(self) -> GroupAttentionBlock:
        if len(self.kernels) not in (1, self.heads):
            raise ValueError(
                f"kernels: must be one side for all heads or one per head, which are {self.heads}; "
                f"got {len(self.kernels)}"
            )
        return self

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or FFN_RATIO * width

    def values(self, width: int) -> int:
        """Dimension of the values per head."""
        return self.v_dim or width // self.heads

    def filled(self: GroupT, width: int) -> GroupT:
        """The same block once, all its widths and kernels written out."""
        written = {
            "repeat": 1,
            "ffn_dim": self.hidden(width),
            "v_dim": self.values(width),
            "kernels": self.kernels_per_head,
        }
        return self.model_copy(update=written)

    @property
    def kernels_per_head(self) -> tuple[int, ...]:
        """Side of each head's depthwise convolution."""
        return self.kernels if len(self.kernels) == self.heads else self.kernels * self.heads

    def check(self, shape: FeatureShape) -> None:
        """Refuse widths that heads cannot share, or that a cascade cannot add."""
        width = shape.channels
        if width % self.heads:
            raise ValueError(
                f"heads: must divide the stage's width, {width}, which they share; got {self.heads}"
            )
        share = width // self.heads
        if self.cascade and self.values(width) != share:
            raise ValueError(
                f"v_dim: must be width / heads = {share} in a cascade, which adds the values of "
                f"one head to the input of the next; got {self.v_dim}; use that, or cascade: false"
            )

    def attention_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone; padding is computed too."""
        width, values = shape.channels, self.values(shape.channels)
        side = window_side(self.window, shape.height, shape.width)
        rows, columns = padded_size(side, shape.height, shape.width)
        tokens, inside = rows * columns, side * side
        total = operator_cost(self.heads * inside, 0, 0)  # the learned biases
        for kernel in self.kernels_per_head:
            total += conv_norm_cost(width // self.heads, 2 * self.qk_dim + values, 1, tokens)
            total += conv_norm_cost(self.qk_dim, self.qk_dim, kernel, tokens, groups=self.qk_dim)
            products = tokens * inside * (self.qk_dim + values)
            total += operator_cost(0, products, tokens * (inside + values))
        return total + conv_norm_cost(self.heads * values, width, 1, tokens)


class EfficientViTBlock(GroupAttentionBlock):
    """Sandwich: FFNs, cascaded group attention, FFNs, all residual, on maps (B, C, H, W).

    `ffns` is the number of FFNs on each side, each behind a depthwise 3x3 convolution.
    """

    type: Literal["efficientvit"] = "efficientvit"
    ffns: Count = 1

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        total = self.attention_cost(shape)
        ffn = interaction_ffn_cost(shape, self.hidden(shape.channels))
        for _ in range(2 * self.ffns):
            total += ffn
        return total


class EfficientViTStem(Spec):
    """Four overlapping 3x3 stride-2 convolutions with BN, ReLU between them; stride 16.

    Their widths are an eighth, a quarter, a half and the whole of `width`.
    """

    type: Literal["efficientvit_stem"] = "efficientvit_stem"
    width: Count

    @field_validator("width")
    @classmethod
    def _eight_parts(cls, width: int) -> int:
        if width % 8:
            raise ValueError(
                f"must be a multiple of 8, its first convolution has an eighth of it; got {width}"
            )
        return width

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Width of each convolution."""
        return self.width // 8, self.width // 4, self.width // 2, self.width

    def output_shape(self, shape: FeatureShape) -> FeatureShape:
        """Shape after the four convolutions."""
        for width in self.widths:
            shape = shape.halved(width)
        return shape

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost for an input image of `shape`."""
        total = NO_COST
        for width in self.widths:
            after = shape.halved(width)
            total += conv_norm_cost(shape.channels, width, 3, after.positions)
            shape = after
        return total


class EfficientViTSubsample(Spec):
    """Downsampling: FFN, inverted residual of stride 2 with squeeze-excitation, FFN.

    Each FFN stands behind a depthwise convolution, as in a block. Where a file leaves them out,
    `before_dim` and `after_dim`, the FFNs' hidden widths, are twice the width around them,
    `inner_dim`, the width of the depthwise stride-2 convolution, is 4 x the width before, and
    `se_dim`, the squeeze-excitation's, a quarter of that in multiples of 8.
    """

    type: Literal["efficientvit_subsample"] = "efficientvit_subsample"
    before_dim: Count | None = None
    after_dim: Count | None = None
    inner_dim: Count | None = None
    se_dim: Count | None = None

    def hidden_before(self, width: int) -> int:
        """Hidden width of the first FFN, after a stage of `width` channels."""
        return self.before_dim or FFN_RATIO * width

    def hidden_after(self, width: int) -> int:
        """Hidden width of the second FFN, in a stage of `width` channels."""
        return self.after_dim or FFN_RATIO * width

    def inner(self, width: int) -> int:
        """Width inside the inverted residual after a stage of `width` channels."""
        return self.inner_dim or EXPANSION * width

    def squeezed(self, width: int) -> int:
        """Width inside the squeeze-excitation."""
        quarter = int(self.inner(width) / 4 + SE_DIVISOR / 2)
        return self.se_dim or max(SE_DIVISOR, quarter // SE_DIVISOR * SE_DIVISOR)

    def output_shape(self, shape: FeatureShape, width: int) -> FeatureShape:
        """Shape after downsampling to `width` channels."""
        return shape.halved(width)

    def cost(self, shape: FeatureShape, width: int) -> Cost:
        """Cost for an input map of `shape`."""
        after = self.output_shape(shape, width)
        inner, squeezed = self.inner(shape.channels), self.squeezed(shape.channels)
        weights = 2 * inner * squeezed
        total = interaction_ffn_cost(shape, self.hidden_before(shape.channels))
        total += conv_norm_cost(shape.channels, inner, 1, shape.positions)
        total += conv_norm_cost(inner, inner, 3, after.positions, groups=inner)
        total += operator_cost(weights + inner + squeezed, weights, inner + squeezed)
        total += conv_norm_cost(inner, width, 1, after.positions)
        return total + interaction_ffn_cost(after, self.hidden_after(width))


class BatchNormHead(Spec):
    """Mean over positions, BatchNorm, linear classifier; both a second time when `distilled`."""

    type: Literal["pooled_bn"] = "pooled_bn"
    classes: Count
    distilled: Annotated[bool, Field(strict=True)] = False

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a last map of `shape`."""
        heads = 2 if self.distilled else 1
        macs = shape.channels * self.classes
        params = 2 * shape.channels + macs + self.classes
        return operator_cost(heads * params, heads * macs, heads * self.classes)


def window_side(window: int, height: int, width: int) -> int:
    """Side of the windows on a map: `window`, or the map's shorter side."""
    return min(window, height, width)


def padded_size(side: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a map after padding to whole windows."""
    return -(-height // side) * side, -(-width // side) * side
