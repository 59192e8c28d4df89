"""Adds up the prices of an architecture's components, with an interval and without torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace, shipped_spaces
from slimnas.arch.templates import ATTENTION, BLOCK_TYPES, CONVOLUTION
from slimnas.arch.walk import Component, walk
from slimnas.errors import MissingLatencyError
from slimnas.latency.keys import OVERHEAD, PriceKey, price_key, price_keys, price_parts
from slimnas.latency.prices import Price, PriceKind
from slimnas.latency.spaces import space_components
from slimnas.latency.table import LEVEL, LatencyTable

NAMED = 3
"""Missing components named in an error line; the rest are counted."""

SPACE_TYPES = BLOCK_TYPES | {"conv_stem", "conv3x3", "linear"}
"""Types that a search space's table holds; others need a table of their model."""

EFFICIENTFORMER_BLOCKS = frozenset({CONVOLUTION, ATTENTION})
"""Blocks that the shipped tables of phones have rows for."""


@dataclass(frozen=True)
class PricedComponent:
    """One line of an estimate.

    Attributes:
        component: module name, or `overhead`; `.attn` and `.mlp` behind it for a ViT or Swin
            block's sub-layers.
        key: what it was looked up by.
        latency_ms: its price.
        spread_ms: standard error of the price.
        kind: exact, interpolated or extrapolated.
    """

    component: str
    key: PriceKey
    latency_ms: float
    spread_ms: float
    kind: PriceKind


@dataclass(frozen=True)
class Estimate:
    """Latency of one architecture by one table.

    Attributes:
        latency_ms: the total.
        interval_ms: lower and upper end of its interval.
        level: share of networks the interval is meant to hold; none when a component was
            extrapolated, which no stated error covers.
        rows: one per component or sub-layer in execution order, the overhead last.
        exact: number of them read from a row.
        interpolated: number read between rows.
        extrapolated: number read beyond the rows.
    """

    latency_ms: float
    interval_ms: tuple[float, float]
    level: float | None
    rows: tuple[PricedComponent, ...]
    exact: int
    interpolated: int
    extrapolated: int


def estimate(
    architecture: Architecture, table: LatencyTable, *, allow_extrapolation: bool = False
) -> Estimate:
    """Price `architecture` by `table`.

    Args:
        architecture: the network.
        table: prices of one device.
        allow_extrapolation: also price components beyond the table's rows; they are counted.

    Raises:
        MissingLatencyError: a component the table cannot price, or only by extrapolation.
    """
    rows, missing = [], []
    for part in (part for component in walk(architecture) for part in price_parts(component)):
        key = price_key(part)
        price = table.prices.find(key)
        if price is None or (price.kind == "extrapolated" and not allow_extrapolation):
            missing.append((part.name, key))
        else:
            rows.append(_row(part.name, key, price))
    if missing:
        raise MissingLatencyError(
            _missing_line(missing, table, f"architecture {architecture.name}")
        )
    overhead = table.prices.find(OVERHEAD)
    if overhead is not None:
        rows.append(_row("overhead", OVERHEAD, overhead))
    counts = Counter(row.kind for row in rows)
    total_ms = sum(row.latency_ms for row in rows)
    return Estimate(
        latency_ms=total_ms,
        interval_ms=_interval_ms(total_ms, rows, table),
        level=None if counts["extrapolated"] else _level(table),
        rows=tuple(rows),
        exact=counts["exact"],
        interpolated=counts["interpolated"],
        extrapolated=counts["extrapolated"],
    )


def latency_ms(architecture: Architecture, table: LatencyTable) -> float:
    """Return the total alone: what a search asks thousands of times.

    Raises:
        MissingLatencyError: a component the table cannot price without extrapolation.
    """
    total_ms = 0.0
    for component in walk(architecture):
        total_ms += component_latency_ms(component, table)
    overhead = table.prices.find(OVERHEAD)
    return total_ms + (overhead.latency_ms if overhead is not None else 0.0)


def component_latency_ms(component: Component, table: LatencyTable) -> float:
    """Return the price of one component: of a ViT or Swin block, the sum of its sub-layers'.

    Every price is computed once per table, so that a pruner may ask for thousands of widths.

    Raises:
        MissingLatencyError: the table cannot price it without extrapolation.
    """
    total_ms = 0.0
    for key in price_keys(component):
        price = table.prices.find(key)
        if price is None or price.kind == "extrapolated":
            raise MissingLatencyError(_missing_line([("", key)], table, component.name))
        total_ms += price.latency_ms
    return total_ms


