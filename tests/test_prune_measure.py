"""Measured latencies of a pruning run: what is recorded, what is not repeated, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import slimnas
from measure_fakes import FakeMachine
from prune_world import ARCHITECTURE, PRUNE, VIT, Events, budget, lay_out, network, prune
from test_latency_transformers import grid_table

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.errors import PruneError, SpecError
from slimnas.latency.table import LatencyTable, RuntimeInfo
from slimnas.measure.machine import this_machine
from slimnas.measure.timing import Call, Protocol
from slimnas.nn.build import Network, build
from slimnas.prune import measured as measured_module
from slimnas.prune.config import MeasureSpec
from slimnas.prune.measured import FILE, VISITS, Measured, Meter, Setup, open_meter, spec_of_table
from slimnas.prune.run import BEFORE, PruneResult
from slimnas.runtimes.registry import RUNTIMES
from slimnas.zoo.create import create_model
from slimnas.zoo.metrics import load_metrics
from slimnas.zoo.weights import save_weights

MOST, HALF, LEAST = budget("80%", 0.8), budget("50%", 0.5), budget("40%", 0.4)
SETUP = {
    "runtime": "fake",
    "version": "1",
    "compute_unit": "cpu",
    "threads": 1,
    "clock": "wall",
    "machine": "none",
    "cores": 1,
}


@dataclass
class Bench:
    """A meter on which a network takes a nanosecond per MAC, and what was loaded on it."""

    machine: FakeMachine = field(default_factory=FakeMachine)
    loaded: list[str] = field(default_factory=list)
    setup: dict[str, Any] = field(default_factory=dict)

    def load(self, network: Network) -> Call:
        self.loaded.append(network.architecture.digest)
        ms = 1e-6 * cost(network.architecture).macs
        return lambda: self.machine.spend(ms)

    @property
    def meter(self) -> Meter:
        setup = Setup.model_validate({**SETUP, **self.setup})
        return Meter(setup, self.load, self.machine.clocks)


def figures(path: Path) -> dict[str, float]:
    return {name: metric.value for name, metric in load_metrics(path).items()}


def digests(result: PruneResult) -> list[str]:
    whole = [result.start.network.architecture, *(found.architecture for found in result.found)]
    return [architecture.digest for architecture in whole]


def test_latency_and_speed_up_are_recorded_with_provenance(tmp_path: Path) -> None:
    events = Events()
    result = prune(tmp_path, MOST, HALF, listener=events, meter=Bench().meter)
    whole_ms = 1e-6 * cost(ARCHITECTURE).macs
    looked_at = 0
    for architecture, path, shown in [
        (ARCHITECTURE, tmp_path / BEFORE, result.before),
        *((one.architecture, one.folder / "metrics.json", one.metrics) for one in result.found),
    ]:
        ms = 1e-6 * cost(architecture).macs
        kept = figures(path)
        assert kept == {name: metric.value for name, metric in shown.items()}
        assert kept["measured_fake_latency_ms"] == pytest.approx(ms)
        assert kept["measured_fake_speed_up"] == pytest.approx(whole_ms / ms)
        assert kept["measured_fake_rounds"] == 20
        for spread in ("latency_iqr_ms", "speed_up_iqr"):
            assert kept[f"measured_fake_{spread}"] == pytest.approx(0, abs=1e-9)
        said = load_metrics(path)["measured_fake_speed_up"].provenance
        for part in ("fake 1, 1 thread, wall clock", "20 interleaved rounds", "none with 1 cores"):
            assert part in said
        looked_at += 1
    assert looked_at == 3
    assert events.of("measuring with fake 1, 1 thread") == list(range(VISITS + 1))


def test_speed_ups_are_ratios_within_a_round(tmp_path: Path) -> None:
    """The machine slows down by 15 % while it measures: latencies see it, speed-ups do not."""
    began: list[float] = []

    def slower(now: float) -> float:
        began.append(now)
        return 1 + 0.15 * min(1.0, (now - began[0]) / 2.0)

    bench = Bench(FakeMachine(pace=slower))
    result = prune(tmp_path, HALF, meter=bench.meter)
    timed = result.measured.sessions[0].networks[1]
    expected = cost(ARCHITECTURE).macs / cost(result.found[0].architecture).macs
    assert timed.speed_up == pytest.approx(expected, rel=0.01)
    assert timed.speed_up_iqr < 0.01 * timed.speed_up
    assert timed.latency_iqr_ms > 0.04 * timed.latency_ms


def test_a_kept_measurement_is_not_repeated_and_others_are_added(tmp_path: Path) -> None:
    first = Bench()
    result = prune(tmp_path, MOST, meter=first.meter)
    assert first.loaded == digests(result)
    kept = figures(result.found[0].folder / "metrics.json")
    again = Bench(FakeMachine(pace=lambda _: 2.0))
    assert prune(tmp_path, MOST, meter=again.meter).measured == result.measured
    assert again.loaded == []

    more = Bench(FakeMachine(pace=lambda _: 2.0))
    events = Events()
    both = prune(tmp_path, MOST, HALF, listener=events, meter=more.meter)
    assert more.loaded == [digests(both)[0], digests(both)[2]]
    assert events.of("importance") == events.of("macs_80pct: planning") == []
    assert figures(both.found[0].folder / "metrics.json") == kept
    assert both.before["measured_fake_latency_ms"] == result.before["measured_fake_latency_ms"]
    added = both.found[1]
    ratio = cost(ARCHITECTURE).macs / cost(added.architecture).macs
    assert added.value("measured_fake_speed_up") == pytest.approx(ratio)

    other = Bench(setup={"runtime": "other"})
    three = prune(tmp_path, MOST, HALF, meter=other.meter)
    assert other.loaded == digests(three)
    assert [setup.runtime for setup in three.measured.setups] == ["fake", "other"]
    names = figures(three.found[0].folder / "metrics.json")
    assert {"measured_fake_latency_ms", "measured_other_latency_ms"} <= names.keys()
    assert Measured.load(tmp_path / FILE) == three.measured

    newer = Bench(setup={"version": "2"})
    assert prune(tmp_path, MOST, HALF, meter=newer.meter).measured.setups[-1].version == "2"
    assert len(newer.loaded) == 3


def test_stopped_while_measuring_it_goes_on(tmp_path: Path) -> None:
    class Stops(Events):
        def at(self, name: str, done: int) -> None:
            if name.startswith("measuring") and done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, HALF, listener=Stops(), meter=Bench().meter)
    assert not (tmp_path / FILE).exists()
    rest = Events()
    result = prune(tmp_path, HALF, listener=rest, meter=Bench().meter)
    assert rest.of("importance") == rest.of("macs_50pct: planning") == []
    path = result.found[0].folder / "metrics.json"
    written = json.loads(path.read_text())
    before = {name: one for name, one in written.items() if not name.startswith("measured_fake")}
    assert len(before) < len(written)
    path.write_text(json.dumps(before))  # as if killed before this file
    bench = Bench()
    prune(tmp_path, HALF, meter=bench.meter)
    assert bench.loaded == []
    assert json.loads(path.read_text()) == written


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    prune(tmp_path, HALF, meter=Bench().meter)
    (tmp_path / FILE).write_text('{"schema"')
    with pytest.raises(SpecError, match=r"measured\.json: not valid JSON.*remove the file"):
        prune(tmp_path, HALF, meter=Bench().meter)
    (tmp_path / FILE).write_text('{"schema": "slimnas/prune-measured/1", "sessions": 3}')
    with pytest.raises(SpecError, match=r"measured\.json: sessions: must be a list"):
        prune(tmp_path, HALF, meter=Bench().meter)


def test_a_meter_runs_the_folded_network_at_its_resolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch runtime gives what the network gives for the image that is timed."""
    meter = open_meter(MeasureSpec(runtime="torch"))
    assert meter.setup.version == torch.__version__
    assert (meter.setup.threads, meter.setup.machine) == (1, this_machine().cpu)
    whole, threads = network(), torch.get_num_threads()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        expected = whole(torch.randn(1, 1, 16, 16))
    call = meter.loader(whole)
    assert torch.allclose(torch.from_numpy(call()), expected, atol=1e-5)
    torch.set_num_threads(threads)
    assert open_meter(MeasureSpec(runtime="torch", clock="cpu")).protocol.clock == "cpu"
    with pytest.raises(PruneError, match="--clock cpu: times one thread, got 2"):
        open_meter(MeasureSpec(runtime="torch", clock="cpu", threads=2))


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_a_table_of_this_machine_tells_how_to_measure(clock: Any) -> None:
    machine, table = this_machine(), grid_table(ARCHITECTURE)
    here = {
        "kind": "measured",
        "soc": machine.cpu,
        "device": f"{machine.architecture} machine with {machine.cores} cores",
        "runtime": RuntimeInfo(name="torch", version=str(torch.__version__)),
        "compute_unit": "cpu",
        "threads": 2 if clock == "wall" else 1,
        "protocol": Protocol(clock=clock).describe(),
    }

    def spec(**changes: object) -> MeasureSpec | None:
        device = table.device.model_copy(update={**here, **changes})
        return spec_of_table(LatencyTable(device, table.rows))

    assert spec() == MeasureSpec(runtime="torch", threads=here["threads"], clock=clock)
    for key, value in {
        "kind": "imported",
        "soc": "another",
        "device": "another",
        "batch": 2,
        "dtype": "fp16",
        "threads": None,
        "compute_unit": "GPU",
        "runtime": RuntimeInfo(name="torch", version="0.1"),
    }.items():
        assert spec(**{key: value}) is None, key
    assert spec(runtime=RuntimeInfo(name="CoreML", version="1")) is None


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measured_module, "VISITS", 1)
    return tmp_path


