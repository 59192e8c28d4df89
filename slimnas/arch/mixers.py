"""Blocks that differ in how they mix tokens, and the closed-form costs of each mechanism.

Every block is a token mixer and an FFN, both residual, so that one mechanism can be put in the
place of another. The mechanisms: self-attention over the whole map (Vaswani et al., NeurIPS 2017)
or in windows (Liu et al., Swin, ICCV 2021, section 3.2), spatial-reduction attention (Wang et al.,
PVT, ICCV 2021, section 3.3), its linear form (PVTv2, CVMJ 2022, section 3.2), the two parts of
Twins-SVT (Chu et al., NeurIPS 2021, section 3.2), large-kernel attention (Guo et al., VAN, CVMJ
2023, section 3.1), cascaded group attention (Liu et al., EfficientViT, CVPR 2023, section 3.2),
strided attention (Li et al., EfficientFormerV2, ICCV 2023, section 3.1) and pooling (Yu et al.,
PoolFormer, CVPR 2022, section 3.2). HiLo is in `slimnas.arch.litv2`.

The modules of the same names are in `slimnas.nn.mixers`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from slimnas.arch.block import Block, ffn_cost
from slimnas.arch.efficientformer import MLP_RATIO, Count
from slimnas.arch.efficientformerv2 import V2Attention
from slimnas.arch.efficientvit import EfficientViTBlock, Kernels
from slimnas.arch.shapes import NO_COST, Cost, FeatureShape, operator_cost
from slimnas.arch.swin import SwinBlock, require_shift_within
from slimnas.arch.vit import ViTBlock, Width

Switch = Annotated[bool, Field(strict=True)]
HeadedT = TypeVar("HeadedT", bound="HeadedBlock")


class MixerBlock(Block):
    """A token mixer and an FFN, both residual; base of all blocks here.

    `ffn: mlp` is two linear layers, `ffn: conv` has a depthwise 3x3 convolution between them, as
    in LITv2. `ffn_dim` is filled in as 4 x the width where a file leaves it out. The norm before
    a sub-layer is LayerNorm where the mechanism works on tokens, BatchNorm where it works on maps.

    Attributes:
        normed: whether a norm stands before the mixer; those of convolutions with BatchNorm have
            none, as published.
    """

    type: str
    ffn_dim: Count | None = None
    ffn: Literal["mlp", "conv"] = "mlp"
    repeat: Count = 1

    normed: ClassVar[bool] = True

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN."""
        return self.ffn_dim or MLP_RATIO * width

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the mechanism alone, without the norm before it."""
        raise NotImplementedError

    def ffn_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the FFN sub-layer, its norm included."""
        return ffn_cost(shape, self.hidden(shape.channels), conv=self.ffn == "conv")

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on a map of `shape`."""
        norm = operator_cost(2 * shape.channels if self.normed else 0, 0, 0)
        return norm + self.mixer_cost(shape) + self.ffn_cost(shape)


class HeadedBlock(MixerBlock):
    """A mixer with heads of a query-key and a value dimension each.

    Both dimensions are filled in as width // heads where a file leaves them out; written out, they
    stay what they are when a search changes the stage's width.
    """

    type: str
    heads: Count
    qk_dim: Count | None = None
    v_dim: Count | None = None

    def filled(self: HeadedT, width: int) -> HeadedT:
        """The same block once, all its widths written out."""
        block = super().filled(width)
        if width % self.heads:  # refused by `check`, which knows the block's place
            return block
        dim = width // self.heads
        given = {"qk_dim": self.qk_dim or dim, "v_dim": self.v_dim or dim}
        return block.model_copy(update=given)

    def dims(self, width: int) -> tuple[int, int]:
        """Dimensions of queries and of values per head in a stage of `width` channels."""
        return self.qk_dim or width // self.heads, self.v_dim or width // self.heads

    def check(self, shape: FeatureShape) -> None:
        """Refuse a width that the heads do not divide.

        Raises:
            ValueError: the dimensions are not given and do not follow from the width.
        """
        if shape.channels % self.heads and (self.qk_dim is None or self.v_dim is None):
            raise ValueError(
                f"heads must divide the stage's width, {shape.channels}, got {self.heads}; or "
                "give qk_dim and v_dim"
            )

    def _vit_cost(self, shape: FeatureShape) -> Cost:
        qk_dim, v_dim = self.dims(shape.channels)
        same = ViTBlock(heads=self.heads, qk_dim=qk_dim, v_dim=v_dim, ffn_dim=0)
        return _without_norm(same.attention_cost(shape), shape)

    def _swin(self, width: int, window: int, shift: int) -> SwinBlock:
        qk_dim, v_dim = self.dims(width)
        return SwinBlock(
            heads=self.heads, qk_dim=qk_dim, v_dim=v_dim, ffn_dim=0, window=window, shift=shift
        )

    def _sra_cost(self, shape: FeatureShape, reduction: int) -> Cost:
        keys = (shape.height // reduction) * (shape.width // reduction)
        cost = self._reduced_cost(shape, keys)
        return cost + _reduction_cost(shape.channels, reduction, keys) if reduction > 1 else cost

    def _reduced_cost(self, shape: FeatureShape, keys: int) -> Cost:
        """Cost of attention of every token to `keys` others, projections included."""
        width, tokens = shape.channels, shape.positions
        qk_dim, v_dim = self.dims(width)
        queries, values = self.heads * qk_dim, self.heads * v_dim
        params = (width + 1) * (2 * queries + values) + (values + 1) * width
        linear = tokens * width * (queries + values) + keys * width * (queries + values)
        outputs = tokens * (queries + values + width + self.heads * keys)
        return operator_cost(
            params, linear + tokens * keys * (queries + values), outputs + keys * (queries + values)
        )


class MHSABlock(HeadedBlock):
    """Multi-head self-attention over the whole map, without position bias; on tokens."""

    type: Literal["mhsa"] = "mhsa"

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone."""
        return self._vit_cost(shape)


