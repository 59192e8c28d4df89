"""The scope of a pruner: everything that one model may become when its blocks are narrowed.

The FFN width of every block varies between 1 and the model's, and so do heads, QK and V width of
the blocks that a pruner narrows there; sub-layers and blocks may be gone. Fields of other kinds,
and the width of the stages, stay.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from slimnas.arch.architecture import Architecture
from slimnas.arch.block import Block
from slimnas.arch.efficientformer import MB3D
from slimnas.arch.swin import SwinBlock
from slimnas.arch.vit import TransformerBlock
from slimnas.arch.walk import Component, walk
from slimnas.latency.keys import WITHOUT_ATTENTION, WITHOUT_FFN
from slimnas.measure.scope import Parts, class_counts, first_blocks, knots

HEADS_RATIO = 5.0
"""Numbers of heads grow by up to this from row to row: each head does the same work."""

NARROWEST = 16
"""Widths of a head are halved down to this, which fills a vector unit; then comes 1."""

FFN_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the model's FFN width that are timed, besides 1."""

GONE = 0.1
"""Share of sub-layers that the random networks lack."""

Widths = Mapping[str, int]


@dataclass(frozen=True)
class ModelScope:
    """Every pruned form of `model` with the stage widths it has.

    Attributes:
        model: the network before it is pruned.
    """

    model: Architecture

    @property
    def title(self) -> str:
        """See `Scope`."""
        return f"model {self.model.name} and what can be pruned from it"

    @property
    def sample(self) -> str:
        """See `Scope`."""
        return f"randomly pruned forms of {self.model.name}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Scope`."""
        return {"scope": {"model": self.model.to_yaml()}}

    @cached_property
    def neighbours(self) -> Mapping[tuple[int, int], Component]:
        """The first block of every stage."""
        return first_blocks(walk(self.model))

    def components(self) -> Iterator[Component]:
        """Yield stem, downsamples and head, and the blocks of each stage at a grid of widths."""
        places = defaultdict(list)
        for part in walk(self.model):
            if isinstance(part.spec, Block):
                places[_place(part, part.spec)].append(part)
            else:
                yield from class_counts(part)
        for blocks in places.values():
            name = f"stages.{blocks[0].stage}.blocks"
            for spec in _variants(blocks):
                yield replace(blocks[0], name=name, spec=spec)

    def grid(self) -> None:
        """See `Scope`: widths inside a block are not chosen by error."""

    def network(self, rng: random.Random) -> Architecture:
        """Draw a pruned form: how much stays is drawn once, then the widths of every block."""
        least = rng.uniform(0.1, 0.9)
        stages = []
        for stage in self.model.stages:
            blocks = [_pruned(block, stage.width, least, rng) for block in stage.blocks]
            stages.append({**stage.model_dump(), "blocks": blocks})
        name = f"{self.model.name}_pruned"
        drawn = {**self.model.model_dump(), "name": name, "stages": stages, "provenance": {}}
        return Architecture.model_validate(drawn)

    def reference(self, rng: random.Random) -> Parts:
        """The last block at a quarter of its widths, with the head."""
        *_, block, head = (part for part in walk(self.model) if part.kind in ("block", "head"))
        assert isinstance(block.spec, Block)
        widths = _widths(block.spec, block.input.channels)
        quarter = {name: -(-width // 4) for name, width in widths.items()}
        return replace(block, spec=block.spec.model_copy(update=quarter)), head


def _place(part: Component, spec: Block) -> tuple[object, ...]:
    """What pruning leaves alone; blocks of one place are timed as one."""
    varied = {*_widths(spec, part.input.channels), "repeat"}
    fixed = {name: value for name, value in spec if name not in varied}
    if isinstance(spec, SwinBlock):
        fixed["shift"] = max(spec.shifts(part.input))
    return part.stage, part.input, tuple(sorted(fixed.items()))


def _widths(spec: Block, width: int) -> Widths:
    """What pruning narrows, as far as the block has it."""
    ffn = {"ffn_dim": spec.hidden(width)}
    if not isinstance(spec, (MB3D, TransformerBlock)):
        return ffn
    return {**{name: getattr(spec, name) for name in WITHOUT_ATTENTION}, **ffn}


def _variants(blocks: Sequence[Component]) -> Iterator[Block]:
    """Blocks of one place at the widths to time, up to the widest of each."""
    specs = [part.spec for part in blocks if isinstance(part.spec, Block)]
    spec, width = specs[0], blocks[0].input.channels
    given = [_widths(one, width) for one in specs]
    most = {name: max(widths[name] for widths in given) for name in given[0]}
    if isinstance(spec, MB3D):  # its sub-layers cannot be timed apart, so few of each
        grid = {name: sorted({1, -(-top // 2), top}) for name, top in most.items()}
        grid |= {name: sorted({1, most[name]}) for name in ("heads", "qk_dim")}
        yield from _narrowed(spec, grid, {})
        return
    whole = isinstance(spec, TransformerBlock)
    if most.get("heads"):
        heads = knots(range(1, most["heads"] + 1), HEADS_RATIO)
        dims = {name: _dims(most[name]) for name in ("qk_dim", "v_dim")}
        yield from _narrowed(spec, {"heads": heads, **dims}, WITHOUT_FFN)
    if most["ffn_dim"]:
        hidden = sorted({1, *(max(1, round(share * most["ffn_dim"])) for share in FFN_SHARES)})
        yield from _narrowed(spec, {"ffn_dim": hidden}, WITHOUT_ATTENTION if whole else {})
    elif not whole:
        yield spec


def _narrowed(spec: Block, grid: Mapping[str, Sequence[int]], absent: Widths) -> Iterator[Block]:
    for values in product(*grid.values()):
        yield spec.model_copy(update={**dict(zip(grid, values, strict=True)), **absent})


def _dims(most: int) -> tuple[int, ...]:
    found = [most]
    while found[-1] >= 2 * NARROWEST:
        found.append(found[-1] // 2)
    return tuple(sorted({1, *found}))


def _pruned(block: Block, width: int, least: float, rng: random.Random) -> dict[str, Any]:
    """The fields of `block` with between `least` and all of each width."""
    kept = {
        name: max(1, round(most * rng.uniform(least, 1))) if most else 0
        for name, most in _widths(block, width).items()
    }
    draw = rng.random()
    if isinstance(block, TransformerBlock) and kept["heads"] and kept["ffn_dim"]:
        if draw < GONE:
            kept |= WITHOUT_ATTENTION
        elif draw < 2 * GONE:
            kept |= WITHOUT_FFN
    return {**block.model_dump(), **kept}
