"""Operators by what they do, whatever a runtime calls them.

A profiler reports dozens of names for the same few things: `aten::linear`, `aten::addmm`, `Gemm`,
`MatMul`. Each becomes one operator of one kind here. Products of matrices are bound by arithmetic
on any device; everything else reads and writes about as much as it computes, and is bound by
memory wherever arithmetic is fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal[
    "product",
    "attention",
    "copy",
    "elementwise",
    "norm",
    "pool",
    "softmax",
    "activation",
    "other",
]

KINDS: Mapping[Kind, str] = MappingProxyType(
    {
        "product": "convolution, product",
        "attention": "fused attention",
        "copy": "copy, reshape",
        "elementwise": "elementwise",
        "norm": "normalisation",
        "pool": "pooling, mean",
        "softmax": "softmax",
        "activation": "activation",
        "other": "other",
    }
)
"""Kinds of operators in the order they are shown in, with words for them."""

MEMORY_BOUND: tuple[Kind, ...] = ("copy", "elementwise", "norm", "pool")
"""Bound by memory, as in EfficientViT (CVPR 2023, section 2.1); it had no pooling to count."""

WITH_NONLINEAR: tuple[Kind, ...] = (*MEMORY_BOUND, "softmax", "activation")
"""The same with softmax and activations, which the paper does not say how it counted."""


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: the same for every runtime.
        kind: what it is.
    """

    name: str
    kind: Kind


# operator: names of torch's, without `aten::` and the underscore of in-place forms
_ATEN: Mapping[Kind, Mapping[str, str]] = {
    "product": {
        "convolution": "conv1d conv2d conv3d convolution _convolution mkldnn_convolution "
        "cudnn_convolution cudnn_convolution_relu thnn_conv2d _slow_conv2d_forward "
        "_conv_depthwise2d conv_transpose2d _nnpack_spatial_convolution deform_conv2d",
        "linear": "linear addmm mm _addmm_activation addmv mv mkldnn_linear",
        "matmul": "matmul bmm baddbmm einsum _scaled_dot_product_attention_math",
    },
    "attention": {
        "attention": "_scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward "
        "_efficient_attention_forward _cudnn_attention_forward",
    },
    "copy": {
        "view": "view reshape _unsafe_view _reshape_alias transpose permute expand expand_as slice "
        "select split split_with_sizes chunk narrow squeeze unsqueeze flatten unflatten as_strided "
        "t numpy_T movedim unbind detach alias view_as swapaxes unfold lift_fresh",
        "copy": "copy clone contiguous _to_copy to",
        "cat": "cat concat concatenate stack",
        "roll": "roll",
        "flip": "flip",
        "repeat": "repeat repeat_interleave tile",
        "pad": "pad constant_pad_nd reflection_pad2d replication_pad2d",
        "gather": "index index_select gather embedding take scatter index_put",
        "unfold": "im2col col2im pixel_shuffle pixel_unshuffle",
        "fill": "fill zero zeros ones full zeros_like ones_like full_like arange scalar_tensor",
    },
    "elementwise": {
        "add": "add",
        "sub": "sub rsub",
        "mul": "mul",
        "div": "div reciprocal",
        "power": "pow sqrt rsqrt exp log square",
        "neg": "neg abs sign",
        "where": "where masked_fill",
        "compare": "eq ne lt le gt ge isneginf all any logical_and logical_or logical_not "
        "bitwise_and bitwise_not",
        "clamp": "clamp clamp_max maximum minimum",
        "fused add, mul": "addcmul addcdiv lerp",
        "resample": "upsample_bilinear2d upsample_bicubic2d upsample_nearest2d grid_sampler_2d",
    },
    "norm": {
        "layer_norm": "layer_norm native_layer_norm rms_norm _fused_rms_norm",
        "batch_norm": "batch_norm native_batch_norm _batch_norm_impl_index cudnn_batch_norm "
        "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update",
        "group_norm": "group_norm native_group_norm",
        "l2_norm": "linalg_vector_norm norm",
    },
    "pool": {
        "average_pool": "avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d",
        "max_pool": "max_pool2d max_pool2d_with_indices adaptive_max_pool2d",
        "mean": "mean sum var var_mean std amax amin max min",
    },
    "softmax": {"softmax": "softmax _softmax _safe_softmax log_softmax _log_softmax"},
    "activation": {
        "gelu": "gelu erf",
        "relu": "relu clamp_min threshold",
        "sigmoid": "sigmoid",
        "tanh": "tanh",
        "silu": "silu mish",
        "hardswish": "hardswish hardsigmoid hardtanh relu6",
        "elu": "elu leaky_relu softplus",
    },
}

