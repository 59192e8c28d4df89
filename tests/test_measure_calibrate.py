"""Calibration: the closed forms against refits and plain least squares, and known distortions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from measure_fakes import CALL_MS, FakeMachine, FakeRuntime, part_ms, small_space

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import Component, walk
from slimnas.errors import MissingLatencyError
from slimnas.latency import OVERHEAD, LatencyTable, estimate, latency_ms, price_key
from slimnas.measure import calibrate as calibrate_module
from slimnas.measure.calibrate import NetworkTiming, _Problem, calibrate, row_shares
from slimnas.measure.plan import make_plan
from slimnas.measure.results import Timing, make_prior
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Protocol
from slimnas.measure.visits import time_networks

SPACE = small_space()
Truth = Callable[[Component], float]


def networks(count: int, seed: int = 1) -> list[Architecture]:
    rng = random.Random(seed)
    found = {}
    while len(found) < count:
        one = SPACE.architecture(SPACE.random(rng))
        found[one.digest] = one
    return list(found.values())


def prior() -> LatencyTable:
    """The additive machine's table of isolated parts, every width of them."""
    every = [one for group in SpaceScope(SPACE).grid().groups.values() for one in group.values()]
    plan = make_plan(SpaceScope(SPACE), components=every)
    part = {price_key(one): part_ms(one) for one in every}
    found = {}
    for entry in plan.components:
        assert entry.key is not None
        ms = part[entry.key]
        found[entry.name] = Timing(ms, 0.01 * ms, ms, ms, 12)
    found["nothing"] = Timing(CALL_MS, 1e-4, CALL_MS, CALL_MS, 12)
    return make_prior(plan, found)


def measured(
    architectures: list[Architecture], truth: Truth, *, noise: float = 0.0
) -> list[NetworkTiming]:
    rng = random.Random(5)
    found = []
    for one in architectures:
        ms = CALL_MS + sum(map(truth, walk(one)))
        found.append(NetworkTiming(one, ms * (1 + rng.gauss(0, noise)), noise * ms / 3))
    return found


def colder(component: Component) -> float:
    """Truth: the last stage takes 30 % longer in a network than alone, the rest 5 %."""
    return part_ms(component) * (1.3 if component.stage == 1 else 1.05)


def worst(table: LatencyTable, seen: list[NetworkTiming]) -> float:
    return max(abs(latency_ms(one.architecture, table) / one.latency_ms - 1) for one in seen)


def test_networks_that_agree_change_nothing() -> None:
    before = prior()
    after = calibrate(before, measured(networks(20), part_ms)).table
    assert [row.key for row in after.rows] == [row.key for row in before.rows]
    for row in after.rows:
        assert row.latency_ms == pytest.approx(before.by_key[row.key].latency_ms, rel=0.02)
        assert row.kind == "fitted"


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.01), (0.01, 0.03)])
def test_known_distortion_is_taken_out(noise: float, allowed: float) -> None:
    seen = measured(networks(40), colder, noise=noise)
    fresh = measured(networks(30, seed=2), colder)
    table = calibrate(prior(), seen).table
    assert worst(prior(), fresh) > 0.1
    assert worst(table, fresh) < allowed


def test_leaving_out_in_closed_form_is_leaving_out() -> None:
    """With the scales chosen once, a refit without one network predicts it the same."""
    seen = measured(networks(12), colder, noise=0.02)
    fit = calibrate(prior(), seen)
    keys = [row.key for row in prior().rows if row.key != OVERHEAD]
    checked = 0
    for i, one in enumerate(seen):
        others = seen[:i] + seen[i + 1 :]
        problem = _Problem.of(prior(), keys, CALL_MS, others)
        problem = replace(
            problem, call_scale_ms=_Problem.of(prior(), keys, CALL_MS, seen).call_scale_ms
        )
        offset, corrections = problem.posterior(fit.common, fit.own)
        shares = row_shares(one.architecture, prior())
        ms = CALL_MS + offset
        for key, d in zip(keys, corrections, strict=True):
            ms += shares.get(key, 0.0) * prior().by_key[key].latency_ms * (1 + d)
        assert fit.left_out_ms[i] == pytest.approx(ms, rel=1e-6)
        checked += 1
    assert checked == 12


