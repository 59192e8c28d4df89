"""`slimnas search` with a table of this machine: on target by measurement, or one line says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_world import SEARCH, SPACE, lay_out, slimnas

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.latency import LatencyTable, find_device, latency_ms
from slimnas.latency.table import RuntimeInfo
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.local import PASSES, LocalDevice, open_local
from slimnas.measure.machine import this_machine
from slimnas.measure.timing import Protocol
from slimnas.runtimes.registry import get_runtime

TARGET = ("--target-latency", "0.3ms")
RUN = Path("runs/small-digits-here-0.3ms")
HERE = tuple("here" if word == "bench" else word for word in SEARCH)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a table `here` that says it was measured on this machine."""
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    save_here(find_device("bench"))
    return tmp_path


def save_here(table: LatencyTable, **changes: Any) -> None:
    runtime = get_runtime("onnxruntime")
    device = table.device.model_copy(
        update={
            "name": "here",
            "soc": this_machine().cpu,
            "runtime": RuntimeInfo(name=runtime.name, version=runtime.version),
            "compute_unit": runtime.compute_unit,
            "dtype": runtime.dtype,
            **changes,
        }
    )
    replace(table, device=device).save(Path("lookup_tables/here"))


def with_truth(monkeypatch: pytest.MonkeyPatch, factor: float) -> list[str]:
    """Replace timing by the table's own prices times `factor`; returns what is timed."""
    timed: list[str] = []
    table = find_device("bench")

    def time(device: LocalDevice, architecture: Architecture) -> tuple[NetworkTiming, float]:
        timed.append(architecture.digest)
        ms = factor * latency_ms(architecture, table)
        return NetworkTiming(architecture, ms, 0.001 * ms), 1.0

    monkeypatch.setattr(LocalDevice, "time", time)
    return timed


def test_found_networks_are_measured_until_they_are_on_target(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine is a fifth slower than the table: the first network found is above the target."""
    timed = with_truth(monkeypatch, 1.2)
    answer = slimnas(capsys, *HERE, *TARGET, "--fill", "0.8", "--json")
    assert answer.code == 0, answer.err
    assert "measured" in answer.err
    body = answer.json()
    (found,) = body["found"]
    assert body["unmeasured"] is None
    assert isinstance(found["measured_ms"], float)
    assert found["measured_error_ms"] == pytest.approx(0.001 * found["measured_ms"])
    assert 0.24 <= found["measured_ms"] <= 0.3
    assert [one["architecture_digest"] for one in found["rounds"]] == timed
    first, *_, last = found["rounds"]
    assert first["measured_ms"] > 0.3 >= first["predicted_ms"]
    assert last["measured_ms"] == found["measured_ms"]
    assert last["predicted_ms"] == found["latency_ms"]
    assert last["interval_ms"] == found["interval_ms"]
    assert found["architecture_digest"] == timed[-1]
    metrics = json.loads((RUN / "metrics.json").read_text())
    assert metrics["measured_latency_ms"]["value"] == found["measured_ms"]
    assert "onnxruntime" in metrics["measured_latency_ms"]["provenance"]
    lines = (RUN / "measurements.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(timed)
    corrected = find_device(str(RUN / "corrected_table"))
    assert len(corrected.device.notes) == len(timed)
    priced = latency_ms(Architecture.load(found["architecture"]), corrected)
    assert priced == pytest.approx(found["measured_ms"], rel=0.01)
    page = (RUN / "report.html").read_text()
    assert "Measured on the device" in page
    assert f"{found['measured_ms']:.3f}" in page

    kept = {name: (RUN / name).read_bytes() for name in ("trajectory.jsonl", "measurements.jsonl")}
    again = slimnas(capsys, *HERE, *TARGET, "--fill", "0.8", "--json")
    assert again.json() == body
    assert len(timed) == len(lines) - 1, "nothing is measured twice"
    assert kept == {name: (RUN / name).read_bytes() for name in kept}
    text = slimnas(capsys, *HERE, *TARGET, "--fill", "0.8").out
    assert "% of the target" in text
    assert "corrected_table" in text
    other = slimnas(capsys, *HERE, *TARGET, "--fill", "0.8", "--no-measure")
    assert other.code == 1
    assert "measure was True, now False" in other.errors[0]


def test_not_measured_and_why(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = with_truth(monkeypatch, 1.2)
    answer = slimnas(capsys, *HERE, *TARGET, "--no-measure", "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["found"][0]["measured_ms"] is None
    assert answer.json()["found"][0]["rounds"] == []
    assert answer.json()["unmeasured"] == "--no-measure was given"
    assert "found networks will not be measured: --no-measure was given" in answer.err
    trained = ("--supernet", RUN / "supernet.safetensors", "--output", "runs/bench")
    answer = slimnas(capsys, *SEARCH[:5], *SEARCH[7:], *trained, *TARGET)
    assert answer.code == 0, answer.err
    assert "not measured: bench: must be a table of this machine's" in answer.out.replace("\n", " ")
    assert "Not measured: bench" in Path("runs/bench/report.html").read_text()
    assert timed == []


def opened(**changes: Any) -> LocalDevice:
    save_here(find_device("bench"), **changes)
    return open_local(find_device("here"), SearchSpace.from_yaml(SPACE))


def test_the_tables_own_protocol(world: Path) -> None:
    for protocol in (Protocol(), Protocol(clock="cpu")):
        device = opened(protocol=protocol.describe())
        assert device.protocol == replace(protocol, passes=PASSES)
        assert device.batch == 1
        assert device.setup["protocol"] == device.protocol.to_dict()
        assert device.setup["runtime"] == "onnxruntime"
        assert len(device.reference) > 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"soc": "another chip"}, "must be a table of this machine's .*, is of a another chip"),
        ({"runtime": RuntimeInfo(name="onnxruntime", version="0.1")}, "runtime version 0.1, here"),
        ({"runtime": RuntimeInfo(name="nothing", version="1")}, "unknown runtime 'nothing'"),
        ({"threads": 4096}, "is for 4096 threads"),
        ({"kind": "imported"}, "is the imported table"),
        ({"dtype": "fp8"}, "fp8"),
    ],
)
def test_devices_that_are_not_this_machine(
    world: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Exception, match=reason) as caught:
        opened(**changes)
    assert type(caught.value).__name__ in ("LatencyTableError", "RuntimeUnavailableError")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_real_measurement(world: Path) -> None:
    """ONNX Runtime itself; how long it takes is not judged."""
    device = opened(protocol=Protocol(clock="cpu").describe())
    device = replace(device, protocol=Protocol(clock="cpu", rounds=2, passes=1))
    space = SearchSpace.from_yaml(SPACE)
    timing, reference_ms = device.time(space.architecture(space.largest()))
    assert timing.latency_ms > 0
    assert timing.error_ms >= 0
    assert reference_ms > 0
