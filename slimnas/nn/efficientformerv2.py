"""The modules of EfficientFormerV2: FFN and attention blocks, attention downsampling and head.

Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed" (ICCV 2023), section 3,
equal in every output to the released code. Parameter names are those timm uses. The stem and the
first downsamplings are `ConvStem` and `Conv3x3` of `slimnas.nn.efficientformer`.

Everything works on maps, so that no layout changes; tokens appear in the attention products only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.arch import efficientformerv2 as specs
from slimnas.arch.documents import Spec
from slimnas.arch.walk import Component
from slimnas.errors import InputSizeError
from slimnas.nn.efficientformer import LinearHead, offset_index
from slimnas.nn.layers import (
    BATCH_NORM_EPS,
    ConvNorm,
    LayerScale,
    ResidualBlock,
    frozen,
    initialised,
    into_layer,
)
from slimnas.nn.layout import Layout, is_tracing
from slimnas.nn.makers import Maker

Grid = tuple[int, int]


@dataclass(frozen=True)
class Heads:
    """How many heads, and the dimensions of queries and keys, and of values, in each."""

    count: int
    qk_dim: int
    v_dim: int


class MapAttention(nn.Module):
    """What both attentions share: values with a local part, and a bias per head and offset.

    The logit of query i and key j gets `attention_biases[head, |dy| * columns + |dx|]`.

    Args:
        width_in: channels of the map it takes.
        width_out: channels of the map it gives.
        grid: (rows, columns) of the keys.
        queries: (rows, columns) of the queries, in every second row and column where there are
            fewer than keys.
        heads: of the attention.
    """

    q: nn.Module
    k: ConvNorm
    v: ConvNorm
    v_local: ConvNorm
    proj: ConvNorm
    attention_biases: nn.Parameter
    attention_bias_idxs: Tensor
    pair_bias: Tensor | None

    def __init__(
        self, *, width_in: int, width_out: int, grid: Grid, queries: Grid, heads: Heads
    ) -> None:
        super().__init__()
        self.grid, self.queries, self.heads = grid, queries, heads
        self.scale = heads.qk_dim**-0.5
        keys, values = heads.count * heads.qk_dim, heads.count * heads.v_dim
        step = 1 if queries == grid else 2
        self.k = ConvNorm(width_in, keys, bias=True)
        self.v = ConvNorm(width_in, values, bias=True)
        self.v_local = ConvNorm(values, values, 3, stride=step, groups=values, bias=True)
        self.act = nn.GELU()
        self.proj = ConvNorm(values, width_out, bias=True)
        self.attention_biases = nn.Parameter(torch.zeros(heads.count, grid[0] * grid[1]))
        index = offset_index(*grid).view(*grid, -1)[::step, ::step].flatten(0, 1)
        # Derived from the grid, so not part of the weights.
        self.register_buffer("attention_bias_idxs", index, persistent=False)
        self.register_buffer("pair_bias", None, persistent=False)

    def bias(self) -> Tensor:
        """The bias of every pair of query and key: (heads, queries, keys)."""
        if self.pair_bias is not None:
            return self.pair_bias
        return self.attention_biases[:, self.attention_bias_idxs]

    def logits(self, x: Tensor) -> Tensor:
        """Scores (B, heads, queries, keys) of a map (B, width_in, rows, columns)."""
        tokens, count = self.grid[0] * self.grid[1], self.queries[0] * self.queries[1]
        q, k = self.q(x), self.k(x)
        if self.pair_bias is None:  # else folded
            q = q * self.scale
        q = q.reshape(-1, self.heads.count, self.heads.qk_dim, count)
        k = k.reshape(-1, self.heads.count, self.heads.qk_dim, tokens)
        scores: Tensor = q.transpose(2, 3) @ k
        return scores + self.bias()

    def mixed(self, weights: Tensor, x: Tensor) -> Tensor:
        """Values of a map `x`, weighted (B, heads, queries, keys), plus their local part.

        Returns:
            (B, values, rows of queries, columns of queries).
        """
        v, heads = self.v(x), self.heads
        values = v.reshape(-1, heads.count, heads.v_dim, self.grid[0] * self.grid[1])
        # The channels come out first: put together again without moving an element.
        seen = values @ weights.transpose(2, 3)
        seen = seen.reshape(-1, heads.count * heads.v_dim, *self.queries)
        out: Tensor = seen + self.v_local(v)
        return out

    def fold_bias_(self, q: ConvNorm) -> None:
        """Fold the scale into the queries' projection and gather the biases once."""
        if self.pair_bias is not None:
            return
        q.fold_()
        assert q.conv.bias is not None
        q.conv.weight = frozen(q.conv.weight * self.scale)
        q.conv.bias = frozen(q.conv.bias * self.scale)
        self.pair_bias = self.bias().detach().clone()
        del self.attention_biases, self.attention_bias_idxs