def missing_components(
    wanted: SearchSpace | Iterable[Component], table: LatencyTable
) -> tuple[PriceKey, ...]:
    """Return the keys of components that `table` cannot price without extrapolation.

    Args:
        wanted: a whole search space, or components.
        table: prices of one device.
    """
    components = space_components(wanted) if isinstance(wanted, SearchSpace) else wanted
    keys = dict.fromkeys(key for component in components for key in price_keys(component))
    return tuple(key for key in keys if _unpriced(table.prices.find(key)))


def require_prices(space: SearchSpace, table: LatencyTable) -> None:
    """Refuse a space with a component that `table` cannot price; call it before a long run.

    Raises:
        MissingLatencyError: names the missing components and the command that measures them.
    """
    missing = missing_components(space, table)
    if missing:
        unnamed = [("", key) for key in missing]
        named = space.name if space.name in shipped_spaces() else "FILE"
        raise MissingLatencyError(
            _missing_line(unnamed, table, f"search space {space.name}", named)
        )


def _unpriced(price: Price | None) -> bool:
    return price is None or price.kind == "extrapolated"


def _is_pruned(key: PriceKey) -> bool:
    """Whether no search space holds it: another type, or an FFN of no whole ratio."""
    hidden = dict(key.fields).get("ffn_dim", 0)
    uneven = isinstance(hidden, int) and key.width_in > 0 and hidden % key.width_in > 0
    return uneven or key.type not in SPACE_TYPES


def _row(name: str, key: PriceKey, price: Price) -> PricedComponent:
    return PricedComponent(name, key, price.latency_ms, price.error_ms, price.kind)


def _level(table: LatencyTable) -> float:
    interval = table.device.interval
    return LEVEL if interval is None else interval.level


def _interval_ms(
    total_ms: float, rows: list[PricedComponent], table: LatencyTable
) -> tuple[float, float]:
    """The table's stated error on whole networks, which holds that of its rows.

    Where a table states none, the timing errors of its rows in quadrature.
    """
    stated = table.device.interval
    if stated is not None:
        low_ms, high_ms = (total_ms * p / 100 for p in (stated.low_percent, stated.high_percent))
    else:
        per_key: defaultdict[PriceKey, float] = defaultdict(float)
        for row in rows:
            per_key[row.key] += row.spread_ms  # one row used twice is wrong twice the same way
        deviations = NormalDist().inv_cdf(0.5 + _level(table) / 2)
        low_ms = high_ms = deviations * sum(error**2 for error in per_key.values()) ** 0.5
    return max(0.0, total_ms - low_ms), total_ms + high_ms


def _missing_line(
    missing: list[tuple[str, PriceKey]], table: LatencyTable, what: str, space: str = "SPACE"
) -> str:
    first: dict[PriceKey, str] = {}
    for name, key in missing:
        first.setdefault(key, name)
    named = []
    for key, name in list(first.items())[:NAMED]:
        nearest = table.prices.nearest(key)
        closest = f"nearest row: {nearest.key}" if nearest else "no row of that type"
        named.append(f"{name + ': ' if name else ''}{key} ({closest})")
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    device = table.device.name
    remedy = _remedy(set(first), table, space)
    return (
        f"{what}: the latency table {device!r} has no price for {'; '.join(named)}{more}; {remedy}"
    )


def _remedy(missing: set[PriceKey], table: LatencyTable, space: str) -> str:
    """What to do; `space` is what to give --space, as far as it is known."""
    if any(map(_is_pruned, missing)):
        return (
            "measure a table for it with 'slimnas latency build --model MODEL --device NAME', "
            "MODEL being the network before it was pruned"
        )
    if {key.type for key in missing} & (BLOCK_TYPES - EFFICIENTFORMER_BLOCKS):
        return (
            f"measure a table of the search space with 'slimnas latency build --space {space} "
            "--device NAME'"
        )
    if table.device.kind == "estimated":
        return (
            "stay within the efficientformer search spaces, or measure a device of your own with "
            "'slimnas latency build --device NAME'"
        )
    return f"measure them with 'slimnas latency build --device {table.device.name}'"