_INTERNAL = (
    "empty empty_like empty_strided new_empty resize resize_as set result_type can_cast item "
    "_local_scalar_dense is_nonzero record_stream sym_size sym_stride _nnpack_available "
    "scaled_dot_product_attention _fused_sdp_choice lift_fresh_copy resolve_conj resolve_neg "
    "_has_compatible_shallow_copy is_floating_point"
)
"""What an operator calls for its own ends, such as memory: its time is that operator's."""

_ONNX: Mapping[Kind, Mapping[str, str]] = {
    "product": {
        "convolution": "Conv FusedConv ConvTranspose QLinearConv ConvInteger NhwcFusedConv",
        "linear": "Gemm FusedGemm QGemm",
        "matmul": "MatMul FusedMatMul TransposeMatMul QLinearMatMul MatMulInteger "
        "DynamicQuantizeMatMul MatMulIntegerToFloat Einsum",
    },
    "attention": {"attention": "Attention MultiHeadAttention QAttention"},
    "copy": {
        "view": "Reshape Flatten Squeeze Unsqueeze Identity Shape Size",
        "transpose": "Transpose",
        "copy": "Cast ReorderInput ReorderOutput QuantizeLinear DequantizeLinear",
        "cat": "Concat",
        "split": "Split Slice",
        "repeat": "Expand Tile",
        "pad": "Pad",
        "gather": "Gather GatherElements GatherND ScatterND ScatterElements",
        "unfold": "DepthToSpace SpaceToDepth Col2Im",
        "fill": "ConstantOfShape Range Constant",
    },
    "elementwise": {
        "add": "Add Sum",
        "sub": "Sub",
        "mul": "Mul QuickMul",
        "div": "Div Reciprocal",
        "power": "Pow Sqrt Exp Log",
        "neg": "Neg Abs Sign",
        "where": "Where",
        "compare": "Equal Less Greater LessOrEqual GreaterOrEqual And Or Not Mod",
        "clamp": "Min Max",
        "resample": "Resize Upsample GridSample",
    },
    "norm": {
        "layer_norm": "LayerNormalization SkipLayerNormalization SimplifiedLayerNormalization "
        "SkipSimplifiedLayerNormalization EmbedLayerNormalization RMSNormalization",
        "batch_norm": "BatchNormalization",
        "group_norm": "GroupNormalization GroupNorm InstanceNormalization SkipGroupNorm",
        "l2_norm": "LpNormalization ReduceL2",
    },
    "pool": {
        "average_pool": "AveragePool GlobalAveragePool QLinearAveragePool QLinearGlobalAveragePool",
        "max_pool": "MaxPool GlobalMaxPool",
        "mean": "ReduceMean ReduceSum ReduceMax ReduceMin",
    },
    "softmax": {"softmax": "Softmax LogSoftmax QLinearSoftmax"},
    "activation": {
        "gelu": "Gelu BiasGelu FastGelu QuickGelu Erf",
        "relu": "Relu Clip LeakyRelu ThresholdedRelu",
        "sigmoid": "Sigmoid QLinearSigmoid",
        "tanh": "Tanh",
        "silu": "Swish Mish",
        "hardswish": "HardSwish HardSigmoid",
        "elu": "Elu Softplus",
    },
}


def _by_name(table: Mapping[Kind, Mapping[str, str]]) -> Mapping[str, Operator]:
    return MappingProxyType(
        {
            word: Operator(name, kind)
            for kind, operators in table.items()
            for name, words in operators.items()
            for word in words.split()
        }
    )


ATEN: Mapping[str, Operator] = _by_name(_ATEN)
ONNX: Mapping[str, Operator] = _by_name(_ONNX)


def of_aten(name: str) -> Operator | None:
    """The operator that torch calls `name`, such as `aten::addmm`; `other` if it is not known.

    Returns:
        None for what an operator calls for its own ends, and for calls of the driver: their time
        is that of the operator around them.
    """
    space, _, word = name.rpartition("::")
    word = word.removesuffix("_")
    if not space or word in _INTERNAL.split():
        return None
    return ATEN.get(word, Operator(word, "other"))


def of_onnx(op_type: str) -> Operator:
    """The operator of a node of type `op_type` in an ONNX graph; `other` if it is not known."""
    return ONNX.get(op_type, Operator(op_type, "other"))


def is_memory_bound(kind: Kind, *, nonlinear: bool = False) -> bool:
    """Whether operators of `kind` are bound by memory; softmax and activations if `nonlinear`."""
    return kind in (WITH_NONLINEAR if nonlinear else MEMORY_BOUND)


def ordered(kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds in the order of `KINDS`, each once."""
    return [kind for kind in KINDS if kind in kinds]
