"""`slimnas latency`: what the commands print, as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimnas.arch.architecture import Architecture
from slimnas.cli.latency import app
from slimnas.errors import LatencyTableError, MissingLatencyError, SlimnasError
from slimnas.latency.devices import known_devices
from slimnas.latency.table import LatencyTable
from tests.test_latency_device_model import published_network
from tests.test_latency_table import small_table


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if isinstance(result.exception, SlimnasError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Architecture:
    monkeypatch.chdir(tmp_path)
    architecture = published_network("efficientformer_l1")
    architecture.save(tmp_path / "l1.yaml")
    return architecture


def test_estimate_prints_every_component_and_the_error(network: Architecture) -> None:
    out, _ = run("estimate", "l1.yaml", "--device", "iphone12")
    assert "iphone12 (estimated)" in out
    assert "leave-one-out, all networks: mean error" in out
    assert out.count("mb4d") == 14
    assert "90 % interval" in out
    assert "21 exact, 0 interpolated, 0 extrapolated" in out


def test_estimate_as_json_is_one_object(network: Architecture) -> None:
    out, err = run("estimate", "l1.yaml", "--device", "iphone12-ios16", "--json")
    answer = json.loads(out)
    assert "leave-one-out" in err
    assert answer["device"] == {"name": "iphone12-ios16", "kind": "estimated"}
    assert answer["latency_ms"] == pytest.approx(sum(row["latency_ms"] for row in answer["rows"]))
    low_ms, high_ms = answer["interval_ms"]
    assert low_ms < answer["latency_ms"] < high_ms
    assert answer["rows"][0].keys() >= {"component", "latency_ms", "kind"}
    assert (answer["exact"], answer["interpolated"], answer["extrapolated"]) == (21, 0, 0)


def test_extrapolation_only_when_asked_for(network: Architecture) -> None:
    wide = Architecture.from_yaml(network.to_yaml().replace("width: 448", "width: 800"))
    wide.save(Path("wide.yaml"))
    with pytest.raises(MissingLatencyError, match=r"stages\.3\.downsample: .*nearest row"):
        run("estimate", "wide.yaml", "--device", "iphone12")
    out, _ = run("estimate", "wide.yaml", "--device", "iphone12", "--extrapolate")
    assert "without the error of extrapolating" in out


def test_show(network: Architecture) -> None:
    out, _ = run("show", "iphone12")
    assert "1512 x downsample conv3x3" in out
    assert "bias" in out
    out, _ = run("show", "iphone12", "--rows")
    assert "block mb4d ffn_dim=1792 448->448 @ 7x7 (fitted, n=12)" in out
    summary = json.loads(run("show", "iphone12", "--json")[0])
    assert summary["kind"] == "estimated"
    assert sum(summary["counts"].values()) == 1927


def test_devices_says_what_each_table_is_and_how_far_off(network: Architecture) -> None:
    out, err = run("devices")
    header, *lines = out.splitlines()
    assert header.split() == ["name", "kind", "device", "runtime", "date", "error", "networks"]
    assert [line.split()[0] for line in lines] == list(known_devices())
    assert len(lines) >= 7
    for line, folder in zip(lines, known_devices().values(), strict=True):
        figure = LatencyTable.load(folder).device.errors[0]
        assert line.endswith(f"{figure.networks}")
        assert f"  {figure.mape_percent:.1f} %" in line
    assert "had not seen" in err
    assert run("list")[0] == out  # its name in the first release
    devices = json.loads(run("devices", "--json")[0])["devices"]
    assert [device["name"] for device in devices] == list(known_devices())
    wanted = {"name", "kind", "device", "runtime", "compute_unit", "date", "errors", "rows", "path"}
    assert all(device.keys() == wanted for device in devices)


def test_a_table_without_error_says_unknown(network: Architecture) -> None:
    small_table().save(Path("lookup_tables/bench"))
    line = next(line for line in run("devices")[0].splitlines() if line.startswith("bench"))
    assert line.split()[1] == "measured"
    assert line.endswith("unknown")


def test_devices_skips_and_names_a_damaged_table(network: Architecture) -> None:
    folder = Path("lookup_tables/broken")
    folder.mkdir(parents=True)
    (folder / "device.yaml").write_text("schema: slimnas/latency-table/1\n")
    out, err = run("devices")
    assert "broken" not in out
    assert "skipped" in err
    with pytest.raises(LatencyTableError, match=r"device\.yaml: rows"):
        run("show", "broken")


def test_latency_needs_no_torch() -> None:
    code = (
        "import sys, slimnas.latency, slimnas.latency.fit as fit\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
