"""The networks of a kit: those of a plan, each once, and the names of their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from slimnas.arch.walk import Component, component_cost
from slimnas.measure.networks import identity
from slimnas.measure.plan import Plan
from slimnas.measure.scope import Parts

FOLDER = "networks"

Identity = tuple[object, ...]
"""What two networks that compute the same have in common."""


@dataclass(frozen=True)
class KitNetworks:
    """The different networks of a plan.

    Attributes:
        plan: the plan.
        parts: by file name without ending, the reference first; entries share networks, and the
            block beside a stem is a chain's block too, so that they are half as many as terms.
    """

    plan: Plan
    parts: Mapping[str, Parts]

    @classmethod
    def of(cls, plan: Plan) -> KitNetworks:
        """Collect the networks of `plan` in its order."""
        distinct: dict[Identity, Parts] = {}
        for parts in _all(plan):
            distinct.setdefault(identity(parts), parts)
        return cls(plan, {_stem(i, parts): parts for i, parts in enumerate(distinct.values())})

    @cached_property
    def _stems(self) -> Mapping[Identity, str]:
        return {identity(parts): stem for stem, parts in self.parts.items()}

    def stem(self, parts: Parts) -> str:
        """File name without ending of the network that computes what `parts` do."""
        return self._stems[identity(parts)]


def macs_of(parts: Parts) -> int:
    """Multiply-adds of a network for one image."""
    return sum(component_cost(part).macs for part in parts)


def params_of(parts: Parts) -> int:
    """Parameters of a network."""
    return sum(component_cost(part).params for part in parts)


def in_words(parts: Parts) -> str:
    """Say what a network is: `mb4d 48->48 @ 56x56 x4`."""
    words = []
    for said, run in groupby(map(_said, parts)):
        count = len(list(run))
        words.append(f"{said} x{count}" if count > 1 else said)
    return ", ".join(words) or "next to nothing"


def _all(plan: Plan) -> Iterator[Parts]:
    yield plan.reference
    for entry in plan.entries:
        for term in entry.terms:
            yield term.parts


def _said(part: Component) -> str:
    shape = part.input
    return f"{_type(part)} {shape.channels}->{part.output.channels} @ {shape.height}x{shape.width}"


def _type(part: Component) -> str:
    name: str = getattr(part.spec, "type")  # noqa: B009  every spec has one, the base class not
    return name


def _stem(number: int, parts: Parts) -> str:
    kinds = [part.kind for part in parts]
    if number == 0:
        slug = "reference"
    elif not parts:
        slug = "nothing"
    elif {"stem", "head"} <= set(kinds):
        slug = "network"
    else:
        types = [_type(part) for part in parts]
        slug = "-".join(name for name, _ in groupby(types)) + f"_x{len(parts)}"
    return f"{FOLDER}/{number:03d}_{slug}"
