"""Building a table: on a simulated machine for exactness, once on this one for real."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import typer
from measure_fakes import (
    CALL_MS,
    SMALL_SPACE,
    FakeMachine,
    FakeRuntime,
    cost_ms,
    part_ms,
    small_space,
)
from typer.testing import CliRunner

from slimnas._lock import LOCK_FILE, folder_lock
from slimnas.arch.walk import walk
from slimnas.cli.latency_build import build as build_command
from slimnas.errors import LatencyTableError, RunFolderError
from slimnas.latency import OVERHEAD, LatencyTable, estimate, missing_components, price_key
from slimnas.latency.spaces import space_components
from slimnas.measure import build as build_module
from slimnas.measure.build import JOURNAL_FILE, SAMPLES_FILE, BuildJob, BuiltTable, build_table
from slimnas.measure.networks import Chain, network_and_input
from slimnas.measure.schedule import Networks
from slimnas.measure.scope import Parts, SpaceScope
from slimnas.measure.timing import Call, Protocol
from slimnas.nn.build import build
from slimnas.nn.seeding import seeded

QUICK = Protocol(rounds=2, passes=2, visit_ms=0.5, sample_ms=0.1)


def job(folder: Path, **changes: object) -> BuildJob:
    plain = BuildJob(folder, SpaceScope(small_space()), QUICK, networks=Networks(8, 4))
    return replace(plain, **changes)  # type: ignore[arg-type]


def measure(wanted: BuildJob, machine: FakeMachine, threads: int = 1) -> BuiltTable:
    return build_table(wanted, FakeRuntime(threads), loader=machine.loader, clocks=machine.clocks)


def test_table_of_an_additive_machine_is_exact(tmp_path: Path) -> None:
    space = small_space()
    built = measure(job(tmp_path / "fake"), FakeMachine())
    table = LatencyTable.load(tmp_path / "fake")
    assert table.rows == LatencyTable.load(built.path).rows
    wanted = {price_key(part): part_ms(part) for part in space_components(space)}
    checked = 0
    for row in table.rows:
        if row.key in wanted:
            assert row.latency_ms == pytest.approx(wanted[row.key], abs=2e-6)
            assert row.n == QUICK.rounds * QUICK.passes
            checked += 1
    assert checked >= 12
    assert missing_components(space, table) == ()
    rng = random.Random(3)
    for _ in range(20):
        network = space.architecture(space.random(rng))
        truth = CALL_MS + sum(part_ms(part) for part in walk(network))
        assert estimate(network, table).latency_ms == pytest.approx(truth, rel=0.05)


def test_stated_error_is_that_of_the_held_out_networks(tmp_path: Path) -> None:
    built = measure(job(tmp_path / "fake"), FakeMachine(noise=0.01))
    figure, before = built.table.device.errors
    errors = [100 * (one.predicted_ms / one.measured_ms - 1) for one in built.held_out]
    assert figure.networks == len(errors) == 4
    assert figure.mape_percent == pytest.approx(sum(map(abs, errors)) / 4, abs=1e-3)
    assert figure.bias_percent == pytest.approx(sum(errors) / 4, abs=1e-3)
    assert figure.max_percent == pytest.approx(max(map(abs, errors)), abs=1e-3)
    assert figure.within_5_percent == 100 * sum(abs(error) <= 5 for error in errors) / 4
    assert figure.within_10_percent == 100 * sum(abs(error) <= 10 for error in errors) / 4
    assert "before calibration on 8" in before.what
    assert before.networks == 4
    interval = built.table.device.interval
    assert interval is not None
    assert interval.low_percent == interval.high_percent <= 100 * 0.2
    inside = [check.covered for check in built.held_out]
    assert figure.coverage_percent == 100 * sum(inside) / 4


def test_overhead_is_what_networks_take_beyond_their_parts(tmp_path: Path) -> None:
    table = measure(job(tmp_path / "fake"), FakeMachine()).table
    row = table.by_key[OVERHEAD]
    assert (row.kind, row.n) == ("fitted", 8)
    assert row.latency_ms >= CALL_MS * (1 - 1e-6)
    alone = measure(job(tmp_path / "alone", networks=Networks(0, 0)), FakeMachine()).table
    row = alone.by_key[OVERHEAD]
    assert (row.kind, row.latency_ms) == ("measured", pytest.approx(CALL_MS, rel=1e-3))
    assert alone.device.errors == ()


@pytest.mark.parametrize("loads", [0, 1, 2, 7, 40, 75])
def test_interrupted_build_goes_on_and_ends_with_the_same_rows(tmp_path: Path, loads: int) -> None:
    whole = measure(job(tmp_path / "whole"), FakeMachine())
    stopped = FakeMachine(fail_after=loads)
    with pytest.raises(KeyboardInterrupt):
        measure(job(tmp_path / "part"), stopped)
    assert not (tmp_path / "part" / LOCK_FILE).exists()
    assert not (tmp_path / "part" / "device.yaml").exists()
    kept = len((tmp_path / "part" / JOURNAL_FILE).read_text().splitlines()) - 1
    again = measure(job(tmp_path / "part"), FakeMachine())
    assert again.resumed == kept
    assert (kept > 0) == (loads > 4)
    assert [row.key for row in again.table.rows] == [row.key for row in whole.table.rows]
    for one, other in zip(again.table.rows, whole.table.rows, strict=True):
        assert one.latency_ms == pytest.approx(other.latency_ms, abs=2e-6)
        assert one.n == other.n


def test_finished_build_keeps_its_samples_and_no_journal(tmp_path: Path) -> None:
    measure(job(tmp_path / "fake"), FakeMachine())
    names = sorted(path.name for path in (tmp_path / "fake").iterdir())
    assert names == ["device.yaml", SAMPLES_FILE, "table.csv", "timings.csv"]
    lines = gzip.decompress((tmp_path / "fake" / SAMPLES_FILE).read_bytes()).splitlines()
    assert json.loads(lines[0])["runtime"]["name"] == "fake"
    assert len(lines) > 2 * 20


def test_killed_before_the_table_was_written_needs_no_new_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build_module, "make_table", die)
        with pytest.raises(KeyboardInterrupt):
            measure(job(tmp_path / "fake"), FakeMachine())
    again = FakeMachine()
    assert measure(job(tmp_path / "fake"), again).resumed > 0
    assert again.loads == 0


def test_uncertain_components_are_visited_again(tmp_path: Path) -> None:
    noisy = FakeMachine(noise=0.05)
    built = measure(job(tmp_path / "fake", protocol=replace(QUICK, max_drift=0.5)), noisy)
    counts = {row.n for row in built.table.rows if row.key != OVERHEAD}
    assert max(counts) > QUICK.rounds * QUICK.passes
    assert max(counts) <= QUICK.rounds * (QUICK.passes + QUICK.extra_passes)


def test_two_builds_on_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "fake"),
        pytest.raises(RunFolderError, match="in use by another run"),
    ):
        measure(job(tmp_path / "fake"), FakeMachine())
    assert list((tmp_path / "fake").iterdir()) == []


def test_finished_table_is_kept_unless_forced(tmp_path: Path) -> None:
    wanted = job(tmp_path / "fake")
    measure(wanted, FakeMachine())
    before = (tmp_path / "fake" / "table.csv").read_bytes()
    with pytest.raises(LatencyTableError, match=r"holds a finished measured table .*--force"):
        measure(wanted, FakeMachine(noise=0.01))
    assert (tmp_path / "fake" / "table.csv").read_bytes() == before
    measure(replace(wanted, force=True), FakeMachine(noise=0.01))
    assert (tmp_path / "fake" / "table.csv").read_bytes() != before


def test_other_kinds_of_table_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = measure(job(tmp_path / "fake"), FakeMachine())
    other = built.table.device.model_copy(update={"kind": "imported"})
    LatencyTable(other, built.table.rows).save(tmp_path / "fake")
    with pytest.raises(LatencyTableError, match=r"fake: is the imported table of .*--device"):
        measure(job(tmp_path / "fake", force=True), FakeMachine())
    monkeypatch.setenv("SLIMNAS_LOOKUP_TABLES", str(tmp_path))
    with pytest.raises(LatencyTableError, match=r"fake: is the imported table"):
        measure(job(tmp_path / "elsewhere" / "fake"), FakeMachine())
    assert not (tmp_path / "elsewhere").exists()


def test_journal_of_another_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(job(tmp_path / "fake"), FakeMachine(fail_after=20))
    with pytest.raises(LatencyTableError, match=r"its runtime is threads 1, not 2"):
        measure(job(tmp_path / "fake"), FakeMachine(), threads=2)
    with pytest.raises(LatencyTableError, match=r"its protocol is rounds 2, not 3"):
        measure(job(tmp_path / "fake", protocol=replace(QUICK, rounds=3)), FakeMachine())


def test_runtime_on_more_threads_than_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match=r"1 thread\(s\) it was given, 2\.0 are busy"):
        measure(job(tmp_path / "fake"), FakeMachine(threads=2))
    measure(job(tmp_path / "two"), FakeMachine(threads=2), threads=2)
    with pytest.raises(LatencyTableError, match="--clock cpu times one thread of a CPU, got 2"):
        measure(job(tmp_path / "x", protocol=replace(QUICK, clock="cpu")), FakeMachine(), threads=2)


def test_device_name_must_be_a_name(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match="a device's name"):
        measure(job(tmp_path / "my device"), FakeMachine())
    assert list(tmp_path.iterdir()) == []


@dataclass
class OddHeads(FakeMachine):
    """Heads change what a network takes by `head_ms`, and cost nothing of their own."""

    head_ms: float = 0.0

    def loader(self, parts: Parts) -> Call:
        if not parts or parts[-1].kind != "head":
            return super().loader(parts)
        ms = cost_ms(parts[:-1]) + self.head_ms
        return lambda: self.spend(ms)


def test_component_lost_in_noise_is_priced_at_its_error(tmp_path: Path) -> None:
    wanted = job(tmp_path / "fake", protocol=replace(QUICK, rounds=6))
    table = measure(wanted, OddHeads(noise=0.01)).table
    (note,) = (note for note in table.device.notes if note.startswith("lost in noise"))
    heads = [row for row in table.rows if row.key.component == "head"]
    assert len(heads) == 9  # ends and middle by 2, the space's own and 1000 classes
    assert any(str(row.key) in note for row in heads)
    assert all(0 < row.latency_ms < 0.01 for row in heads)
    assert missing_components(small_space(), LatencyTable.load(tmp_path / "fake")) == ()


def test_component_that_makes_networks_faster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match=r"head .* comes out negative \(-0\.00"):
        measure(job(tmp_path / "fake"), OddHeads(head_ms=-0.003))
    assert not (tmp_path / "fake" / "table.csv").exists()


@pytest.mark.parametrize("seed", range(4))
def test_components_in_a_row_compute_what_the_network_does(seed: int) -> None:
    space = small_space()
    architecture = space.architecture(space.random(random.Random(seed)))
    network = build(architecture, seed=7).eval()
    with seeded(7):
        chain = Chain(tuple(walk(architecture))).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        assert torch.equal(network(x), chain(x))
        folded, example = network_and_input(tuple(walk(architecture)), 2, seed=7)
        assert example.shape == x.shape
        torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)


def test_piece_starting_with_attention_takes_tokens() -> None:
    attention = next(
        part
        for part in space_components(small_space())
        if getattr(part.spec, "type") == "mb3d"  # noqa: B009
    )
    network, x = network_and_input((attention,) * 2, 3)
    assert x.shape == (3, attention.input.positions, attention.input.channels)
    assert network(x).shape == x.shape
    nothing, x = network_and_input((), 1)
    assert nothing(x).numel() == 1


def test_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "build_table", interrupted)
    result = CliRunner().invoke(_app(), ["--output", str(tmp_path / "local")])
    assert result.exit_code == 130
    assert "the same command goes on there" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_real_build_prices_its_space(tmp_path: Path, backend: str) -> None:
    space = tmp_path / "small.yaml"
    space.write_text(SMALL_SPACE)
    arguments = ["--backend", backend, "--space", str(space), "--rounds", "1", "--clock", "cpu"]
    arguments += ["--networks", "4", "--held-out", "6", "--precision", "100"]
    result = CliRunner().invoke(_app(), [*arguments, "--output", str(tmp_path / "here"), "--json"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    table = LatencyTable.load(tmp_path / "here")
    assert body["device"] == {"name": "here", "kind": "measured"}
    assert body["rows"] == len(table.rows) > 20
    assert body["held_out"]["networks"] == len(body["held_out"]["architectures"]) == 6
    assert table.device.threads == 1
    assert table.device.runtime.name == backend
    assert missing_components(small_space(), table) == ()
    assert all(one["measured_ms"] > 0 for one in body["held_out"]["architectures"])


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(build_command)
    return app
