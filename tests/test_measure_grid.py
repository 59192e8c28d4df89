"""Widths chosen by error: straight prices need three rows, bent ones as many as they bend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from measure_fakes import small_space

from slimnas.arch.space import SearchSpace
from slimnas.latency.keys import PriceKey
from slimnas.latency.rows import PriceRow
from slimnas.measure.grid import TOLERANCE, Lines, WidthGrid
from slimnas.measure.monotone import falling
from slimnas.measure.scope import SpaceScope

WIDE = SpaceScope(SearchSpace.load("efficientformer_small"))


def refined(grid: WidthGrid, price: Callable[[PriceKey], float], error: float = 0.0) -> Lines:
    lines = grid.coarse()
    for _ in range(20):
        finer = grid.finer(lines, lambda key: (price(key), error * price(key)))
        if finer == lines:
            return lines
        lines = finer
    raise AssertionError("does not come to an end")


def axes(lines: Lines, kind: str) -> list[tuple[int, ...]]:
    return [axis for group, found in lines.items() if group[0] == kind for axis in found]  # type: ignore[index]


def test_coarse_grid_is_ends_and_middle() -> None:
    grid = WIDE.grid()
    lines = grid.coarse()
    assert (128, 256, 512) in axes(lines, "block")
    assert all(len(axis) <= 3 for found in lines.values() for axis in found)
    assert {len(list(grid.components(lines))), len(set(grid.components(lines)))} == {
        sum(1 for _ in grid.components(lines))
    }


def test_straight_prices_need_no_more() -> None:
    grid = WIDE.grid()
    lines = refined(grid, lambda key: 1.0 + 0.01 * key.width_in * key.width_out)
    # a pair's price is linear in each width; only a block's, whose two widths are one, bends
    assert axes(lines, "downsample") == axes(grid.coarse(), "downsample")
    assert len(max(axes(lines, "block"), key=len)) > 3


@pytest.mark.parametrize("power", [1, 2])
def test_lines_between_the_rows_are_as_good_as_asked(power: int) -> None:
    grid = WIDE.grid()

    def price(key: PriceKey) -> float:
        return 0.2 + 1e-5 * float(key.width_in) ** power

    lines = refined(grid, price)
    checked = 0
    for group, members in grid.groups.items():
        if group[0] == "block":  # type: ignore[index]
            (axis,) = lines[group]
            for (width,) in members:
                low = max(x for x in axis if x <= width)
                high = min(x for x in axis if x >= width)
                share = (width - low) / (high - low) if high > low else 0.0
                ends = [0.2 + 1e-5 * float(x) ** power for x in (low, high)]
                line = (1 - share) * ends[0] + share * ends[1]
                assert line / (0.2 + 1e-5 * float(width) ** power) - 1 < 2 * TOLERANCE
                checked += 1
    assert checked > 70


def test_a_stair_is_found_and_noise_is_not_chased() -> None:
    grid = WIDE.grid()
    stair = refined(grid, lambda key: 1.0 + (key.width_in > 256))
    wide = [axis for axis in axes(stair, "block") if axis[-1] == 512]
    assert all({256, 272} <= set(axis) for axis in wide)
    assert len(wide) == 2
    noisy = refined(grid, lambda key: 1.0 + (key.width_in % 32) / 320, error=0.1)
    assert noisy == grid.coarse()


def test_small_space_is_timed_at_every_width() -> None:
    grid = SpaceScope(small_space()).grid()
    assert grid.finer(grid.coarse(), lambda _: (1.0, 0.0)) == grid.coarse()
    assert axes(grid.coarse(), "stem") == [(16, 32, 48)]


def test_rows_cheaper_than_narrower_ones_are_named() -> None:
    def row(width: int, ms: float, spread_ms: float = 0.001) -> PriceRow:
        key = PriceKey("block", "mb4d", (("ffn_dim", 4 * width),), "7x7", width, width)
        return PriceRow(key, ms, spread_ms, 12, "fitted")

    rising = [row(16, 1.0), row(32, 1.1), row(48, 1.2)]
    assert falling(rising) == ()
    rows = [row(16, 1.0), row(32, 0.9), row(48, 0.95)]
    assert falling(rows) == ((rows[0].key, rows[1].key),)
    assert falling([row(16, 1.0, 0.1), row(32, 0.9, 0.1)]) == ()
    pair = [
        PriceRow(PriceKey("downsample", "conv3x3", (), "14x14", a, b), ms, 0.0, 4, "fitted")
        for a, b, ms in ((16, 32, 2.0), (32, 16, 1.0), (32, 32, 1.5))
    ]
    assert falling(pair) == ((pair[0].key, pair[2].key),)  # the other two cannot be compared
