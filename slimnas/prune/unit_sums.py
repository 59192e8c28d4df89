"""Sums over the weights a unit removes, for criteria that look at weights one by one.

A unit's weights are all that go with it, on every side and biases too, as `slimnas.nn.units`
declares; a head's are those of its dimensions and its attention biases. A value dimension's own
bias does not count: it stays, folded into the projection's bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimnas.arch.walk import Component, walk
from slimnas.nn.build import Network
from slimnas.nn.units import ATTENTION, attention_of, unit_axes, unit_positions
from slimnas.prune.scores import EMBEDDING, blocks_of
from slimnas.prune.vector import UnitVector
from slimnas.prune.widths import embedding_groups, stream_stage


@dataclass(frozen=True)
class _Axis:
    """Which unit each position of an axis of a tensor belongs to.

    Attributes:
        axis: number of the axis.
        positions: those that belong to a unit.
        units: entry of the vector, for each of them.
    """

    axis: int
    positions: Tensor
    units: Tensor


class UnitSums:
    """Sums a value per weight over the weights of each unit.

    Args:
        network: any network of slimnas.
        units: its units.
    """

    def __init__(self, network: Network, units: UnitVector) -> None:
        self.units = units
        self.architecture = network.architecture
        self.names = [name for name, _ in network.named_parameters()]
        self._axes: dict[str, list[_Axis]] = {}
        self._layers: dict[str, list[int]] = {}
        known = set(self.names)
        for component in walk(self.architecture):
            for name, axes in unit_axes(component).items():
                full = f"{component.name}.{name}"
                if full in known:
                    found = [
                        self._axis(component, name, number, role)
                        for number, role in enumerate(axes)
                        if role is not None
                    ]
                    self._axes[full] = [axis for axis in found if len(axis.positions)]
        for block in blocks_of(self.architecture):
            for kind, prefixes in _layer_prefixes(block):
                entry = units.where(block.name, kind).start
                for name in self.names:
                    if name.startswith(tuple(f"{block.name}.{prefix}" for prefix in prefixes)):
                        self._layers.setdefault(name, []).append(entry)

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum `values`, one tensor per parameter and shaped like it, to (U,) float64 on the CPU."""
        out = torch.zeros(self.units.size, dtype=torch.float64)
        for name, value in values.items():
            if value.device.type == "mps":  # it has no float64
                value = value.cpu()
            for axis in self._axes.get(name, []):
                others = [number for number in range(value.dim()) if number != axis.axis]
                sums = value.sum(others, dtype=torch.float64) if others else value.double()
                out.index_add_(0, axis.units, sums.cpu()[axis.positions])
            for entry in self._layers.get(name, []):
                out[entry] += value.sum(dtype=torch.float64).cpu()
        self._finish(out)
        return out

    def _finish(self, out: Tensor) -> None:
        """Heads own their dimensions; stages of one residual stream share its channels."""
        for block in blocks_of(self.architecture):
            attention = attention_of(block.spec)
            if attention is not None:
                for kind in ("qk", "v"):
                    dims = out[self.units.where(block.name, kind)]
                    head = self.units.where(block.name, "head")
                    out[head] += dims.reshape(attention.heads, -1).sum(dim=1)
        for stage, first in enumerate(embedding_groups(self.architecture)):
            if stage != first:
                here, there = (self.units.where(EMBEDDING, str(s)) for s in (stage, first))
                out[here] = out[there]

    def _axis(self, component: Component, name: str, number: int, role: str) -> _Axis:
        positions: list[np.ndarray] = []
        units: list[np.ndarray] = []
        for family, places in unit_positions(component, role).items():
            if family == "v" and name.endswith("qkv.bias"):
                continue
            owner, kind = component.name, str(family)
            if family in ("in", "out"):
                stage = stream_stage(self.architecture, component, family)
                if stage is None:
                    continue
                owner, kind = EMBEDDING, str(stage)
            entries = self.units.where(owner, kind)
            numbers = np.arange(entries.start, entries.stop).reshape(*places.shape[:-1], 1)
            positions.append(places.reshape(-1))
            units.append(np.broadcast_to(numbers, places.shape).reshape(-1))
        empty = [np.zeros(0, dtype=np.int64)]
        return _Axis(
            number,
            torch.from_numpy(np.concatenate(positions or empty)),
            torch.from_numpy(np.concatenate(units or empty)),
        )


def _layer_prefixes(block: Component) -> Iterator[tuple[str, tuple[str, ...]]]:
    """How the names of the parameters of a block's sub-layers begin."""
    if attention_of(block.spec) is not None:
        yield "attention_layer", ("norm1.", "ls1.", f"{ATTENTION[type(block.spec)]}.")
    yield "ffn_layer", ("norm2.", "ls2.", "mlp.")
