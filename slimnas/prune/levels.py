"""How far each block and residual stream is cut, and what every further cut loses.

Heads of a block are cut to equal dims: the next dim to go is each head's least important one, all
together. A head that goes whole is the least important of those left. (Unequal heads would have
to be padded to the widest; with a head's next best dims instead of zeros that is the same choice.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from slimnas.arch.architecture import AnyBlock, Architecture
from slimnas.arch.efficientformer import ConvStem
from slimnas.arch.walk import Component
from slimnas.prune.costs import BlockWidths
from slimnas.prune.scores import BlockScores, FloatArray, Scores
from slimnas.prune.widths import (
    BlockPlan,
    Indexes,
    WidthPlan,
    block_components,
    embedding_groups,
    removable_layers,
)


@dataclass(frozen=True)
class BlockLevels:
    """A block's units in the order they go.

    Attributes:
        component: the block.
        block: its description.
        scores: importance of its units.
        full: its widths before.
        removable: whether a whole sub-layer may go.
    """

    component: Component
    block: AnyBlock
    scores: BlockScores
    full: BlockWidths
    removable: bool
    _orders: dict[str, FloatArray] = field(default_factory=dict, compare=False, repr=False)

    def kept_heads(self, heads: int) -> Indexes:
        """The `heads` most important heads, ascending."""
        order = np.argsort(-self.scores.head, kind="stable")[:heads]
        return tuple(sorted(order.tolist()))

    def lost(self, widths: BlockWidths) -> float:
        """Importance of everything that goes when the block is cut to `widths`."""
        return self.lost_attention(widths) + self.lost_ffn(widths)

    def lost_attention(self, widths: BlockWidths) -> float:
        """Importance of the heads, QK dims and V dims that go."""
        if not self.full.heads:
            return 0.0
        if not widths.heads:
            return self.scores.attention_layer
        heads = list(self.kept_heads(widths.heads))
        gone = self.scores.head.sum() - self.scores.head[heads].sum()
        for scores, kept in ((self.scores.qk, widths.qk), (self.scores.v, widths.v)):
            ascending = np.sort(scores[heads], axis=1)
            gone += ascending[:, : scores.shape[1] - kept].sum()
        return float(gone)

    def lost_ffn(self, widths: BlockWidths) -> float:
        """Importance of the hidden units that go."""
        if not self.full.ffn:
            return 0.0
        if not widths.ffn:
            return self.scores.ffn_layer
        if "ffn" not in self._orders:
            self._orders["ffn"] = np.concatenate([[0.0], np.cumsum(np.sort(self.scores.ffn))])
        return float(self._orders["ffn"][self.full.ffn - widths.ffn])

    def plan(self, widths: BlockWidths) -> BlockPlan:
        """What stays when the block is cut to `widths`; equal scores go from the back."""
        heads = self.kept_heads(widths.heads)
        return BlockPlan(
            heads=heads,
            qk=tuple(_largest(self.scores.qk[head], widths.qk) for head in heads),
            v=tuple(_largest(self.scores.v[head], widths.v) for head in heads),
            ffn=_largest(self.scores.ffn, widths.ffn),
        )


@dataclass(frozen=True)
class StreamLevels:
    """Channels of one residual stream in the order they go.

    Attributes:
        stages: the stages that share it.
        scores: importance of its channels, summed over those stages.
        step: channels go in multiples of this, beside any rounding asked for.
    """

    stages: tuple[int, ...]
    scores: FloatArray
    step: int

    def lost(self, channels: int) -> float:
        """Importance of the channels that go when `channels` stay."""
        return float(np.sort(self.scores)[: len(self.scores) - channels].sum())

    def kept(self, channels: int) -> Indexes:
        """The `channels` most important ones, ascending."""
        return _largest(self.scores, channels)


@dataclass(frozen=True)
class State:
    """Widths of every block by name, and of every stage."""

    blocks: Mapping[str, BlockWidths]
    channels: tuple[int, ...]

    def with_block(self, name: str, widths: BlockWidths) -> State:
        """This state with one block changed."""
        return replace(self, blocks={**self.blocks, name: widths})


@dataclass(frozen=True)
class Levels:
    """All that can be cut of an architecture.

    Attributes:
        architecture: before.
        blocks: by name.
        streams: by their first stage.
    """

    architecture: Architecture
    blocks: Mapping[str, BlockLevels]
    streams: Mapping[int, StreamLevels]

    @property
    def start(self) -> State:
        """Nothing cut."""
        blocks = {name: levels.full for name, levels in self.blocks.items()}
        return State(blocks, self.architecture.widths)

    def lost(self, state: State) -> float:
        """Importance of everything that goes."""
        blocks = sum(levels.lost(state.blocks[name]) for name, levels in self.blocks.items())
        return blocks + sum(
            stream.lost(state.channels[stage]) for stage, stream in self.streams.items()
        )

    def plan(self, state: State) -> WidthPlan:
        """The width plan of a state."""
        groups = embedding_groups(self.architecture)
        kept = {s: stream.kept(state.channels[s]) for s, stream in self.streams.items()}
        cut = state.channels != self.architecture.widths
        return WidthPlan(
            source=self.architecture.digest,
            blocks={name: self.blocks[name].plan(widths) for name, widths in state.blocks.items()},
            embedding=tuple(kept[group] for group in groups) if cut else (),
        )


def make_levels(architecture: Architecture, scores: Scores) -> Levels:
    """Order the units of `architecture` by `scores`.

    Raises:
        PruneError: scores of another architecture.
    """
    scores.check(architecture)
    blocks = {
        part.name: BlockLevels(
            component=part,
            block=block,
            scores=scores.blocks[part.name],
            full=BlockWidths.of(block, part.input.channels),
            removable=removable_layers(block),
        )
        for part, block in block_components(architecture)
    }
    groups = embedding_groups(architecture)
    return Levels(architecture, blocks, _streams(architecture, scores.embedding, groups))


def _streams(
    architecture: Architecture, embedding: Sequence[FloatArray], groups: Sequence[int]
) -> dict[int, StreamLevels]:
    streams = {}
    for first in dict.fromkeys(groups):
        stages = tuple(stage for stage, group in enumerate(groups) if group == first)
        total = np.sum([embedding[stage] for stage in stages], axis=0)
        conv = first == 0 and isinstance(architecture.stem, ConvStem)
        follows = architecture.stages[0].downsample is None
        streams[first] = StreamLevels(stages, total, 2 if conv and follows else 1)
    return streams


def _largest(scores: FloatArray, count: int) -> Indexes:
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(sorted(order.tolist()))
