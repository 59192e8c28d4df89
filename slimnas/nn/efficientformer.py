"""The modules of EfficientFormer (V1): stem, downsampling, MB4D, MB3D and head.

Li et al., "EfficientFormer: Vision Transformers at MobileNet Speed" (NeurIPS 2022), sections 3.2
and 4.1, equal in every output to the released code. Parameter names are those timm uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from slimnas.arch import efficientformer as specs
from slimnas.arch.documents import Spec
from slimnas.arch.walk import Component
from slimnas.errors import InputSizeError
from slimnas.nn.layers import (
    LayerScale,
    ResidualBlock,
    frozen,
    initialised,
    into_layer,
    with_norm,
)
from slimnas.nn.layout import Layout, is_tracing, to_tokens
from slimnas.nn.makers import Maker

NORM_EPS = 1e-5
"""LayerNorm's and BatchNorm's; both are torch's defaults, written out because weights need it."""


class ConvStem(nn.Module):
    """Two 3x3 stride-2 convolutions, each with BN and activation: (B, c, H, W) -> (B, C, H/4, W/4).

    Args:
        channels: image channels c.
        width: output channels C; the first convolution has half.
        act: `relu` (EfficientFormer) or `gelu`.
    """

    layout: ClassVar[Layout] = "map"
    conv1: nn.Conv2d
    norm1: nn.Module
    conv2: nn.Conv2d
    norm2: nn.Module

    def __init__(self, *, channels: int, width: int, act: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width // 2, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(width // 2, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(width, eps=NORM_EPS)
        self.act = nn.GELU() if act == "gelu" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to the first feature map."""
        x = self.act(self.norm1(self.conv1(x)))
        out: Tensor = self.act(self.norm2(self.conv2(x)))
        return out

    def fold_(self) -> None:
        """Fold both BatchNorms."""
        self.conv1, self.norm1 = with_norm(self.conv1, self.norm1)
        self.conv2, self.norm2 = with_norm(self.conv2, self.norm2)


class Conv3x3(nn.Module):
    """Downsampling between stages: 3x3 stride-2 convolution and BN, no activation."""

    layout: ClassVar[Layout] = "map"
    conv: nn.Conv2d
    norm: nn.Module

    def __init__(self, *, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width_out, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width_in, H, W) to (B, width_out, ceil(H/2), ceil(W/2))."""
        out: Tensor = self.norm(self.conv(x))
        return out

    def fold_(self) -> None:
        """Fold BatchNorm."""
        self.conv, self.norm = with_norm(self.conv, self.norm)


class PoolMixer(nn.Module):
    """The token mixer of MB4D: 3x3 average pooling of a map, minus the map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        out: Tensor = self.pool(x) - x
        return out


class ConvFFN(nn.Module):
    """1x1 convolution, BN, GELU, 1x1 convolution, BN on a map (B, C, H, W)."""

    fc1: nn.Conv2d
    norm1: nn.Module
    fc2: nn.Conv2d
    norm2: nn.Module

    def __init__(self, *, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = initialised(nn.Conv2d(width, ffn_dim, 1))
        self.norm1 = nn.BatchNorm2d(ffn_dim, eps=NORM_EPS)
        self.act = nn.GELU()
        self.fc2 = initialised(nn.Conv2d(ffn_dim, width, 1))
        self.norm2 = nn.BatchNorm2d(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = self.act(self.norm1(self.fc1(x)))
        out: Tensor = self.norm2(self.fc2(x))
        return out

    def fold_(self) -> None:
        """Fold both BatchNorms."""
        self.fc1, self.norm1 = with_norm(self.fc1, self.norm1)
        self.fc2, self.norm2 = with_norm(self.fc2, self.norm2)


class MB4D(ResidualBlock):
    """Pool mixer and convolutional FFN, both residual with layer scale, on maps (B, C, H, W).

    Args:
        width: channels C.
        ffn_dim: hidden channels of the FFN.
    """

    layout: ClassVar[Layout] = "map"
    token_mixer: PoolMixer
    ls1: nn.Module
    mlp: ConvFFN
    ls2: nn.Module

    def __init__(self, *, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.token_mixer = PoolMixer()
        self.ls1 = LayerScale(width, self.layout)
        self.mlp = ConvFFN(width=width, ffn_dim=ffn_dim)
        self.ls2 = LayerScale(width, self.layout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = x + self.kept(self.ls1(self.token_mixer(x)))
        out: Tensor = x + self.kept(self.ls2(self.mlp(x)))
        return out

    def fold_(self) -> None:
        """Fold the second layer scale, which needs the FFN's BatchNorm folded before."""
        self.mlp.fold_()
        self.ls2 = into_layer(self.ls2, self.mlp.fc2)


class Attention(nn.Module):
    """Multi-head attention over a grid of tokens with a learned bias per head and offset.

    The logit of query i and key j gets `attention_biases[head, |dy| * columns + |dx|]`.

    Args:
        width: channels C of the tokens.
        grid: (rows, columns) of the map the tokens come from.
        heads: number of heads.
        qk_dim: dimension of queries and keys per head.
        v_dim: dimension of values per head.
    """

    qkv: nn.Linear
    proj: nn.Linear
    attention_biases: nn.Parameter
    attention_bias_idxs: Tensor
    pair_bias: Tensor | None

    def __init__(
        self, *, width: int, grid: tuple[int, int], heads: int, qk_dim: int, v_dim: int
    ) -> None:
        super().__init__()
        self.grid, self.heads, self.qk_dim, self.v_dim = grid, heads, qk_dim, v_dim
        self.tokens = grid[0] * grid[1]
        self.scale = qk_dim**-0.5
        self.qkv = initialised(nn.Linear(width, heads * (2 * qk_dim + v_dim)))
        self.proj = initialised(nn.Linear(heads * v_dim, width))
        self.attention_biases = nn.Parameter(torch.zeros(heads, self.tokens))
        # Derived from the grid, so not part of the weights.
        self.register_buffer("attention_bias_idxs", offset_index(*grid), persistent=False)
        self.register_buffer("pair_bias", None, persistent=False)

    def bias(self) -> Tensor:
        """The bias of every pair of tokens: (heads, N, N)."""
        if self.pair_bias is not None:
            return self.pair_bias
        return self.attention_biases[:, self.attention_bias_idxs]

    def fold_(self) -> None:
        """Gather the biases once."""
        self.pair_bias = self.bias().detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C), N = rows * columns, to the same shape.

        Raises:
            InputSizeError: another number of tokens.
        """
        if not is_tracing() and x.shape[1] != self.tokens:
            raise InputSizeError(
                f"attention was built for {self.grid[0]}x{self.grid[1]} = {self.tokens} tokens, "
                f"got {x.shape[1]}; build the architecture for this input resolution"
            )
        qkv = self.qkv(x).reshape(-1, self.tokens, self.heads, 2 * self.qk_dim + self.v_dim)
        q, k, v = qkv.permute(0, 2, 1, 3).split([self.qk_dim, self.qk_dim, self.v_dim], dim=3)
        logits = (q @ k.transpose(2, 3)) * self.scale + self.bias()
        mixed = (logits.softmax(dim=-1) @ v).transpose(1, 2)
        out: Tensor = self.proj(mixed.reshape(-1, self.tokens, self.heads * self.v_dim))
        return out


class FFN(nn.Module):
    """Linear, GELU, linear on tokens (B, N, C)."""

    fc1: nn.Linear
    fc2: nn.Linear

    def __init__(self, *, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = initialised(nn.Linear(width, ffn_dim))
        self.act = nn.GELU()
        self.fc2 = initialised(nn.Linear(ffn_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class MB3D(ResidualBlock):
    """Attention and FFN, both pre-norm and residual with layer scale, on tokens (B, N, C).

    Args:
        width: channels C.
        grid: (rows, columns) of the map the tokens come from.
        heads: attention heads.
        qk_dim: query and key dimension per head.
        v_dim: value dimension per head.
        ffn_dim: hidden width of the FFN.
    """

    layout: ClassVar[Layout] = "tokens"
    norm1: nn.LayerNorm
    token_mixer: Attention
    ls1: nn.Module
    norm2: nn.LayerNorm
    mlp: FFN
    ls2: nn.Module

    def __init__(
        self,
        *,
        width: int,
        grid: tuple[int, int],
        heads: int,
        qk_dim: int,
        v_dim: int,
        ffn_dim: int,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.token_mixer = Attention(
            width=width, grid=grid, heads=heads, qk_dim=qk_dim, v_dim=v_dim
        )
        self.ls1 = LayerScale(width, self.layout)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = FFN(width=width, ffn_dim=ffn_dim)
        self.ls2 = LayerScale(width, self.layout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape."""
        x = x + self.kept(self.ls1(self.token_mixer(self.norm1(x))))
        out: Tensor = x + self.kept(self.ls2(self.mlp(self.norm2(x))))
        return out

    def fold_(self) -> None:
        """Fold both layer scales."""
        self.ls1 = into_layer(self.ls1, self.token_mixer.proj)
        self.ls2 = into_layer(self.ls2, self.mlp.fc2)


