"""What the networks of a table can contain: a search space's, or the pruned forms of one model.

A scope lists the components to time, a grid of widths between which a `LatencyTable`
interpolates, and draws the random networks that the table is checked on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from slimnas.arch.architecture import AnyHead, Architecture
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import Component, walk
from slimnas.latency.spaces import space_components
from slimnas.measure.grid import WidthGrid

WIDTH_RATIO = 1.35
"""Widths of blocks, stems and heads grow by about this from row to row. Linear interpolation of
a quadratic cost is then at most 2 % too high: ((r - 1) / (r + 1))**2."""

PAIR_RATIO = 1.6
"""The same for each of the two widths of a downsample; at most 5 % off between the rows."""

CLASSES = (2, 1000)
"""Heads are timed for these numbers of classes and the scope's own, so that one table prices the
head of most data sets, by interpolation."""

Parts = tuple[Component, ...]
"""Components in execution order: a network, or a piece of one; empty for `nothing`."""


class Scope(Protocol):
    """The networks that a table is for."""

    @property
    def title(self) -> str:
        """Which, in words: `space efficientformer_tiny`."""

    @property
    def sample(self) -> str:
        """What the random networks are, in words."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain data that differs between scopes, for the journal's header."""

    @property
    def neighbours(self) -> Mapping[tuple[int, int], Component]:
        """By stage and width, the block that other components are timed beside."""

    def components(self) -> Iterator[Component]:
        """Yield what to time; each has one price, several may have the same."""

    def grid(self) -> WidthGrid | None:
        """All widths, for a build that chooses which to time by error; none if it cannot."""

    def network(self, rng: random.Random) -> Architecture:
        """Draw a network."""

    def reference(self, rng: random.Random) -> Parts:
        """The network that is timed around every round, to see the machine drift; a fast one."""


@dataclass(frozen=True)
class SpaceScope:
    """Every network of a search space.

    Attributes:
        space: the search space.
    """

    space: SearchSpace

    @property
    def title(self) -> str:
        """See `Scope`."""
        return f"space {self.space.name}"

    @property
    def sample(self) -> str:
        """See `Scope`."""
        return "random networks of the space"

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Scope`."""
        return {"scope": {"space": self.space.without_recipe().to_yaml()}}

    @cached_property
    def neighbours(self) -> Mapping[tuple[int, int], Component]:
        """The first block choice at every width of every stage."""
        return first_blocks(space_components(self.space))

    def components(self) -> Iterator[Component]:
        """Yield each stem, block, downsample and head at a grid of widths."""
        for part in self._every_width():
            if self._on_grid(part):
                yield from class_counts(part)

    def grid(self) -> WidthGrid:
        """See `Scope`."""
        return WidthGrid.of(each for part in self._every_width() for each in class_counts(part))

    def network(self, rng: random.Random) -> Architecture:
        """Draw a network, each legal choice as likely."""
        return self.space.architecture(self.space.random(rng))

    def reference(self, rng: random.Random) -> Parts:
        """A smallest network."""
        smallest = next(iter(self.space.smallest()), None) or self.space.random(rng)
        return tuple(walk(self.space.architecture(smallest)))

    def _every_width(self) -> Iterator[Component]:
        # Narrowing pairs too: a price is interpolated inside the hull of the rows, which a
        # triangle of the pairs alone would cut short.
        limits = self.space.limits.model_copy(update={"monotone_widths": False})
        return space_components(self.space.model_copy(update={"limits": limits}))

    def _on_grid(self, part: Component) -> bool:
        width_in, width_out = part.input.channels, part.output.channels
        widths = self.space.stages[part.stage].width.values
        if part.kind == "downsample":
            before = self.space.stages[part.stage - 1].width.values
            return width_in in knots(before, PAIR_RATIO) and width_out in knots(widths, PAIR_RATIO)
        width = width_out if part.kind == "stem" else width_in
        return width in knots(widths, WIDTH_RATIO)


def first_blocks(components: Iterator[Component]) -> dict[tuple[int, int], Component]:
    """The first block of each stage and width among `components`."""
    found: dict[tuple[int, int], Component] = {}
    for part in components:
        if part.kind == "block":
            found.setdefault((part.stage, part.input.channels), part)
    return found


def class_counts(part: Component) -> Iterator[Component]:
    """A head once per number of classes; anything else as it is."""
    if not isinstance(part.spec, AnyHead):
        yield part
        return
    for classes in sorted({*CLASSES, part.spec.classes}):
        spec = part.spec.model_copy(update={"classes": classes})
        yield replace(part, spec=spec, output=FeatureShape(classes, 1, 1))


def knots(values: Sequence[int], ratio: float) -> tuple[int, ...]:
    """Return some of ascending `values`, ends included, each about `ratio` times the one before.

    No two neighbours are further apart than an even geometric division allows, up to the
    rounding to `values`.
    """
    low, high = values[0], values[-1]
    if low == high:
        return (low,)
    intervals = math.ceil(math.log(high / low) / math.log(ratio))
    wanted = [low * (high / low) ** (i / intervals) for i in range(intervals + 1)]
    nearest = {min(values, key=lambda value: abs(value - width)) for width in wanted}
    return tuple(sorted(nearest))
