"""The timing protocol on a simulated machine whose every cost is known."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
from measure_fakes import FakeMachine, part_ms, small_space

from slimnas.errors import LatencyTableError
from slimnas.measure.journal import Visit
from slimnas.measure.plan import Entry, make_plan
from slimnas.measure.results import Timing, timings
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Call, Protocol, Round, Stopwatch

PROTOCOL = Protocol(rounds=5, visit_ms=2.0)
PLAN = make_plan(SpaceScope(small_space()))
BLOCK = next(entry for entry in PLAN.components if entry.key and entry.key.component == "block")


def visit(machine: FakeMachine, entry: Entry, protocol: Protocol = PROTOCOL) -> Visit:
    stopwatch = Stopwatch(protocol, machine.loader(PLAN.reference), machine.clocks)
    stopwatch.prime()
    calls = [machine.loader(term.parts) for term in entry.terms]
    return Visit(entry.name, 0, stopwatch.rounds(calls, name="entry", rng=random.Random(0)))


def timing(machine: FakeMachine, entry: Entry) -> Timing:
    return timings([entry], [visit(machine, entry)])[entry.name]


@pytest.mark.parametrize("entry", PLAN.components, ids=lambda entry: entry.name)
def test_differencing_recovers_the_cost_of_a_component(entry: Entry) -> None:
    component = {part.name: part for term in entry.terms for part in term.parts if term.share > 0}
    own = [part for part in component.values() if part.kind == entry.name.split()[0]]
    found = timing(FakeMachine(), entry)
    wanted = part_ms(own[0]) if own[0].kind != "block" else part_ms(entry.terms[0].parts[0])
    assert found.latency_ms == pytest.approx(wanted, rel=1e-6)
    assert found.n == PROTOCOL.rounds


def test_noise_shows_in_the_spread_and_hardly_in_the_median() -> None:
    found = timing(FakeMachine(noise=0.02), BLOCK)
    wanted = part_ms(BLOCK.terms[0].parts[0])
    assert found.latency_ms == pytest.approx(wanted, rel=0.05)
    assert 0 < found.spread_ms < 0.1 * wanted
    assert found.error_ms < found.spread_ms


def test_rounds_with_a_drifted_reference_are_rejected() -> None:
    def bursts(now: float) -> float:
        return 1.5 if now > 100.1 and int(now * 20) % 3 == 0 else 1.0

    machine = FakeMachine(pace=bursts)
    rounds = visit(machine, BLOCK, replace(PROTOCOL, rounds=40)).rounds
    rejected = [one for one in rounds if not one.accepted]
    accepted = [one for one in rounds if one.accepted]
    assert len(rejected) > 3
    assert len(accepted) == 40
    usual = median(one.pace for one in accepted)
    assert all(abs(ms / usual - 1) <= 0.05 for one in accepted for ms in one.reference_ms)
    assert all(max(abs(ms / usual - 1) for ms in one.reference_ms) > 0.05 for one in rejected)
    found = timings([BLOCK], [Visit(BLOCK.name, 0, rounds)])[BLOCK.name]
    assert found.n == 40
    assert found.latency_ms == pytest.approx(part_ms(BLOCK.terms[0].parts[0]), rel=0.02)


def test_accepted_rounds_are_scaled_to_one_pace() -> None:
    def at(pace: float) -> Round:
        return Round((pace - 0.01, pace + 0.01), ((7.0 * pace,), (1.0 * pace,)), True)

    visits = [Visit(BLOCK.name, 0, (at(0.96), at(1.0), at(1.04), at(1.04), at(1.0)))]
    found = timings([BLOCK], visits)[BLOCK.name]
    assert found.spread_ms == pytest.approx(0, abs=1e-9)
    assert found.latency_ms == pytest.approx((7.0 - 1.0) / 3, abs=1e-9)


def test_rejected_rounds_count_for_nothing() -> None:
    good = Round((1.0, 1.0), ((2.0,), (1.0,)), True)
    bad = Round((9.0, 9.0), ((90.0,), (1.0,)), False)
    given_up = Round((9.0, 9.0), (), False)
    found = timings([BLOCK], [Visit(BLOCK.name, 0, (bad, good, given_up))])[BLOCK.name]
    assert (found.latency_ms, found.n) == (pytest.approx((2.0 - 1.0) / 3), 1)


def test_lasting_change_of_pace_is_followed() -> None:
    machine = FakeMachine(pace=lambda now: 1.3 if now > 100.5 else 1.0)
    rounds = visit(machine, BLOCK, replace(PROTOCOL, rounds=30)).rounds
    paces = [one.pace for one in rounds if one.accepted]
    assert max(paces) / min(paces) == pytest.approx(1.3, rel=0.01)
    assert any(not one.accepted for one in rounds)


def test_machine_that_never_stands_still_is_too_busy() -> None:
    machine = FakeMachine()
    machine.pace = lambda now: 1.0 + 10 * (now - 100.0)  # ever slower
    with pytest.raises(LatencyTableError, match=r"entry: .* the machine is too busy") as caught:
        visit(machine, BLOCK, replace(PROTOCOL, max_drift=0.001, patience_s=5.0))
    assert "\n" not in str(caught.value)


def test_warm_up_waits_until_calls_settle() -> None:
    machine = FakeMachine()

    def slow_at_first(ms: float) -> Call:
        calls = 0

        def call() -> None:
            nonlocal calls
            calls += 1
            machine.spend(ms * (1 + 8 * 0.8**calls))

        return call

    stopwatch = Stopwatch(PROTOCOL, machine.loader(PLAN.reference), machine.clocks)
    stopwatch.prime()
    rounds = stopwatch.rounds([slow_at_first(1.0)], name="x", rng=random.Random(0))
    samples = [ms for one in rounds for ms in one.samples_ms[0]]
    assert max(samples) < 1.03
    assert min(len(one.samples_ms[0]) for one in rounds) >= 3


def test_fast_networks_are_called_often_enough_for_the_timer() -> None:
    machine = FakeMachine()
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        machine.spend(0.001)

    stopwatch = Stopwatch(PROTOCOL, machine.loader(PLAN.reference), machine.clocks)
    stopwatch.prime()
    (one, *_) = stopwatch.rounds([call], name="x", rng=random.Random(0))
    assert one.samples_ms[0][0] == pytest.approx(0.001, rel=1e-3)
    assert calls > 1000 * len(one.samples_ms[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_busy_threads_are_counted(threads: int) -> None:
    machine = FakeMachine(threads=threads)
    stopwatch = Stopwatch(PROTOCOL, machine.loader(PLAN.reference), machine.clocks)
    assert stopwatch.busy_threads() == pytest.approx(threads)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds and passes must be at least 1, got 0"),
        ({"max_drift": 0.0}, "max_drift must be a share"),
        ({"chains": (3, 3)}, "chains must be two growing lengths"),
        ({"clock": "sun"}, "clock must be wall or cpu, got 'sun'"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LatencyTableError, match=message):
        Protocol(**wrong)