class LinearHead(nn.Module):
    """LayerNorm over channels, mean over positions, linear classifier; a second if distilled.

    Takes tokens (B, N, C) or a map (B, C, H, W). A distilled head gives the pair
    (logits, distillation logits) in training and their mean in evaluation.

    Args:
        width: channels C.
        classes: number of classes K.
        distilled: whether there is a second classifier that learns from a teacher.
    """

    layout: ClassVar[Layout] = "tokens"
    norm: nn.Module
    head: nn.Linear
    head_dist: nn.Linear | None

    def __init__(self, *, width: int, classes: int, distilled: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = initialised(nn.Linear(width, classes))
        self.head_dist = initialised(nn.Linear(width, classes)) if distilled else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, K), or a pair of them from a distilled head in training."""
        pooled = self.pooled(x)
        logits: Tensor = self.head(pooled)
        if self.head_dist is None:
            return logits
        distilled: Tensor = self.head_dist(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def pooled(self, x: Tensor) -> Tensor:
        """What the classifiers read: (B, C)."""
        out: Tensor = self.norm(to_tokens(x) if x.dim() == 4 else x).mean(dim=1)
        return out

    def fold_(self) -> None:
        """Make one classifier of two."""
        if self.head_dist is None:
            return
        assert self.head.bias is not None
        assert self.head_dist.bias is not None
        self.head.weight = frozen((self.head.weight + self.head_dist.weight) / 2)
        self.head.bias = frozen((self.head.bias + self.head_dist.bias) / 2)
        self.head_dist = None


def offset_index(rows: int, columns: int) -> Tensor:
    """For every pair of tokens of a grid, the index |dy| * columns + |dx| of their offset.

    Returns:
        int64 tensor (N, N), N = rows * columns, tokens in row-major order.
    """
    y = torch.arange(rows).repeat_interleave(columns)
    x = torch.arange(columns).repeat(rows)
    return (y[:, None] - y).abs() * columns + (x[:, None] - x).abs()


def _make_stem(component: Component) -> nn.Module:
    assert isinstance(component.spec, specs.ConvStem)
    return ConvStem(
        channels=component.input.channels, width=component.spec.width, act=component.spec.act
    )


def _make_downsample(component: Component) -> nn.Module:
    return Conv3x3(width_in=component.input.channels, width_out=component.output.channels)


def _make_mb4d(component: Component) -> nn.Module:
    assert isinstance(component.spec, specs.MB4D)
    width = component.input.channels
    return MB4D(width=width, ffn_dim=component.spec.hidden(width))


def _make_mb3d(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.MB3D)
    return MB3D(
        width=shape.channels,
        grid=(shape.height, shape.width),
        heads=spec.heads,
        qk_dim=spec.qk_dim,
        v_dim=spec.v_dim,
        ffn_dim=spec.hidden(shape.channels),
    )


def _make_head(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.LinearHead)
    return LinearHead(
        width=component.input.channels, classes=spec.classes, distilled=spec.distilled
    )


MAKERS: Mapping[type[Spec], Maker] = MappingProxyType(
    {
        specs.ConvStem: _make_stem,
        specs.Conv3x3: _make_downsample,
        specs.MB4D: _make_mb4d,
        specs.MB3D: _make_mb3d,
        specs.LinearHead: _make_head,
    }
)
"""How a component of this family becomes a module; `slimnas.nn.build` joins the families."""
