"""Which positions of which tensor a prunable unit holds, for every component of a network.

A unit is one query-and-key dimension of a head, one value dimension of a head, one hidden unit of
an FFN, a head, or one channel of the residual stream. Each axis of each tensor has a role; a role
says which units lie on the axis, and where. The channel graph and the surgery both follow from
these declarations. Roles `in` and `out` are those of `slimnas.nn.channels`.

Every layout keeps the order of its units, so what stays of an axis is the positions of the kept
units, ascending.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MB3D, MB4D, Conv3x3, ConvStem, LinearHead
from slimnas.arch.swin import PatchMerging, SwinBlock, SwinStem
from slimnas.arch.vit import TokenHead, ViTBlock, ViTStem
from slimnas.arch.walk import Component
from slimnas.errors import PruneError
from slimnas.nn.channels import CHANNEL_AXES, HIDDEN, IN, OUT, TensorAxes

Positions: TypeAlias = npt.NDArray[np.int64]
Family = Literal["qk", "v", "ffn", "head", "in", "out"]
"""What a unit is to its component; `in` and `out` are channels of the stages before and after."""

QKV = "qkv"
"""Outputs of the joint projection: queries, keys and values of every head."""
VALUES = "values"
"""Values of every head side by side, head by head: the inputs of the output projection."""
HEADS = "heads"
"""One entry per head."""
MERGED = "merged"
"""Four neighbours' channels side by side: channel e lies at e, e + C, e + 2C and e + 3C."""
STEM_HIDDEN = "stem_hidden"
"""Channels inside a convolutional stem; half of its width, so they follow, and are no units."""

AttentionSpec: TypeAlias = "MB3D | ViTBlock | SwinBlock"
ATTENTION: Mapping[type[Spec], str] = MappingProxyType(
    {MB3D: "token_mixer", ViTBlock: "attn", SwinBlock: "attn"}
)
"""Name of the attention module, which has `qkv` and `proj`, in each block type that has one."""

LAYERS: Mapping[type[Spec], Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        block: {"attention_layer": ("norm1.", "attn."), "ffn_layer": ("norm2.", "mlp.")}
        for block in (ViTBlock, SwinBlock)
    }
)
"""Sub-layers that can be removed whole, and how the names of their tensors begin."""


def _affine(name: str, *axes: str | None) -> dict[str, TensorAxes]:
    return {f"{name}.weight": axes, f"{name}.bias": axes[:1]}


def _refined(spec: type[Spec], roles: Mapping[str, TensorAxes]) -> dict[str, TensorAxes]:
    """The channel axes of `spec`, with `roles` for the axes that they leave open."""
    refined = dict(CHANNEL_AXES[spec])
    for name, axes in roles.items():
        known = refined.get(name, (None,) * len(axes))
        refined[name] = tuple(a if a is not None else b for a, b in zip(known, axes, strict=True))
    return refined


def _renamed(spec: type[Spec], old: str, new: str) -> dict[str, TensorAxes]:
    return {
        name: tuple(new if axis == old else axis for axis in axes)
        for name, axes in CHANNEL_AXES[spec].items()
    }


_TRANSFORMER_BLOCK: dict[str, TensorAxes] = {
    **_affine("norm1", OUT),
    **_affine("attn.qkv", QKV, OUT),
    **_affine("attn.proj", OUT, VALUES),
    **_affine("norm2", OUT),
    **_affine("mlp.fc1", HIDDEN, OUT),
    **_affine("mlp.fc2", OUT, HIDDEN),
}

