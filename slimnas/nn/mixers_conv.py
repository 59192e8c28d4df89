"""What the mechanisms that work on maps are made of; see `slimnas.nn.mixers`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from slimnas.nn.layers import BATCH_NORM_EPS, ResidualBlock, frozen, initialised
from slimnas.nn.layout import Layout


class LargeKernelAttention(nn.Module):
    """The gated convolutions of VAN, plus their input, on maps (B, C, H, W).

    Depthwise 5x5, depthwise 7x7 of dilation 3 and 1x1 together see as far as a 21x21 kernel; their
    output gates what they were given (section 3.1, equation 2).

    Args:
        width: channels C.
    """

    proj_1: nn.Conv2d
    near: nn.Conv2d
    far: nn.Conv2d
    point: nn.Conv2d
    proj_2: nn.Conv2d

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.act = nn.GELU()
        self.near = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.far = nn.Conv2d(width, width, 7, padding=9, groups=width, dilation=3)
        self.point = nn.Conv2d(width, width, 1)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        seen = self.act(self.proj_1(x))
        gate = self.point(self.far(self.near(seen)))
        out: Tensor = self.proj_2(seen * gate) + x
        return out


class MapFFN(nn.Module):
    """1x1 convolution, depthwise 3x3 convolution if wanted, GELU, 1x1 convolution on (B, C, H, W).

    Args:
        width: channels C.
        ffn_dim: hidden channels.
        depthwise: whether there is a convolution in the middle.
    """

    fc1: nn.Conv2d
    dwconv: nn.Conv2d | None
    fc2: nn.Conv2d

    def __init__(self, *, width: int, ffn_dim: int, depthwise: bool) -> None:
        super().__init__()
        self.fc1 = initialised(nn.Conv2d(width, ffn_dim, 1))
        self.dwconv = None
        if depthwise:
            self.dwconv = nn.Conv2d(ffn_dim, ffn_dim, 3, padding=1, groups=ffn_dim)
        self.act = nn.GELU()
        self.fc2 = initialised(nn.Conv2d(ffn_dim, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x)
        out: Tensor = self.fc2(self.act(x))
        return out


class MapBlock(ResidualBlock):
    """A mixer and an FFN, both residual, on maps (B, C, H, W), BatchNorm before them.

    Args:
        width: channels C.
        mixer: maps maps to maps.
        mlp: the FFN.
        normed: whether BatchNorm stands before the mixer too.
        fixed_size: whether the mixer takes maps of one size only.
    """

    layout: ClassVar[Layout] = "map"
    norm1: nn.Module
    mixer: nn.Module
    norm2: nn.Module
    mlp: MapFFN

    def __init__(
        self, *, width: int, mixer: nn.Module, mlp: MapFFN, normed: bool, fixed_size: bool
    ) -> None:
        super().__init__()
        self.fixed_size = fixed_size
        self.norm1 = nn.BatchNorm2d(width, eps=BATCH_NORM_EPS) if normed else nn.Identity()
        self.mixer = mixer
        self.norm2 = nn.BatchNorm2d(width, eps=BATCH_NORM_EPS)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = x + self.kept(self.mixer(self.norm1(x)))
        out: Tensor = x + self.kept(self.mlp(self.norm2(x)))
        return out

    def fold_(self) -> None:
        """Fold the second BatchNorm into the 1x1 convolution after it.

        The first stays: other layers than convolutions read what it gives too.
        """
        norm, conv = self.norm2, self.mlp.fc1
        if not isinstance(norm, nn.BatchNorm2d):  # folded already
            return
        assert norm.running_var is not None
        assert norm.running_mean is not None
        assert conv.bias is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        conv.bias = frozen(conv.bias + conv.weight.flatten(1) @ shift)
        conv.weight = frozen(conv.weight * scale.view(1, -1, 1, 1))
        self.norm2 = nn.Identity()
