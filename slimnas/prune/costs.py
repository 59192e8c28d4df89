"""What pruning is paid in: MACs, parameters, milliseconds by a table, or units; and budgets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from slimnas.arch.architecture import AnyBlock, Architecture
from slimnas.arch.cost import cost
from slimnas.arch.efficientformer import MB4D
from slimnas.arch.walk import Component, component_cost, walk
from slimnas.errors import PruneError, suggest
from slimnas.latency.estimate import component_latency_ms, latency_ms
from slimnas.latency.table import LatencyTable
from slimnas.latency.target import parse_latency_ms
from slimnas.prune.widths import attention_dims

CostKind = Literal["macs", "params", "latency_ms", "units"]
KINDS: tuple[CostKind, ...] = get_args(CostKind)
WIDTHS = ("heads", "qk_dim", "v_dim", "ffn_dim")
"""What the widths of a block are called in its description."""

_AMOUNT = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([kKMG%]?)\s*$")
_FACTORS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class BlockWidths:
    """Widths of one block; zeros where it has no attention or no FFN."""

    heads: int
    qk: int
    v: int
    ffn: int

    @classmethod
    def of(cls, block: AnyBlock, width: int) -> BlockWidths:
        """The widths of a block of a stage of `width` channels."""
        return cls(*attention_dims(block), block.hidden(width))

    @property
    def attention(self) -> BlockWidths:
        """These without the FFN."""
        return replace(self, ffn=0)

    @property
    def feed_forward(self) -> BlockWidths:
        """These without attention."""
        return BlockWidths(0, 0, 0, self.ffn)

    def to_dict(self) -> dict[str, int]:
        """Plain data, by the names of a block's fields."""
        return dict(zip(WIDTHS, (self.heads, self.qk, self.v, self.ffn), strict=True))

    @property
    def units(self) -> int:
        """QK dims, V dims and hidden units."""
        return self.heads * (self.qk + self.v) + self.ffn


class CostModel:
    """Cost of a network of one kind, block by block; every answer is computed once.

    Args:
        kind: macs, params, latency_ms or units (QK dims, V dims and hidden units).
        table: prices, for latency_ms.

    Raises:
        PruneError: latency without a table.
    """

    def __init__(self, kind: CostKind, table: LatencyTable | None = None) -> None:
        if kind == "latency_ms" and table is None:
            raise PruneError("a latency budget needs a latency table; give a device")
        self.kind, self.table = kind, table
        self._known: dict[tuple[str, int, BlockWidths], float] = {}

    def block(self, component: Component, widths: BlockWidths, channels: int) -> float:
        """Cost of a block with other widths, in a residual stream of `channels`.

        Raises:
            MissingLatencyError: the table has no price for it.
        """
        key = (component.name, channels, widths)
        if key not in self._known:
            self._known[key] = self._block(component, widths, channels)
        return self._known[key]

    def _block(self, component: Component, widths: BlockWidths, channels: int) -> float:
        if self.kind == "units":
            return widths.units
        if not (widths.heads or widths.ffn):
            return 0.0
        fields: dict[str, int] = {"ffn_dim": widths.ffn}
        if not isinstance(component.spec, MB4D):
            fields |= {"heads": widths.heads, "qk_dim": widths.qk, "v_dim": widths.v}
        # Not validated: thousands of widths, all of them below a legal block's.
        changed = replace(
            component,
            spec=component.spec.model_copy(update=fields),
            input=component.input.with_channels(channels),
            output=component.output.with_channels(channels),
        )
        return self.component(changed)

    def component(self, component: Component) -> float:
        """Cost of any component as it is; none in units.

        Raises:
            MissingLatencyError: the table has no price for it.
        """
        if self.kind == "latency_ms":
            return component_latency_ms(component, cast("LatencyTable", self.table))
        counted = component_cost(component)
        return counted.macs if self.kind == "macs" else counted.params

    def total(self, architecture: Architecture) -> float:
        """Cost of a whole network.

        Raises:
            MissingLatencyError: the table has no price for a component.
        """
        if self.kind == "units":
            return sum(BlockWidths.of(*pair).units for pair in _blocks(architecture))
        if self.kind == "latency_ms":
            return latency_ms(architecture, cast("LatencyTable", self.table))
        counted = cost(architecture)
        return counted.macs if self.kind == "macs" else counted.params


@dataclass(frozen=True)
class Budget:
    """The most a pruned network may cost.

    Attributes:
        kind: what it counts.
        limit: macs, params, milliseconds or units, absolute.
    """

    kind: CostKind
    limit: float

    def __post_init__(self) -> None:
        """Refuse what is no budget.

        Raises:
            PruneError: an unknown kind, or a limit that is not above zero.
        """
        if self.kind not in KINDS:
            raise PruneError(
                f"budget: must be one of {', '.join(KINDS)}, got {self.kind!r}"
                f"{suggest(self.kind, KINDS)}"
            )
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise PruneError(f"budget: {self.kind} must be above 0, got {self.limit!r}")

    def __str__(self) -> str:
        return amount_text(self.kind, self.limit)


def parse_budget(
    kind: CostKind, text: str, architecture: Architecture, table: LatencyTable | None = None
) -> Budget:
    """Read a budget as users write it: `0.9G`, `900M`, `75%`, for latency `6ms` or `80%`.

    Args:
        kind: what it counts.
        text: an amount, or a share of what `architecture` costs.
        architecture: the unpruned network.
        table: prices, for latency.

    Raises:
        PruneError: not an amount, or not above zero.
        SpecError: a latency without a unit.
    """
    match = _AMOUNT.match(text)
    if match is not None and match[2] == "%":
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise PruneError(f"budget: a share of {kind} must lie above 0 and up to 100 %: {text}")
        return Budget(kind, share * CostModel(kind, table).total(architecture))
    if kind == "latency_ms":
        return Budget(kind, parse_latency_ms(text))
    if match is None:
        raise PruneError(
            f"budget: {kind} must be a number, with k, M or G if wanted, or a share such as 75%, "
            f"got {text!r}"
        )
    return Budget(kind, float(match[1]) * _FACTORS[match[2]])


def amount_text(kind: CostKind, value: float) -> str:
    """An amount with its unit, for people: `0.9 GMACs`, `4.12 M params`, `6 ms`."""
    if kind == "macs":
        scale, unit = (1e9, "GMACs") if value >= 1e8 else (1e6, "MMACs")
        return f"{value / scale:.4g} {unit}"
    if kind == "params":
        return f"{value / 1e6:.4g} M params"
    return f"{value:.4g} ms" if kind == "latency_ms" else f"{value:.0f} units"


def _blocks(architecture: Architecture) -> Iterator[tuple[AnyBlock, int]]:
    for stage in architecture.stages:
        yield from ((block, stage.width) for block in stage.blocks)


def components_outside_blocks(architecture: Architecture) -> list[Component]:
    """Stem, downsamples and head."""
    return [part for part in walk(architecture) if part.kind != "block"]
