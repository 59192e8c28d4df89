"""A model of a neural accelerator: a component's latency from what it computes and moves.

For devices that cannot be timed from here, the price of a component is a non-negative
combination of the features below. They follow from one picture, the roofline: a dense layer
with few output positions waits for its weights (each is read once and used once per position),
one with many waits for its multipliers, and every layer moves its activations. The coefficients
are fitted to published whole-network latencies by `slimnas.latency.fit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import MB3D, MB4D, Conv3x3, ConvStem, LinearHead
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import Component, walk

STREAMING_POSITIONS = 400
"""A dense layer with fewer output positions waits for its weights, one with more for its
multipliers. At 224 pixels maps have 49, 196, 784, ... positions, so any threshold between 196
and 784 says the same."""

LARGE_ATTENTION_QUERIES = 100
"""Attention over more queries than this pays for its score map. At 224 pixels stages have 49
and 196, so any threshold between them says the same."""

SCALES = (1.0, 1e6, 1e9, 1e6, 1.0, 1e6, 1.0)
"""Counts behind one unit of each coefficient: per network, per million weights, per billion
MACs, per million elements, per operator, per million elements, per operator."""


@dataclass(frozen=True)
class Features:
    """What a component or network does, for one image.

    Attributes:
        networks: 1 for a whole network, whose fixed cost it carries.
        streamed_weights: weights of dense layers that wait for them.
        dense_macs: multiply-adds of the other dense layers.
        traffic_elements: elements read and written by convolutions, linear layers, attention
            products and pooling.
        dynamic_norms: layer and group normalisations and softmaxes; batch normalisation folds.
        large_attention_elements: score-map elements of attention over many queries.
        patch_embeddings: convolutions with kernel 7 and stride 4 or more.
    """

    networks: int = 0
    streamed_weights: int = 0
    dense_macs: int = 0
    traffic_elements: int = 0
    dynamic_norms: int = 0
    large_attention_elements: int = 0
    patch_embeddings: int = 0

    def __add__(self, other: Features) -> Features:
        return Features(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[int, ...]:
        """The features in order."""
        return tuple(getattr(self, name) for name in FEATURE_NAMES)


FEATURE_NAMES = tuple(field.name for field in fields(Features))
COEFFICIENT_NAMES = (
    "overhead_ms",
    "ms_per_million_streamed_weights",
    "ms_per_billion_dense_macs",
    "ms_per_million_traffic_elements",
    "ms_per_dynamic_norm",
    "ms_per_million_large_attention_elements",
    "ms_per_patch_embedding",
)


def predict_ms(features: Features, coefficients: Iterable[float]) -> float:
    """Latency of `features` by `coefficients`, in the order of `COEFFICIENT_NAMES`."""
    terms = zip(features.counts, SCALES, coefficients, strict=True)
    return sum(count / scale * coefficient for count, scale, coefficient in terms)


def dense_layer(inputs: int, weights: int, outputs: int, positions: int) -> Features:
    """A convolution or linear layer without groups.

    Args:
        inputs: elements read.
        weights: its weights; each is used once per output position.
        outputs: elements written.
        positions: output pixels or tokens.
    """
    traffic = inputs + outputs
    if positions < STREAMING_POSITIONS:
        return Features(streamed_weights=weights, traffic_elements=traffic)
    return Features(dense_macs=weights * positions, traffic_elements=traffic)


def component_features(component: Component) -> Features:
    """Features of one component.

    Raises:
        TypeError: a spec without a rule.
    """
    spec, shape = component.spec, component.input
    if isinstance(spec, ConvStem):
        middle = shape.halved(spec.width // 2)
        return _conv3x3(shape, middle) + _conv3x3(middle, component.output)
    if isinstance(spec, Conv3x3):
        return _conv3x3(shape, component.output)
    if isinstance(spec, MB4D):
        pool = Features(traffic_elements=2 * shape.channels * shape.positions)
        return pool + _ffn(shape, spec.hidden(shape.channels))
    if isinstance(spec, MB3D):
        return _attention(shape, spec) + _ffn(shape, spec.hidden(shape.channels))
    if isinstance(spec, LinearHead):
        norm = Features(dynamic_norms=1)
        return norm + _linear(shape.channels, spec.classes, tokens=1)  # both heads fold into one
    raise TypeError(f"{type(spec).__name__} has no device-model rule; add one here")


def network_features(architecture: Architecture) -> Features:
    """Features of a whole network."""
    total = Features(networks=1)
    for component in walk(architecture):
        total += component_features(component)
    return total


def envelope() -> Iterator[Component]:
    """Yield every component an estimated table prices, smallest widths first.

    EfficientFormer's components at 224 pixels, in steps of 16 up to the widths of its L7, with
    attention in stages 3 and 4: what the shipped search spaces draw from.
    """
    image = FeatureShape(3, 224, 224)
    maps = (56, 28, 14, 7)
    widths = [tuple(range(16, top + 1, 16)) for top in (96, 192, 384, 768)]
    for act in ("gelu", "relu"):
        for width in widths[0]:
            stem = ConvStem.model_validate({"width": width, "act": act})
            yield Component("stem", "stem", 0, stem, image, FeatureShape(width, 56, 56))
    for i, side in enumerate(maps):
        for width_in in widths[i - 1] if i else ():
            before = FeatureShape(width_in, maps[i - 1], maps[i - 1])
            for width in widths[i]:
                after, name = FeatureShape(width, side, side), f"stages.{i}.downsample"
                yield Component(name, "downsample", i, Conv3x3(), before, after)
        for block in (MB4D(), MB3D()) if i > 1 else (MB4D(),):
            for width in widths[i]:
                at = FeatureShape(width, side, side)
                yield Component(f"stages.{i}.blocks", "block", i, block, at, at)
    for classes in (2, 10, 100, 1000, 21841):
        logits = FeatureShape(classes, 1, 1)
        for width in widths[-1]:
            last = FeatureShape(width, maps[-1], maps[-1])
            yield Component("head", "head", 3, LinearHead(classes=classes), last, logits)


def _conv3x3(before: FeatureShape, after: FeatureShape) -> Features:
    return dense_layer(
        before.channels * before.positions,
        9 * before.channels * after.channels,
        after.channels * after.positions,
        after.positions,
    )


def _linear(width_in: int, width_out: int, tokens: int) -> Features:
    return dense_layer(width_in * tokens, width_in * width_out, width_out * tokens, tokens)


def _ffn(shape: FeatureShape, hidden: int) -> Features:
    first = _linear(shape.channels, hidden, shape.positions)
    return first + _linear(hidden, shape.channels, shape.positions)


def _attention(shape: FeatureShape, spec: MB3D) -> Features:
    """Two layer norms (the FFN's too), qkv, scores, softmax, weighted values, projection."""
    tokens, keys, values = shape.positions, spec.heads * spec.qk_dim, spec.heads * spec.v_dim
    scores = spec.heads * tokens**2
    products = (2 * keys * tokens + scores) + (scores + 2 * values * tokens)
    large = scores if tokens > LARGE_ATTENTION_QUERIES else 0
    mixing = Features(traffic_elements=products, dynamic_norms=3, large_attention_elements=large)
    qkv = _linear(shape.channels, 2 * keys + values, tokens)
    return mixing + qkv + _linear(values, shape.channels, tokens)
