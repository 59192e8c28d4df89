"""The two values every component works with: a feature map's shape and a cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

BYTES_PER_ELEMENT = 4
"""Activations are counted as fp32."""


@dataclass(frozen=True)
class FeatureShape:
    """Shape of one image's feature map: (channels, height, width).

    `extra_tokens` stand before the map's own tokens: class and distillation token of a ViT.
    """

    channels: int
    height: int
    width: int
    extra_tokens: int = 0

    @property
    def positions(self) -> int:
        """Number of pixels and extra tokens, which is what an attention block sees."""
        return self.height * self.width + self.extra_tokens

    def halved(self, channels: int) -> FeatureShape:
        """Shape after a 3x3, stride-2, padding-1 convolution to `channels` channels."""
        return FeatureShape(channels, -(-self.height // 2), -(-self.width // 2))

    def with_channels(self, channels: int) -> FeatureShape:
        """The same map with another number of channels."""
        return replace(self, channels=channels)


@dataclass(frozen=True)
class Cost:
    """What one image costs in one component.

    Attributes:
        params: trainable parameters.
        macs: multiply-adds of convolutions, linear layers and attention products
            (1 MAC = one multiply-add).
        activation_bytes: fp32 bytes of the outputs of those same operators
            (the activation count of Designing Network Design Spaces, times four).
    """

    params: int
    macs: int
    activation_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.activation_bytes + other.activation_bytes,
        )


NO_COST = Cost(0, 0, 0)


def operator_cost(params: int, macs: int, output_elements: int) -> Cost:
    """Cost from its parts, the activations given in elements."""
    return Cost(params, macs, BYTES_PER_ELEMENT * output_elements)
