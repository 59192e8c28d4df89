"""The plan of a build: every component of a space can be priced by what it times."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from made_up_device import made_up_device
from measure_fakes import cost_ms, part_ms

from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import walk
from slimnas.latency import LatencyTable, PriceRow, missing_components, price_key
from slimnas.latency.spaces import space_components
from slimnas.measure.plan import make_plan
from slimnas.measure.scope import WIDTH_RATIO, SpaceScope, knots

DEVICE = made_up_device("fake")


def count_keys(space: SearchSpace) -> int:
    """Stems, blocks, widening downsamples and heads of a space, counted from its ranges."""
    widths = [stage.width.values for stage in space.stages]
    blocks = sum(len(stage.blocks) * len(stage.width.values) for stage in space.stages)
    pairs = sum(
        width_in <= width_out
        for before, after in pairwise(widths)
        for width_in in before
        for width_out in after
    )
    return len(widths[0]) + blocks + pairs + len(widths[-1])


@pytest.mark.parametrize(
    ("name", "entries"),
    [("efficientformer_tiny", 97), ("efficientformer_small", 107), ("efficientformer", 129)],
)
def test_planned_rows_price_the_whole_space(name: str, entries: int) -> None:
    space = SearchSpace.load(name)
    plan = make_plan(SpaceScope(space))
    rows = [PriceRow(entry.key, 1.0, 0.0, 1, "measured") for entry in plan.components if entry.key]
    table = LatencyTable(DEVICE, tuple(rows))
    assert len(rows) == len(plan.components) == entries
    assert len({price_key(part) for part in space_components(space)}) == count_keys(space)
    assert missing_components(space, table) == ()
    for classes in (2, 10, 37, 1000):
        assert missing_components(space.with_classes(classes), table) == ()
    rng = random.Random(1)
    for _ in range(50):
        network = space.architecture(space.random(rng))
        assert missing_components(list(walk(network)), table) == ()


def test_terms_of_additive_networks_add_up_to_the_component() -> None:
    space = SearchSpace.load("efficientformer_tiny")
    prices = {price_key(part): part_ms(part) for part in space_components(space)}
    seen: dict[str, int] = {}
    for entry in make_plan(SpaceScope(space), chains=(2, 5)).components:
        assert entry.key is not None
        if entry.key not in prices:  # a narrowing downsample, a head of 2 classes
            assert entry.key.width_in > entry.key.width_out
            continue
        total = sum(term.share * cost_ms(term.parts) for term in entry.terms)
        assert total == pytest.approx(prices[entry.key], rel=1e-9)
        seen[entry.key.component] = seen.get(entry.key.component, 0) + 1
    assert seen == {"stem": 4, "block": 33, "downsample": 39, "head": 6}


def test_neighbours_stand_in_execution_order() -> None:
    for entry in make_plan(SpaceScope(SearchSpace.load("efficientformer_tiny"))).components:
        for term in entry.terms:
            for one, following in pairwise(term.parts):
                assert one.output == following.input


def test_networks_differ_and_follow_the_seed() -> None:
    space = SearchSpace.load("efficientformer_tiny")
    plan = make_plan(SpaceScope(space), calibration=3, held_out=5, seed=4)
    digests = [one.digest for one in (*plan.calibration, *plan.held_out)]
    assert len(plan.calibration) == 3
    assert len(set(digests)) == 8
    again = make_plan(SpaceScope(space), calibration=3, held_out=5, seed=4)
    assert again == plan
    assert (
        make_plan(SpaceScope(space), seed=5).held_out
        != make_plan(SpaceScope(space), seed=4).held_out
    )
    assert len({entry.name for entry in plan.entries}) == len(plan.entries)


@pytest.mark.parametrize("values", [range(16, 65, 16), range(128, 513, 16), range(48, 49), (8, 96)])
def test_knots_keep_the_ends_and_the_ratio(values: range) -> None:
    found = knots(tuple(values), WIDTH_RATIO)
    assert found[0] == values[0]
    assert found[-1] == values[-1]
    assert set(found) <= set(values)
    for low, high in pairwise(found):
        between = [value for value in values if low < value < high]
        assert high / low <= WIDTH_RATIO * 1.15 or not between
