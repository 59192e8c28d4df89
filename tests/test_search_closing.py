"""Found networks are measured until they are on target: on devices whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from closing_cases import (
    TRUTHS,
    Case,
    FakeMeter,
    Truth,
    largest_ms,
    noisy,
    slower,
    tiny,
    tiny_table,
)

from slimnas.arch.architecture import Architecture
from slimnas.errors import RunFolderError, UnreachableTargetError
from slimnas.latency.estimate import estimate, latency_ms
from slimnas.search.closing import MOST, Answer
from slimnas.search.measurements import Measurement, MeasurementLog
from slimnas.search.run import _measuring
from slimnas.search.trajectory import Trajectory

SHARES = (0.7, 0.5, 0.3)


def targets(truth: Truth) -> list[float]:
    return [share * largest_ms(truth) for share in SHARES]


@pytest.mark.parametrize("name", list(TRUTHS))
def test_measured_networks_are_on_target(name: str, tmp_path: Path) -> None:
    """At or below the target and above 0.97 of it, however the table errs."""
    truth = TRUTHS[name]
    meter = FakeMeter(truth)
    case = Case(tmp_path, meter)
    loop = case.loop()
    answers = loop.run(targets(truth))
    rounds = 0
    for answer, target_ms in zip(answers, targets(truth), strict=True):
        assert answer.target_ms == target_ms
        assert answer.measurement == answer.rounds[-1]
        architecture = tiny().architecture(loop.walk.trajectory.states[answer.steps][0])
        assert answer.measurement.architecture == architecture.digest
        assert answer.measurement.measured_ms == truth(architecture)
        assert 0.97 <= answer.measurement.share <= 1
        priced = estimate(architecture, answer.table)
        assert answer.measurement.predicted_ms == priced.latency_ms
        assert answer.measurement.interval_ms == priced.interval_ms
        assert all(not 0.97 <= one.share <= 1 for one in answer.rounds[:-1])
        assert [one.number for one in answer.rounds] == list(range(1, len(answer.rounds) + 1))
        rounds += len(answer.rounds)
    assert rounds <= (3 if name == "exact" else 6)
    assert len(meter.timed) == len(set(meter.timed)) == rounds
    assert [one.architecture for one in case.told.after] == meter.timed
    assert case.told.before == [(one.target_ms, one.number) for one in case.told.after]
    log = MeasurementLog.load(case.measurements)
    assert log is not None
    assert list(log.measurements) == case.told.after
    assert Trajectory.load(case.trajectory) == loop.walk.trajectory


def summary(answers: tuple[Answer, ...]) -> list[object]:
    """Everything of the answers that can be compared."""
    return [(a.target_ms, a.steps, a.measurement, a.rounds, a.table.rows) for a in answers]


def test_stopped_anywhere_and_gone_on(tmp_path: Path) -> None:
    """Stopped before any measurement and after any step, again and again: the same end."""
    whole = Case(tmp_path / "whole", FakeMeter(noisy))
    whole.folder.mkdir()
    expected = summary(whole.loop().run(targets(noisy)))
    measured = len(whole.told.after)
    steps = len(Trajectory.load(whole.trajectory).steps)
    assert measured >= 4
    stops = 0
    for moment in [*range(measured), *(f"step {i}" for i in range(1, steps, 4))]:
        folder = tmp_path / str(moment).replace(" ", "")
        folder.mkdir()
        left = int(moment.split()[1]) if isinstance(moment, str) else steps + 1

        def evaluated() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        fail_after = moment if isinstance(moment, int) else None
        with pytest.raises(KeyboardInterrupt):
            Case(folder, FakeMeter(noisy, fail_after)).loop(evaluated).run(targets(noisy))
        again = Case(folder, FakeMeter(noisy))
        assert summary(again.loop().run(targets(noisy))) == expected
        for name in ("trajectory", "measurements"):
            assert getattr(again, name).read_bytes() == getattr(whole, name).read_bytes()
        stops += 1
    assert stops >= measured + 5


def test_out_of_reach_nothing_is_measured(tmp_path: Path) -> None:
    """Then the table alone decides, and the whole range up to the target is used."""
    case = Case(tmp_path, None)
    loop = case.loop()
    for target_ms, answer in zip(
        targets(latency_by_table), loop.run(targets(latency_by_table)), strict=True
    ):
        assert answer.measurement is None
        assert answer.rounds == ()
        assert answer.table is tiny_table()
        predicted = loop.walk.trajectory.states[answer.steps][1]
        assert 0.97 * target_ms <= predicted <= target_ms
        assert loop.aim(target_ms).high_ms == target_ms
    assert not case.measurements.exists()


def latency_by_table(architecture: Architecture) -> float:
    return latency_ms(architecture, tiny_table())


def test_what_was_measured_holds_where_the_device_is_out_of_reach_now(tmp_path: Path) -> None:
    known = Case(tmp_path, FakeMeter(slower)).loop().run(targets(slower))
    again = Case(tmp_path, None).loop().run(targets(slower))
    assert summary(again) == summary(known)
    path = tmp_path / "measurements.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:2]))
    some = Case(tmp_path, None).loop().run(targets(slower))
    assert some[0].measurement is not None  # the best that was measured
    assert [answer.measurement for answer in some[1:]] == [None, None]


def test_another_runtime_measures_nothing_for_this_run(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    first = FakeMeter(slower)
    log, meter = _measuring(path, first)
    assert meter is first
    assert log == MeasurementLog.load(path)
    assert _measuring(path, first) == (log, first)
    kept, reason = _measuring(path, FakeMeter(slower, version="2"))
    assert kept == log
    assert reason == (
        f"{path} was measured with version '1', now it is '2'; give another --output to measure "
        "anew"
    )
    assert _measuring(path, "--no-measure was given") == (log, "--no-measure was given")
    assert _measuring(tmp_path / "none", "why") == (None, "why")


def test_without_filling_up_any_network_that_meets_the_target_answers_it(tmp_path: Path) -> None:
    """The paper's way: slimming alone, but still measured."""
    case = Case(tmp_path, FakeMeter(slower), fill=0.0)
    loop = case.loop()
    for answer in loop.run(targets(slower)):
        assert answer.measurement is not None
        assert answer.measurement.share <= 1
        assert loop.aim(10.0).low_ms == 0
    latencies = [latency for _, latency, _ in loop.walk.trajectory.states[:5]]
    assert latencies == sorted(latencies, reverse=True)
    assert {step.phase for step in loop.walk.trajectory.steps} == {"slim"}
    corrections = [step.corrections for step in loop.walk.trajectory.steps]
    assert corrections == sorted(corrections)
    assert corrections[0] == 0
    assert corrections[-1] > 0


