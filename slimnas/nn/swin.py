"""The modules of Swin Transformer: stem, patch merging and (shifted) window blocks, on tokens.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021),
section 3, equal in every output to timm's. Its head is `slimnas.nn.efficientformer.LinearHead`.

No tensor here has more than four axes and no size but the batch is read from a tensor: some
exporters refuse the one, some the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.arch import swin as specs
from slimnas.arch.documents import Spec
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import Component
from slimnas.errors import InputSizeError, WeightsError
from slimnas.nn.layers import LINEAR_INIT_STD, initialised
from slimnas.nn.layout import Layout, is_tracing, to_tokens
from slimnas.nn.makers import Maker
from slimnas.nn.transformer import TransformerBlock

NORM_EPS = 1e-5
MASKED = -100.0
"""Added to the logit of two tokens that a shift brought into one window; the released value."""


@dataclass(frozen=True)
class Windows:
    """How a map is cut into windows; all are pairs (rows, columns) in tokens.

    Attributes:
        grid: size of the map.
        size: size of a window.
        shift: by how much the windows are moved down and right, around the edges.
        padded: size of the map with its padding, whole windows.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def of(cls, spec: specs.SwinBlock, shape: FeatureShape) -> Windows:
        """The windows of a block on a map of `shape`."""
        grid = shape.height, shape.width
        return cls(grid, spec.windows(shape), spec.shifts(shape), spec.padded(shape))

    @property
    def tokens(self) -> int:
        """Tokens in a window."""
        return self.size[0] * self.size[1]

    @property
    def count(self) -> int:
        """Windows in a map."""
        return self.padded[0] * self.padded[1] // self.tokens

    def split(self, x: Tensor, width: int) -> Tensor:
        """Cut tokens (B, H*W, width) into windows (B * count, tokens, width)."""
        if self.size == self.grid:
            return x
        (rows, columns), (high, wide) = self.grid, self.padded
        x = x.reshape(-1, rows, columns, width)
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), dims=(1, 2))
        if self.padded != self.grid:
            x = F.pad(x, (0, 0, 0, wide - columns, 0, high - rows))
        return self._cut(x, width)

    def join(self, windows: Tensor, width: int) -> Tensor:
        """Put windows together again, the inverse of `split`."""
        if self.size == self.grid:
            return windows
        (rows, columns), (high, wide) = self.grid, self.padded
        across = wide // self.size[1]
        x = windows.reshape(-1, across, self.size[0], self.size[1] * width).transpose(1, 2)
        x = x.reshape(-1, high, wide, width)
        if high != rows:
            x = x.narrow(1, 0, rows)
        if wide != columns:
            x = x.narrow(2, 0, columns)
        if any(self.shift):
            x = torch.roll(x, self.shift, dims=(1, 2))
        return x.reshape(-1, rows * columns, width)

    def mask(self) -> Tensor | None:
        """What keeps tokens apart that only the shift made neighbours.

        Returns:
            (count, tokens, tokens) of 0 and `MASKED`, to be added to the logits; None unshifted.
        """
        if not any(self.shift):
            return None
        down, right = (
            _regions(*sides) for sides in zip(self.padded, self.size, self.shift, strict=True)
        )
        label = (3 * down[:, None] + right).float()[None, :, :, None]
        region = self._cut(label, 1).squeeze(2)
        return (region[:, None, :] != region[:, :, None]).float() * MASKED

    def _cut(self, x: Tensor, width: int) -> Tensor:
        across = self.padded[1] // self.size[1]
        x = x.reshape(-1, self.size[0], across, self.size[1] * width).transpose(1, 2)
        return x.reshape(-1, self.tokens, width)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learned bias per head and signed offset.

    The logit of query i and key j gets the table's row (dy + h - 1) * (2w - 1) + dx + w - 1 for
    windows of h rows and w columns.

    Args:
        width: channels C of the tokens.
        heads: number of heads.
        qk_dim: dimension of queries and keys per head.
        v_dim: dimension of values per head.
        windows: how the map is cut.
    """

    qkv: nn.Linear
    proj: nn.Linear
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor
    mask: Tensor | None
    pair_bias: Tensor | None

    def __init__(
        self, *, width: int, heads: int, qk_dim: int, v_dim: int, windows: Windows
    ) -> None:
        super().__init__()
        self.width, self.heads, self.qk_dim, self.v_dim = width, heads, qk_dim, v_dim
        self.windows = windows
        self.scale = qk_dim**-0.5
        self.qkv = initialised(nn.Linear(width, heads * (2 * qk_dim + v_dim)))
        self.proj = initialised(nn.Linear(heads * v_dim, width))
        high, wide = windows.size
        table = torch.empty((2 * high - 1) * (2 * wide - 1), heads)
        self.relative_position_bias_table = nn.Parameter(table)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=LINEAR_INIT_STD)
        # Derived from the map's size, so not part of the weights.
        index = relative_position_index(high, wide).flatten()
        self.register_buffer("relative_position_index", index, persistent=False)
        self.register_buffer("mask", windows.mask(), persistent=False)
        self.register_buffer("pair_bias", None, persistent=False)

    def bias(self) -> Tensor:
        """What is added to the logits: (heads, tokens, tokens), or one after another per window."""
        if self.pair_bias is not None:
            return self.pair_bias
        tokens = self.windows.tokens
        pairs = self.relative_position_bias_table[self.relative_position_index]
        bias = pairs.transpose(0, 1).reshape(self.heads, tokens, tokens)
        if self.mask is None:
            return bias
        masked = bias + self.mask[:, None]
        return masked.reshape(self.windows.count * self.heads, tokens, tokens)

    def fold_(self) -> None:
        """Gather the biases, and add the mask, once; ExecuTorch needs them row by row."""
        self.pair_bias = self.bias().detach().clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, H*W, C) to the same shape.

        Raises:
            InputSizeError: another number of tokens.
        """
        rows, columns = self.windows.grid
        if not is_tracing() and x.shape[1] != rows * columns:
            raise InputSizeError(
                f"attention was built for {rows}x{columns} = {rows * columns} tokens, got "
                f"{x.shape[1]}; build the architecture for this input resolution"
            )
        tokens, keys, values = (
            self.windows.tokens,
            self.heads * self.qk_dim,
            self.heads * self.v_dim,
        )
        qkv = self.qkv(self.windows.split(x, self.width))
        q, k, v = qkv.split([keys, keys, values], dim=2)
        q = q.reshape(-1, tokens, self.heads, self.qk_dim).transpose(1, 2)
        k = k.reshape(-1, tokens, self.heads, self.qk_dim).permute(0, 2, 3, 1)
        v = v.reshape(-1, tokens, self.heads, self.v_dim).transpose(1, 2)
        logits = (q * self.scale) @ k
        if self.mask is None:
            logits = logits + self.bias()
        else:  # every window of a map has its own mask
            per_map = self.windows.count * self.heads
            logits = logits.reshape(-1, per_map, tokens, tokens) + self.bias()
            logits = logits.reshape(-1, self.heads, tokens, tokens)
        mixed = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, tokens, values)
        return self.windows.join(self.proj(mixed), self.width)


