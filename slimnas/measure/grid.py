"""Which widths to time: ends and middle first, more only where a line between them is wrong."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from slimnas.arch.walk import Component
from slimnas.latency.keys import PriceKey, price_key

TOLERANCE = 0.015
"""How far off a price between two rows may be, as a share of it."""

HALVED = 4
"""By what a row in the middle divides the error of a line through a smooth curve."""

SURE = 2.0
"""Standard errors beyond which a row is off its line and not just noisy."""

Widths = tuple[int, ...]
Lines = Mapping[object, tuple[Widths, ...]]
"""Per group of components, the timed widths along each of its axes."""
Price = Callable[[PriceKey], tuple[float, float]]
"""Latency and standard error in milliseconds of a timed row."""


@dataclass(frozen=True)
class WidthGrid:
    """Every component of a space, in groups that differ in widths only.

    Attributes:
        groups: per group, the component at every width or pair of widths.
    """

    groups: Mapping[object, Mapping[Widths, Component]]

    @classmethod
    def of(cls, components: Iterable[Component]) -> WidthGrid:
        """Group `components`, every width of each."""
        groups: defaultdict[object, dict[Widths, Component]] = defaultdict(dict)
        for part in components:
            groups[price_key(part).group].setdefault(_place(part), part)
        return cls(dict(groups))

    def coarse(self) -> Lines:
        """Return the ends and the middle of every axis; all of an axis of three."""
        return {
            group: tuple(_ends_and_middle(axis) for axis in _axes(members))
            for group, members in self.groups.items()
        }

    def every(self) -> Iterator[Component]:
        """Yield all components, group by group."""
        for members in self.groups.values():
            yield from members.values()

    def components(self, lines: Lines) -> Iterator[Component]:
        """Yield the components on `lines`, group by group."""
        for group, members in self.groups.items():
            for place in product(*lines[group]):
                if place in members:
                    yield members[place]

    def finer(self, lines: Lines, price: Price) -> Lines:
        """Return `lines` with widths added around every row that the line beside it misses.

        A row between two others tells how far linear interpolation was off where it stands. With
        the row there, the error of what is between the three falls to a quarter if the price is
        smooth; where even that is above `TOLERANCE`, both halves get a row of their own.
        """
        return {
            group: tuple(
                _with_middles(axis, every, self._missed(group, lines[group], i, price))
                for i, (axis, every) in enumerate(zip(lines[group], _axes(members), strict=True))
            )
            for group, members in self.groups.items()
        }

    def _missed(
        self, group: object, axes: Sequence[Widths], i: int, price: Price
    ) -> list[tuple[int, int, int]]:
        """Triples of neighbouring widths along axis `i` whose middle is off the line."""
        members = self.groups[group]
        found = []
        for low, middle, high in zip(axes[i], axes[i][1:], axes[i][2:], strict=False):
            share = (middle - low) / (high - low)
            beyond = []
            for others in product(*(axis for k, axis in enumerate(axes) if k != i)):
                places = [(*others[:i], width, *others[i:]) for width in (low, middle, high)]
                if all(place in members for place in places):
                    three = [price(price_key(members[place])) for place in places]
                    beyond.append(_off_line(three, share))
            if beyond and median(beyond) > HALVED * TOLERANCE:
                found.append((low, middle, high))
        return found


def _off_line(three: Sequence[tuple[float, float]], share: float) -> float:
    """How far the middle one is surely off the line through the others, as a share of it."""
    (low, low_error), (middle, error), (high, high_error) = three
    line = (1 - share) * low + share * high
    noise = math.hypot((1 - share) * low_error, error, share * high_error)
    return (abs(line - middle) - SURE * noise) / max(middle, noise, 1e-9)


def _place(part: Component) -> Widths:
    if part.kind == "block":
        return (part.input.channels,)
    if part.kind == "stem":
        return (part.output.channels,)
    return part.input.channels, part.output.channels


def _axes(members: Mapping[Widths, Component]) -> list[Widths]:
    return [tuple(sorted(set(axis))) for axis in zip(*members, strict=True)]


def _ends_and_middle(axis: Widths) -> Widths:
    if len(axis) <= 3:
        return axis
    return axis[0], _between(axis, axis[0], axis[-1]), axis[-1]


def _between(axis: Widths, low: int, high: int) -> int:
    """The width of `axis` nearest to the geometric mean of `low` and `high`."""
    return min(axis, key=lambda width: abs(width - math.sqrt(low * high)))


def _with_middles(axis: Widths, every: Widths, missed: Sequence[tuple[int, int, int]]) -> Widths:
    added = set(axis)
    for low, middle, high in missed:
        for left, right in ((low, middle), (middle, high)):
            inside = tuple(width for width in every if left < width < right)
            if inside:
                added.add(_between(inside, left, right))
    return tuple(sorted(added))
