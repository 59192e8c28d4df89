"""Models of devices: a component's latency from what it computes and moves.

For devices that cannot be timed from here, the price of a component is a non-negative
combination of its features. Two models choose among them:

- `accelerator`, for a neural accelerator: the roofline. A dense layer with few output positions
  waits for its weights (each is read once and used once per position), one with many waits for
  its multipliers, and every layer moves its activations.
- `processor`, for CPU cores: each kind of multiply-add has a rate of its own, and elements cost
  by what is done to them.

Both have a fixed cost per network, per operator and per reordered element. The coefficients are
fitted to whole-network latencies by `slimnas.latency.fit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from slimnas.arch.efficientformer import MB3D, MB4D, Conv3x3, ConvStem, LinearHead
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import Component
from slimnas.latency.features import Features

PER_MILLION, PER_BILLION = 1e6, 1e9


@dataclass(frozen=True)
class Term:
    """One term of a device model.

    Attributes:
        feature: what is counted.
        coefficient: the name of its price.
        scale: counts behind one unit of that price.
    """

    feature: str
    coefficient: str
    scale: float


_OVERHEAD = Term("networks", "overhead_ms", 1.0)
_OPERATORS = Term("operators", "ms_per_operator", 1.0)
_TRAFFIC = Term("traffic_elements", "ms_per_million_traffic_elements", PER_MILLION)
_RESHAPED = Term("reshaped_elements", "ms_per_million_reshaped_elements", PER_MILLION)

MODELS: Mapping[str, tuple[Term, ...]] = {
    "accelerator": (
        _OVERHEAD,
        Term("streamed_weights", "ms_per_million_streamed_weights", PER_MILLION),
        Term("dense_macs", "ms_per_billion_dense_macs", PER_BILLION),
        _TRAFFIC,
        Term("dynamic_norms", "ms_per_dynamic_norm", 1.0),
        Term("large_attention_elements", "ms_per_million_large_attention_elements", PER_MILLION),
        Term("patch_embeddings", "ms_per_patch_embedding", 1.0),
        _RESHAPED,
        _OPERATORS,
    ),
    "processor": (
        _OVERHEAD,
        Term("conv_macs", "ms_per_billion_conv_macs", PER_BILLION),
        Term("pointwise_macs", "ms_per_billion_pointwise_macs", PER_BILLION),
        Term("grouped_macs", "ms_per_billion_grouped_macs", PER_BILLION),
        Term("attention_macs", "ms_per_billion_attention_macs", PER_BILLION),
        Term("weights", "ms_per_million_weights", PER_MILLION),
        _TRAFFIC,
        Term("norm_elements", "ms_per_million_norm_elements", PER_MILLION),
        Term("activation_elements", "ms_per_million_activation_elements", PER_MILLION),
        _RESHAPED,
        _OPERATORS,
    ),
}
"""The terms of each model, in the order of its coefficients."""


def term_counts(features: Features, terms: Iterable[Term]) -> list[float]:
    """The features that `terms` price, in units of their prices."""
    return [getattr(features, term.feature) / term.scale for term in terms]


def predict_ms(features: Features, coefficients: Iterable[float], terms: tuple[Term, ...]) -> float:
    """Latency of `features` by `coefficients`, in the order of `terms`."""
    counts = term_counts(features, terms)
    return sum(count * price for count, price in zip(counts, coefficients, strict=True))


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