class SwinBlock(TransformerBlock):
    """Window attention and FFN, both pre-norm and residual, on tokens (B, H*W, C).

    Args:
        width: channels C.
        heads: attention heads; 0 for no attention.
        qk_dim: query and key dimension per head.
        v_dim: value dimension per head.
        ffn_dim: hidden width of the FFN; 0 for none.
        windows: how the map is cut.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        qk_dim: int,
        v_dim: int,
        ffn_dim: int,
        windows: Windows,
    ) -> None:
        attn = None
        if heads:
            attn = WindowAttention(
                width=width, heads=heads, qk_dim=qk_dim, v_dim=v_dim, windows=windows
            )
        super().__init__(width=width, attn=attn, ffn_dim=ffn_dim, eps=NORM_EPS)


class SwinStem(nn.Module):
    """Convolution of stride and kernel `patch`, then LayerNorm: (B, c, H, W) -> (B, N, C).

    Args:
        image: shape of the image.
        width: output channels C.
        patch: side of a patch in pixels.
    """

    layout: ClassVar[Layout] = "tokens"
    proj: nn.Conv2d
    norm: nn.LayerNorm

    def __init__(self, *, image: FeatureShape, width: int, patch: int) -> None:
        super().__init__()
        self.padding = (-image.width % patch, -image.height % patch)
        self.proj = nn.Conv2d(image.channels, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to tokens."""
        if any(self.padding):
            x = F.pad(x, (0, self.padding[0], 0, self.padding[1]))
        out: Tensor = self.norm(to_tokens(self.proj(x)))
        return out