def test_correction_is_the_ridge_of_its_formula() -> None:
    """Against numpy's least squares of the lines stacked on the penalty."""
    seen = measured(networks(25), colder, noise=0.005)
    keys = [row.key for row in prior().rows if row.key != OVERHEAD]
    problem = _Problem.of(prior(), keys, CALL_MS, seen)
    offset, corrections = problem.posterior(0.1, 0.1)
    inverse = np.linalg.inv(problem.covariance(0.1, 0.1))
    penalty = np.linalg.cholesky(inverse).T
    lines = np.column_stack([problem.call, problem.parts]) / problem.noise[:, None]
    first = np.zeros((1, len(keys) + 1))
    first[0, 0] = 1 / problem.call_scale_ms
    rest = np.column_stack([np.zeros(len(keys)), penalty])
    wanted = np.concatenate([problem.missing / problem.noise, np.zeros(len(keys) + 1)])
    found = np.linalg.lstsq(np.vstack([lines, first, rest]), wanted, rcond=None)[0]
    assert offset == pytest.approx(found[0], abs=1e-9)
    np.testing.assert_allclose(corrections, found[1:], atol=1e-7)


def test_prices_stay_positive_whatever_the_networks_say() -> None:
    seen = measured(networks(30), lambda part: part_ms(part) * (0.02 if part.stage else 2.0))
    table = calibrate(prior(), seen).table
    for row in table.rows:
        before = prior().by_key[row.key].latency_ms
        assert (
            row.latency_ms
            >= (0.999 * calibrate_module.LEAST if row.key != OVERHEAD else 1) * before
        )
    assert len(table.rows) == len(prior().rows)


def test_too_few_networks_and_parts_without_a_price_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 networks, got 2"):
        calibrate(prior(), measured(networks(2), part_ms))
    rows = tuple(row for row in prior().rows if row.key.type != "mb3d")
    with pytest.raises(
        MissingLatencyError, match=r"no price for stages\.1\.blocks\.\d: block mb3d"
    ):
        calibrate(LatencyTable(prior().device, rows), measured(networks(20), part_ms))


def test_shares_of_rows_add_up_to_the_estimate() -> None:
    table = prior()
    checked = 0
    for one in networks(20):
        shares = row_shares(one, table)
        total = sum(share * table.by_key[key].latency_ms for key, share in shares.items())
        assert total + CALL_MS == pytest.approx(estimate(one, table).latency_ms, rel=1e-12)
        checked += len(shares)
    assert checked > 100


def test_networks_are_timed_beside_the_reference() -> None:
    machine = FakeMachine(pace=lambda now: 1.0 + 0.02 * (int(now * 20) % 2))
    wanted = networks(5)
    protocol = Protocol(rounds=2, passes=2, visit_ms=0.5, sample_ms=0.1)
    reference = SpaceScope(SPACE).reference(random.Random(0))
    found, pace_ms = time_networks(
        wanted,
        FakeRuntime(),  # type: ignore[arg-type]  # the fake machine loads
        protocol,
        reference=reference,
        loader=machine.loader,
        clocks=machine.clocks,
    )
    assert [one.architecture for one in found] == wanted
    truth = [CALL_MS + sum(part_ms(part) for part in walk(one)) for one in wanted]
    for one, ms in zip(found, truth, strict=True):
        assert one.latency_ms == pytest.approx(ms, rel=0.03)
    assert pace_ms == pytest.approx(CALL_MS + sum(map(part_ms, reference)), rel=0.03)
    assert fmean(one.error_ms for one in found) < 0.02
