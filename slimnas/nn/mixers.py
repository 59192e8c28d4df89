"""Blocks that differ in how they mix tokens: the mechanisms of `slimnas.arch.mixers` as modules.

Those that work on tokens are here, those that work on maps in `slimnas.nn.mixers_conv`. Attention
without a position bias goes through PyTorch's `scaled_dot_product_attention`, which picks a fused
kernel where it has one.

No tensor here has more than four axes and no size but the batch is read from a tensor: some
exporters refuse the one, some the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.arch import mixers as specs
from slimnas.arch.documents import Spec
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.swin import SwinBlock
from slimnas.arch.walk import Component
from slimnas.errors import InputSizeError
from slimnas.nn.efficientformer import FFN, PoolMixer
from slimnas.nn.efficientformerv2 import Heads, V2TokenMixer
from slimnas.nn.efficientvit import CascadedGroupAttention
from slimnas.nn.layers import ResidualBlock, initialised
from slimnas.nn.layout import Layout, is_tracing, to_map, to_tokens
from slimnas.nn.litv2 import ConvFFN
from slimnas.nn.makers import Maker
from slimnas.nn.mixers_conv import LargeKernelAttention, MapBlock, MapFFN
from slimnas.nn.swin import WindowAttention, Windows

NORM_EPS = 1e-5
Grid = tuple[int, int]


class SelfAttention(nn.Module):
    """Multi-head attention inside windows of a map without position bias, on tokens (B, N, C).

    One window of the map's size is plain multi-head self-attention. `qkv` gives [queries of all
    heads | keys of all heads | values of all heads]; logits are scaled by qk_dim**-0.5.

    Args:
        width: channels C.
        heads: number of heads.
        qk_dim: dimension of queries and keys per head.
        v_dim: dimension of values per head.
        windows: how the map is cut.
    """

    qkv: nn.Linear
    proj: nn.Linear
    mask: Tensor | None

    def __init__(
        self, *, width: int, heads: int, qk_dim: int, v_dim: int, windows: Windows
    ) -> None:
        super().__init__()
        self.width, self.heads, self.qk_dim, self.v_dim = width, heads, qk_dim, v_dim
        self.windows = windows
        self.scale = qk_dim**-0.5
        self.qkv = initialised(nn.Linear(width, heads * (2 * qk_dim + v_dim)))
        self.proj = initialised(nn.Linear(heads * v_dim, width))
        mask = windows.mask()
        if mask is not None:  # as heads follow each other in the logits, window by window
            mask = mask.repeat_interleave(heads, dim=0)
        # Derived from the map's size, so not part of the weights.
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape.

        Raises:
            InputSizeError: another number of tokens.
        """
        _check_tokens(x, self.windows.grid)
        tokens, keys, values = (
            self.windows.tokens,
            self.heads * self.qk_dim,
            self.heads * self.v_dim,
        )
        q, k, v = self.qkv(self.windows.split(x, self.width)).split([keys, keys, values], dim=2)
        mixed = F.scaled_dot_product_attention(
            self._by_head(q, self.qk_dim),
            self._by_head(k, self.qk_dim),
            self._by_head(v, self.v_dim),
            attn_mask=self.mask,
            scale=self.scale,
        )
        if self.mask is not None:
            mixed = mixed.reshape(-1, self.heads, tokens, self.v_dim)
        out = self.proj(mixed.transpose(1, 2).reshape(-1, tokens, values))
        return self.windows.join(out, self.width)

    def _by_head(self, x: Tensor, dim: int) -> Tensor:
        """(windows, tokens, heads * dim) -> (windows, heads, tokens, dim).

        With a mask, which differs from window to window: (B, windows of a map * heads, ...).
        """
        x = x.reshape(-1, self.windows.tokens, self.heads, dim).transpose(1, 2)
        if self.mask is None:
            return x
        return x.reshape(-1, self.windows.count * self.heads, self.windows.tokens, dim)


