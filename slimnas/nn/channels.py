"""Which axis of which tensor holds which channels, for every component that can be narrowed.

Axes are named `in` and `out` (the widths before and after the component; one and the same where
the component is residual, then only `out`) and `hidden` (channels inside it). Axes that keep
their size when a width changes, such as heads and kernels, are None. Tensors that are not
listed do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MB3D, MB4D, Conv3x3, ConvStem, LinearHead

TensorAxes = tuple[str | None, ...]

IN, OUT, HIDDEN = "in", "out", "hidden"


def _norm(prefix: str, axis: str) -> dict[str, TensorAxes]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{name}": (axis,) for name in names}


_RESIDUAL_FFN: dict[str, TensorAxes] = {
    "ls1.gamma": (OUT,),
    "ls2.gamma": (OUT,),
    "mlp.fc1.weight": (HIDDEN, OUT),
    "mlp.fc1.bias": (HIDDEN,),
    "mlp.fc2.weight": (OUT, HIDDEN),
    "mlp.fc2.bias": (OUT,),
}

CHANNEL_AXES: Mapping[type[Spec], Mapping[str, TensorAxes]] = MappingProxyType(
    {
        ConvStem: {
            "conv1.weight": (HIDDEN,),
            "conv1.bias": (HIDDEN,),
            **_norm("norm1", HIDDEN),
            "conv2.weight": (OUT, HIDDEN),
            "conv2.bias": (OUT,),
            **_norm("norm2", OUT),
        },
        Conv3x3: {"conv.weight": (OUT, IN), "conv.bias": (OUT,), **_norm("norm", OUT)},
        MB4D: {**_RESIDUAL_FFN, **_norm("mlp.norm1", HIDDEN), **_norm("mlp.norm2", OUT)},
        MB3D: {
            **_RESIDUAL_FFN,
            **_norm("norm1", OUT),
            "token_mixer.qkv.weight": (None, OUT),
            "token_mixer.proj.weight": (OUT, None),
            "token_mixer.proj.bias": (OUT,),
            **_norm("norm2", OUT),
        },
        LinearHead: {
            **_norm("norm", IN),
            "head.weight": (None, IN),
            "head_dist.weight": (None, IN),
        },
    }
)
"""Tensor name -> axes, leading axes first; trailing axes (kernels) may be left out."""
