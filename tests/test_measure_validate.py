"""Validating a table: on a simulated machine, whose networks cost what they are said to."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from measure_fakes import FakeMachine, FakeRuntime, cost_ms, small_space
from scipy import stats
from typer.testing import CliRunner

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import walk
from slimnas.cli.main import app
from slimnas.errors import LatencyTableError, RunFolderError, SlimnasError
from slimnas.latency import LatencyTable, estimate
from slimnas.latency.table import DeviceInfo, IntervalInfo
from slimnas.measure import visits as visits_module
from slimnas.measure.build import SAMPLES_FILE, BuildJob, build_table
from slimnas.measure.networks import Loader
from slimnas.measure.plan import network_entry
from slimnas.measure.restate import restated
from slimnas.measure.schedule import Networks
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Protocol
from slimnas.measure.validate import (
    JOURNAL_FILE,
    BuildRecord,
    ValidateJob,
    Validation,
    fresh_networks,
    require_measured_here,
    validate_table,
)
from slimnas.report.figures import NARROW_IN
from slimnas.report.validation import validation_document, validation_figure, write_validation

QUICK = Protocol(rounds=2, passes=2, visit_ms=0.5, sample_ms=0.1)
COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of an exact simulated machine."""
    path = tmp_path_factory.mktemp("tables") / "fake"
    machine = FakeMachine()
    wanted = BuildJob(path, SpaceScope(small_space()), QUICK, networks=Networks(6, 3))
    build_table(wanted, FakeRuntime(), loader=machine.loader, clocks=machine.clocks)
    return path


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> ValidateJob:
    record = BuildRecord.load(folder)
    table = LatencyTable.load(folder)
    output = tmp_path / "validation"
    return ValidateJob(table, record, record.scope, output, QUICK, networks=COUNT)


def run(job: ValidateJob, machine: FakeMachine | None = None, runtime: object = None) -> Validation:
    machine = machine or FakeMachine()
    used = runtime or FakeRuntime()
    return validate_table(job, used, loader=machine.loader, clocks=machine.clocks)  # type: ignore[arg-type]


def dearer(table: LatencyTable, factor: float, interval_percent: float) -> LatencyTable:
    """The same table with every price off by a factor, and an interval to hold it or not."""
    rows = tuple(
        replace(row, latency_ms=row.latency_ms * factor, spread_ms=0.0) for row in table.rows
    )
    interval = IntervalInfo(
        level=0.9, low_percent=interval_percent, high_percent=interval_percent, basis="by hand"
    )
    return replace(table, rows=rows, device=table.device.model_copy(update={"interval": interval}))


def test_record_of_the_build_says_what_the_table_is_for(job: ValidateJob) -> None:
    assert isinstance(job.record.scope, SpaceScope)
    assert job.record.scope.space == small_space()
    assert job.record.protocol == QUICK
    assert sum(name.startswith("network ") for name in job.record.timed) == 9
    reference = cost_ms(job.scope.reference(None))  # type: ignore[arg-type]
    assert job.record.reference_ms == pytest.approx(reference, abs=1e-6)


@pytest.mark.parametrize(
    ("factor", "interval_percent", "within", "covered"),
    [(1.0, 30.0, None, 100.0), (1.07, 30.0, 0.0, 100.0), (1.5, 5.0, 0.0, 0.0)],
)
def test_figures_are_those_of_the_predictions_and_the_truth(
    job: ValidateJob,
    factor: float,
    interval_percent: float,
    within: float | None,
    covered: float,
) -> None:
    table = dearer(job.table, factor, interval_percent)
    found = run(replace(job, table=table))
    assert len(found.checks) == found.figure.networks == COUNT
    predicted, truth, errors = [], [], []
    for check in found.checks:
        truth.append(cost_ms(tuple(walk(check.architecture))))
        predicted.append(estimate(check.architecture, table).latency_ms)
        errors.append(100 * (predicted[-1] / truth[-1] - 1))
        assert check.measured_ms == pytest.approx(truth[-1], rel=1e-5)
        assert check.predicted_ms == predicted[-1]
        low_ms, high_ms = check.interval_ms or (0.0, 0.0)
        assert low_ms == pytest.approx(predicted[-1] * (1 - interval_percent / 100))
        assert high_ms == pytest.approx(predicted[-1] * (1 + interval_percent / 100))
    figure = found.figure
    assert figure.mape_percent == pytest.approx(sum(map(abs, errors)) / COUNT, abs=2e-3)
    assert figure.bias_percent == pytest.approx(sum(errors) / COUNT, abs=2e-3)
    assert figure.max_percent == pytest.approx(max(map(abs, errors)), abs=2e-3)
    rank = stats.spearmanr(predicted, truth).statistic
    assert figure.spearman == pytest.approx(rank, abs=1e-4)
    five, ten = (100 * sum(abs(e) <= most for e in errors) / COUNT for most in (5, 10))
    assert figure.within_5_percent == pytest.approx(five, abs=1e-3)
    assert figure.within_10_percent == pytest.approx(ten, abs=1e-3)
    assert figure.coverage_percent == covered
    if within is not None:
        assert five == within