class WindowBlock(HeadedBlock):
    """Multi-head self-attention inside (shifted) windows; on tokens.

    Windows, shift and padding are those of type `swin`. `position_bias` adds Swin's learned bias
    per offset; without it this is the local attention that LITv2's study compares.
    """

    type: Literal["window"] = "window"
    window: Count = 7
    shift: Width = 0
    position_bias: Switch = False

    @model_validator(mode="after")
    def _shifts_within(self) -> WindowBlock:
        require_shift_within(self.window, self.shift)
        return self

    def swin(self, width: int) -> SwinBlock:
        """Swin's block with the same windows and no FFN."""
        return self._swin(width, self.window, self.shift)

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone; padding is computed too."""
        cost = _window_cost(self.swin(shape.channels), shape)
        if not self.position_bias:
            return cost
        high, wide = self.swin(shape.channels).windows(shape)
        table = (2 * high - 1) * (2 * wide - 1) * self.heads
        return replace(cost, params=cost.params + table)


class SRABlock(HeadedBlock):
    """Spatial-reduction attention (PVT): keys and values of a map that a convolution shrank.

    The convolution's kernel and stride are `reduction`, LayerNorm follows; rows and columns that
    fill no kernel are not seen by it. `reduction: 1` has neither. On tokens.
    """

    type: Literal["sra"] = "sra"
    reduction: Count = 2

    def check(self, shape: FeatureShape) -> None:
        """Refuse heads that do not divide the width, and maps smaller than the reduction.

        Raises:
            ValueError: says which.
        """
        super().check(shape)
        _check_reduction(self.reduction, shape)

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone."""
        return self._sra_cost(shape, self.reduction)


class LinearSRABlock(HeadedBlock):
    """Linear spatial-reduction attention (PVTv2): keys and values of a map pooled to a fixed size.

    The map is averaged to `pooled` x `pooled`, then goes through a 1x1 convolution, LayerNorm and
    GELU. On tokens.
    """

    type: Literal["linear_sra"] = "linear_sra"
    pooled: Count = 7

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone; pooling has no MACs by the usual count."""
        keys = self.pooled**2
        return self._reduced_cost(shape, keys) + _reduction_cost(shape.channels, 1, keys)


class TMSABlock(HeadedBlock):
    """One of the two attentions that Twins-SVT alternates; on tokens.

    `part: local` is attention inside windows of `window` tokens, `part: global` is spatial-
    reduction attention by `reduction`.
    """

    type: Literal["tmsa"] = "tmsa"
    part: Literal["local", "global"] = "local"
    window: Count = 7
    reduction: Count = 2

    def swin(self, width: int) -> SwinBlock:
        """Swin's block with the windows of the local part and no FFN."""
        return self._swin(width, self.window, 0)

    def check(self, shape: FeatureShape) -> None:
        """Refuse heads that do not divide the width, and maps smaller than the reduction.

        Raises:
            ValueError: says which.
        """
        super().check(shape)
        if self.part == "global":
            _check_reduction(self.reduction, shape)

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone; padding is computed too."""
        if self.part == "local":
            return _window_cost(self.swin(shape.channels), shape)
        return self._sra_cost(shape, self.reduction)


class LKABlock(MixerBlock):
    """Large-kernel attention (VAN): a gate of a wide depthwise convolution; on maps.

    1x1 convolution, GELU, times the output of a depthwise 5x5, a depthwise 7x7 of dilation 3 and a
    1x1 convolution, then a 1x1 convolution, plus the input.
    """

    type: Literal["lka"] = "lka"

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the gated convolutions alone."""
        width, tokens = shape.channels, shape.positions
        weights = 3 * width**2 + (25 + 49) * width
        return operator_cost(weights + 5 * width, weights * tokens, 5 * width * tokens)


