"""How sure a table is: the interval of its estimates, and prices lost in noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
from measure_fakes import FakeMachine, FakeRuntime, small_space

from slimnas.errors import LatencyTableError
from slimnas.latency import LatencyTable, estimate
from slimnas.measure.build import SAMPLES_FILE, BuildJob, build_table
from slimnas.measure.journal import Visit, read_journal
from slimnas.measure.plan import Plan
from slimnas.measure.results import Timing, load_latencies, make_prior, make_table, timings
from slimnas.measure.schedule import Networks, timed_plan
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Protocol

PROTOCOL = Protocol(rounds=2, passes=2, visit_ms=0.5, sample_ms=0.1)
Change = Callable[[Visit], Visit]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatencyTable, Plan, list[Visit]]:
    """A table of a machine without noise, its plan and its visits."""
    folder = tmp_path_factory.mktemp("tables") / "fake"
    machine, scope, networks = FakeMachine(), SpaceScope(small_space()), Networks(8, 12)
    job = BuildJob(folder, scope, PROTOCOL, networks=networks)
    table = build_table(job, FakeRuntime(1), loader=machine.loader, clocks=machine.clocks).table
    _, visits = read_journal(folder / SAMPLES_FILE)
    return table, timed_plan(scope, PROTOCOL, networks, visits), visits


def slowed(visit: Visit, factor: float) -> Visit:
    """The same visit, every sample longer by a factor."""
    rounds = (
        replace(one, samples_ms=tuple(tuple(factor * ms for ms in term) for term in one.samples_ms))
        for one in visit.rounds
    )
    return replace(visit, rounds=tuple(rounds))


def one_load_slow(visit: Visit) -> Visit:
    """Every network's second load is 4 % slower than the first, by its place in memory, say."""
    slow = visit.entry.startswith("network ") and visit.number == 1
    return slowed(visit, 1.04) if slow else visit


def test_interval_is_for_a_network_loaded_once(
    built: tuple[LatencyTable, Plan, list[Visit]],
) -> None:
    table, plan, visits = built
    changed = [one_load_slow(visit) for visit in visits]
    anew, checks = make_table(plan, changed, table.device)
    interval = anew.device.interval
    assert interval is not None
    assert "20 networks the prices had not seen, each load on its own" in interval.basis
    # The prices follow the median over loads, 2 % up, which every network's own median meets.
    assert anew.device.errors[0].max_percent < 1.0
    assert interval.high_percent == pytest.approx(2.5, abs=0.6)
    assert len(checks) == 12
    loads = load_latencies([check.architecture for check in checks], changed)
    for check in checks:
        first, second = loads[check.architecture.digest]
        assert second == pytest.approx(1.04 * first, rel=1e-4)
        assert check.measured_ms == pytest.approx(median([first, second]), rel=1e-3)
        assert estimate(check.architecture, anew).latency_ms == check.predicted_ms


def test_without_differences_between_loads_the_interval_is_that_of_the_medians(
    built: tuple[LatencyTable, Plan, list[Visit]],
) -> None:
    table, plan, visits = built
    anew, checks = make_table(plan, visits, table.device)
    assert anew.device.interval == table.device.interval
    assert anew.device.errors == table.device.errors
    assert anew.device.interval is not None
    assert anew.device.interval.high_percent < 1.0
    assert sum(check.covered for check in checks) >= 10


def test_a_load_at_another_pace_counts_as_little_as_its_rounds(
    built: tuple[LatencyTable, Plan, list[Visit]],
) -> None:
    """A visit in which the reference was 20 % slower, and the network not."""
    table, plan, visits = built
    name = next(v.entry for v in visits if v.entry.startswith("network ") and v.number == 1)

    def disturbed(visit: Visit) -> Visit:
        if visit.entry != name or visit.number != 1:
            return visit
        slow = (
            replace(one, reference_ms=(1.2 * one.reference_ms[0], 1.2 * one.reference_ms[1]))
            for one in visit.rounds
        )
        return replace(visit, rounds=tuple(slow))

    changed = [disturbed(visit) for visit in visits]
    networks = [*plan.calibration, *plan.held_out]
    loads = load_latencies(networks, changed)
    assert sorted(map(len, loads.values())) == [1] + [2] * 19
    assert make_table(plan, changed, table.device)[0].device.interval is not None


@pytest.mark.parametrize(
    ("rounds", "errors"),
    [(2, 244.0), (6, 5.5), (100, 3.09)],  # of Student's t with 1, 5 and 99 degrees of freedom
)
def test_a_negative_price_is_wrong_only_beyond_what_its_rounds_can_tell(
    built: tuple[LatencyTable, Plan, list[Visit]], rounds: int, errors: float
) -> None:
    _, plan, visits = built
    found = timings(plan.entries, visits)
    head = next(entry for entry in plan.components if entry.name.startswith("head"))

    def price(standard_errors: float) -> Timing:
        spread_ms = 0.01
        error_ms = 1.2533 * spread_ms / 1.349 / math.sqrt(rounds)
        return Timing(-standard_errors * error_ms, spread_ms, 0.0, 0.0, rounds)

    lost = make_prior(plan, {**found, head.name: price(0.95 * errors)})
    assert head.key is not None
    assert lost.by_key[head.key].latency_ms == pytest.approx(price(0).error_ms)
    with pytest.raises(LatencyTableError, match=r"head .* comes out negative"):
        make_prior(plan, {**found, head.name: price(1.05 * errors)})
