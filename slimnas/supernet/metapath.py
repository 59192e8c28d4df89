"""A MetaPath, one slot with all its choices, and a stage of them.

EfficientFormer (NeurIPS 2022), section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimnas.arch.shapes import FeatureShape
from slimnas.arch.templates import IDENTITY
from slimnas.nn.layout import Layout, as_layout, run_module
from slimnas.supernet.gumbel import Route, mix, straight_through


class MetaPath(nn.Module):
    """One slot: its candidate blocks side by side, and one architecture parameter each.

    Args:
        blocks: the candidates but identity, by name.
        choices: every candidate's name, identity included, in the order of `alpha`.
        shape: shape of the map that goes in and comes out.
    """

    blocks: nn.ModuleDict
    alpha: nn.Parameter

    def __init__(
        self, blocks: dict[str, nn.Module], choices: Sequence[str], shape: FeatureShape
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        self.choices = tuple(choices)
        self.shape = shape
        self.alpha = nn.Parameter(torch.zeros(len(self.choices)))

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """Run the routed choice, or the mixture of all, on a map or tokens of `shape`."""
        if route.index is None:
            assert route.weights is not None
            outputs = [
                as_layout(self._run(choice, x), "map", self.shape) for choice in self.choices
            ]
            return mix(outputs, route.weights)
        choice = self.choices[route.index]
        out = self._run(choice, x)
        if route.weights is None or (route.of_change and choice == IDENTITY):
            return out
        weight = route.weights[route.index]
        if not route.of_change:
            return straight_through(out, weight)
        return straight_through(out, weight, as_layout(x, _layout(out), self.shape))

    def _run(self, choice: str, x: Tensor) -> Tensor:
        return x if choice == IDENTITY else run_module(self.blocks[choice], x, self.shape)


def _layout(x: Tensor) -> Layout:
    return "map" if x.dim() == 4 else "tokens"


class SuperStage(nn.Module):
    """An optional downsampling layer and the stage's MetaPaths, at full width."""

    downsample: nn.Module | None
    slots: nn.ModuleList

    def __init__(
        self, downsample: nn.Module | None, slots: Sequence[MetaPath], shape_in: FeatureShape
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.slots = nn.ModuleList(slots)
        self.shape_in = shape_in