class PatchMerging(nn.Module):
    """Downsampling: 2x2 neighbours side by side, LayerNorm, linear without bias.

    The neighbours of position (2y, 2x) come in the order (0, 0), (1, 0), (0, 1), (1, 1) of
    (row, column), as in the released weights.

    Args:
        shape: shape of the map it takes.
        width_out: channels after it.
    """

    layout: ClassVar[Layout] = "tokens"
    norm: nn.LayerNorm
    reduction: nn.Linear

    def __init__(self, *, shape: FeatureShape, width_out: int) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(4 * shape.channels, eps=NORM_EPS)
        self.reduction = nn.Linear(4 * shape.channels, width_out, bias=False)
        nn.init.trunc_normal_(self.reduction.weight, std=LINEAR_INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H*W, C) to (B, ceil(H/2) * ceil(W/2), width_out)."""
        rows, columns, width = self.shape.height, self.shape.width, self.shape.channels
        odd = rows % 2, columns % 2
        if any(odd):
            x = F.pad(x.reshape(-1, rows, columns, width), (0, 0, 0, odd[1], 0, odd[0]))
            rows, columns = rows + odd[0], columns + odd[1]
        pairs = x.reshape(-1, 2, columns, width).transpose(1, 2)
        merged = pairs.reshape(-1, rows * columns // 4, 4 * width)
        out: Tensor = self.reduction(self.norm(merged))
        return out


def relative_position_index(rows: int, columns: int) -> Tensor:
    """For every pair of tokens of a window, the row of the table that holds their bias.

    Returns:
        int64 tensor (N, N), N = rows * columns, tokens in row-major order.
    """
    y = torch.arange(rows).repeat_interleave(columns)
    x = torch.arange(columns).repeat(rows)
    down, right = y[:, None] - y + rows - 1, x[:, None] - x + columns - 1
    return down * (2 * columns - 1) + right


def resize_relative_position_table(
    table: Tensor, size: tuple[int, int], new_size: tuple[int, int]
) -> Tensor:
    """Move a table of biases to windows of another size.

    Along a side that shrinks, the offsets that remain keep their biases: the stages whose windows
    stay whole keep theirs too. Along a side that grows, the table is resized bicubically with the
    largest offsets mapped onto each other.

    Args:
        table: ((2h - 1) * (2w - 1), heads) for `size` = (h, w).
        size: rows and columns of the windows the table is for.
        new_size: rows and columns of the windows it is wanted for.

    Returns:
        The new table, in the table's dtype; `table` itself for the same size.

    Raises:
        WeightsError: the table is not one of `size`.
    """
    rows, columns = 2 * size[0] - 1, 2 * size[1] - 1
    if table.dim() != 2 or table.shape[0] != rows * columns:
        raise WeightsError(
            f"a relative position table of {size[0]}x{size[1]} windows must be "
            f"({rows * columns}, heads), got {tuple(table.shape)}"
        )
    if new_size == size:
        return table
    new_rows, new_columns = 2 * new_size[0] - 1, 2 * new_size[1] - 1
    signed = table.T.reshape(1, -1, rows, columns)
    top, left = max(0, size[0] - new_size[0]), max(0, size[1] - new_size[1])
    kept = signed[:, :, top : rows - top, left : columns - left]
    if kept.shape[2:] != (new_rows, new_columns):
        wanted = (new_rows, new_columns)
        kept = F.interpolate(kept.float(), size=wanted, mode="bicubic", align_corners=True)
    return kept[0].flatten(1).T.to(table.dtype).contiguous()


def _regions(length: int, size: int, shift: int) -> Tensor:
    """Label the rows of a shifted map by what they neighboured before the shift."""
    position = torch.arange(length)
    if not shift:
        return torch.zeros_like(position)
    return (position >= length - size).long() + (position >= length - shift).long()


def _make_stem(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.SwinStem)
    return SwinStem(image=component.input, width=spec.width, patch=spec.patch)


def _make_merging(component: Component) -> nn.Module:
    return PatchMerging(shape=component.input, width_out=component.output.channels)


def _make_block(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.SwinBlock)
    return SwinBlock(
        width=shape.channels,
        heads=spec.heads,
        qk_dim=spec.qk_dim,
        v_dim=spec.v_dim,
        ffn_dim=spec.hidden(shape.channels),
        windows=Windows.of(spec, shape),
    )


MAKERS: Mapping[type[Spec], Maker] = MappingProxyType(
    {
        specs.SwinStem: _make_stem,
        specs.PatchMerging: _make_merging,
        specs.SwinBlock: _make_block,
    }
)
"""How a component of this family becomes a module; `slimnas.nn.build` joins the families."""
