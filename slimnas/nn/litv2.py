"""The modules of LITv2: HiLo attention, the FFN with a convolution in it, token merging.

Pan et al., "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022), sections 3 and 4. Names
inside a block are the released code's. Stem and head are `slimnas.nn.swin.SwinStem` and
`slimnas.nn.efficientformer.LinearHead`.

No tensor here has more than four axes and no size but the batch is read from a tensor: some
exporters refuse the one, some the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.arch import litv2 as specs
from slimnas.arch.documents import Spec
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import Component
from slimnas.errors import InputSizeError
from slimnas.nn.efficientformer import FFN
from slimnas.nn.layers import (
    BATCH_NORM_EPS,
    LINEAR_INIT_STD,
    ResidualBlock,
    initialised,
    with_norm,
)
from slimnas.nn.layout import Layout, is_tracing, to_map, to_tokens
from slimnas.nn.makers import Maker

NORM_EPS = 1e-5


class HiLo(nn.Module):
    """HiLo attention on tokens (B, N, C): some heads in small windows, the others over averages.

    Hi-Fi heads attend inside windows of `window` x `window` tokens. Lo-Fi heads attend from every
    token to the averages of those windows. Each group has its own output projection; the outputs
    stand side by side, Hi-Fi first. With a window of 1 all heads are Lo-Fi heads: plain attention.
    Maps are padded with zeros, right and below, to whole windows; padding is attended to.

    `h_qkv` gives [queries of all heads | keys of all heads | values of all heads], `l_kv` keys and
    values. Logits are scaled by (width / heads)**-0.5.

    Args:
        width: channels C of the tokens.
        grid: (rows, columns) of the map the tokens come from, N = rows * columns.
        heads: number of heads, which divides the width.
        lo_heads: how many of them are Lo-Fi heads; see `slimnas.arch.litv2.lo_heads_of`.
        window: side of a window in tokens.
        qkv_bias: whether queries, keys and values have biases; the output projections do.
    """

    layout: ClassVar[Layout] = "tokens"
    h_qkv: nn.Linear | None
    h_proj: nn.Linear | None
    l_q: nn.Linear | None
    l_kv: nn.Linear | None
    l_proj: nn.Linear | None

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        heads: int,
        lo_heads: int,
        window: int,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.grid, self.window = width, grid, window
        self.padded = -(-grid[0] // window) * window, -(-grid[1] // window) * window
        self.dim = width // heads
        self.scale = self.dim**-0.5
        self.lo_heads = heads if window == 1 else lo_heads
        self.hi_heads = heads - self.lo_heads
        hi, lo = self.hi_heads * self.dim, self.lo_heads * self.dim
        self.h_qkv = _linear(width, 3 * hi, bias=qkv_bias) if hi else None
        self.h_proj = _linear(hi, hi) if hi else None
        self.l_q = _linear(width, lo, bias=qkv_bias) if lo else None
        self.l_kv = _linear(width, 2 * lo, bias=qkv_bias) if lo else None
        self.l_proj = _linear(lo, lo) if lo else None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C), N = rows * columns, to the same shape.

        Raises:
            InputSizeError: another number of tokens.
        """
        rows, columns = self.grid
        if not is_tracing() and x.shape[1] != rows * columns:
            raise InputSizeError(
                f"attention was built for {rows}x{columns} = {rows * columns} tokens, got "
                f"{x.shape[1]}; build the architecture for this input resolution"
            )
        x = self._pad(x)
        if not self.lo_heads:
            return self._crop(self.hifi(x))
        if not self.hi_heads:
            return self._crop(self.lofi(x))
        return self._crop(torch.cat([self.hifi(x), self.lofi(x)], dim=2))

    def hifi(self, x: Tensor) -> Tensor:
        """The Hi-Fi heads' part of the output.

        Args:
            x: tokens (B, M, C) of the map as padded to whole windows.

        Returns:
            (B, M, hi_heads * C / heads), after the output projection.
        """
        assert self.h_qkv is not None
        assert self.h_proj is not None
        side, across = self.window, self.padded[1] // self.window
        inside, hi = side**2, self.hi_heads * self.dim
        rows = self.h_qkv(x).reshape(-1, side, across, side * 3 * hi)
        windows = rows.transpose(1, 2).reshape(-1, inside, 3 * hi)
        q, k, v = (
            self._by_head(part, inside, self.hi_heads) for part in windows.split([hi] * 3, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        # Projected window by window: ExecuTorch lays attention's output out anew, and cannot
        # regroup it before something has copied it.
        out: Tensor = self.h_proj(mixed.reshape(-1, inside, hi))
        joined = out.reshape(-1, across, side, side * hi).transpose(1, 2)
        return joined.reshape(-1, self.padded[0] * self.padded[1], hi)

    def lofi(self, x: Tensor) -> Tensor:
        """The Lo-Fi heads' part of the output.

        Args:
            x: tokens (B, M, C) of the map as padded to whole windows.

        Returns:
            (B, M, lo_heads * C / heads), after the output projection.
        """
        assert self.l_q is not None
        assert self.l_kv is not None
        assert self.l_proj is not None
        tokens, lo = self.padded[0] * self.padded[1], self.lo_heads * self.dim
        averages = tokens // self.window**2
        k, v = self.l_kv(self._averaged(x)).split([lo, lo], dim=2)
        mixed = F.scaled_dot_product_attention(
            self._by_head(self.l_q(x), tokens, self.lo_heads),
            self._by_head(k, averages, self.lo_heads),
            self._by_head(v, averages, self.lo_heads),
            scale=self.scale,
        )
        out: Tensor = self.l_proj(mixed.transpose(1, 2).reshape(-1, tokens, lo))
        return out

    def _averaged(self, x: Tensor) -> Tensor:
        """The mean token of each window, row by row: (B, M / window**2, C)."""
        if self.window == 1:
            return x
        # Two sums instead of pooling: no layout but the tokens' own is needed.
        rows = x.reshape(-1, self.window, self.padded[1], self.width).sum(dim=1)
        sums = rows.reshape(-1, self.window, self.width).sum(dim=1)
        averages = self.padded[0] * self.padded[1] // self.window**2
        return sums.reshape(-1, averages, self.width) * (1 / self.window**2)

    def _by_head(self, x: Tensor, tokens: int, heads: int) -> Tensor:
        """(B, tokens, heads * dim) -> (B, heads, tokens, dim)."""
        return x.reshape(-1, tokens, heads, self.dim).transpose(1, 2)

    def _pad(self, x: Tensor) -> Tensor:
        if self.padded == self.grid:
            return x
        (rows, columns), (high, wide) = self.grid, self.padded
        x = x.reshape(-1, rows, columns, self.width)
        x = F.pad(x, (0, 0, 0, wide - columns, 0, high - rows))
        return x.reshape(-1, high * wide, self.width)

    def _crop(self, x: Tensor) -> Tensor:
        if self.padded == self.grid:
            return x
        (rows, columns), (high, wide) = self.grid, self.padded
        x = x.reshape(-1, high, wide, self.width)
        x = x.narrow(1, 0, rows).narrow(2, 0, columns)
        return x.reshape(-1, rows * columns, self.width)


class ConvFFN(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear on tokens (B, N, C).

    The convolution, padded with zeros, is all that tells the network where a token lies.

    Args:
        width: channels C.
        grid: (rows, columns) of the map the tokens come from.
        ffn_dim: hidden width.
    """

    layout: ClassVar[Layout] = "tokens"
    fc1: nn.Linear
    dwconv: nn.Conv2d
    fc2: nn.Linear

    def __init__(self, *, width: int, grid: tuple[int, int], ffn_dim: int) -> None:
        super().__init__()
        self.shape = FeatureShape(width, *grid)
        self.fc1 = initialised(nn.Linear(width, ffn_dim))
        self.dwconv = nn.Conv2d(ffn_dim, ffn_dim, 3, padding=1, groups=ffn_dim)
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2 / 9))  # 2 / fan_out of one channel
        assert self.dwconv.bias is not None
        nn.init.zeros_(self.dwconv.bias)
        self.act = nn.GELU()
        self.fc2 = initialised(nn.Linear(ffn_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        if is_tracing():
            return self._by_convolutions(x)
        # Both changes of layout are views in PyTorch: the map is channels-last.
        hidden = to_map(self.fc1(x), self.shape.with_channels(self.fc1.out_features))
        out: Tensor = self.fc2(self.act(to_tokens(self.dwconv(hidden))))
        return out

    def _by_convolutions(self, x: Tensor) -> Tensor:
        """The same for exported files.

        Runtimes keep maps in a layout of their own from one convolution to the next and change it
        around anything else: with linear layers in between, ONNX Runtime takes 1.13 x as long.
        """
        hidden = F.conv2d(to_map(x, self.shape), _kernel(self.fc1), self.fc1.bias)
        seen = self.act(self.dwconv(hidden))
        out = F.conv2d(seen, _kernel(self.fc2), self.fc2.bias)
        return out.reshape(-1, self.shape.channels, self.shape.positions).transpose(1, 2)


class ConvFFNBlock(ResidualBlock):
    """`ConvFFN`, pre-norm and residual, on tokens (B, N, C).

    Args:
        width: channels C.
        grid: (rows, columns) of the map the tokens come from.
        ffn_dim: hidden width of the FFN.
    """

    layout: ClassVar[Layout] = "tokens"
    norm2: nn.LayerNorm
    mlp: ConvFFN

    def __init__(self, *, width: int, grid: tuple[int, int], ffn_dim: int) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = ConvFFN(width=width, grid=grid, ffn_dim=ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape."""
        out: Tensor = x + self.kept(self.mlp(self.norm2(x)))
        return out


class HiLoBlock(ResidualBlock):
    """HiLo attention and FFN, both pre-norm and residual, on tokens (B, N, C).

    Args:
        width: channels C.
        attn: maps tokens to tokens.
        mlp: maps tokens to tokens.
    """

    layout: ClassVar[Layout] = "tokens"
    norm1: nn.LayerNorm
    attn: HiLo
    norm2: nn.LayerNorm
    mlp: ConvFFN | FFN

    def __init__(self, *, width: int, attn: HiLo, mlp: ConvFFN | FFN) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape."""
        x = x + self.kept(self.attn(self.norm1(x)))
        out: Tensor = x + self.kept(self.mlp(self.norm2(x)))
        return out


class ConvMerging(nn.Module):
    """Downsampling: 2x2 stride-2 convolution, BatchNorm, GELU on a map (B, C, H, W).

    Deformable, it is deformable convolution v1 (Dai et al., ICCV 2017): the convolution sees the
    map, bilinearly sampled, at its pixels moved by offsets that another convolution predicts from
    the same 2x2 pixels. Those start at zero. Outside, the map is zero. `offset` gives the offsets
    in pixels, down and right for each pixel of a window, row by row.

    Args:
        shape: shape of the map it takes; the last row or column of an odd side is not seen,
            unless an offset reaches it.
        width_out: channels after it.
        deformable: whether there are offsets.
    """

    layout: ClassVar[Layout] = "map"
    conv: nn.Conv2d
    bn: nn.Module
    offset: nn.Conv2d | None
    rows: Tensor
    columns: Tensor

    def __init__(self, *, shape: FeatureShape, width_out: int, deformable: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.conv = nn.Conv2d(shape.channels, width_out, 2, stride=2)
        self.bn = nn.BatchNorm2d(width_out, eps=BATCH_NORM_EPS)
        self.act = nn.GELU()
        self.offset = None
        if deformable:
            self.offset = nn.Conv2d(shape.channels, 2 * specs.TAPS, 2, stride=2)
            nn.init.zeros_(self.offset.weight)
            assert self.offset.bias is not None
            nn.init.zeros_(self.offset.bias)
            rows, columns = 2 * (shape.height // 2), 2 * (shape.width // 2)
            self.register_buffer("rows", torch.arange(1.0 * rows)[:, None], persistent=False)
            self.register_buffer("columns", torch.arange(1.0 * columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, width_out, H // 2, W // 2)."""
        out: Tensor = self.act(self.bn(self.conv(x if self.offset is None else self._moved(x))))
        return out

    def fold_(self) -> None:
        """Fold BatchNorm into the convolution."""
        self.conv, self.bn = with_norm(self.conv, self.bn)

    def _moved(self, x: Tensor) -> Tensor:
        """The map as the convolution is to see it: pixel by pixel sampled at its moved place."""
        assert self.offset is not None
        offsets = self.offset(x)
        # (B, 4, H / 2, W / 2) -> (B, 1, H, W): the shuffle puts each offset at its pixel.
        down = F.pixel_shuffle(offsets[:, 0::2], 2)[:, 0] + self.rows
        right = F.pixel_shuffle(offsets[:, 1::2], 2)[:, 0] + self.columns
        ends = self.shape.height - 1, self.shape.width - 1
        places = torch.stack([right * (2 / ends[1]) - 1, down * (2 / ends[0]) - 1], dim=3)
        return F.grid_sample(x, places, mode="bilinear", padding_mode="zeros", align_corners=True)


def _linear(width_in: int, width_out: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(width_in, width_out, bias=bias)
    if bias:
        return initialised(layer)
    nn.init.trunc_normal_(layer.weight, std=LINEAR_INIT_STD)
    return layer


def _kernel(layer: nn.Linear) -> Tensor:
    """The weights of a linear layer as those of a 1x1 convolution."""
    return layer.weight[:, :, None, None]


def _make_ffn_block(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.ConvFFNBlock)
    grid = shape.height, shape.width
    return ConvFFNBlock(width=shape.channels, grid=grid, ffn_dim=spec.hidden(shape.channels))


def _make_hilo_block(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.HiLoBlock)
    width, grid, hidden = shape.channels, (shape.height, shape.width), spec.hidden(shape.channels)
    attn = HiLo(width, grid, spec.heads, spec.lo_heads, spec.window, qkv_bias=spec.qkv_bias)
    if spec.ffn == "conv":
        return HiLoBlock(
            width=width, attn=attn, mlp=ConvFFN(width=width, grid=grid, ffn_dim=hidden)
        )
    return HiLoBlock(width=width, attn=attn, mlp=FFN(width=width, ffn_dim=hidden))


def _make_merging(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.ConvMerging)
    return ConvMerging(
        shape=component.input,
        width_out=component.output.channels,
        deformable=spec.deformable,
    )


MAKERS: Mapping[type[Spec], Maker] = MappingProxyType(
    {
        specs.ConvFFNBlock: _make_ffn_block,
        specs.HiLoBlock: _make_hilo_block,
        specs.ConvMerging: _make_merging,
    }
)
"""How a component of this family becomes a module; `slimnas.nn.build` joins the families."""
