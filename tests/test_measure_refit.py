"""A table corrected by a few measured networks: they come out as measured, others follow."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from micro import made_up_table, micro_space

from slimnas.arch.architecture import Architecture
from slimnas.latency.estimate import estimate, latency_ms
from slimnas.latency.keys import OVERHEAD
from slimnas.latency.rows import PriceRow
from slimnas.latency.table import IntervalInfo, LatencyTable
from slimnas.measure.calibrate import NetworkTiming, row_shares
from slimnas.measure.refit import TIMING, refitted

SPACE = micro_space()
BARE = made_up_table(SPACE)
TABLE = LatencyTable(BARE.device, (*BARE.rows, PriceRow(OVERHEAD, 0.02, 0.001, 9, "measured")))


def networks(count: int, seed: int = 0) -> list[Architecture]:
    rng = random.Random(seed)
    found = {one.digest: one for one in (SPACE.architecture(SPACE.random(rng)) for _ in range(200))}
    return list(found.values())[:count]


def timing(architecture: Architecture, factor: float, error: float = 1e-6) -> NetworkTiming:
    ms = factor * latency_ms(architecture, TABLE)
    return NetworkTiming(architecture, ms, error * ms)


@pytest.mark.parametrize("factor", [0.6, 0.9, 0.98, 1.0, 1.04, 1.3, 2.0])
@pytest.mark.parametrize("count", [1, 4])
def test_measured_networks_come_out_as_measured(factor: float, count: int) -> None:
    """Up to the error of a measurement, whatever the table said about its own."""
    known = [timing(one, factor) for one in networks(count)]
    corrected = refitted(TABLE, known)
    for one in known:
        assert latency_ms(one.architecture, corrected) == pytest.approx(one.latency_ms, rel=0.006)
    for one in networks(40, seed=1):  # all of them were off alike
        expected = factor * latency_ms(one, TABLE)
        assert latency_ms(one, corrected) == pytest.approx(
            expected, rel=0.35 * abs(factor - 1) + 1e-9
        )


def test_the_posterior_mean_by_other_means() -> None:
    """The same normal equations solved in the space of rows: (A'A/s2 + C^-1)^-1 A'y/s2."""
    known = [timing(one, f, 0.004) for one, f in zip(networks(3), (1.05, 0.97, 1.02), strict=True)]
    corrected = refitted(TABLE, known)
    keys = [row.key for row in TABLE.rows]
    weights = np.zeros((3, len(keys)))
    for line, one in zip(weights, known, strict=True):
        shares = {**row_shares(one.architecture, TABLE), OVERHEAD: 1.0}
        for key, share in shares.items():
            line[keys.index(key)] = share * TABLE.by_key[key].latency_ms
        line /= latency_ms(one.architecture, TABLE)
    kinds = [(key.component, key.type, key.resolution) for key in keys]
    prior = np.array([[1.0 + (a == b) for b in kinds] for a in kinds])
    # no interval is stated: 5 % or what was seen
    variance = max(0.05**2, np.mean([0.05**2, 0.03**2, 0.02**2]))
    prior *= variance / np.mean(np.diag(weights @ prior @ weights.T))
    # kinds that occur often make the prior singular; its square root does not mind
    root = np.linalg.cholesky(prior + 1e-12 * np.eye(len(keys)))
    noise = np.hypot(0.004, TIMING)
    design = weights @ root / noise
    seen = np.array([0.05, -0.03, 0.02]) / noise
    found = root @ np.linalg.solve(design.T @ design + np.eye(len(keys)), design.T @ seen)
    for row, before, correction in zip(corrected.rows, TABLE.rows, found, strict=True):
        assert row.latency_ms == pytest.approx(before.latency_ms * (1 + correction), rel=1e-5)


def test_a_table_that_is_sure_of_itself_is_moved_less_by_a_noisy_measurement() -> None:
    one = networks(1)[0]
    noisy = timing(one, 1.02, error=0.02)
    moved = []
    for percent in (1.0, 5.0, 20.0):
        interval = IntervalInfo(level=0.9, low_percent=percent, high_percent=percent, basis="x")
        stated = replace(TABLE, device=TABLE.device.model_copy(update={"interval": interval}))
        moved.append(latency_ms(one, refitted(stated, [noisy])) / latency_ms(one, TABLE))
    assert 1 < moved[0] < moved[1] < moved[2] < 1.02


def test_what_holds_more_of_what_was_wrong_moves_more() -> None:
    """An error seen with attention only is put down to attention."""
    counted = [SPACE.architecture(SPACE.largest(count)) for count in range(4)]
    corrected = refitted(TABLE, [timing(counted[0], 1.0), timing(counted[3], 1.05)])
    moved = [latency_ms(one, corrected) / latency_ms(one, TABLE) for one in counted]
    assert moved == sorted(moved)
    assert moved[0] == pytest.approx(1.0, abs=0.005)
    assert moved[3] == pytest.approx(1.05, abs=0.005)
    assert 1.01 < moved[1] < moved[2] < 1.04


def test_order_does_not_matter_and_nothing_measured_changes_nothing() -> None:
    known = [timing(one, f) for one, f in zip(networks(4), (1.1, 0.9, 1.2, 1.0), strict=True)]
    there, back = refitted(TABLE, known), refitted(TABLE, known[::-1])
    for a, b in zip(there.rows, back.rows, strict=True):
        assert a.latency_ms == pytest.approx(b.latency_ms)
    assert refitted(TABLE, []) is TABLE


def test_what_corrected_it_is_written_down_and_the_stated_error_stays(tmp_path: object) -> None:
    known = [timing(one, 1.07) for one in networks(2)]
    corrected = refitted(TABLE, known)
    notes = corrected.device.notes[len(TABLE.device.notes) :]
    assert len(notes) == 2
    for one, note in zip(known, notes, strict=True):
        assert one.architecture.digest[:12] in note
        assert f"measured {one.latency_ms:.4f} ms" in note
        assert "+7.00 %" in note
    assert corrected.device.model_copy(update={"notes": TABLE.device.notes}) == TABLE.device
    assert [row.key for row in corrected.rows] == [row.key for row in TABLE.rows]
    assert {row.kind for row in corrected.rows} == {"fitted"}
    assert estimate(networks(1)[0], corrected).latency_ms > 0


def test_prices_stay_positive() -> None:
    corrected = refitted(TABLE, [timing(one, 0.01) for one in networks(3)])
    for row in corrected.rows:
        assert row.latency_ms >= 0.19 * TABLE.by_key[row.key].latency_ms
