"""The single cuts that a state allows, and what states cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from slimnas.arch.walk import Component
from slimnas.prune.costs import BlockWidths, CostModel, components_outside_blocks
from slimnas.prune.levels import Levels, State

UnitKind = Literal["qk", "v", "ffn", "head", "embedding", "layer"]

LOOK_AHEAD = (1, 2, 4, 8, 16, 32)
"""Multiples of a single cut that are weighed where a table's price is flat or uneven."""


@dataclass(frozen=True)
class Steps:
    """What may be cut, from which states, at which cost.

    Attributes:
        levels: the units in their order.
        model: what is paid in.
        units: kinds that may go.
        round_to: widths that are cut end at multiples of this.
    """

    levels: Levels
    model: CostModel
    units: frozenset[UnitKind]
    round_to: int

    def cost(self, state: State) -> float:
        """Cost of the whole network in this state."""
        total = sum(self.block_cost(name, state) for name in state.blocks)
        if self.model.kind == "units":
            return total
        if state.channels == self.levels.architecture.widths:
            return total + self._outside()
        return total + self._outside_at(state.channels)

    def block_cost(self, name: str, state: State) -> float:
        """Cost of one block."""
        return self.widths_cost(name, state.blocks[name], state)

    def widths_cost(self, name: str, widths: BlockWidths, state: State) -> float:
        """Cost of a block at other widths than the state's."""
        component = self.levels.blocks[name].component
        return self.model.block(component, widths, state.channels[component.stage])

    def attention_cuts(self, name: str, widths: BlockWidths) -> Iterator[BlockWidths]:
        """Smaller attention: fewer QK dims, V dims or heads, or none at all."""
        if not widths.heads:
            return
        for kind in ("qk", "v"):
            if kind in self.units:
                for smaller in self._narrower(getattr(widths, kind)):
                    yield replace(widths, **{kind: smaller})
        if "head" in self.units and widths.heads > 1:
            yield replace(widths, heads=widths.heads - 1)
        if "layer" in self.units and self.levels.blocks[name].removable:
            yield replace(widths, heads=0, qk=0, v=0)

    def ffn_cuts(self, name: str, widths: BlockWidths) -> Iterator[BlockWidths]:
        """Smaller FFN: fewer hidden units, or none at all."""
        if not widths.ffn:
            return
        if "ffn" in self.units:
            for smaller in self._narrower(widths.ffn):
                yield replace(widths, ffn=smaller)
        if "layer" in self.units and self.levels.blocks[name].removable:
            yield replace(widths, ffn=0)

    def stream_cuts(self, state: State) -> Iterator[State]:
        """Fewer channels of one residual stream."""
        if "embedding" not in self.units:
            return
        for stage, stream in self.levels.streams.items():
            for smaller in self._narrower(state.channels[stage], stream.step)[:1]:
                yield self._with_channels(state, stage, smaller)

    def keeps_stage(self, name: str, widths: BlockWidths, state: State) -> bool:
        """Whether the block's stage still has a block once this one has `widths`."""
        if widths.heads or widths.ffn:
            return True
        stage = self.levels.blocks[name].component.stage
        return any(
            (state.blocks[other].heads or state.blocks[other].ffn)
            and levels.component.stage == stage
            and other != name
            for other, levels in self.levels.blocks.items()
        )

    def smallest(self) -> State:
        """The state with everything cut that may go."""
        state = self.levels.start
        for stage, stream in self.levels.streams.items():
            if "embedding" in self.units:
                state = self._with_channels(state, stage, self._least(stream.step))
        cheapest = sorted(
            self.levels.blocks,
            key=lambda name: -self.widths_cost(name, self._narrowest(name), state),
        )
        for name in cheapest:
            gone = BlockWidths(0, 0, 0, 0)
            levels, widths = self.levels.blocks[name], self._narrowest(name)
            if "layer" in self.units and levels.removable:
                widths = gone if self.keeps_stage(name, gone, state) else self._one_layer(name)
            state = state.with_block(name, widths)
        return state

    def least(self, full: int) -> int:
        """The smallest width that a width of `full` may be cut to."""
        return min(full, self._least(1))

    def _least(self, step: int) -> int:
        return -(-self.round_to // step) * step

    def _narrowest(self, name: str) -> BlockWidths:
        """A block's smallest widths with both sub-layers there."""
        full = self.levels.blocks[name].full
        return BlockWidths(
            heads=1 if "head" in self.units and full.heads else full.heads,
            qk=self.least(full.qk) if "qk" in self.units else full.qk,
            v=self.least(full.v) if "v" in self.units else full.v,
            ffn=self.least(full.ffn) if "ffn" in self.units else full.ffn,
        )

    def _one_layer(self, name: str) -> BlockWidths:
        """The cheaper of a block's two sub-layers alone, at its smallest."""
        narrowest = self._narrowest(name)
        options = [part for part in (narrowest.attention, narrowest.feed_forward) if part.units]
        start = self.levels.start
        return min(options, key=lambda widths: self.widths_cost(name, widths, start))

    def _narrower(self, width: int, step: int = 1) -> list[int]:
        """Smaller widths: the next multiple of the rounding, and for a table some beyond."""
        least = self._least(step)
        below = (width - 1) // least * least
        multiples = LOOK_AHEAD if self.model.kind == "latency_ms" else (1,)
        return [w for w in (below - (m - 1) * least for m in multiples) if w >= least]

    def _with_channels(self, state: State, stage: int, channels: int) -> State:
        shared = self.levels.streams[stage].stages
        widths = [channels if i in shared else width for i, width in enumerate(state.channels)]
        return replace(state, channels=tuple(widths))

    def _outside(self) -> float:
        """Cost of stem, downsamples, head and overhead at full width."""
        architecture = self.levels.architecture
        blocks = sum(self.block_cost(name, self.levels.start) for name in self.levels.blocks)
        return self.model.total(architecture) - blocks

    def _outside_at(self, channels: tuple[int, ...]) -> float:
        """The same for other channels; the difference is that of the components."""
        total = self._outside()
        for part in components_outside_blocks(self.levels.architecture):
            changed = self._narrowed(part, channels)
            total += self.model.component(changed) - self.model.component(part)
        return total

    def _narrowed(self, part: Component, channels: tuple[int, ...]) -> Component:
        """A stem, downsample or head in residual streams of other widths."""
        follows = self.levels.architecture.stages[0].downsample is None
        if part.kind == "stem":
            if not follows:
                return part
            spec = part.spec.model_copy(update={"width": channels[0]})
            return replace(part, spec=spec, output=part.output.with_channels(channels[0]))
        if part.kind == "head":
            return replace(part, input=part.input.with_channels(channels[-1]))
        output = part.output.with_channels(channels[part.stage])
        if part.stage == 0:
            return replace(part, output=output)
        entering = part.input.with_channels(channels[part.stage - 1])
        return replace(part, input=entering, output=output)