UNIT_AXES: Mapping[type[Spec], Mapping[str, TensorAxes]] = MappingProxyType(
    {
        ConvStem: _renamed(ConvStem, HIDDEN, STEM_HIDDEN),
        Conv3x3: CHANNEL_AXES[Conv3x3],
        MB4D: CHANNEL_AXES[MB4D],
        MB3D: _refined(
            MB3D,
            {
                "token_mixer.qkv.weight": (QKV, None),
                "token_mixer.qkv.bias": (QKV,),
                "token_mixer.proj.weight": (None, VALUES),
                "token_mixer.attention_biases": (HEADS, None),
            },
        ),
        LinearHead: _refined(LinearHead, {"head.bias": (None,), "head_dist.bias": (None,)}),
        ViTStem: {
            **_affine("proj", OUT),
            "cls_token": (None, None, OUT),
            "dist_token": (None, None, OUT),
            "pos_embed": (None, None, OUT),
        },
        ViTBlock: _TRANSFORMER_BLOCK,
        TokenHead: {
            **_affine("norm", IN),
            **_affine("head", None, IN),
            **_affine("head_dist", None, IN),
        },
        SwinStem: {**_affine("proj", OUT), **_affine("norm", OUT)},
        PatchMerging: {**_affine("norm", MERGED), "reduction.weight": (OUT, MERGED)},
        SwinBlock: {
            **_TRANSFORMER_BLOCK,
            "attn.relative_position_bias_table": (None, HEADS),
        },
    }
)
"""Tensor name -> role of each axis, leading axes first; trailing axes (kernels) may be left out."""


def unit_axes(component: Component) -> Mapping[str, TensorAxes]:
    """The declaration of a component's tensors.

    Raises:
        PruneError: a component type that declares none.
    """
    axes = UNIT_AXES.get(type(component.spec))
    if axes is None:
        known = ", ".join(sorted(spec.__name__ for spec in UNIT_AXES))
        raise PruneError(
            f"{component.name}: {type(component.spec).__name__} cannot be pruned; known: {known}; "
            "declare its tensors in slimnas.nn.units.UNIT_AXES"
        )
    return axes


def attention_of(spec: Spec) -> AttentionSpec | None:
    """`spec` if it is a block with attention in it, else None."""
    if isinstance(spec, (MB3D, ViTBlock, SwinBlock)) and spec.heads:
        return spec
    return None


def qkv_rows(spec: AttentionSpec) -> tuple[Positions, Positions, Positions]:
    """Rows of the joint projection that make queries, keys (heads, qk_dim), values (heads, v_dim).

    EfficientFormer orders them head by head, [q k v] in each; timm's ViT and Swin by what they
    are, head by head inside: [q of all heads, k of all heads, v of all heads].
    """
    heads, qk, v = spec.heads, spec.qk_dim, spec.v_dim
    if isinstance(spec, MB3D):
        rows = np.arange(heads * (2 * qk + v)).reshape(heads, 2 * qk + v)
        return rows[:, :qk], rows[:, qk : 2 * qk], rows[:, 2 * qk :]
    ends = (heads * qk, 2 * heads * qk)
    queries, keys, values = np.split(np.arange(ends[1] + heads * v), ends)
    return queries.reshape(heads, qk), keys.reshape(heads, qk), values.reshape(heads, v)


def unit_positions(component: Component, role: str) -> dict[Family, Positions]:
    """Where the units of each family lie on an axis of `component` with this role.

    Returns:
        Family -> positions: (heads, dims, n) for `qk` and `v`, (units, n) else, where n is how
        many positions one unit has. Together they are every position once; empty for channels
        that are no units.
    """
    width_in, width_out = component.input.channels, component.output.channels
    spec = component.spec
    attention = attention_of(spec)
    if role == IN:
        return {"in": np.arange(width_in)[:, None]}
    if role == OUT:
        return {"out": np.arange(width_out)[:, None]}
    if role == MERGED:
        return {"in": np.arange(width_in)[:, None] + width_in * np.arange(4)}
    if role == HIDDEN:
        assert isinstance(spec, (MB4D, MB3D, ViTBlock, SwinBlock))
        return {"ffn": np.arange(spec.hidden(width_out))[:, None]}
    if role == STEM_HIDDEN:
        return {}
    assert attention is not None
    if role == HEADS:
        return {"head": np.arange(attention.heads)[:, None]}
    if role == VALUES:
        values = np.arange(attention.heads * attention.v_dim)
        return {"v": values.reshape(attention.heads, attention.v_dim, 1)}
    assert role == QKV
    q, k, v = qkv_rows(attention)
    return {"qk": np.stack([q, k], axis=-1), "v": v[..., None]}
