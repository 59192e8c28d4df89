"""Does the latency of a stage follow how wide it is, or only how many blocks it has?

A block whose price hardly changes with its width spends its time on what width does not change:
launching operators, moving small tensors, attention of fixed heads. Narrowing such a stage buys
nothing; removing its blocks does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slimnas.arch.space import SearchSpace
from slimnas.latency.keys import INTERPOLATED_FIELDS, PriceKey, price_keys
from slimnas.latency.spaces import space_components
from slimnas.latency.table import LatencyTable

Regime = Literal["launch-bound", "mixed", "compute-bound"]

LAUNCH_BOUND = 0.25
COMPUTE_BOUND = 0.5
"""Bounds on the followed share, which is the elasticity over that of the MACs."""

SPAN = 8
"""Rows of less than an eighth of the widest's width do not count: nobody narrows so far, and a
logarithm would give them the most weight."""

SAME = 1.1
"""Prices that differ by less are called the same."""

SUB_LAYERED = frozenset({"vit", "swin"})
"""Types that are priced by sub-layer; others whole."""

_MACS_POWER = {"width": 2, "ffn_dim": 1, "heads": 1}
"""Power of a width that the MACs of a block grow with."""

_WORDS = {"width": "channels", "ffn_dim": "FFN channels", "heads": "heads"}
_ADVICE = {
    "launch-bound": "launch-bound: remove blocks, narrowing buys little",
    "mixed": "mixed: narrowing pays less than it cuts, removing a block pays in full",
    "compute-bound": "compute-bound: width pays",
}

Priced = tuple[int | None, PriceKey, float]
"""Number of the stage where it is known, what is priced, and its latency in ms."""


@dataclass(frozen=True)
class StageRegime:
    """How the price of one kind of block at one resolution follows its width.

    Attributes:
        stage: number of the stage from 1, where a search space was given.
        resolution: `HEIGHTxWIDTH` of the block's input, as in the table.
        type: the block's type; its sub-layer behind it for ViT and Swin.
        varied: what changes between the rows: `width` (the stage's), `ffn_dim` or `heads`.
        narrowest: the least such width.
        widest: the greatest.
        growth: price at the widest over price at the narrowest.
        elasticity: d log price / d log width between them.
        regime: see `regimes`.
        sentence: all of it in one line of plain English.
    """

    stage: int | None
    resolution: str
    type: str
    varied: str
    narrowest: int
    widest: int
    growth: float
    elasticity: float
    regime: Regime
    sentence: str


def regimes(table: LatencyTable, space: SearchSpace | None = None) -> tuple[StageRegime, ...]:
    """Tell for every stage and kind of block whether its latency follows depth or width.

    The elasticity e says how the price answers to the width: blocks of a stage that is 1 %
    narrower are e % cheaper. MACs grow with the width squared (linearly with a block's FFN width
    or heads alone), so e over that power p is about the share of the price that follows the
    MACs: of a price a + b * width**p it is b * width**p. Below 0.25, more than three quarters of
    the price stay whatever the width: half the channels (p = 2) make a block at most 29 %
    cheaper, where removing it saves all of it: launch-bound. From 0.5 on at least half of the
    price is work: half the channels save at least half: compute-bound. Between them: mixed.

    Args:
        table: prices of one device.
        space: take the blocks and the range of widths of this space, as far as the table prices
            them, and number its stages; otherwise the table's own rows.

    Returns:
        From the highest resolution to the lowest. Blocks priced at one width alone are left
        out: nothing is known about them.
    """
    rows = _table_rows(table) if space is None else _space_rows(table, space)
    groups: defaultdict[tuple[object, ...], list[Priced]] = defaultdict(list)
    for stage, key, latency_ms in rows:
        names = tuple(name for name, _ in key.fields)  # tells attention from FFN
        groups[stage, key.group, names].append((stage, key, latency_ms))
    found = [regime for members in groups.values() if (regime := _regime(members)) is not None]
    return tuple(sorted(found, key=lambda one: (-_positions(one.resolution), one.type)))


def _table_rows(table: LatencyTable) -> Iterator[Priced]:
    for row in table.rows:
        if row.key.component == "block":
            yield None, row.key, row.latency_ms


def _space_rows(table: LatencyTable, space: SearchSpace) -> Iterator[Priced]:
    for component in space_components(space):
        if component.kind == "block":
            for key in price_keys(component):
                price = table.prices.find(key)
                if price is not None and price.kind != "extrapolated":
                    yield component.stage + 1, key, price.latency_ms


def _regime(rows: Sequence[Priced]) -> StageRegime | None:
    varied, line = _line(rows)
    widths = [width for width in line if SPAN * width >= max(line)]
    low, high = min(widths), max(widths)
    if low == high:
        return None
    growth = line[high] / line[low]
    elasticity = math.log(growth) / math.log(high / low)
    followed = elasticity / _MACS_POWER[varied]
    regime: Regime = "compute-bound" if followed >= COMPUTE_BOUND else "mixed"
    if followed < LAUNCH_BOUND:
        regime = "launch-bound"
    stage, key, _ = rows[0]
    number = "" if stage is None else f" {stage}"
    sentence = (
        f"stage{number} at {key.resolution}, {_kind(key)}: price {_change(growth)} from {low} to "
        f"{high} {_WORDS[varied]} (elasticity {elasticity:.2f}): {_ADVICE[regime]}"
    )
    return StageRegime(
        stage=stage,
        resolution=key.resolution,
        type=_kind(key),
        varied=varied,
        narrowest=low,
        widest=high,
        growth=growth,
        elasticity=elasticity,
        regime=regime,
        sentence=sentence,
    )


def _line(rows: Sequence[Priced]) -> tuple[str, dict[int, float]]:
    """What to vary, and the price along it, everything else at its greatest.

    The stage's width, which a space varies; where that is fixed, what pruning narrows.
    """
    ordered = sorted(rows, key=lambda row: row[1].point)  # the last of a width is its greatest
    by_width = {key.width_in: latency_ms for _, key, latency_ms in ordered}
    for name in ("ffn_dim", "heads") if len(by_width) == 1 else ():
        others = [
            [value for field, value in _numbers(key).items() if field != name]
            for _, key, _ in ordered
        ]
        along = {
            _numbers(key)[name]: latency_ms
            for (_, key, latency_ms), other in zip(ordered, others, strict=True)
            if other == max(others) and name in _numbers(key)
        }
        if len(along) > 1:
            return name, along
    return "width", by_width


def _numbers(key: PriceKey) -> dict[str, int]:
    """What of a block is interpolated over, beside the stage's width."""
    return {name: int(value) for name, value in key.fields if name in INTERPOLATED_FIELDS}


def _kind(key: PriceKey) -> str:
    """The block's type, with the sub-layer where it is one."""
    if key.type not in SUB_LAYERED:
        return key.type
    return f"{key.type} {'FFN' if 'ffn_dim' in _numbers(key) else 'attention'}"


def _change(growth: float) -> str:
    if growth < SAME:
        return "hardly changes" if growth > 1 / SAME else f"falls to {growth:.2g} of it"
    return f"grows {growth:.1f}x"


def _positions(resolution: str) -> int:
    height, _, width = resolution.partition("+")[0].partition("x")
    return int(height) * int(width)