def test_another_pace_of_the_machine_is_told_apart_from_the_error(job: ValidateJob) -> None:
    """Everything takes 10 % longer than during the build, the reference too."""
    found = run(job, FakeMachine(pace=lambda _: 1.1))
    assert found.pace == pytest.approx(1.1, rel=1e-5)
    usual = run(replace(job, output=job.output.with_name("usual")))
    assert found.figure.mape_percent == pytest.approx(usual.figure.mape_percent, abs=2e-3)
    off = (1 + usual.figure.bias_percent / 100) / 1.1 - 1
    assert found.unscaled.bias_percent == pytest.approx(100 * off, abs=2e-3)
    assert found.repeat_percent == pytest.approx(0.0, abs=1e-3)


def test_pace_is_that_of_whole_networks_not_of_the_small_reference(job: ValidateJob) -> None:
    off = replace(job.record, reference_ms=1.1 * job.record.reference_ms)
    found = run(replace(job, record=off))
    assert found.pace == pytest.approx(1.0, rel=1e-5)
    assert len(off.anchors) == 6
    alone = replace(job, record=replace(off, anchors=()), output=job.output.with_name("alone"))
    assert run(alone).pace == pytest.approx(1 / 1.1, rel=1e-5)


def test_repeat_is_the_error_of_one_half_of_the_passes_against_the_other(job: ValidateJob) -> None:
    found = run(job, FakeMachine(noise=0.02))
    assert len(found.halves_ms) == COUNT
    by_hand = [abs(second / first - 1) for first, second in found.halves_ms]
    assert found.repeat_percent == pytest.approx(100 * sum(by_hand) / COUNT)
    assert max(by_hand) > 0
    once = run(replace(job, output=job.output / "once", protocol=replace(QUICK, passes=1)))
    assert once.halves_ms == ()
    assert once.repeat_percent is None


def test_networks_are_new_to_the_table_and_follow_from_the_seed(job: ValidateJob) -> None:
    timed = job.record.timed
    names = [network_entry(one).name for one in fresh_networks(job.scope, 12, 1, timed)]
    assert len(set(names)) == 12
    assert not set(names) & timed
    again = [network_entry(one).name for one in fresh_networks(job.scope, 12, 1, timed)]
    assert names == again
    other = [network_entry(one).name for one in fresh_networks(job.scope, 12, 2, timed)]
    assert set(names) != set(other)
    # the seed of the build draws the very networks it has timed: they are passed over
    drawn = [network_entry(one).name for one in fresh_networks(job.scope, 12, QUICK.seed)]
    assert set(drawn) & timed
    kept = {network_entry(one).name for one in fresh_networks(job.scope, 12, QUICK.seed, timed)}
    assert not kept & timed


class OneNetwork(SpaceScope):
    """A scope that draws the same network every time."""

    def network(self, rng: random.Random) -> Architecture:
        return self.space.architecture(self.space.largest())


def test_scope_without_untimed_networks_is_refused() -> None:
    scope = OneNetwork(small_space())
    (only,) = fresh_networks(scope, 2, 1)
    with pytest.raises(LatencyTableError, match="nothing is left to validate on"):
        fresh_networks(scope, 2, 1, {network_entry(only).name})


