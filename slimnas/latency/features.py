"""What a component does on a device, in counts a device model can price.

Every count follows from shapes alone, so that an architecture needs no torch to be counted; the
same counts of foreign networks are traced by `tools/trace_features.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MB3D, MB4D, Conv3x3, ConvStem, LinearHead
from slimnas.arch.efficientformerv2 import V2FFN, V2Attention, V2AttentionDownsample, V2Head
from slimnas.arch.efficientvit import (
    BatchNormHead,
    EfficientViTBlock,
    EfficientViTStem,
    EfficientViTSubsample,
    padded_size,
    window_side,
)
from slimnas.arch.litv2 import ConvFFNBlock, ConvMerging, HiLoBlock
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.swin import PatchMerging, SwinBlock, SwinStem
from slimnas.arch.vit import TokenHead, TransformerBlock, ViTBlock, ViTStem
from slimnas.arch.walk import Component, walk

STREAMING_POSITIONS = 400
"""A dense layer with fewer output positions waits for its weights, one with more for its
multipliers. At 224 pixels maps have 49, 196, 784, ... positions, so any threshold between 196
and 784 says the same."""

LARGE_ATTENTION_QUERIES = 100
"""Attention over more queries than this pays for its score map. At 224 pixels stages have 49
and 196, so any threshold between them says the same."""


@dataclass(frozen=True)
class Features:
    """What a component or network does, for one image.

    Attributes:
        networks: 1 for a whole network, whose fixed cost it carries.
        streamed_weights: weights of dense layers that wait for them.
        dense_macs: multiply-adds of the other dense layers.
        traffic_elements: elements read and written by convolutions, linear layers, attention
            products, pooling and dynamic norms.
        dynamic_norms: layer and group normalisations and softmaxes; batch normalisation folds.
        large_attention_elements: score-map elements of attention over many queries.
        patch_embeddings: convolutions with kernel 7 and stride 4 or more.
        conv_macs: multiply-adds of ungrouped convolutions with kernels above 1x1.
        pointwise_macs: multiply-adds of 1x1 convolutions and linear layers.
        grouped_macs: multiply-adds of grouped convolutions, depthwise ones among them.
        attention_macs: multiply-adds of attention products.
        weights: weights of convolutions and linear layers.
        norm_elements: elements that `dynamic_norms` write.
        activation_elements: elements that GELU, SiLU, sigmoid and the like write; ReLU is free.
        reshaped_elements: elements put into another order: heads and windows apart and together
            again, rolls, concatenations. Turning a map into tokens is one view of the same.
        operators: convolutions, linear layers, attention products, pooling, dynamic norms.
    """

    networks: int = 0
    streamed_weights: int = 0
    dense_macs: int = 0
    traffic_elements: int = 0
    dynamic_norms: int = 0
    large_attention_elements: int = 0
    patch_embeddings: int = 0
    conv_macs: int = 0
    pointwise_macs: int = 0
    grouped_macs: int = 0
    attention_macs: int = 0
    weights: int = 0
    norm_elements: int = 0
    activation_elements: int = 0
    reshaped_elements: int = 0
    operators: int = 0

    def __add__(self, other: Features) -> Features:
        return Features(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[int, ...]:
        """The features in order."""
        return tuple(getattr(self, name) for name in FEATURE_NAMES)

    @property
    def macs(self) -> int:
        """All multiply-adds."""
        return self.conv_macs + self.pointwise_macs + self.grouped_macs + self.attention_macs


_Rule = Callable[[Any, FeatureShape, FeatureShape], Features]
"""(spec, shape it takes, shape it gives) -> features."""

FEATURE_NAMES = tuple(field.name for field in fields(Features))


def dense_layer(inputs: int, weights: int, outputs: int, positions: int, kernel: int) -> Features:
    """A convolution or linear layer without groups.

    Args:
        inputs: elements read.
        weights: its weights; each is used once per output position.
        outputs: elements written.
        positions: output pixels or tokens.
        kernel: side of its kernel; 1 for a linear layer.
    """
    macs, streams = weights * positions, positions < STREAMING_POSITIONS
    return Features(
        streamed_weights=weights if streams else 0,
        dense_macs=0 if streams else macs,
        traffic_elements=inputs + outputs,
        conv_macs=macs if kernel > 1 else 0,
        pointwise_macs=0 if kernel > 1 else macs,
        weights=weights,
        operators=1,
    )


def pooling(outputs: int) -> Features:
    """Pooling that writes `outputs` elements and reads about as many."""
    return Features(traffic_elements=2 * outputs, operators=1)


def dynamic_norm(elements: int) -> Features:
    """A layer or group normalisation over `elements`."""
    return Features(
        dynamic_norms=1, traffic_elements=2 * elements, norm_elements=elements, operators=1
    )


def attention_product(left: int, right: int, outputs: int, macs: int) -> Features:
    """A batched matrix product that reads `left` and `right` elements."""
    return Features(traffic_elements=left + right + outputs, attention_macs=macs, operators=1)


def softmax(elements: int, queries: int) -> Features:
    """Softmax over a score map of `elements`."""
    large = elements if queries > LARGE_ATTENTION_QUERIES else 0
    return dynamic_norm(elements) + Features(large_attention_elements=large)


def component_features(component: Component) -> Features:
    """Features of one component, or of one sub-layer as `price_parts` gives it.

    Raises:
        TypeError: a spec without a rule.
    """
    spec, shape = component.spec, component.input
    if isinstance(spec, ConvStem):
        return _conv_stem(spec, shape, component.output)
    if isinstance(spec, Conv3x3):
        return _conv3x3(shape, component.output)
    if isinstance(spec, MB4D):
        return pooling(shape.channels * shape.positions) + _ffn(
            shape, spec.hidden(shape.channels), normed=False
        )
    if isinstance(spec, MB3D):
        attention = _attention(shape, spec, windows=1, tokens=shape.positions)
        return attention + _ffn(shape, spec.hidden(shape.channels))
    if isinstance(spec, TransformerBlock):
        return _transformer(spec, shape)
    if isinstance(spec, (ViTStem, SwinStem)):
        return _patch_stem(spec, shape, component.output)
    if isinstance(spec, PatchMerging):
        return _patch_merging(component)
    for types, rule in _FAMILIES:
        if isinstance(spec, types):
            return rule(spec, shape, component.output)
    if isinstance(spec, LinearHead):
        norm = dynamic_norm(shape.channels * shape.positions)
        return norm + _linear(shape.channels, spec.classes, tokens=1)  # both heads fold into one
    if isinstance(spec, TokenHead):
        norm = dynamic_norm(shape.channels * shape.positions)
        head = _linear(shape.channels, spec.classes, tokens=1)
        return norm + head + (head if spec.distilled else Features())
    raise TypeError(f"{type(spec).__name__} has no device-model rule; add one here")


def network_features(architecture: Architecture) -> Features:
    """Features of a whole network."""
    total = Features(networks=1)
    for component in walk(architecture):
        total += component_features(component)
    return total


def _conv3x3(before: FeatureShape, after: FeatureShape) -> Features:
    return dense_layer(
        before.channels * before.positions,
        9 * before.channels * after.channels,
        after.channels * after.positions,
        after.positions,
        kernel=3,
    )


def _conv_stem(spec: ConvStem, image: FeatureShape, out: FeatureShape) -> Features:
    middle = image.halved(spec.width // 2)
    activated = middle.channels * middle.positions + out.channels * out.positions
    act = Features(activation_elements=activated if spec.act == "gelu" else 0)
    return _conv3x3(image, middle) + _conv3x3(middle, out) + act


def _linear(width_in: int, width_out: int, tokens: int) -> Features:
    return dense_layer(width_in * tokens, width_in * width_out, width_out * tokens, tokens, 1)


def _ffn(shape: FeatureShape, hidden: int, *, normed: bool = True) -> Features:
    """Two layers with GELU between; layer norm before them on tokens."""
    tokens = shape.positions
    layers = _linear(shape.channels, hidden, tokens) + _linear(hidden, shape.channels, tokens)
    norm = dynamic_norm(shape.channels * tokens) if normed else Features()
    return norm + layers + Features(activation_elements=hidden * tokens)


def _attention(
    shape: FeatureShape, spec: MB3D | TransformerBlock, *, windows: int, tokens: int
) -> Features:
    """Layer norm, qkv, scores, softmax, weighted values, projection.

    `tokens` are those of one window, the whole map for attention without windows.
    """
    keys, values = spec.heads * spec.qk_dim, spec.heads * spec.v_dim
    everything = windows * tokens
    scores = windows * spec.heads * tokens**2
    apart = Features(reshaped_elements=(2 * keys + values) * everything + values * everything)
    return (
        dynamic_norm(shape.channels * shape.positions)
        + _linear(shape.channels, 2 * keys + values, everything)
        + attention_product(
            keys * everything, keys * everything, scores, keys * everything * tokens
        )
        + softmax(scores, tokens)
        + attention_product(
            scores, values * everything, values * everything, values * everything * tokens
        )
        + _linear(values, shape.channels, everything)
        + apart
    )


def _transformer(spec: TransformerBlock, shape: FeatureShape) -> Features:
    total = Features()
    if spec.heads and isinstance(spec, SwinBlock):
        (high, wide), (rows, columns) = spec.windows(shape), spec.padded(shape)
        windows = rows * columns // (high * wide)
        total += _attention(shape, spec, windows=windows, tokens=high * wide)
        rolled = shape.channels * rows * columns if max(spec.shifts(shape)) else 0
        cut = shape.channels * rows * columns  # into windows, and back
        total += Features(reshaped_elements=2 * cut + 2 * rolled)
    elif spec.heads and isinstance(spec, ViTBlock):
        total += _attention(shape, spec, windows=1, tokens=shape.positions)
    elif spec.heads:
        raise TypeError(f"{type(spec).__name__} has no device-model rule; add one here")
    hidden = spec.hidden(shape.channels)
    return total + _ffn(shape, hidden) if hidden else total


def _patch_stem(spec: ViTStem | SwinStem, image: FeatureShape, out: FeatureShape) -> Features:
    patches, elements = out.height * out.width, out.channels * out.positions
    weights = image.channels * spec.patch**2 * out.channels
    pixels = image.channels * image.positions
    layer = dense_layer(pixels, weights, patches * out.channels, patches, kernel=spec.patch)
    layer += Features(patch_embeddings=int(spec.patch >= 7), reshaped_elements=elements)
    return layer + (dynamic_norm(elements) if isinstance(spec, SwinStem) else Features())


def _patch_merging(component: Component) -> Features:
    shape, out = component.input, component.output
    merged = 4 * shape.channels
    elements = merged * out.positions
    order = Features(reshaped_elements=elements)
    return order + dynamic_norm(elements) + _linear(merged, out.channels, out.positions)


def _depthwise(channels: int, before: int, after: int, kernel: int = 3) -> Features:
    """A depthwise convolution from `before` positions to `after`."""
    return Features(
        traffic_elements=channels * (before + after),
        grouped_macs=kernel**2 * channels * after,
        weights=kernel**2 * channels,
        operators=1,
    )


def _efficientvit(
    spec: EfficientViTStem | EfficientViTSubsample | EfficientViTBlock | BatchNormHead,
    shape: FeatureShape,
    out: FeatureShape,
) -> Features:
    if isinstance(spec, BatchNormHead):
        return _linear(shape.channels, spec.classes, tokens=1)  # the norm and both heads fold
    if isinstance(spec, EfficientViTBlock):
        ffn = _interaction_ffn(shape, spec.hidden(shape.channels))
        return sum((ffn for _ in range(2 * spec.ffns)), _group_attention(spec, shape))
    if isinstance(spec, EfficientViTSubsample):
        return _subsample(spec, shape, out)
    total = Features()
    for width in spec.widths:
        after = shape.halved(width)
        total += _conv3x3(shape, after)
        shape = after
    return total


def _interaction_ffn(shape: FeatureShape, hidden: int) -> Features:
    positions = shape.positions
    layers = _linear(shape.channels, hidden, positions) + _linear(hidden, shape.channels, positions)
    return _depthwise(shape.channels, positions, positions) + layers


def _group_attention(spec: EfficientViTBlock, shape: FeatureShape) -> Features:
    width, values = shape.channels, spec.values(shape.channels)
    side = window_side(spec.window, shape.height, shape.width)
    rows, columns = padded_size(side, shape.height, shape.width)
    tokens, inside = rows * columns, side**2
    keys, scores = spec.qk_dim * tokens, tokens * inside
    total = _linear(spec.heads * values, width, tokens)
    for kernel in spec.kernels_per_head:
        total += _linear(width // spec.heads, 2 * spec.qk_dim + values, tokens)
        total += _depthwise(spec.qk_dim, tokens, tokens, kernel)
        total += attention_product(keys, keys, scores, spec.qk_dim * scores)
        total += softmax(scores, inside)
        total += attention_product(scores, values * tokens, values * tokens, values * scores)
    cut = 2 * width * tokens if tokens > inside else 0  # into windows, and back
    return total + Features(reshaped_elements=cut)


def _subsample(spec: EfficientViTSubsample, shape: FeatureShape, out: FeatureShape) -> Features:
    inner, squeezed = spec.inner(shape.channels), spec.squeezed(shape.channels)
    mean = Features(traffic_elements=inner * out.positions, operators=1)
    scaled = Features(traffic_elements=2 * inner * out.positions, operators=1)
    return (
        _interaction_ffn(shape, spec.hidden_before(shape.channels))
        + _linear(shape.channels, inner, shape.positions)
        + _depthwise(inner, shape.positions, out.positions)
        + mean
        + _linear(inner, squeezed, 1)
        + _linear(squeezed, inner, 1)
        + scaled
        + _linear(inner, out.channels, out.positions)
        + _interaction_ffn(out, spec.hidden_after(out.channels))
    )


def _efficientformerv2(
    spec: V2FFN | V2Attention | V2AttentionDownsample | V2Head,
    shape: FeatureShape,
    out: FeatureShape,
) -> Features:
    if isinstance(spec, V2Head):
        return _linear(shape.channels, spec.classes, tokens=1)  # the norm and both heads fold
    if isinstance(spec, V2AttentionDownsample):
        return _v2_downsample(spec, shape, out)
    ffn = _v2_ffn(shape, spec.hidden(shape.channels))
    return _v2_attention(spec, shape) + ffn if isinstance(spec, V2Attention) else ffn


def _v2_ffn(shape: FeatureShape, hidden: int) -> Features:
    positions = shape.positions
    layers = _linear(shape.channels, hidden, positions) + _linear(hidden, shape.channels, positions)
    depthwise = _depthwise(hidden, positions, positions)
    return layers + depthwise + Features(activation_elements=2 * hidden * positions)


def _v2_attention(spec: V2Attention, shape: FeatureShape) -> Features:
    width, tokens = shape.channels, spec.grid(shape).positions
    keys, values, scores = spec.heads * spec.qk_dim, spec.heads * spec.v_dim, spec.heads * tokens**2
    talking = dense_layer(scores, spec.heads**2, scores, tokens**2, kernel=1)
    strided = spec.stride == 2
    return (
        (_depthwise(width, shape.positions, tokens) if strided else Features())
        + _linear(width, keys, tokens)
        + talking
        + _v2_products(spec, width, tokens, tokens)
        + talking
        + Features(activation_elements=values * shape.positions)
        + _linear(values, width, shape.positions)
    )


def _v2_downsample(spec: V2AttentionDownsample, shape: FeatureShape, out: FeatureShape) -> Features:
    before, tokens, queries = shape.channels, shape.positions, out.positions
    keys, values = spec.heads * spec.qk_dim, spec.heads * spec.v_dim
    return (
        _conv3x3(shape, out)
        + _depthwise(before, tokens, queries)
        + pooling(before * queries)
        + _linear(before, keys, queries)
        + _v2_products(spec, before, tokens, queries)
        + Features(activation_elements=values * queries)
        + _linear(values, out.channels, queries)
    )


def _v2_products(
    spec: V2Attention | V2AttentionDownsample, width: int, tokens: int, queries: int
) -> Features:
    """Keys, values with their local part, scores, softmax and weighted values."""
    keys, values = spec.heads * spec.qk_dim, spec.heads * spec.v_dim
    scores = spec.heads * queries * tokens
    return (
        _linear(width, keys, tokens)
        + _linear(width, values, tokens)
        + _depthwise(values, tokens, queries)
        + attention_product(keys * queries, keys * tokens, scores, keys * queries * tokens)
        + softmax(scores, queries)
        + attention_product(scores, values * tokens, values * queries, values * queries * tokens)
        + Features(reshaped_elements=keys * queries + (keys + values) * tokens)
    )


def _litv2(
    spec: ConvFFNBlock | HiLoBlock | ConvMerging, shape: FeatureShape, out: FeatureShape
) -> Features:
    if isinstance(spec, ConvMerging):
        return _conv_merging(spec, shape, out)
    if isinstance(spec, ConvFFNBlock):
        return _conv_ffn(shape, spec.hidden(shape.channels))
    ffn = _conv_ffn if spec.ffn == "conv" else _ffn
    return _hilo(spec, shape) + ffn(shape, spec.hidden(shape.channels))


def _conv_ffn(shape: FeatureShape, hidden: int) -> Features:
    """The FFN of LITv2: layer norm, and a depthwise convolution inside."""
    return _ffn(shape, hidden) + _depthwise(hidden, shape.positions, shape.positions)


def _hilo(spec: HiLoBlock, shape: FeatureShape) -> Features:
    """Layer norm, attention inside windows, attention to their averages, concatenation."""
    width, (rows, columns) = shape.channels, spec.padded(shape)
    tokens, inside = rows * columns, spec.window**2
    dim, averages = width // spec.heads, tokens // inside
    lo_heads, hi_heads = spec.lo_heads, spec.heads - spec.lo_heads
    lo, hi = lo_heads * dim, hi_heads * dim
    total = dynamic_norm(width * shape.positions)
    if hi:
        total += _linear(width, 3 * hi, tokens) + _linear(hi, hi, tokens)
        total += _products(hi_heads, dim, tokens, keys=inside, blocks=averages)
        total += Features(reshaped_elements=8 * hi * tokens)  # windows and heads apart, and back
    if lo:
        total += _linear(width, lo, tokens) + _linear(width, 2 * lo, averages)
        total += _products(lo_heads, dim, tokens, keys=averages) + _linear(lo, lo, tokens)
        total += Features(reshaped_elements=2 * lo * (tokens + averages))
        total += pooling(width * averages) if spec.window > 1 else Features()
    return total + Features(reshaped_elements=width * tokens if hi and lo else 0)


def _products(heads: int, dim: int, queries: int, *, keys: int, blocks: int = 1) -> Features:
    """Scores, softmax and weighted values; in each of `blocks` the queries see its own keys."""
    scores, mixed, seen = heads * queries * keys, heads * dim * queries, heads * dim * keys * blocks
    return (
        attention_product(mixed, seen, scores, dim * scores)
        + softmax(scores, queries // blocks)
        + attention_product(scores, seen, mixed, dim * scores)
    )


def _conv_merging(spec: ConvMerging, shape: FeatureShape, out: FeatureShape) -> Features:
    seen, made = shape.channels * shape.positions, out.channels * out.positions
    layer = dense_layer(seen, 4 * shape.channels * out.channels, made, out.positions, kernel=2)
    layer += Features(activation_elements=made)
    if not spec.deformable:
        return layer
    offsets, sampled = 8, pooling(4 * shape.channels * out.positions)
    moving = dense_layer(
        seen, 4 * shape.channels * offsets, offsets * out.positions, out.positions, kernel=2
    )
    return layer + moving + sampled


_FAMILIES: tuple[tuple[tuple[type[Spec], ...], _Rule], ...] = (
    (
        (EfficientViTStem, EfficientViTSubsample, EfficientViTBlock, BatchNormHead),
        _efficientvit,
    ),
    ((V2FFN, V2Attention, V2AttentionDownsample, V2Head), _efficientformerv2),
    ((ConvFFNBlock, HiLoBlock, ConvMerging), _litv2),
)
"""Specs of a family -> its rule."""
