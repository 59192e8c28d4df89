"""Parameters, MACs and activation bytes of an architecture, by closed form and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add

from slimnas.arch.architecture import Architecture
from slimnas.arch.shapes import NO_COST, Cost
from slimnas.arch.walk import Component, component_cost, walk


@dataclass(frozen=True)
class CostReport:
    """Cost of an architecture for one image.

    Attributes:
        components: every component with its cost, in execution order.
        total: their sum.
    """

    components: tuple[tuple[Component, Cost], ...]
    total: Cost

    @property
    def params(self) -> int:
        """Trainable parameters of the whole network."""
        return self.total.params

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.total.macs

    @property
    def activation_bytes(self) -> int:
        """fp32 bytes that convolutions, linear layers and attention products write."""
        return self.total.activation_bytes


def cost(architecture: Architecture) -> CostReport:
    """Count `architecture` by the closed forms of its components."""
    rows = tuple((component, component_cost(component)) for component in walk(architecture))
    return CostReport(rows, reduce(add, (part for _, part in rows), NO_COST))
