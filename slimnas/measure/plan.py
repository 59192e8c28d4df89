"""What has to be timed to price everything that the networks of a scope can contain.

A price is a weighted sum of the latencies of small networks ("terms"), so that what a component
does not own cancels out:

* block: `(t(m copies in a row) - t(k copies)) / (m - k)`;
* stem: `t(stem, block) - t(block)`; head: `t(block, head) - t(block)`;
* downsample: `t(block, downsample, block') - t(block) - t(block') + t(nothing)`;

where block and block' are the scope's neighbours in the stages around, at the widths around, and
`nothing` is a network that does next to nothing: its latency is what one call costs. So every
component is timed with the neighbours it has in a network, and fuses with them as it does there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import Component, walk
from slimnas.latency.keys import PriceKey, price_key
from slimnas.measure.scope import Parts, Scope


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
        calibration: random networks that correct the prices.
        held_out: other random networks, for the stated error alone.
        sample: what the random networks are, in words.
    """

    reference: Parts
    components: tuple[Entry, ...]
    nothing: Entry
    calibration: tuple[Architecture, ...]
    held_out: tuple[Architecture, ...]
    sample: str

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All there is to time."""
        networks = (*self.calibration, *self.held_out)
        return (*self.components, self.nothing, *(network_entry(one) for one in networks))


def make_plan(
    scope: Scope,
    *,
    chains: tuple[int, int] = (1, 4),
    calibration: int = 4,
    held_out: int = 6,
    seed: int = 0,
    components: Iterable[Component] | None = None,
) -> Plan:
    """Plan the table of `scope`.

    The random networks are drawn in one sequence, the held-out ones first: more calibration
    networks leave all others what they are.

    Args:
        scope: what its networks can contain.
        chains: lengths k and m of the two chains of a block.
        calibration: random networks for the correction of the prices.
        held_out: random networks for the error figures.
        seed: of the random networks.
        components: what to time; by default all that the scope lists.
    """
    networks = _random_networks(scope, calibration + held_out, random.Random(seed))
    listed = scope.components() if components is None else components
    return Plan(
        reference=scope.reference(random.Random(seed)),
        components=tuple(entries_for(scope, listed, chains)),
        nothing=Entry("nothing", (Term((), 1.0),)),
        calibration=tuple(networks[held_out:]),
        held_out=tuple(networks[:held_out]),
        sample=scope.sample,
    )


def network_entry(architecture: Architecture) -> Entry:
    """Return the entry that times `architecture` as a whole."""
    return Entry(f"network {architecture.digest}", (Term(tuple(walk(architecture)), 1.0),))


def entries_for(
    scope: Scope, components: Iterable[Component], chains: tuple[int, int]
) -> Iterator[Entry]:
    """Yield the entry of every price of `components`, each once."""
    neighbours = scope.neighbours
    seen = set()
    for part in components:
        key = price_key(part)
        if key not in seen:
            seen.add(key)
            yield Entry(str(key), _terms(part, neighbours, chains), key)


def _terms(
    part: Component, blocks: Mapping[tuple[int, int], Component], chains: tuple[int, int]
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


def _random_networks(scope: Scope, count: int, rng: random.Random) -> list[Architecture]:
    """Up to `count` different networks; a tiny scope may hold fewer."""
    found: dict[str, Architecture] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        architecture = scope.network(rng)
        found.setdefault(architecture.digest, architecture)
    return list(found.values())