class V2TokenMixer(MapAttention):
    """Attention of a map to itself whose heads talk before and after the softmax.

    With stride 2 a depthwise convolution halves the map before it, and its output is upsampled
    bilinearly before the last projection.

    Args:
        width: channels C of the map.
        grid: (rows, columns) of the map that attention sees, after the stride.
        heads: of the attention.
        stride: 1 or 2.
    """

    q: ConvNorm
    stride_conv: ConvNorm | None
    talking_head1: nn.Conv2d
    talking_head2: nn.Conv2d

    def __init__(self, *, width: int, grid: Grid, heads: Heads, stride: int) -> None:
        super().__init__(width_in=width, width_out=width, grid=grid, queries=grid, heads=heads)
        self.stride = stride
        self.stride_conv = None
        if stride > 1:
            self.stride_conv = ConvNorm(width, width, 3, stride=stride, groups=width, bias=True)
        self.q = ConvNorm(width, heads.count * heads.qk_dim, bias=True)
        self.talking_head1 = nn.Conv2d(heads.count, heads.count, 1)
        self.talking_head2 = nn.Conv2d(heads.count, heads.count, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape.

        Raises:
            InputSizeError: another height or width.
        """
        _check_size(x, (self.grid[0] * self.stride, self.grid[1] * self.stride))
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        heads, tokens = self.heads.count, self.grid[0] * self.grid[1]
        logits = self.talking_head1(self.logits(x))
        # With three axes: ExecuTorch takes the last of four, after a convolution, for the heads.
        weights = logits.reshape(-1, heads * tokens, tokens).softmax(dim=-1)
        weights = self.talking_head2(weights.reshape(-1, heads, tokens, tokens))
        out = self.mixed(weights, x)
        if self.stride_conv is not None:
            out = F.interpolate(out, scale_factor=float(self.stride), mode="bilinear")
        projected: Tensor = self.proj(self.act(out))
        return projected

    def fold_(self) -> None:
        """Fold the scale and gather the biases."""
        self.fold_bias_(self.q)


class LocalGlobalQuery(nn.Module):
    """One query per 2x2 positions: the position itself plus a 3x3 depthwise convolution there."""

    local: nn.Conv2d
    proj: ConvNorm

    def __init__(self, *, width_in: int, width_out: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(width_in, width_in, 3, stride=2, padding=1, groups=width_in)
        self.proj = ConvNorm(width_in, width_out, bias=True)
        self.adds_position = True

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width_in, H, W) to (B, width_out, ceil(H/2), ceil(W/2))."""
        seen = self.local(x)
        if self.adds_position:
            seen = seen + x[:, :, ::2, ::2]
        out: Tensor = self.proj(seen)
        return out

    def fold_(self) -> None:
        """Let the convolution add the position itself, which lies under its middle weight."""
        if self.adds_position:
            weight = self.local.weight.detach().clone()
            weight[:, :, 1, 1] += 1
            self.local.weight = frozen(weight)
            self.adds_position = False


class V2DownsampleAttention(MapAttention):
    """Attention of every second row and column of a map to the whole map.

    Args:
        width_in: channels of the map it takes.
        width_out: channels of the map it gives.
        grid: (rows, columns) of the map it takes.
        heads: of the attention.
    """

    q: LocalGlobalQuery

    def __init__(self, *, width_in: int, width_out: int, grid: Grid, heads: Heads) -> None:
        super().__init__(
            width_in=width_in,
            width_out=width_out,
            grid=grid,
            queries=(-(-grid[0] // 2), -(-grid[1] // 2)),
            heads=heads,
        )
        self.q = LocalGlobalQuery(width_in=width_in, width_out=heads.count * heads.qk_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width_in, H, W) to (B, width_out, ceil(H/2), ceil(W/2)).

        Raises:
            InputSizeError: another height or width.
        """
        _check_size(x, self.grid)
        out: Tensor = self.proj(self.act(self.mixed(self.logits(x).softmax(dim=-1), x)))
        return out

    def fold_(self) -> None:
        """Fold the scale and gather the biases."""
        self.fold_bias_(self.q.proj)


class V2AttentionDownsample(nn.Module):
    """Downsampling between stages: 3x3 stride-2 convolution and BN, plus attention.

    Args:
        width_in: channels before it.
        width_out: channels after it.
        grid: (rows, columns) of the map it takes.
        heads: of the attention.
    """

    layout: ClassVar[Layout] = "map"
    fixed_size: ClassVar[bool] = True
    conv: ConvNorm
    attn: V2DownsampleAttention

    def __init__(self, *, width_in: int, width_out: int, grid: Grid, heads: Heads) -> None:
        super().__init__()
        self.conv = ConvNorm(width_in, width_out, 3, stride=2, bias=True)
        self.attn = V2DownsampleAttention(
            width_in=width_in, width_out=width_out, grid=grid, heads=heads
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width_in, H, W) to (B, width_out, ceil(H/2), ceil(W/2))."""
        out: Tensor = self.attn(x) + self.conv(x)
        return out


class DepthwiseFFN(nn.Module):
    """1x1, 3x3 depthwise and 1x1 convolution, each with BN, GELU between them."""

    fc1: ConvNorm
    mid: ConvNorm
    fc2: ConvNorm

    def __init__(self, *, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(width, ffn_dim, bias=True)
        self.mid = ConvNorm(ffn_dim, ffn_dim, 3, groups=ffn_dim, bias=True)
        self.fc2 = ConvNorm(ffn_dim, width, bias=True)
        self.act = nn.GELU()
        initialised(self.fc1.conv)
        initialised(self.fc2.conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        out: Tensor = self.fc2(self.act(self.mid(self.act(self.fc1(x)))))
        return out


class V2FFN(ResidualBlock):
    """The FFN, residual with layer scale, on maps (B, C, H, W) of any size.

    Args:
        width: channels C.
        ffn_dim: hidden channels of the FFN.
    """

    layout: ClassVar[Layout] = "map"
    mlp: DepthwiseFFN
    ls2: nn.Module

    def __init__(self, *, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.mlp = DepthwiseFFN(width=width, ffn_dim=ffn_dim)
        self.ls2 = LayerScale(width, self.layout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return _add_scaled(x, self.ls2, self.kept(self.mlp(x)))

    def fold_(self) -> None:
        """Fold the layer scale, which needs the last BatchNorm folded before."""
        self.mlp.fc2.fold_()
        self.ls2 = into_layer(self.ls2, self.mlp.fc2.conv)


class V2Attention(V2FFN):
    """Attention and FFN, both residual with layer scale, on maps (B, C, H, W).

    Args:
        width: channels C.
        grid: (rows, columns) of the map that attention sees, after the stride.
        heads: of the attention.
        stride: of the attention, 1 or 2.
        ffn_dim: hidden channels of the FFN.
    """

    fixed_size: ClassVar[bool] = True
    token_mixer: V2TokenMixer
    ls1: nn.Module

    def __init__(self, *, width: int, grid: Grid, heads: Heads, stride: int, ffn_dim: int) -> None:
        super().__init__(width=width, ffn_dim=ffn_dim)
        self.token_mixer = V2TokenMixer(width=width, grid=grid, heads=heads, stride=stride)
        self.ls1 = LayerScale(width, self.layout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return super().forward(_add_scaled(x, self.ls1, self.kept(self.token_mixer(x))))

    def fold_(self) -> None:
        """Fold both layer scales, which needs the last BatchNorms folded before."""
        super().fold_()
        self.token_mixer.proj.fold_()
        self.ls1 = into_layer(self.ls1, self.token_mixer.proj.conv)


class V2Head(LinearHead):
    """BatchNorm, mean over positions, linear classifier; a second if distilled.

    Takes a map (B, C, H, W) or tokens (B, N, C); otherwise as EfficientFormer's.
    """

    layout: ClassVar[Layout] = "map"

    def __init__(self, *, width: int, classes: int, distilled: bool = False) -> None:
        super().__init__(width=width, classes=classes, distilled=distilled)
        self.norm = nn.BatchNorm2d(width, eps=BATCH_NORM_EPS)

    def pooled(self, x: Tensor) -> Tensor:
        """What the classifiers read: (B, C)."""
        if x.dim() == 3:
            x = x.transpose(1, 2).unsqueeze(3)
        # In evaluation a fixed linear map: of the mean it costs less, and gives the same.
        fixed = not self.norm.training
        out: Tensor = self.norm(x.mean(dim=(2, 3), keepdim=True) if fixed else x)
        return out.flatten(1) if fixed else out.mean(dim=(2, 3))

    def fold_(self) -> None:
        """Make one classifier of two, and let it normalise."""
        super().fold_()
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d):  # folded already
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert self.head.bias is not None
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        offset = norm.bias - norm.running_mean * factor
        self.head.bias = frozen(self.head.bias + self.head.weight @ offset)
        self.head.weight = frozen(self.head.weight * factor)
        self.norm = nn.Identity()


def _check_size(x: Tensor, size: Grid) -> None:
    if not is_tracing() and x.shape[2:] != size:
        raise InputSizeError(
            f"attention was built for maps of {size[0]}x{size[1]}, got "
            f"{x.shape[2]}x{x.shape[3]}; build the architecture for this input resolution"
        )


def _add_scaled(x: Tensor, scale: nn.Module, branch: Tensor) -> Tensor:
    """Add a residual branch and its layer scale, in one pass over the map."""
    if isinstance(scale, LayerScale) and not is_tracing():  # Core ML has no such operator
        return torch.addcmul(x, branch, scale.gamma.view(scale.shape))
    out: Tensor = x + scale(branch)
    return out


def _make_ffn(component: Component) -> nn.Module:
    spec, width = component.spec, component.input.channels
    assert isinstance(spec, specs.V2FFN)
    return V2FFN(width=width, ffn_dim=spec.hidden(width))


def _make_attention(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.V2Attention)
    seen = spec.grid(shape)
    return V2Attention(
        width=shape.channels,
        grid=(seen.height, seen.width),
        heads=Heads(spec.heads, spec.qk_dim, spec.v_dim),
        stride=spec.stride,
        ffn_dim=spec.hidden(shape.channels),
    )


def _make_downsample(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.V2AttentionDownsample)
    return V2AttentionDownsample(
        width_in=shape.channels,
        width_out=component.output.channels,
        grid=(shape.height, shape.width),
        heads=Heads(spec.heads, spec.qk_dim, spec.v_dim),
    )


def _make_head(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.V2Head)
    return V2Head(width=component.input.channels, classes=spec.classes, distilled=spec.distilled)


MAKERS: Mapping[type[Spec], Maker] = MappingProxyType(
    {
        specs.V2FFN: _make_ffn,
        specs.V2Attention: _make_attention,
        specs.V2AttentionDownsample: _make_downsample,
        specs.V2Head: _make_head,
    }
)
"""How a component of this family becomes a module; `slimnas.nn.build` joins the families."""