def test_a_target_the_device_cannot_meet(tmp_path: Path) -> None:
    """The table says it can: no traceback, no endless search, the fastest network as the answer."""
    smallest = min(latency_by_table(tiny().architecture(one)) for one in tiny().smallest())
    loop = Case(tmp_path, FakeMeter(slower)).loop()
    (answer,) = loop.run([1.05 * smallest])
    assert answer.measurement is not None
    assert answer.measurement.share > 1
    assert 1 <= len(answer.rounds) <= MOST
    assert answer.measurement.measured_ms == min(one.measured_ms for one in answer.rounds)
    with pytest.raises(UnreachableTargetError, match="no action saves time below"):
        Case(tmp_path / "other", FakeMeter(slower)).loop().run([0.9 * smallest])


def test_a_device_that_no_table_describes_ends_after_a_handful(tmp_path: Path) -> None:
    """Latencies that jump by 30 % from network to network: the slowest that meets the target."""

    def wild(architecture: Architecture) -> float:
        return latency_by_table(architecture) * (
            1.3 if int(architecture.digest[:4], 16) % 2 else 0.7
        )

    meter = FakeMeter(wild)
    (answer,) = Case(tmp_path, meter).loop().run([0.5 * largest_ms(latency_by_table)])
    assert len(meter.timed) <= MOST
    shares = [one.share for one in answer.rounds]
    assert answer.measurement is not None
    meeting = [share for share in shares if share <= 1]
    assert answer.measurement.share == (max(meeting) if meeting else min(shares))


def test_the_largest_network_may_be_the_answer(tmp_path: Path) -> None:
    loop = Case(tmp_path, FakeMeter(slower)).loop()
    (answer,) = loop.run([2 * largest_ms(slower)])
    assert answer.steps == 0
    assert answer.measurement is not None
    assert answer.measurement.measured_ms == largest_ms(slower)
    assert len(answer.rounds) == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"schema": "slimnas/search-measurements/1"', '"schema": "x"', "schema: must be"),
        ('"measured_ms"', '"measured"', "not measurements of a search"),
        ("{", "", "not measurements of a search"),
    ],
)
def test_damaged_measurements_are_one_line(tmp_path: Path, old: str, new: str, reason: str) -> None:
    case = Case(tmp_path, FakeMeter(slower))
    case.loop().run(targets(slower)[:1])
    text = case.measurements.read_text()
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
    case.measurements.write_text(text.replace(old, new))
    with pytest.raises(RunFolderError, match=reason) as caught:
        MeasurementLog.load(case.measurements)
    assert str(case.measurements) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_measurement_tells_what_it_means() -> None:
    log = MeasurementLog(Path("none"), {})
    assert log.find(1.0, 1) is None
    one = measurement()
    assert one.share == 1.1
    assert one.off_percent == pytest.approx(10)
    assert one.is_inside
    assert not replace(one, measured_ms=2.41).is_inside
    assert not replace(one, measured_ms=1.79).is_inside


def measurement() -> Measurement:
    return Measurement(2.0, 1, 3, "ab", 2.0, (1.8, 2.4), 2.2, 0.01, 1.0, "2026-01-01")