@pytest.mark.parametrize("loads", [1, 5, 12])
def test_interrupted_validation_goes_on_and_ends_the_same(job: ValidateJob, loads: int) -> None:
    whole = run(replace(job, output=job.output / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(job, FakeMachine(fail_after=loads))
    kept = loads - 1  # the reference is loaded too
    again = run(job)
    assert again.resumed == kept
    assert [one.architecture for one in again.checks] == [one.architecture for one in whole.checks]
    measured = [one.measured_ms for one in again.checks]
    assert measured == pytest.approx([one.measured_ms for one in whole.checks], rel=1e-5)
    machine = FakeMachine()
    finished = run(job, machine)
    assert machine.loads == 0
    assert finished.resumed == 2 * (COUNT + len(job.record.anchors)) == 24
    read_back = [one.measured_ms for one in finished.checks]
    assert read_back == pytest.approx(measured, rel=1e-5)  # the journal has nanoseconds


def test_folder_of_another_validation_is_kept_unless_forced(job: ValidateJob) -> None:
    run(job)
    before = (job.output / JOURNAL_FILE).read_bytes()
    other = replace(job, seed=2)
    with pytest.raises(LatencyTableError, match=r"its networks is seed 1, not 2.*--output"):
        run(other)
    assert (job.output / JOURNAL_FILE).read_bytes() == before
    changed = replace(job, table=dearer(job.table, 2.0, 5.0))
    with pytest.raises(LatencyTableError, match="its table is sha256"):
        run(changed)
    assert run(replace(other, force=True)).resumed == 0


def changed(job: ValidateJob, **device: object) -> ValidateJob:
    info = DeviceInfo.model_validate({**job.table.device.model_dump(), **device})
    return replace(job, table=replace(job.table, device=info))


def test_tables_of_other_machines_are_refused(job: ValidateJob) -> None:
    require_measured_here(job.table)
    for kind in ("estimated", "imported"):
        update = {"kind": kind, "interval": dearer(job.table, 1.0, 1.0).device.interval}
        with pytest.raises(LatencyTableError, match=f"fake: must be .* is the {kind} table of"):
            run(changed(job, **update))
    with pytest.raises(LatencyTableError, match="is of a PDP-11; validate it there"):
        run(changed(job, soc="PDP-11"))
    with pytest.raises(LatencyTableError, match="is for 4096 threads, this process may use"):
        run(changed(job, threads=4096))
    assert not job.output.exists()


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        (FakeRuntime(version="2"), "runtime version 1, here it is 2"),
        (FakeRuntime(name="other"), "runtime fake, here it is other"),
        (FakeRuntime(compute_unit="cuda:X"), "compute unit cpu, here it is cuda:X"),
        (FakeRuntime(dtype="bf16"), "number format fp32, here it is bf16"),
        (FakeRuntime(threads=2), "threads 1, here it is 2"),
    ],
)
def test_other_runtimes_are_refused(job: ValidateJob, runtime: FakeRuntime, said: str) -> None:
    with pytest.raises(LatencyTableError, match=f"^fake: was measured with {said}; .*--force'$"):
        run(job, runtime=runtime)
    assert not job.output.exists()


def test_samples_must_be_there_and_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match=f"{SAMPLES_FILE}: must hold a build's samples"):
        BuildRecord.load(tmp_path)
    packed = (folder / SAMPLES_FILE).read_bytes()
    (tmp_path / SAMPLES_FILE).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(LatencyTableError, match="must hold a build's samples"):
        BuildRecord.load(tmp_path)
    first, *rest = gzip.decompress(packed).splitlines(keepends=True)
    header = {**json.loads(first), "protocol": {"rounds": 2}}
    text = b"".join([json.dumps(header).encode() + b"\n", *rest])
    (tmp_path / SAMPLES_FILE).write_bytes(gzip.compress(text))
    with pytest.raises(LatencyTableError, match="protocol: must be one of this version"):
        BuildRecord.load(tmp_path)