class CGABlock(MixerBlock):
    """Cascaded group attention (EfficientViT), in windows where the map is larger; on maps.

    Every head sees its share of the channels plus the output of the head before it, so a head's
    values have width // heads dimensions, whatever the width. `kernels` are the sides of the
    depthwise convolutions on the queries, one per head or one for all. BatchNorm follows every
    convolution and none stands before the mixer, as published.
    """

    type: Literal["cga"] = "cga"
    heads: Count
    qk_dim: Count = 16
    kernels: Kernels = (5,)
    window: Count = 7

    normed: ClassVar[bool] = False

    @model_validator(mode="after")
    def _kernel_per_head(self) -> CGABlock:
        if len(self.kernels) not in (1, self.heads):
            raise ValueError(
                f"kernels must be one side for all heads or one per head, which are {self.heads}; "
                f"got {len(self.kernels)}"
            )
        return self

    def filled(self, width: int) -> CGABlock:
        """The same block once, its FFN's width and all kernels written out."""
        kernels = self.kernels if len(self.kernels) == self.heads else self.kernels * self.heads
        return super().filled(width).model_copy(update={"kernels": kernels})

    def check(self, shape: FeatureShape) -> None:
        """Refuse a width that the heads do not divide.

        Raises:
            ValueError: they do not.
        """
        self.efficientvit(shape.channels).check(shape)

    def efficientvit(self, width: int) -> EfficientViTBlock:
        """EfficientViT's block with the same attention."""
        return EfficientViTBlock(
            heads=self.heads, qk_dim=self.qk_dim, kernels=self.kernels, window=self.window
        ).filled(width)

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone; padding is computed too."""
        return self.efficientvit(shape.channels).attention_cost(shape)


class StridedBlock(HeadedBlock):
    """Attention on a map of half the sides, brought back by bilinear upsampling; on maps.

    EfficientFormerV2's, as in type `v2_attention` of stride 2. BatchNorm follows every convolution
    and none stands before the mixer, as published.
    """

    type: Literal["strided"] = "strided"

    normed: ClassVar[bool] = False

    def check(self, shape: FeatureShape) -> None:
        """Refuse heads that do not divide the width, and maps with an odd side.

        Raises:
            ValueError: says which.
        """
        super().check(shape)
        self.v2(shape.channels).check(shape)

    def v2(self, width: int) -> V2Attention:
        """EfficientFormerV2's block with the same attention."""
        qk_dim, v_dim = self.dims(width)
        return V2Attention(heads=self.heads, qk_dim=qk_dim, v_dim=v_dim, stride=2)

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention alone; upsampling has no MACs by the usual count."""
        cost = self.v2(shape.channels).attention_cost(shape)
        return replace(cost, params=cost.params - shape.channels)  # its layer scale


class PoolBlock(MixerBlock):
    """3x3 average pooling minus the input, in the place of attention (PoolFormer); on maps."""

    type: Literal["pool"] = "pool"

    def mixer_cost(self, shape: FeatureShape) -> Cost:
        """Nothing: pooling has no parameters, and no MACs by the usual count."""
        return NO_COST


def _without_norm(cost: Cost, shape: FeatureShape) -> Cost:
    return replace(cost, params=cost.params - 2 * shape.channels)


def _window_cost(same: SwinBlock, shape: FeatureShape) -> Cost:
    """Cost of Swin's attention without its norm and its table of biases."""
    high, wide = same.windows(shape)
    cost = _without_norm(same.attention_cost(shape), shape)
    return replace(cost, params=cost.params - (2 * high - 1) * (2 * wide - 1) * same.heads)


def _reduction_cost(width: int, ratio: int, keys: int) -> Cost:
    """Cost of the convolution that shrinks a map to `keys` positions, and of its LayerNorm."""
    weights = ratio**2 * width**2
    return operator_cost(weights + 3 * width, weights * keys, width * keys)


def _check_reduction(reduction: int, shape: FeatureShape) -> None:
    if reduction > min(shape.height, shape.width):
        raise ValueError(
            f"reduction must be at most the map's smaller side, got {reduction} on "
            f"{shape.height}x{shape.width}"
        )


AnyMixer = (
    MHSABlock
    | WindowBlock
    | SRABlock
    | LinearSRABlock
    | TMSABlock
    | LKABlock
    | CGABlock
    | StridedBlock
    | PoolBlock
)
"""All of them; `slimnas.arch.architecture` joins the families."""
