"""What has to be timed to price every component of a search space.

A price is a weighted sum of the latencies of small networks ("terms"), so that what a component
does not own cancels out:

* block: `(t(m copies in a row) - t(k copies)) / (m - k)`;
* stem: `t(stem, block) - t(block)`; head: `t(block, head) - t(block)`;
* downsample: `t(block, downsample, block') - t(block) - t(block') + t(nothing)`;

where block and block' are the first block choice of the stages around, at the widths around, and
`nothing` is a network that does next to nothing: its latency is what one call costs. So every
component is timed with the neighbours it has in a network, and fuses with them as it does there.

Only a grid of widths is timed; a `LatencyTable` interpolates between its rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import LinearHead
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import Component, walk
from slimnas.latency.keys import PriceKey, price_key
from slimnas.latency.spaces import space_components

WIDTH_RATIO = 1.35
"""Widths of blocks, stems and heads grow by about this from row to row. Linear interpolation of
a quadratic cost is then at most 2 % too high: ((r - 1) / (r + 1))**2."""

PAIR_RATIO = 1.6
"""The same for each of the two widths of a downsample; at most 5 % off between the rows."""

CLASSES = (2, 1000)
"""Heads are timed for these numbers of classes and the space's own, so that one table prices the
head of most data sets, by interpolation."""

Parts = tuple[Component, ...]
"""Components in execution order: a network, or a piece of one; empty for `nothing`."""


@dataclass(frozen=True)
class Term:
    """One network to time, and the share of its latency in the price."""

    parts: Parts
    share: float


@dataclass(frozen=True)
class Entry:
    """Something to time, its terms side by side in the same rounds.

    Attributes:
        name: unique in a plan; names it in the journal.
        terms: networks whose weighted latencies add up to its price.
        key: the table row it becomes; none for whole networks and for `nothing`.
    """

    name: str
    terms: tuple[Term, ...]
    key: PriceKey | None = None


@dataclass(frozen=True)
class Plan:
    """Everything a table's build times.

    Attributes:
        reference: the network timed around every round, to see the machine drift.
        components: one entry per row of the table but the overhead.
        nothing: what a call costs.
        calibration: random networks that the overhead is fitted to.
        held_out: other random networks, for the stated error alone.
    """

    reference: Parts
    components: tuple[Entry, ...]
    nothing: Entry
    calibration: tuple[Architecture, ...]
    held_out: tuple[Architecture, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All there is to time."""
        networks = (*self.calibration, *self.held_out)
        return (*self.components, self.nothing, *(network_entry(one) for one in networks))


def make_plan(
    space: SearchSpace,
    *,
    chains: tuple[int, int] = (1, 4),
    calibration: int = 4,
    held_out: int = 6,
    seed: int = 0,
) -> Plan:
    """Plan the table of `space`.

    Args:
        space: the search space.
        chains: lengths k and m of the two chains of a block.
        calibration: random networks for the overhead.
        held_out: random networks for the error figures.
        seed: of the random networks.
    """
    rng = random.Random(seed)
    networks = _random_networks(space, calibration + held_out, rng)
    smallest = next(iter(space.smallest()), None) or space.random(rng)
    return Plan(
        reference=tuple(walk(space.architecture(smallest))),
        components=tuple(_component_entries(space, chains)),
        nothing=Entry("nothing", (Term((), 1.0),)),
        calibration=tuple(networks[:calibration]),
        held_out=tuple(networks[calibration:]),
    )


def network_entry(architecture: Architecture) -> Entry:
    """Return the entry that times `architecture` as a whole."""
    return Entry(f"network {architecture.digest}", (Term(tuple(walk(architecture)), 1.0),))


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


def _component_entries(space: SearchSpace, chains: tuple[int, int]) -> Iterator[Entry]:
    # Narrowing pairs too: a price is interpolated inside the hull of the rows, which a
    # triangle of the pairs alone would cut short.
    every_pair = space.model_copy(
        update={"limits": space.limits.model_copy(update={"monotone_widths": False})}
    )
    components = [
        sized
        for part in space_components(every_pair)
        if _on_grid(part, space)
        for sized in _class_counts(part)
    ]
    neighbours = _neighbours(space)
    seen = set()
    for part in components:
        key = price_key(part)
        if key not in seen:
            seen.add(key)
            yield Entry(str(key), _terms(part, neighbours, chains), key)


def _class_counts(part: Component) -> Iterator[Component]:
    """A head once per number of classes; anything else as it is."""
    if not isinstance(part.spec, LinearHead):
        yield part
        return
    for classes in sorted({*CLASSES, part.spec.classes}):
        spec = part.spec.model_copy(update={"classes": classes})
        yield replace(part, spec=spec, output=FeatureShape(classes, 1, 1))


def _terms(
    part: Component, blocks: dict[tuple[int, int], Component], chains: tuple[int, int]
) -> tuple[Term, ...]:
    if part.kind == "block":
        short, long = chains
        share = 1 / (long - short)
        return Term((part,) * long, share), Term((part,) * short, -share)
    if part.kind == "stem":
        after = blocks[0, part.output.channels]
        return Term((part, after), 1.0), Term((after,), -1.0)
    if part.kind == "head":
        before = blocks[part.stage, part.input.channels]
        return Term((before, part), 1.0), Term((before,), -1.0)
    before = blocks[part.stage - 1, part.input.channels]
    after = blocks[part.stage, part.output.channels]
    return (
        Term((before, part, after), 1.0),
        Term((before,), -1.0),
        Term((after,), -1.0),
        Term((), 1.0),
    )


def _neighbours(space: SearchSpace) -> dict[tuple[int, int], Component]:
    """The first block choice at every width of every stage, the neighbours of the others."""
    hosts: dict[tuple[int, int], Component] = {}
    for part in space_components(space):
        if part.kind == "block":
            hosts.setdefault((part.stage, part.input.channels), part)
    return hosts


def _on_grid(part: Component, space: SearchSpace) -> bool:
    width_in, width_out = part.input.channels, part.output.channels
    widths = space.stages[part.stage].width.values
    if part.kind == "downsample":
        before = space.stages[part.stage - 1].width.values
        return width_in in knots(before, PAIR_RATIO) and width_out in knots(widths, PAIR_RATIO)
    width = width_out if part.kind == "stem" else width_in
    return width in knots(widths, WIDTH_RATIO)


def _random_networks(space: SearchSpace, count: int, rng: random.Random) -> list[Architecture]:
    """Up to `count` different networks; a tiny space may hold fewer."""
    found: dict[str, Architecture] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        architecture = space.architecture(space.random(rng))
        found.setdefault(architecture.digest, architecture)
    return list(found.values())