def test_files_hold_every_network_and_the_figures(job: ValidateJob, tmp_path: Path) -> None:
    found = run(job)
    files = write_validation(found, job.table, tmp_path / "out")
    assert [path.name for path in files] == [f"validation.{end}" for end in ("json", "svg", "png")]
    body = json.loads(files[0].read_text())
    schema = body.pop("schema")
    assert schema == "slimnas/latency-validation/1"
    assert body == json.loads(json.dumps(validation_document(found, job.table)))
    assert body["mape_percent"] == found.figure.mape_percent
    assert len(body["architectures"]) == COUNT
    for one, check in zip(body["architectures"], found.checks, strict=True):
        assert one["measured_ms"] == check.measured_ms
        assert one["error_percent"] == 100 * (check.predicted_ms / check.measured_ms - 1)
        assert len(one["repeats_ms"]) == 2
    assert files[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width_in", [NARROW_IN, 9.0])
def test_figure_shows_every_network_twice(job: ValidateJob, width_in: float) -> None:
    found = run(replace(job, table=dearer(job.table, 1.5, 5.0)))
    figure = validation_figure(found, job.table, width_in)
    for axes, centre in zip(figure.axes, (None, 0.0), strict=True):
        points = [line for line in axes.lines if line.get_marker() in ("o", "D")]
        assert len(points) == COUNT
        assert {line.get_marker() for line in points} == {"D"}  # none inside its interval
        low, high = axes.get_ylim()
        assert all(low < float(np.asarray(line.get_ydata())[0]) < high for line in points)
        if centre is not None:
            assert low < centre < high


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """The command runs on a simulated machine."""
    machine = FakeMachine(noise=0.01)

    def runtime(name: str, **_: object) -> FakeRuntime:
        return FakeRuntime(name=name)

    def loader(runtime: object, *, batch: int, model: object) -> Loader:
        assert (batch, model) == (1, None)
        return machine.loader

    monkeypatch.setattr(visits_module, "runtime_loader", loader)
    monkeypatch.setattr(visits_module, "Clocks", lambda wall: machine.clocks)
    monkeypatch.setattr(visits_module, "clock_of", lambda runtime: None)
    monkeypatch.setattr("slimnas.runtimes.registry.get_runtime", runtime)
    return machine


def test_command_prints_every_network_and_writes_the_files(
    folder: Path, tmp_path: Path, simulated: FakeMachine
) -> None:
    words = ["latency", "validate", "--device", str(folder), "--networks", str(COUNT)]
    place = ["--output", str(tmp_path)]
    first = CliRunner().invoke(app, [*words, *place])
    assert first.exit_code == 0, first.output
    assert first.stdout.count(" to ") == COUNT
    for word in ("mean error", "within 5 %", "inside their intervals", "measured again"):
        assert word in first.stdout
    loads = simulated.loads
    second = CliRunner().invoke(app, [*words, *place, "--json"])
    assert second.exit_code == 0, second.output
    assert simulated.loads == loads  # read back
    body = json.loads(second.stdout)
    assert body["networks"] == len(body["architectures"]) == COUNT
    assert body["device"] == {"name": "fake", "kind": "measured"}
    assert (tmp_path / "validation.png").is_file()


@pytest.mark.parametrize(("factor", "wider"), [(1.1, True), (1.0, False)])
def test_table_states_what_a_validation_found(job: ValidateJob, factor: float, wider: bool) -> None:
    table = dearer(job.table, factor, 3.0)
    asked = replace(job, table=table)
    run(asked)
    ended = datetime(2026, 1, 31, 12).timestamp()
    os.utime(job.output / JOURNAL_FILE, (ended, ended))
    found = run(asked)  # read back: measured on the day it was measured
    assert found.date == "2026-01-31"
    stated = restated(table, found)
    assert stated.rows == table.rows
    assert stated.device.errors[:-1] == table.device.errors
    figure = stated.device.errors[-1]
    assert figure.what == f"{found.figure.what}, on 2026-01-31"
    assert figure.mape_percent == found.figure.mape_percent
    assert restated(stated, found).device == stated.device
    interval = stated.device.interval
    assert interval is not None
    if wider:
        pairs = zip(found.checks, found.halves_ms, strict=True)
        errors = [abs(ms / check.predicted_ms - 1) for check, halves in pairs for ms in halves]
        assert interval.high_percent == pytest.approx(100 * max(errors), abs=1e-3)
        assert f"{COUNT} networks in a validation on 2026-01-31" in interval.basis
    else:
        assert interval == table.device.interval


def test_command_updates_what_the_table_states(
    folder: Path, tmp_path: Path, simulated: FakeMachine
) -> None:
    own = tmp_path / "fake"
    shutil.copytree(folder, own)
    before = LatencyTable.load(own)
    words = ["latency", "validate", "--device", str(own), "--networks", str(COUNT)]
    plain = CliRunner().invoke(app, words)
    assert plain.exit_code == 0, plain.output
    assert LatencyTable.load(own).device == before.device
    updated = CliRunner().invoke(app, [*words, "--update"])
    assert updated.exit_code == 0, updated.output
    after = LatencyTable.load(own)
    assert after.rows == before.rows
    assert len(after.device.errors) == len(before.device.errors) + 1
    assert after.device.interval is not None
    assert f"interval is now ± {after.device.interval.high_percent:.1f} %" in updated.stdout
    with pytest.raises(LatencyTableError, match="must be timed by the build's clock, wall, got"):
        CliRunner().invoke(app, [*words, "--update", "--clock", "cpu"], catch_exceptions=False)
    with pytest.raises(LatencyTableError, match="--update: must validate on what the table was"):
        CliRunner().invoke(
            app, [*words, "--update", "--model", "deit_tiny"], catch_exceptions=False
        )


def test_command_refuses_in_one_line(folder: Path, tmp_path: Path, simulated: FakeMachine) -> None:
    with pytest.raises(LatencyTableError, match="must be a table measured on this machine"):
        CliRunner().invoke(
            app, ["latency", "validate", "--device", "iphone12"], catch_exceptions=False
        )
    words = ["latency", "validate", "--device", str(folder), "--output", str(tmp_path)]
    both = CliRunner().invoke(app, [*words, "--space", "a", "--model", "b"])
    assert both.exit_code == 2
    with pytest.raises(SlimnasError, match="no_such_space"):
        CliRunner().invoke(app, [*words, "--space", "no_such_space"], catch_exceptions=False)
    blocked = tmp_path / "file"
    blocked.write_text("")
    words[-1] = str(blocked / "below")
    with pytest.raises(RunFolderError, match="cannot be written"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert simulated.loads == 0
