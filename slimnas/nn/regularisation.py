"""What a training recipe sets in a network before it begins: drop path and layer scale."""

from __future__ import annotations

import torch
from torch import nn

from slimnas.errors import SpecError
from slimnas.nn.build import Backbone, Stage
from slimnas.nn.layers import LayerScale, ResidualBlock


def set_drop_path(network: Backbone, rate: float) -> tuple[float, ...]:
    """Let the i-th of n blocks drop its branches with probability rate * i / (n - 1), in training.

    The linear rule of Huang et al. (ECCV 2016) over the blocks of all stages, as the papers of
    these families take it; a lone block drops nothing. Weights and evaluation stay as they are.

    Returns:
        The rate of each block, in order.

    Raises:
        SpecError: `rate` does not lie in 0..1, below 1.
    """
    if not 0.0 <= rate < 1.0:
        raise SpecError(f"drop path must be a share of images, from 0 and below 1, got {rate:g}")
    blocks = [
        block for stage in network.stages if isinstance(stage, Stage) for block in stage.blocks
    ]
    rates = tuple(rate * i / max(1, len(blocks) - 1) for i in range(len(blocks)))
    for block, own in zip(blocks, rates, strict=True):
        for part in block.modules():
            if isinstance(part, ResidualBlock):
                part.drop_path = own
    return rates


@torch.no_grad()
def set_layer_scale(network: nn.Module, value: float) -> None:
    """Start every layer scale, and every BatchNorm whose factors are all 0, at `value`.

    For a network with fresh weights: both silence residual branches at first, and the shorter a
    training, the longer that lasts.
    """
    for part in network.modules():
        if isinstance(part, LayerScale):
            part.gamma.fill_(value)
        elif isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) and not part.weight.any():
            part.weight.fill_(value)
