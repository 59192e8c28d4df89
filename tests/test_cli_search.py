"""`slimnas search` to its end: what it prints, what it leaves, and what the next commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_world import SEARCH, lay_out, slimnas

import slimnas as package

TARGETS = ("--target-latency", "0.3ms", "--target-latency", "150us")
RUN = Path("runs/small-digits-bench-0.15ms-0.3ms")
FOUND_KEYS = {
    *("target_ms", "latency_ms", "interval_ms", "measured_ms", "params", "macs"),
    *("search_top1", "steps", "architecture", "weights"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run for two targets, in another process, and the JSON it printed."""
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    command = [sys.executable, "-m", "slimnas", *SEARCH, *TARGETS, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "training step 2/2" in done.stderr
    return folder, json.loads(done.stdout)


@pytest.fixture
def world(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any]]:
    monkeypatch.chdir(finished[0])
    return finished


def test_json_has_the_stable_keys(world: tuple[Path, dict[str, Any]]) -> None:
    _, answer = world
    assert answer.keys() >= {"run", "device", "found"}
    assert answer["run"] == str(RUN)
    assert answer["device"] == {"name": "bench", "kind": "measured"}
    assert [found["target_ms"] for found in answer["found"]] == [0.15, 0.3]
    for found in answer["found"]:
        assert found.keys() >= FOUND_KEYS
        low_ms, high_ms = found["interval_ms"]
        assert low_ms <= found["latency_ms"] <= high_ms
        assert found["latency_ms"] <= found["target_ms"]
        assert 0 <= found["search_top1"] <= 100


def test_the_files_are_there_and_agree(world: tuple[Path, dict[str, Any]]) -> None:
    _, answer = world
    table = package.find_device("bench")
    for found in answer["found"]:
        architecture = package.Architecture.load(found["architecture"])
        assert package.cost(architecture).params == found["params"]
        assert package.cost(architecture).macs == found["macs"]
        assert package.estimate(architecture, table).latency_ms == found["latency_ms"]
        network = package.create_model(Path(found["architecture"]).parent, pretrained=True)
        assert sum(p.numel() for p in network.parameters()) == found["params"]
    there = {path.name for path in RUN.iterdir()}
    assert there >= {
        *("config.yaml", "supernet.safetensors", "metrics.jsonl", "importance.json"),
        *("trajectory.jsonl", "report.html", "figures", "found"),
    }
    assert not [name for name in there if name.startswith(".")]
    modes = {path.stat().st_mode & 0o777 for path in RUN.rglob("*") if path.is_file()}
    assert len(modes) == 1, "every file as readable as the others"


def test_again_it_only_reports(
    world: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, answer = world

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("training started")

    monkeypatch.setattr("slimnas.search.run.train_supernet", started)
    assert slimnas(capsys, *SEARCH, *TARGETS, "--json").json() == answer
    text = slimnas(capsys, *SEARCH, *TARGETS).out
    assert "found for 0.15 ms" in text
    assert "latency by the measured table bench" in text
    for line in text.splitlines():
        if line.startswith("runs/"):
            assert Path(line).exists(), line


def test_a_supernet_serves_other_runs(
    world: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, answer = world
    monkeypatch.setattr("slimnas.search.run.train_supernet", None)
    given = ("--supernet", RUN / "supernet.safetensors", "--output", "runs/other")
    other = slimnas(capsys, *SEARCH[:5], *SEARCH[7:], *given, *TARGETS, "--json")
    assert other.code == 0, other.err
    digests = [found["architecture_digest"] for found in other.json()["found"]]
    assert digests == [found["architecture_digest"] for found in answer["found"]]
    given = ("--supernet", RUN / "supernet.safetensors", "--output", "runs/unseen")
    leaky = slimnas(capsys, *SEARCH[:5], *SEARCH[7:], *given, *TARGETS, "--seed", "1")
    assert leaky.code == 1
    assert "SEARCH may hold images it has seen" in leaky.errors[0]
    assert not Path("runs/unseen").exists()


def test_a_damaged_trajectory_is_one_line(
    world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = RUN / "trajectory.jsonl"
    whole = path.read_bytes()
    try:
        for damaged in (whole[: len(whole) // 2], b"{}\n", b"\xff\xfe"):
            path.write_bytes(damaged)
            answer = slimnas(capsys, *SEARCH, *TARGETS)
            assert answer.code == 1
            assert len(answer.errors) == 1, answer.err
            assert "trajectory.jsonl" in answer.errors[0]
    finally:
        path.write_bytes(whole)


def test_the_next_commands(
    world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(world[1]["found"][0]["architecture"]).parent
    priced = slimnas(capsys, "latency", "estimate", folder, "--device", "bench", "--json").json()
    assert priced["latency_ms"] == world[1]["found"][0]["latency_ms"]
    assert slimnas(capsys, "zoo", "add", folder, "--name", "mine").code == 0
    names = [e["name"] for e in slimnas(capsys, "zoo", "list", "--json").json()["entries"]]
    assert "mine" in names
    exported = slimnas(capsys, "zoo", "export", "mine", "--json").json()
    assert Path(exported["file"]).is_file()
    assert exported["max_abs_difference"] < 1e-3
    again = slimnas(capsys, "zoo", "add", folder, "--name", "mine")
    assert again.code == 1
    assert "mine" in again.errors[0]
