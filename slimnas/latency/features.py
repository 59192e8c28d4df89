"""What a component does on a device, in counts a device model can price.

Every count follows from shapes alone, so that an architecture needs no torch to be counted; the
same counts of foreign networks are traced by `tools/trace_features.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import MB3D, MB4D, Conv3x3, ConvStem, LinearHead
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
