"""The modules of EfficientViT (the memory-efficient one): stem, subsampling, blocks and head.

Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention"
(CVPR 2023), section 3, equal in every output to timm's. All work on maps (B, C, H, W).

No tensor here has more than four axes and no size but the batch is read from a tensor: some
exporters refuse the one, some the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.arch import efficientvit as specs
from slimnas.arch.documents import Spec
from slimnas.arch.walk import Component
from slimnas.errors import InputSizeError
from slimnas.nn.efficientformer import offset_index
from slimnas.nn.layers import BATCH_NORM_EPS, ConvNorm, ResidualBlock, frozen, initialised
from slimnas.nn.layout import Layout, is_tracing
from slimnas.nn.makers import Maker


@dataclass(frozen=True)
class SquareWindows:
    """How a map is cut into square windows.

    Attributes:
        grid: rows and columns of the map.
        side: rows and columns of a window.
        padded: rows and columns of the map with its padding, whole windows.
    """

    grid: tuple[int, int]
    side: int
    padded: tuple[int, int]

    @classmethod
    def of(cls, window: int, grid: tuple[int, int]) -> SquareWindows:
        """Windows of side `window` on a map of `grid`, or of the map's shorter side."""
        side = specs.window_side(window, *grid)
        return cls(grid, side, specs.padded_size(side, *grid))

    def split(self, x: Tensor, width: int) -> Tensor:
        """Cut a map (B, width, *grid) into windows (B * count, width, side, side), row by row."""
        (rows, columns), (high, wide), side = self.grid, self.padded, self.side
        if (high, wide) != (rows, columns):
            x = F.pad(x, (0, wide - columns, 0, high - rows))
        if high > side:  # two steps, as one would need six axes
            x = x.reshape(-1, width, high // side, side * wide).transpose(1, 2)
        if wide > side:
            x = x.reshape(-1, width * side, wide // side, side).transpose(1, 2)
        return x.reshape(-1, width, side, side) if max(high, wide) > side else x

    def join(self, x: Tensor, width: int) -> Tensor:
        """Put windows together again, the inverse of `split`."""
        (rows, columns), (high, wide), side = self.grid, self.padded, self.side
        if wide > side:
            x = x.reshape(-1, wide // side, width * side, side).transpose(1, 2)
        if high > side:
            x = x.reshape(-1, high // side, width, side * wide).transpose(1, 2)
        if max(high, wide) > side:
            x = x.reshape(-1, width, high, wide)
        if high != rows:
            x = x.narrow(2, 0, rows)
        return x.narrow(3, 0, columns) if wide != columns else x


class CascadedGroupAttention(nn.Module):
    """Attention whose heads each see their share of the channels, inside windows.

    In a cascade a head also sees what the head before it gives, added to its share. Queries pass
    a depthwise convolution that ends at the window's borders. The logit of query i and key j gets
    `attention_biases[head, |dy| * side + |dx|]` (section 3.2).

    Args:
        width: channels C.
        grid: (rows, columns) of the map.
        heads: number of heads; divides C.
        qk_dim: dimension of queries and keys per head.
        v_dim: dimension of values per head; C / heads in a cascade.
        kernels: side of each head's depthwise convolution.
        window: side of a window; the map's shorter side if that is less.
        cascade: whether heads are added up, or only see their shares.
    """

    layout: ClassVar[Layout] = "map"
    qkvs: nn.ModuleList
    dws: nn.ModuleList
    proj: ConvNorm
    attention_biases: nn.Parameter
    attention_bias_idxs: Tensor
    pair_biases: Tensor | None

    def __init__(
        self,
        *,
        width: int,
        grid: tuple[int, int],
        heads: int,
        qk_dim: int,
        v_dim: int,
        kernels: Sequence[int],
        window: int,
        cascade: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.qk_dim, self.v_dim = width, heads, qk_dim, v_dim
        self.share, self.cascade = width // heads, cascade
        self.windows = SquareWindows.of(window, grid)
        self.scale = qk_dim**-0.5
        self.qkvs = nn.ModuleList(ConvNorm(self.share, 2 * qk_dim + v_dim) for _ in range(heads))
        self.dws = nn.ModuleList(
            ConvNorm(qk_dim, qk_dim, kernel, groups=qk_dim) for kernel in kernels
        )
        self.proj = ConvNorm(heads * v_dim, width, norm_weight=0.0)
        side = self.windows.side
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        # Derived from the window, so not part of the weights; nor is what folding gathers.
        self.register_buffer("attention_bias_idxs", offset_index(side, side), persistent=False)
        self.register_buffer("pair_biases", None, persistent=False)

    def bias(self) -> Tensor:
        """The bias of every pair of positions in a window: (heads, N, N)."""
        if self.pair_biases is not None:
            return self.pair_biases
        return self.attention_biases[:, self.attention_bias_idxs]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, rows, columns) to the same shape.

        Raises:
            InputSizeError: another size.
        """
        rows, columns = self.windows.grid
        if not is_tracing() and x.shape[2:] != (rows, columns):
            raise InputSizeError(
                f"attention was built for a map of {rows}x{columns}, got "
                f"{x.shape[2]}x{x.shape[3]}; build the architecture for this input resolution"
            )
        x = self.windows.split(x, self.width)
        biases = self.bias()
        given: list[Tensor] = []
        for head in range(self.heads):
            share = x.narrow(1, head * self.share, self.share) if self.heads > 1 else x
            seen = share + given[-1] if self.cascade and given else share
            given.append(self._head(head, seen, biases[head]))
        mixed = torch.cat(given, dim=1) if self.heads > 1 else given[0]
        return self.windows.join(self.proj(F.relu(mixed)), self.width)

    def _head(self, head: int, x: Tensor, bias: Tensor) -> Tensor:
        side = self.windows.side
        q, k, v = self.qkvs[head](x).split([self.qk_dim, self.qk_dim, self.v_dim], dim=1)
        q = self.dws[head](q).flatten(2).transpose(1, 2)
        logits = torch.baddbmm(bias, q, k.flatten(2), alpha=self.scale)
        mixed: Tensor = v.flatten(2) @ logits.softmax(dim=-1).transpose(1, 2)
        return mixed.reshape(-1, self.v_dim, side, side)

    def fold_(self) -> None:
        """Fold the scale of the logits into the queries and gather the biases once."""
        if self.pair_biases is not None:  # folded already
            return
        for dw in self.dws:
            assert isinstance(dw, ConvNorm)
            dw.fold_()
            assert dw.conv.bias is not None
            dw.conv.weight = frozen(dw.conv.weight * self.scale)
            dw.conv.bias = frozen(dw.conv.bias * self.scale)
        self.scale = 1.0
        self.pair_biases = self.bias().detach()


class InteractionFFN(ResidualBlock):
    """Depthwise 3x3 convolution, then FFN, each with BN and residual, on maps (B, C, H, W).

    Args:
        width: channels C.
        ffn_dim: hidden channels of the FFN.
        silent: whether the convolution starts without effect; the FFN does always.
    """

    layout: ClassVar[Layout] = "map"
    dw: ConvNorm
    pw1: ConvNorm
    pw2: ConvNorm

    def __init__(self, *, width: int, ffn_dim: int, silent: bool = True) -> None:
        super().__init__()
        self.dw = ConvNorm(width, width, 3, groups=width, norm_weight=0.0 if silent else 1.0)
        self.residual = True
        self.pw1 = ConvNorm(width, ffn_dim)
        self.act = nn.ReLU(inplace=True)
        self.pw2 = ConvNorm(ffn_dim, width, norm_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = x + self.kept(self.dw(x)) if self.residual else self.dw(x)
        out: Tensor = x + self.kept(self.pw2(self.act(self.pw1(x))))
        return out

    def fold_(self) -> None:
        """Fold the first residual: it is one more at the centre of the depthwise kernel."""
        if not self.residual:  # folded already
            return
        self.dw.fold_()
        centred = self.dw.conv.weight.detach().clone()
        centred[:, :, 1, 1] += 1
        self.dw.conv.weight = frozen(centred)
        self.residual = False


class EfficientViTBlock(ResidualBlock):
    """FFNs, cascaded group attention and FFNs, all residual, on maps (B, C, H, W).

    Args:
        width: channels C.
        ffn_dim: hidden channels of the FFNs.
        ffns: FFNs on each side of the attention.
        mixer: the attention.
    """

    layout: ClassVar[Layout] = "map"
    fixed_size: ClassVar[bool] = True
    before: nn.Sequential
    mixer: CascadedGroupAttention
    after: nn.Sequential

    def __init__(
        self, *, width: int, ffn_dim: int, ffns: int, mixer: CascadedGroupAttention
    ) -> None:
        super().__init__()
        self.before = _ffns(ffns, width, ffn_dim)
        self.mixer = mixer
        self.after = _ffns(ffns, width, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = self.before(x)
        out: Tensor = self.after(x + self.kept(self.mixer(x)))
        return out


class EfficientViTStem(nn.Module):
    """Four 3x3 stride-2 convolutions with BN, ReLU between: (B, c, H, W) -> (B, C, H/16, W/16).

    Args:
        channels: image channels c.
        widths: output channels of the convolutions; the last are C.
    """

    layout: ClassVar[Layout] = "map"

    def __init__(self, *, channels: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, widths[0], 3, stride=2)
        self.conv2 = ConvNorm(widths[0], widths[1], 3, stride=2)
        self.conv3 = ConvNorm(widths[1], widths[2], 3, stride=2)
        self.conv4 = ConvNorm(widths[2], widths[3], 3, stride=2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to the first feature map."""
        for layer in (self.conv1, self.conv2, self.conv3):
            x = self.act(layer(x))
        out: Tensor = self.conv4(x)
        return out


class SqueezeExcite(nn.Module):
    """Scale each channel of a map by what a two-layer network makes of all channels' means.

    Args:
        width: channels C.
        hidden: channels between the layers.
    """

    fc1: nn.Conv2d
    fc2: nn.Conv2d

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        scale: Tensor = self.fc2(self.act(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * scale.sigmoid()


class EfficientViTSubsample(nn.Module):
    """Downsampling: FFN, inverted residual of stride 2 with squeeze-excitation, FFN.

    Args:
        width_in: channels before it.
        width_out: channels after it.
        before_dim: hidden channels of the first FFN.
        after_dim: hidden channels of the second.
        inner: channels of the inverted residual.
        squeezed: channels inside the squeeze-excitation.
    """

    layout: ClassVar[Layout] = "map"

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        before_dim: int,
        after_dim: int,
        inner: int,
        squeezed: int,
    ) -> None:
        super().__init__()
        self.before = InteractionFFN(width=width_in, ffn_dim=before_dim, silent=False)
        self.conv1 = ConvNorm(width_in, inner)
        self.conv2 = ConvNorm(inner, inner, 3, stride=2, groups=inner)
        self.act = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(width=inner, hidden=squeezed)
        self.conv3 = ConvNorm(inner, width_out)
        self.after = InteractionFFN(width=width_out, ffn_dim=after_dim, silent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width_in, H, W) to (B, width_out, ceil(H/2), ceil(W/2))."""
        x = self.act(self.conv1(self.before(x)))
        x = self.conv3(self.se(self.act(self.conv2(x))))
        out: Tensor = self.after(x)
        return out


class NormLinear(nn.Module):
    """BatchNorm and linear layer on (B, C)."""

    bn: nn.Module
    linear: nn.Linear

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, eps=BATCH_NORM_EPS)
        self.linear = initialised(nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C) to (B, outputs)."""
        out: Tensor = self.linear(self.bn(x))
        return out

    def fold_(self) -> None:
        """Fold BatchNorm into the linear layer after it."""
        norm, linear = self.bn, self.linear
        if not isinstance(norm, nn.BatchNorm1d):  # folded already
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        linear.bias = frozen(linear.bias + linear.weight @ shift)
        linear.weight = frozen(linear.weight * scale)
        self.bn = nn.Identity()


class BatchNormHead(nn.Module):
    """Mean over positions, BatchNorm, linear classifier; BN and classifier twice if distilled.

    Takes a map (B, C, H, W) or tokens (B, N, C). A distilled head gives the pair
    (logits, distillation logits) in training and their mean in evaluation.

    Args:
        width: channels C.
        classes: number of classes K.
        distilled: whether there is a second classifier that learns from a teacher.
    """

    layout: ClassVar[Layout] = "map"
    head: NormLinear
    head_dist: NormLinear | None

    def __init__(self, *, width: int, classes: int, distilled: bool = False) -> None:
        super().__init__()
        self.head = NormLinear(width, classes)
        self.head_dist = NormLinear(width, classes) if distilled else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, K), or a pair of them from a distilled head in training."""
        pooled = x.mean(dim=(2, 3)) if x.dim() == 4 else x.mean(dim=1)
        logits: Tensor = self.head(pooled)
        if self.head_dist is None:
            return logits
        distilled: Tensor = self.head_dist(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def fold_(self) -> None:
        """Make one classifier of two; each needs its BatchNorm folded before."""
        if self.head_dist is None:
            return
        self.head.fold_()
        self.head_dist.fold_()
        kept, other = self.head.linear, self.head_dist.linear
        kept.weight = frozen((kept.weight + other.weight) / 2)
        kept.bias = frozen((kept.bias + other.bias) / 2)
        self.head_dist = None


def _ffns(count: int, width: int, ffn_dim: int) -> nn.Sequential:
    return nn.Sequential(*(InteractionFFN(width=width, ffn_dim=ffn_dim) for _ in range(count)))


def _make_stem(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.EfficientViTStem)
    return EfficientViTStem(channels=component.input.channels, widths=spec.widths)


def _make_subsample(component: Component) -> nn.Module:
    spec, width, after = component.spec, component.input.channels, component.output.channels
    assert isinstance(spec, specs.EfficientViTSubsample)
    return EfficientViTSubsample(
        width_in=width,
        width_out=after,
        before_dim=spec.hidden_before(width),
        after_dim=spec.hidden_after(after),
        inner=spec.inner(width),
        squeezed=spec.squeezed(width),
    )


def _make_block(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.EfficientViTBlock)
    mixer = CascadedGroupAttention(
        width=shape.channels,
        grid=(shape.height, shape.width),
        heads=spec.heads,
        qk_dim=spec.qk_dim,
        v_dim=spec.values(shape.channels),
        kernels=spec.kernels_per_head,
        window=spec.window,
        cascade=spec.cascade,
    )
    ffn_dim = spec.hidden(shape.channels)
    return EfficientViTBlock(width=shape.channels, ffn_dim=ffn_dim, ffns=spec.ffns, mixer=mixer)


def _make_head(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.BatchNormHead)
    return BatchNormHead(
        width=component.input.channels, classes=spec.classes, distilled=spec.distilled
    )


MAKERS: Mapping[type[Spec], Maker] = MappingProxyType(
    {
        specs.EfficientViTStem: _make_stem,
        specs.EfficientViTSubsample: _make_subsample,
        specs.EfficientViTBlock: _make_block,
        specs.BatchNormHead: _make_head,
    }
)
"""How a component of this family becomes a module; `slimnas.nn.build` joins the families."""
