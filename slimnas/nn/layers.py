"""Small modules that several block families are made of, and how they fold.

A module that something can be folded out of at inference has a method `fold_`, which
`slimnas.nn.fold.fold` calls on a copy of the network in evaluation mode.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from slimnas.nn.layout import Layout

LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)

LAYER_SCALE_INIT = 1e-5
LINEAR_INIT_STD = 0.02
BATCH_NORM_EPS = 1e-5
"""BatchNorm's; torch's default, written out because weights need it."""


class LayerScale(nn.Module):
    """A learned factor per channel of tokens (..., C) or, with `layout="map"`, of (B, C, H, W)."""

    gamma: nn.Parameter

    def __init__(self, width: int, layout: Layout) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), LAYER_SCALE_INIT))
        self.shape = (width, 1, 1) if layout == "map" else (width,)

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` channel by channel."""
        return x * self.gamma.view(self.shape)


class ResidualBlock(nn.Module):
    """A block whose residual branches may be dropped in training, image by image.

    Stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016), with what is
    kept scaled so that evaluation, which drops nothing, sees the mean. It is no module and has no
    tensors: nothing of it is in weights, folded networks and exported files.

    Attributes:
        drop_path: share of the images whose branch is dropped, below 1; each branch draws anew.
            `slimnas.nn.regularisation.set_drop_path` sets it.
    """

    drop_path: float = 0.0

    def kept(self, branch: Tensor) -> Tensor:
        """A branch's output (B, ...) as it is added: of dropped images zero."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1))
        return branch * mask.bernoulli_(keep).div_(keep)


class ConvNorm(nn.Module):
    """Convolution and BatchNorm on a map (B, C, H, W).

    Args:
        width_in: channels of its input.
        width_out: channels of its output.
        kernel: side of the kernel; odd sides are padded to keep the map's size at stride 1.
        stride: of the convolution.
        groups: of the convolution.
        bias: whether the convolution has one beside BatchNorm's.
        norm_weight: initial value of BatchNorm's factors; 0 makes a residual branch start silent.
    """

    conv: nn.Conv2d
    bn: nn.Module

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            width_in,
            width_out,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=bias,
        )
        norm = nn.BatchNorm2d(width_out, eps=BATCH_NORM_EPS)
        nn.init.constant_(norm.weight, norm_weight)
        self.bn = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width_in, H, W) to (B, width_out, H / stride, W / stride), rounded up."""
        out: Tensor = self.bn(self.conv(x))
        return out

    def fold_(self) -> None:
        """Fold BatchNorm into the convolution."""
        self.conv, self.bn = with_norm(self.conv, self.bn)


def initialised(layer: LayerT) -> LayerT:
    """Truncated normal weights and zero biases, as the released codes start their 1x1 layers."""
    nn.init.trunc_normal_(layer.weight, std=LINEAR_INIT_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def with_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """The convolution with `norm` folded in, and what stands in the norm's place."""
    if not isinstance(norm, nn.BatchNorm2d):  # folded already
        return conv, norm
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


def into_layer(scale: nn.Module, layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Scale the outputs of `layer` by `scale`; returns what stands in the scale's place."""
    if not isinstance(scale, LayerScale):  # folded already
        return scale
    weight_shape = (-1,) + (1,) * (layer.weight.dim() - 1)
    layer.weight = frozen(layer.weight * scale.gamma.view(weight_shape))
    assert layer.bias is not None
    layer.bias = frozen(layer.bias * scale.gamma)
    return nn.Identity()


def frozen(value: Tensor) -> nn.Parameter:
    """A parameter of that value that takes no gradient."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)