def test_from_the_command_line(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without, then with: nothing is pruned again; on paper, as JSON and on the page."""
    plain = slimnas(capsys, *PRUNE, "--macs", "80%", "--json")
    assert plain.code == 0, plain.err
    assert plain.json()["measured_with"] is None
    assert plain.json()["after"][0]["measured_latency_ms"] is None
    command = (*PRUNE, "--macs", "80%", "--macs", "50%", "--measure", "torch", "--clock", "cpu")
    answer = slimnas(capsys, *command, "--json")
    assert answer.code == 0, answer.err
    assert "importance" not in answer.err
    body = answer.json()
    assert body["measured_with"]["runtime"] == "torch"
    assert body["before"]["measured_speed_up"] == 1.0
    for row in (body["before"], *body["after"]):
        assert row["measured_latency_ms"] > 0
        assert row["measured_speed_up"] > 0
        assert row["measured_latency_iqr_ms"] >= 0
        assert row["measured_rounds"] == 5
    table = slimnas(capsys, *command)
    assert table.code == 0, table.err
    for after in body["after"]:
        assert f"{after['measured_latency_ms']:.3f} (" in table.out
        assert f"{after['measured_speed_up']:.3f} (" in table.out
    assert "CPU time of the one thread" in " ".join(table.out.split())
    page = (fresh / "runs/prune-mini-digits/report.html").read_text()
    assert f"torch {torch.__version__}, 1 thread, CPU time" in page
    assert f"{body['after'][1]['measured_latency_ms']:.3f}<small>IQR" in page


def test_a_table_measured_here_is_checked_without_being_asked(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_table(ARCHITECTURE).save(fresh / "lookup_tables" / "bench")
    monkeypatch.setattr(
        measured_module, "spec_of_table", lambda table: MeasureSpec(runtime="torch", clock="cpu")
    )
    command = (*PRUNE, "--macs", "80%", "--device", "bench", "--json")
    answer = slimnas(capsys, *command)
    assert answer.code == 0, answer.err
    assert answer.json()["measured_with"]["clock"] == "cpu"
    assert answer.json()["after"][0]["latency_ms"] > 0
    assert answer.json()["after"][0]["measured_latency_ms"] > 0
    silent = slimnas(capsys, *command, "--measure", "none")
    assert silent.json()["measured_with"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--measure openvino",
            "'openvino' is not installed .*; pip install 'slimnas\\[openvino\\]'",
        ),
        ("--measure torch --clock cpu --threads 2", "--clock cpu: times one thread, got 2"),
        ("--threads 2", "--threads: is for measuring; give --measure RUNTIME"),
        ("--measure none --clock cpu", "--clock: is for measuring; give --measure RUNTIME"),
    ],
)
def test_refused_before_anything_starts(
    arguments: str,
    message: str,
    fresh: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RUNTIMES, "openvino", ("slimnas.runtimes.nowhere", "OpenVinoRuntime"))
    answer = slimnas(capsys, *PRUNE, *arguments.split())
    assert answer.code == 1
    assert len(answer.errors) == 1, answer.err
    assert re.search(message, answer.errors[0]), answer.errors
    assert list(Path("runs").glob("*")) == []


ALONE = """
import sys, torch, slimnas
network = slimnas.create_model(sys.argv[1], pretrained=True).eval()
torch.manual_seed(0)
print(network(torch.randn(1, 1, 16, 16)).tolist())
print([name for name in sys.modules if name.startswith("slimnas.prune")])
"""


def test_a_pruned_distilled_deit_goes_to_the_zoo_and_to_files(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Added and exported like any model, and opened in one line where no pruner is."""
    text = VIT.replace("patch: 4", "patch: 4, distilled: true")
    text = text.replace("classes: 10", "classes: 10, distilled: true")
    deit = Architecture.from_yaml(text)
    deit.save(fresh / "mini.yaml")
    save_weights(fresh / "mini.safetensors", build(deit, seed=1).state_dict(), deit)
    answer = slimnas(capsys, *PRUNE, "--macs", "60%", "--measure", "onnxruntime", "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["after"][0]["measured_latency_ms"] > 0
    found = Path(answer.json()["after"][0]["architecture"]).parent

    zoo = ("--zoo", fresh / "zoo", "--json")
    added = slimnas(capsys, "zoo", "add", found, "--name", "small", *zoo)
    assert added.code == 0, added.err
    shown = slimnas(capsys, "zoo", "show", "small", *zoo).json()
    assert "measured_onnxruntime_latency_ms" in json.dumps(shown)
    formats = ["onnx", *(["openvino"] if find_spec("openvino") else [])]
    for name in formats:
        exported = slimnas(capsys, "zoo", "export", "small", "--format", name, *zoo)
        assert exported.code == 0, exported.err
        assert Path(exported.json()["file"]).is_file()

    done = subprocess.run(
        [sys.executable, "-c", ALONE, found], capture_output=True, text=True, check=True
    )
    given, modules = map(json.loads, done.stdout.splitlines())
    assert modules == []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        image = torch.randn(1, 1, 16, 16)
        expected = create_model(found, pretrained=True).eval()(image)
    assert torch.allclose(torch.tensor(given), expected, atol=1e-5)