class ReducedAttention(nn.Module):
    """Multi-head attention of every token to fewer ones made from the same map, (B, N, C).

    Args:
        width: channels C.
        grid: (rows, columns) of the map the tokens come from.
        heads: number of heads.
        qk_dim: dimension of queries and keys per head.
        v_dim: dimension of values per head.
        reduce: makes those that keys and values are taken from; None for all of them.
    """

    q: nn.Linear
    kv: nn.Linear
    reduce: StridedReduction | PooledReduction | None
    proj: nn.Linear

    def __init__(
        self,
        *,
        width: int,
        grid: Grid,
        heads: int,
        qk_dim: int,
        v_dim: int,
        reduce: StridedReduction | PooledReduction | None,
    ) -> None:
        super().__init__()
        self.grid, self.heads, self.qk_dim, self.v_dim = grid, heads, qk_dim, v_dim
        self.scale = qk_dim**-0.5
        self.keys = grid[0] * grid[1] if reduce is None else reduce.tokens
        self.q = initialised(nn.Linear(width, heads * qk_dim))
        self.kv = initialised(nn.Linear(width, heads * (qk_dim + v_dim)))
        self.reduce = reduce
        self.proj = initialised(nn.Linear(heads * v_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape.

        Raises:
            InputSizeError: another number of tokens.
        """
        _check_tokens(x, self.grid)
        tokens = self.grid[0] * self.grid[1]
        seen = x if self.reduce is None else self.reduce(x)
        k, v = self.kv(seen).split([self.heads * self.qk_dim, self.heads * self.v_dim], dim=2)
        mixed = F.scaled_dot_product_attention(
            self._by_head(self.q(x), tokens, self.qk_dim),
            self._by_head(k, self.keys, self.qk_dim),
            self._by_head(v, self.keys, self.v_dim),
            scale=self.scale,
        )
        mixed = mixed.transpose(1, 2).reshape(-1, tokens, self.heads * self.v_dim)
        out: Tensor = self.proj(mixed)
        return out

    def _by_head(self, x: Tensor, tokens: int, dim: int) -> Tensor:
        """(B, tokens, heads * dim) -> (B, heads, tokens, dim)."""
        return x.reshape(-1, tokens, self.heads, dim).transpose(1, 2)


class StridedReduction(nn.Module):
    """Convolution whose kernel is its stride, then LayerNorm (PVT): tokens to fewer tokens.

    Args:
        shape: shape of the map the tokens come from; what fills no kernel is not seen.
        ratio: side of the kernel.
    """

    conv: nn.Conv2d
    norm: nn.LayerNorm

    def __init__(self, *, shape: FeatureShape, ratio: int) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = (shape.height // ratio) * (shape.width // ratio)
        self.conv = nn.Conv2d(shape.channels, shape.channels, ratio, stride=ratio)
        self.norm = nn.LayerNorm(shape.channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, `tokens`, C)."""
        out: Tensor = self.norm(to_tokens(self.conv(to_map(x, self.shape))))
        return out


class PooledReduction(nn.Module):
    """Averaging to a fixed number of tokens, 1x1 convolution, LayerNorm, GELU (PVTv2).

    Where the map's sides are no multiples of `pooled`, the averages overlap: row i is the mean of
    rows floor(i * H / pooled) to ceil((i + 1) * H / pooled).

    Args:
        shape: shape of the map the tokens come from.
        pooled: side of the map of averages.
    """

    conv: nn.Linear
    norm: nn.LayerNorm
    pooling: Tensor | None

    def __init__(self, *, shape: FeatureShape, pooled: int) -> None:
        super().__init__()
        self.shape, self.tokens = shape, pooled**2
        self.kernel = shape.height // pooled, shape.width // pooled
        self.conv = initialised(nn.Linear(shape.channels, shape.channels))
        self.norm = nn.LayerNorm(shape.channels, eps=NORM_EPS)
        self.act = nn.GELU()
        pooling = None
        if shape.height % pooled or shape.width % pooled:
            rows, columns = (_averaging(side, pooled) for side in (shape.height, shape.width))
            pooling = torch.kron(rows, columns)
        # Derived from the map's size, so not part of the weights.
        self.register_buffer("pooling", pooling, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, `tokens`, C)."""
        if self.pooling is not None:
            seen = self.pooling @ x
        elif self.kernel == (1, 1):
            seen = x
        else:
            seen = to_tokens(F.avg_pool2d(to_map(x, self.shape), self.kernel))
        out: Tensor = self.act(self.norm(self.conv(seen)))
        return out


class TokenBlock(ResidualBlock):
    """A mixer and an FFN, both pre-norm and residual, on tokens (B, N, C).

    Args:
        width: channels C.
        mixer: maps tokens to tokens.
        mlp: maps tokens to tokens.
    """

    layout: ClassVar[Layout] = "tokens"
    norm1: nn.LayerNorm
    mixer: nn.Module
    norm2: nn.LayerNorm
    mlp: FFN | ConvFFN

    def __init__(self, *, width: int, mixer: nn.Module, mlp: FFN | ConvFFN) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape."""
        x = x + self.kept(self.mixer(self.norm1(x)))
        out: Tensor = x + self.kept(self.mlp(self.norm2(x)))
        return out


def make_mixer(spec: specs.MixerBlock, shape: FeatureShape) -> nn.Module:
    """Make the mechanism of a block alone, without norm, residual and FFN.

    It takes and gives tokens (B, N, C), or maps (B, C, H, W) if `works_on_maps`.

    Raises:
        TypeError: no mechanism for such a spec.
    """
    if isinstance(spec, specs.HeadedBlock):
        return _make_headed(spec, shape)
    if isinstance(spec, specs.CGABlock):
        same = spec.efficientvit(shape.channels)
        return CascadedGroupAttention(
            width=shape.channels,
            grid=(shape.height, shape.width),
            heads=spec.heads,
            qk_dim=spec.qk_dim,
            v_dim=same.values(shape.channels),
            kernels=same.kernels_per_head,
            window=spec.window,
        )
    if isinstance(spec, specs.LKABlock):
        return LargeKernelAttention(shape.channels)
    if isinstance(spec, specs.PoolBlock):
        return PoolMixer()
    raise TypeError(f"no mechanism for {type(spec).__name__}")


def works_on_maps(spec: specs.MixerBlock) -> bool:
    """Whether the mechanism takes and gives maps rather than tokens."""
    return isinstance(spec, (specs.LKABlock, specs.CGABlock, specs.StridedBlock, specs.PoolBlock))


def _make_headed(spec: specs.HeadedBlock, shape: FeatureShape) -> nn.Module:
    width, grid = shape.channels, (shape.height, shape.width)
    qk_dim, v_dim = spec.dims(width)
    if isinstance(spec, specs.StridedBlock):
        half = spec.v2(width).grid(shape)
        sizes = Heads(count=spec.heads, qk_dim=qk_dim, v_dim=v_dim)
        seen = half.height, half.width
        return V2TokenMixer(width=width, grid=seen, heads=sizes, stride=2)
    windows = _windows(spec, shape)
    if windows is not None:
        biased = isinstance(spec, specs.WindowBlock) and spec.position_bias
        attention = WindowAttention if biased else SelfAttention
        return attention(width=width, heads=spec.heads, qk_dim=qk_dim, v_dim=v_dim, windows=windows)
    return ReducedAttention(
        width=width,
        grid=grid,
        heads=spec.heads,
        qk_dim=qk_dim,
        v_dim=v_dim,
        reduce=_reduction(spec, shape),
    )


def _windows(spec: specs.HeadedBlock, shape: FeatureShape) -> Windows | None:
    """How the map is cut, one window being the whole; None for attention to a reduced map."""
    if isinstance(spec, specs.MHSABlock):
        grid = shape.height, shape.width
        return Windows(grid, grid, (0, 0), grid)
    same: SwinBlock | None = None
    if isinstance(spec, specs.WindowBlock) or (
        isinstance(spec, specs.TMSABlock) and spec.part == "local"
    ):
        same = spec.swin(shape.channels)
    return None if same is None else Windows.of(same, shape)


def _reduction(
    spec: specs.HeadedBlock, shape: FeatureShape
) -> StridedReduction | PooledReduction | None:
    if isinstance(spec, specs.LinearSRABlock):
        return PooledReduction(shape=shape, pooled=spec.pooled)
    if not isinstance(spec, (specs.SRABlock, specs.TMSABlock)):
        raise TypeError(f"no mechanism for {type(spec).__name__}")
    return StridedReduction(shape=shape, ratio=spec.reduction) if spec.reduction > 1 else None


def _averaging(side: int, pooled: int) -> Tensor:
    """The matrix (pooled, side) that averages `side` values to `pooled` ones."""
    matrix = torch.zeros(pooled, side)
    for i in range(pooled):
        first, end = i * side // pooled, -(-(i + 1) * side // pooled)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def _check_tokens(x: Tensor, grid: Grid) -> None:
    if not is_tracing() and x.shape[1] != grid[0] * grid[1]:
        raise InputSizeError(
            f"attention was built for {grid[0]}x{grid[1]} = {grid[0] * grid[1]} tokens, got "
            f"{x.shape[1]}; build the architecture for this input resolution"
        )


def _make_block(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.MixerBlock)
    width, hidden = shape.channels, spec.hidden(shape.channels)
    mixer = make_mixer(spec, shape)
    if works_on_maps(spec):
        ffn = MapFFN(width=width, ffn_dim=hidden, depthwise=spec.ffn == "conv")
        return MapBlock(
            width=width,
            mixer=mixer,
            mlp=ffn,
            normed=spec.normed,
            fixed_size=isinstance(spec, (specs.CGABlock, specs.StridedBlock)),
        )
    if spec.ffn == "conv":
        conv = ConvFFN(width=width, grid=(shape.height, shape.width), ffn_dim=hidden)
        return TokenBlock(width=width, mixer=mixer, mlp=conv)
    return TokenBlock(width=width, mixer=mixer, mlp=FFN(width=width, ffn_dim=hidden))


MAKERS: Mapping[type[Spec], Maker] = MappingProxyType(
    dict.fromkeys(
        (
            specs.MHSABlock,
            specs.WindowBlock,
            specs.SRABlock,
            specs.LinearSRABlock,
            specs.TMSABlock,
            specs.LKABlock,
            specs.CGABlock,
            specs.StridedBlock,
            specs.PoolBlock,
        ),
        _make_block,
    )
)
"""How a component of these types becomes a module; `slimnas.nn.build` joins the families."""
