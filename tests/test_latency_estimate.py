"""Estimates: sums of rows, interpolation against known functions, intervals, refusals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import Component, walk
from slimnas.errors import MissingLatencyError
from slimnas.latency import (
    OVERHEAD,
    LatencyTable,
    PriceKey,
    PriceRow,
    component_latency_ms,
    estimate,
    latency_ms,
    missing_components,
    price_key,
    require_prices,
    space_components,
)
from slimnas.latency.table import IntervalInfo
from tests.test_latency_table import DEVICE

SPACE = SearchSpace.from_yaml(
    """
schema: slimnas/search-space/1
name: small
input: {resolution: 64}
stages:
  - {width: {min: 16, max: 48}, slots: 2, choices: [mb4d, identity]}
  - width: {min: 32, max: 96}
    slots: 3
    choices: [mb4d, mb3d, identity]
    downsample: {type: conv3x3}
head: {type: linear, classes: 10}
"""
)


def known_ms(key: PriceKey) -> float:
    """Linear in every width, different for every type: interpolation must reproduce it."""
    sides = [int(side) for side in key.resolution.split("x")]
    own = 1 + len(key.type)
    return 1e-4 * own * sides[0] + 2e-3 * key.width_in + 3e-3 * key.width_out


def table_for(
    components: Iterable[Component],
    keep: Callable[[PriceKey], bool] = lambda key: True,
    **device: object,
) -> LatencyTable:
    keys = dict.fromkeys(price_key(component) for component in components)
    rows = [PriceRow(key, known_ms(key), 0.001, 16, "measured") for key in keys if keep(key)]
    rows.append(PriceRow(OVERHEAD, 0.25, 0.0, 16, "measured"))
    return LatencyTable(DEVICE.model_copy(update=device), tuple(rows))


def random_network(seed: int) -> Architecture:
    return SPACE.architecture(SPACE.random(random.Random(seed)))


@pytest.mark.parametrize("seed", range(5))
def test_estimate_is_the_sum_of_rows_and_overhead(seed: int) -> None:
    table, network = table_for(space_components(SPACE)), random_network(seed)
    result = estimate(network, table)
    expected = [known_ms(price_key(component)) for component in walk(network)]
    assert [row.latency_ms for row in result.rows] == pytest.approx([*expected, 0.25])
    assert result.latency_ms == pytest.approx(sum(expected) + 0.25)
    assert result.latency_ms == pytest.approx(latency_ms(network, table), abs=1e-12)
    assert [row.component for row in result.rows][-2:] == ["head", "overhead"]
    assert (result.exact, result.interpolated, result.extrapolated) == (len(result.rows), 0, 0)


def test_table_without_overhead_adds_none() -> None:
    full, network = table_for(space_components(SPACE)), random_network(0)
    bare = replace(full, rows=tuple(row for row in full.rows if row.key != OVERHEAD))
    assert estimate(network, bare).latency_ms == pytest.approx(latency_ms(network, full) - 0.25)


def test_between_rows_a_linear_price_is_reproduced() -> None:
    # every second width kept: lines of blocks, grids of downsamples
    table = table_for(space_components(SPACE), lambda k: k.width_out % 32 == 16 or k.width_in == 3)
    asked = [
        component
        for component in space_components(SPACE)
        if component.kind in ("block", "downsample")
        and 48 <= component.output.channels <= 80
        and price_key(component) not in table.by_key
    ]
    assert len(asked) >= 4
    for component in asked:
        price = table.prices.find(price_key(component))
        assert price is not None
        assert price.kind == "interpolated"
        assert price.latency_ms == pytest.approx(known_ms(price_key(component)))
        assert component_latency_ms(component, table) == price.latency_ms


def test_classes_are_interpolated() -> None:
    network = random_network(1)
    components = [
        component
        for classes in (10, 1000)
        for component in space_components(SPACE.with_classes(classes))
    ]
    head = list(walk(network.with_head(classes=100)))[-1]
    assert component_latency_ms(head, table_for(components)) == pytest.approx(
        known_ms(price_key(head))
    )


def test_beyond_the_rows_is_refused_unless_asked_for() -> None:
    components = list(space_components(SPACE))
    table = table_for(
        components,
        lambda key: key.component != "block" or key.resolution != "16x16" or key.width_in < 48,
    )
    network = SPACE.architecture(SPACE.largest())
    with pytest.raises(
        MissingLatencyError, match=r"no price for stages\.0\.blocks\.0: block mb4d"
    ) as e:
        estimate(network, table)
    assert "nearest row: block mb4d ffn_dim=128 32->32 @ 16x16" in str(e.value)
    assert "slimnas latency build --device bench" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(MissingLatencyError, match="no price"):
        latency_ms(network, table)
    result = estimate(network, table, allow_extrapolation=True)
    assert result.extrapolated == 2
    assert result.level is None
    assert result.rows[1].latency_ms == pytest.approx(known_ms(result.rows[1].key))


def test_a_group_without_a_second_row_cannot_be_extrapolated() -> None:
    table = table_for(space_components(SPACE), lambda key: key.type != "mb3d")
    network = SPACE.architecture(SPACE.largest(attention=1))
    with pytest.raises(MissingLatencyError, match=r"mb3d .* \(no row of that type\)"):
        estimate(network, table, allow_extrapolation=True)


def test_extrapolation_stays_positive() -> None:
    steep = [
        PriceRow(PriceKey("block", "mb4d", (("ffn_dim", 4 * w),), "7x7", w, w), t, 0, 1, "measured")
        for w, t in ((64, 0.1), (80, 0.5), (96, 1.0))
    ]
    table = LatencyTable(DEVICE, tuple(steep))
    price = table.prices.find(PriceKey("block", "mb4d", (("ffn_dim", 64),), "7x7", 16, 16))
    assert price is not None
    assert price.kind == "extrapolated"
    assert price.latency_ms == pytest.approx(0.1 / 4)


def test_hidden_width_off_the_line_is_not_interpolated() -> None:
    """Rows with an FFN of 4 x the width say nothing about another ratio."""
    rows = [
        PriceRow(PriceKey("block", "mb4d", (("ffn_dim", 4 * w),), "7x7", w, w), w, 0, 1, "measured")
        for w in (16, 32, 64)
    ]
    table = LatencyTable(DEVICE, tuple(rows))
    on = table.prices.find(PriceKey("block", "mb4d", (("ffn_dim", 192),), "7x7", 48, 48))
    off = table.prices.find(PriceKey("block", "mb4d", (("ffn_dim", 96),), "7x7", 48, 48))
    assert on is not None
    assert off is not None
    assert (on.kind, off.kind) == ("interpolated", "extrapolated")
    assert on.latency_ms == pytest.approx(48)


def test_whole_space_is_checked_before_a_run() -> None:
    full = table_for(space_components(SPACE))
    assert missing_components(SPACE, full) == ()
    require_prices(SPACE, full)
    lacking = table_for(space_components(SPACE), lambda key: key.type != "mb3d")
    missing = missing_components(SPACE, lacking)
    assert [key.width_in for key in missing] == [32, 48, 64, 80, 96]
    assert {key.type for key in missing} == {"mb3d"}
    with pytest.raises(MissingLatencyError, match=r"search space small: .* and 2 more; measure"):
        require_prices(SPACE, lacking)


def test_space_components_are_those_of_its_networks() -> None:
    listed = {price_key(component) for component in space_components(SPACE)}
    seen = set()
    for seed in range(400):
        seen |= {price_key(component) for component in walk(random_network(seed))}
    assert seen <= listed
    assert len(listed) == 3 + 3 + 14 + 5 + 5 + 5  # stems, blocks, 15 - 1 downsamples, ..., heads
    assert len(seen) == len(listed)


def test_interval_is_the_stated_error_else_that_of_the_timings() -> None:
    network = random_network(2)
    bare = estimate(network, table_for(space_components(SPACE)))
    # standard error of the median of 16 with IQR 0.001, repeated rows wrong together
    error = 1.2533 * 0.001 / 1.349 / 4
    keys = [price_key(component) for component in walk(network)]
    deviation = math.sqrt(sum((keys.count(key) * error) ** 2 for key in set(keys)))
    half = bare.interval_ms[1] - bare.latency_ms
    assert half == pytest.approx(1.6448536 * deviation, rel=1e-5)
    assert bare.latency_ms - bare.interval_ms[0] == pytest.approx(half)
    assert bare.level == 0.9
    stated = IntervalInfo(level=0.9, low_percent=5, high_percent=10, basis="held-out networks")
    wide = estimate(network, table_for(space_components(SPACE), interval=stated))
    below, above = wide.latency_ms - wide.interval_ms[0], wide.interval_ms[1] - wide.latency_ms
    assert below == pytest.approx(0.05 * wide.latency_ms)
    assert above == pytest.approx(0.10 * wide.latency_ms)
