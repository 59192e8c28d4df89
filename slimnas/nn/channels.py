"""Which axis of which tensor holds which channels, for every component that can be narrowed.

Axes are named `in` and `out` (the widths before and after the component; one and the same where
the component is residual, then only `out`) and `hidden` (channels inside it). Axes that keep
their size when a width changes, such as heads and kernels, are None. Tensors that are not
listed do not change. An axis that holds channels in another order than its group, or of several
groups, is a tuple of `Run`s. `slimnas.nn.channels_shared` has those of attention whose heads share
the stage's channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from slimnas.arch import mixers
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MB3D, MB4D, Conv3x3, ConvStem, LinearHead
from slimnas.arch.litv2 import ConvFFNBlock, ConvMerging
from slimnas.arch.swin import PatchMerging

TensorAxes = tuple[str | None, ...]

IN, OUT, HIDDEN = "in", "out", "hidden"

WHOLE = Fraction(0), Fraction(1)


@dataclass(frozen=True)
class Run:
    """Channels that lie side by side on an axis.

    Attributes:
        group: whose channels they are: `in`, `out`, `hidden`, or a name of the component's own.
        first: where they begin in the group, as a share of it.
        last: where they end.
        keeps_logits: the values are queries', to be scaled so that logits stay what they are when
            their division by the square root of a head's dimension changes with the dimension.
    """

    group: str
    first: Fraction = WHOLE[0]
    last: Fraction = WHOLE[1]
    keeps_logits: bool = False


Runs = tuple[Run, ...]
Axes = Mapping[str, tuple[Runs | None, ...]]
"""Tensor name -> what lies on its leading axes."""


@dataclass(frozen=True)
class Channels:
    """How the tensors of one component hold its channels.

    Attributes:
        axes: what lies on which axis.
        sizes: channels of each group inside the component, `hidden` and those of its own.
        chunks: equal runs of a group that must keep equally many channels; 1 where not listed.
    """

    axes: Axes
    sizes: Mapping[str, int]
    chunks: Mapping[str, int]


def norm_axes(prefix: str, axis: str) -> dict[str, TensorAxes]:
    """Of LayerNorm or BatchNorm."""
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{name}": (axis,) for name in names}


def layer_axes(prefix: str, *axes: str | None) -> dict[str, TensorAxes]:
    """Of a linear layer or convolution: outputs, then inputs."""
    return {f"{prefix}.weight": axes, f"{prefix}.bias": axes[:1]}


def plain(axes: Mapping[str, TensorAxes]) -> dict[str, tuple[Runs | None, ...]]:
    """The same axes as whole runs."""
    return {
        name: tuple(None if axis is None else (Run(axis),) for axis in given)
        for name, given in axes.items()
    }


FFN_AXES: Mapping[str, TensorAxes] = MappingProxyType(
    {
        **layer_axes("mlp.fc1", HIDDEN, OUT),
        **layer_axes("mlp.dwconv", HIDDEN),
        **layer_axes("mlp.fc2", OUT, HIDDEN),
    }
)
"""Of an FFN, with a depthwise convolution in it or without."""

_RESIDUAL_FFN: dict[str, TensorAxes] = {
    "ls1.gamma": (OUT,),
    "ls2.gamma": (OUT,),
    "mlp.fc1.weight": (HIDDEN, OUT),
    "mlp.fc1.bias": (HIDDEN,),
    "mlp.fc2.weight": (OUT, HIDDEN),
    "mlp.fc2.bias": (OUT,),
}

_MIXER_BLOCK: dict[str, TensorAxes] = {
    **norm_axes("norm1", OUT),
    **norm_axes("norm2", OUT),
    **FFN_AXES,
}
_PROJECTED: dict[str, TensorAxes] = {
    **_MIXER_BLOCK,
    **layer_axes("mixer.qkv", None, OUT),
    **layer_axes("mixer.q", None, OUT),
    **layer_axes("mixer.kv", None, OUT),
    **layer_axes("mixer.reduce.conv", OUT, OUT),
    **norm_axes("mixer.reduce.norm", OUT),
    **layer_axes("mixer.proj", OUT, None),
}
"""Attention whose heads have dimensions of their own, on tokens: the projections change alone."""

CHANNEL_AXES: Mapping[type[Spec], Mapping[str, TensorAxes]] = MappingProxyType(
    {
        ConvStem: {
            "conv1.weight": (HIDDEN,),
            "conv1.bias": (HIDDEN,),
            **norm_axes("norm1", HIDDEN),
            "conv2.weight": (OUT, HIDDEN),
            "conv2.bias": (OUT,),
            **norm_axes("norm2", OUT),
        },
        Conv3x3: {"conv.weight": (OUT, IN), "conv.bias": (OUT,), **norm_axes("norm", OUT)},
        ConvMerging: {
            **layer_axes("conv", OUT, IN),
            **norm_axes("bn", OUT),
            **layer_axes("offset", None, IN),
        },
        MB4D: {**_RESIDUAL_FFN, **norm_axes("mlp.norm1", HIDDEN), **norm_axes("mlp.norm2", OUT)},
        MB3D: {
            **_RESIDUAL_FFN,
            **norm_axes("norm1", OUT),
            "token_mixer.qkv.weight": (None, OUT),
            "token_mixer.proj.weight": (OUT, None),
            "token_mixer.proj.bias": (OUT,),
            **norm_axes("norm2", OUT),
        },
        mixers.MHSABlock: _PROJECTED,
        mixers.WindowBlock: _PROJECTED,
        mixers.SRABlock: _PROJECTED,
        mixers.LinearSRABlock: _PROJECTED,
        mixers.TMSABlock: _PROJECTED,
        mixers.StridedBlock: {
            **_MIXER_BLOCK,
            **layer_axes("mixer.stride_conv.conv", OUT),
            **norm_axes("mixer.stride_conv.bn", OUT),
            **layer_axes("mixer.q.conv", None, OUT),
            **layer_axes("mixer.k.conv", None, OUT),
            **layer_axes("mixer.v.conv", None, OUT),
            **layer_axes("mixer.proj.conv", OUT, None),
            **norm_axes("mixer.proj.bn", OUT),
        },
        mixers.LKABlock: {
            **_MIXER_BLOCK,
            **layer_axes("mixer.proj_1", OUT, OUT),
            **layer_axes("mixer.near", OUT),
            **layer_axes("mixer.far", OUT),
            **layer_axes("mixer.point", OUT, OUT),
            **layer_axes("mixer.proj_2", OUT, OUT),
        },
        mixers.PoolBlock: _MIXER_BLOCK,
        ConvFFNBlock: {**norm_axes("norm2", OUT), **FFN_AXES},
        LinearHead: {
            **norm_axes("norm", IN),
            "head.weight": (None, IN),
            "head_dist.weight": (None, IN),
        },
    }
)
"""Tensor name -> axes, leading axes first; trailing axes (kernels) may be left out."""

_MERGED: tuple[Runs | None, ...] = ((Run(IN),) * 4,)

RUN_AXES: Mapping[type[Spec], Axes] = MappingProxyType(
    {
        PatchMerging: {
            "norm.weight": _MERGED,
            "norm.bias": _MERGED,
            "reduction.weight": ((Run(OUT),), *_MERGED),
        }
    }
)
"""Components whose axes are no whole groups, whatever their fields."""
