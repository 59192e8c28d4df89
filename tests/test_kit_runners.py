"""The runners of a kit, on simulated devices: a fake clock, a fake adb, a fake coremltools."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kit_protocol
import pytest
import run_kit
import run_kit_adb
import run_kit_mac
from kit_world import DEVICE, QUICK, RUNNERS, FakeBackend, FakeKit, edited
from measure_fakes import FakeMachine

from slimnas.measure.kit_manifest import digest_of
from slimnas.measure.timing import Protocol, Stopwatch

ONE_MS, TWO_MS = 1.0, 2.0


@pytest.fixture
def kit(tmp_path: Path) -> FakeKit:
    return FakeKit(tmp_path / "kit")


def options(**changes: Any) -> argparse.Namespace:
    plain = {"rounds": None, "passes": None, "extra_passes": None}
    return argparse.Namespace(**{**plain, **changes})


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_rounds_are_those_of_slimnas_itself(noise: float) -> None:
    """The runner's protocol gives the rounds that `Stopwatch` gives on an equal machine."""
    protocol = Protocol(rounds=3, visit_ms=2.0, sample_ms=0.1)

    def slow_for_a_while(now: float) -> float:
        return 1.3 if 100.25 < now < 100.28 else 1.0

    def machine() -> FakeMachine:
        return FakeMachine(pace=slow_for_a_while, noise=noise)

    def calls(one: FakeMachine) -> list[Callable[[], None]]:
        return [lambda ms=ms: one.spend(ms) for ms in (0.05, ONE_MS, TWO_MS)]  # type: ignore[misc]

    first = machine()
    reference, *terms = calls(first)
    stopwatch = Stopwatch(protocol, reference, first.clocks)
    stopwatch.prime()
    wanted = [stopwatch.rounds(terms, name="x", rng=random.Random(i)) for i in range(4)]

    second = machine()
    plain = protocol.to_dict()
    wall = second.clocks.wall
    reference, *terms = calls(second)
    timed = run_kit.Timed(reference, plain, wall)
    rounds = kit_protocol.Rounds(plain, timed, wall)
    rounds.prime()
    found = [
        rounds.time([run_kit.Timed(t, plain, wall) for t in terms], "x", random.Random(i))
        for i in range(4)
    ]
    assert any(not one.accepted for visit in wanted for one in visit)
    for visit, other in zip(wanted, found, strict=True):
        assert [one.accepted for one in visit] == [one["accepted"] for one in other]
        for one, same in zip(visit, other, strict=True):
            assert same["reference_ms"] == pytest.approx(one.reference_ms, abs=1e-6)
            for samples, others in zip(one.samples_ms, same["samples_ms"], strict=True):
                assert others == pytest.approx(samples, abs=1e-6)


def test_the_digest_is_the_one_that_slimnas_computes(kit: FakeKit) -> None:
    manifest = kit.manifest.to_dict()
    assert kit_protocol.digest_of(manifest) == digest_of(manifest) == manifest["digest"]


def test_a_device_that_never_stands_still(kit: FakeKit) -> None:
    machine = kit.machine
    rng = random.Random(0)

    def visit() -> list[float]:
        machine.now += 10
        return [rng.choice((1.0, 2.0, 3.0)) if primed else 1.0]

    primed = False
    rounds = kit_protocol.Rounds({**QUICK.to_dict(), "rounds": 99}, visit, machine.clocks.wall)
    rounds.prime()
    primed = True
    with pytest.raises(kit_protocol.KitError, match=r"entry x: .* start the same command again"):
        rounds.time([visit], "entry x", random.Random(0))


def test_an_interrupted_run_goes_on(kit: FakeKit, tmp_path: Path) -> None:
    whole = kit.run(tmp_path / "whole.jsonl")
    count = len(whole.read_text().splitlines())
    path = tmp_path / "results.jsonl"
    loaded = kit_protocol.Kit.load(kit.write())
    protocol = kit.protocol.to_dict()
    header = kit_protocol.header_of(loaded, DEVICE, protocol, "1/1")
    starts = 0
    for fail_after in (4, 7, 9, 15, None):
        results = kit_protocol.Results(path, header)
        try:
            kit_protocol.time_all(
                loaded, FakeBackend(kit, fail_after=fail_after), results, protocol
            )
        except KeyboardInterrupt:
            starts += 1
            path.write_bytes(path.read_bytes() + b'{"entry":"torn')
    assert starts == 4
    names = [json.loads(line).get("entry") for line in path.read_text().splitlines()[1:]]
    assert len(names) == len(set(names)) == len(kit.manifest.entries) == count - 2


def test_shards_are_all_entries_once(kit: FakeKit) -> None:
    entries = [entry.model_dump() for entry in kit.manifest.entries]
    for count in (1, 2, 3, 7, 50):
        parts = [kit_protocol.part_of(entries, f"{i + 1}/{count}") for i in range(count)]
        names = [entry["name"] for part in parts for entry in part]
        assert sorted(names) == sorted(entry["name"] for entry in entries)
    for wrong in ("0/2", "3/2", "x", "1/0", "-1/2"):
        with pytest.raises(kit_protocol.KitError, match="--shard must be i/n"):
            kit_protocol.part_of(entries, wrong)


def test_uncertain_entries_are_visited_again(tmp_path: Path) -> None:
    kit = FakeKit(
        tmp_path / "kit",
        protocol=Protocol(rounds=3, passes=1, max_drift=0.9, precision=1e-4, extra_passes=2),
        machine=FakeMachine(noise=0.1),
    )
    visits = [json.loads(line) for line in kit.run(tmp_path / "r").read_text().splitlines()]
    passes = [visit["pass"] for visit in visits if "entry" in visit]
    priced = sum(entry.priced for entry in kit.manifest.entries)
    assert passes.count(0) == len(kit.manifest.entries)
    assert 0 < passes.count(1) <= priced
    assert 0 < passes.count(2) <= priced


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[0].update(schema="x"), "is no results file of a kit"),
        (lambda lines: lines[0].update(kit="0"), "belongs to another run: its kit differs"),
        (lambda lines: lines[0]["protocol"].update(rounds=99), r"protocol differs \(rounds: 99"),
    ],
)
def test_other_results_are_not_overwritten(
    change: Any, message: str, kit: FakeKit, tmp_path: Path
) -> None:
    path = edited(kit.run(tmp_path / "results.jsonl"), change)
    before = path.read_bytes()
    with pytest.raises(kit_protocol.KitError, match=message):
        kit.run(path)
    assert path.read_bytes() == before


def test_a_damaged_manifest_or_file_is_named(kit: FakeKit, tmp_path: Path) -> None:
    with pytest.raises(kit_protocol.KitError, match="no such file; give the kit's folder"):
        kit_protocol.Kit.load(tmp_path)
    path = kit.write() / "manifest.json"
    loaded = kit_protocol.Kit.load(kit.folder)
    count = len(kit.manifest.files)
    with pytest.raises(kit_protocol.KitError, match=f"{count} of {count} files are missing"):
        loaded.check_files()
    path.write_text(path.read_text().replace("space micro", "space macro"))
    with pytest.raises(kit_protocol.KitError, match="was changed after the kit was made"):
        kit_protocol.Kit.load(kit.folder)
    path.write_text("{")
    with pytest.raises(kit_protocol.KitError, match="cannot be read"):
        kit_protocol.Kit.load(kit.folder)
    path.write_text("{}")
    with pytest.raises(kit_protocol.KitError, match="must have the schema"):
        kit_protocol.Kit.load(kit.folder)


def test_options_change_the_protocol(kit: FakeKit) -> None:
    loaded = kit_protocol.Kit.load(kit.write())
    assert kit_protocol.protocol_of(loaded, options()) == kit.protocol.to_dict()
    changed = kit_protocol.protocol_of(loaded, options(rounds=9, extra_passes=0), clock="cpu")
    assert (changed["rounds"], changed["clock"], changed["extra_passes"]) == (9, "cpu", 0)
    with pytest.raises(kit_protocol.KitError, match="--passes must be at least 1, got 0"):
        kit_protocol.protocol_of(loaded, options(passes=0))


@pytest.mark.parametrize("name", ["run_kit.py", "run_kit_mac.py", "run_kit_adb.py"])
def test_runners_need_nothing_to_explain_themselves(name: str, tmp_path: Path) -> None:
    for file in (name, "kit_protocol.py"):
        (tmp_path / file).write_bytes((RUNNERS / file).read_bytes())
    # -I: no installed packages of the working directory's, as on somebody else's machine
    code = (
        "import sys, runpy; sys.path.insert(0, '.'); sys.argv = ['x', '--help']\n"
        "for heavy in ('numpy', 'onnxruntime', 'coremltools', 'slimnas', 'torch'):\n"
        "    sys.modules[heavy] = None\n"
        f"runpy.run_path({name!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--kit" in done.stdout


ADB = """\
#!{python}
import os, re, sys
words = sys.argv[1:]
with open(os.environ["ADB_LOG"], "a") as log:
    log.write(" ".join(words) + "\\n")
if words[0] == "shell":
    command = words[1]
    if command.startswith("getprop"):
        known = {{"ro.product.manufacturer": "Acme", "ro.product.model": "One",
                 "ro.soc.model": "C1", "ro.build.version.release": "15"}}
        print(known.get(command.split()[1], ""))
    elif "executor_runner --model_path" in command:
        name = re.search(r"kit/([\\w-]+)\\.onnx", command).group(1)
        count = int(re.search(r"num_executions=(\\d+)", command).group(1))
        ms = float(open(os.path.join(os.environ["ADB_TIMES"], name)).read())
        if ms == 0:
            print("E 00:00:00 executor_runner.cpp:1] no such operator")
            sys.exit(0)
        total = 0
        for i in range(count):
            one = ms * (3 if i == 0 else 1)
            total += one
            if os.environ.get("ADB_OLD") is None:
                print(f"I 00:00:00.000001 executor_runner:executor_runner.cpp:1] "
                      f"Iteration {{i + 1}} of {{count}}: {{one:.6f}} ms")
        print(f"I 00:00 executor_runner.cpp:2] Model executed successfully {{count}} time(s) in "
              f"{{total:.6f}} ms.")
elif words[0] == "-s":
    print("error: device 'x' not found", file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture
def adb(kit: FakeKit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called adb that stands for a phone with the simulated device's times."""
    times = tmp_path / "times"
    times.mkdir()
    for name, ms in kit.times().items():
        (times / Path(name).stem).write_text(repr(ms))
    program = tmp_path / "bin" / "adb"
    program.parent.mkdir()
    program.write_text(ADB.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ADB_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("ADB_TIMES", str(times))
    return times


def android(kit: FakeKit, *words: str) -> argparse.Namespace:
    """The command line for a kit whose files are taken for ExecuTorch's."""
    runner = kit.folder / "executor_runner"
    kit.folder.mkdir(exist_ok=True)
    runner.write_bytes(b"")
    return run_kit_adb.parse(["--kit", str(kit.folder), "--runner", str(runner), *words])


def phone_backend(kit: FakeKit, **changes: Any) -> run_kit_adb.ExecuTorchBackend:
    loaded = kit_protocol.Kit.load(kit.write())
    plain = {"threads": 2, "core": None, "pause_s": 0.0, **changes}
    phone = run_kit_adb.Phone("adb", None)
    return run_kit_adb.ExecuTorchBackend(loaded, phone, kit.protocol.to_dict(), **plain)


@pytest.mark.parametrize("old", [False, True])
def test_adb_gives_the_times_of_the_phone(
    old: bool, kit: FakeKit, adb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        monkeypatch.setenv("ADB_OLD", "1")
    backend = phone_backend(kit, core=7)
    backend.prepare(tmp_path / "executor_runner")
    for file in list(backend._kit.files.values())[:3]:
        samples = backend.load(file)()
        backend.unload(file)
        true = kit.times()[file["name"]]
        if old:
            assert len(samples) == 1
            assert true < samples[0] < 2 * true
        else:
            assert len(samples) >= 3
            assert samples == pytest.approx([true] * len(samples), rel=1e-3)
    backend.clean()
    log = (tmp_path / "log").read_text()
    assert "push" in log
    assert "taskset 80 /data/local/tmp/slimnas-kit/executor_runner" in log
    assert "--cpu_threads=2" in log
    assert log.rstrip().endswith("rm -rf /data/local/tmp/slimnas-kit")


def test_adb_says_what_is_missing(
    kit: FakeKit, adb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = phone_backend(kit)
    file = next(iter(backend._kit.files.values()))
    (adb / Path(file["name"]).stem).write_text("0")
    with pytest.raises(kit_protocol.KitError, match=r"printed no times but .*no such operator"):
        backend.load(file)
    assert run_kit_adb.Phone("adb", None).facts() == ("Acme One", "C1", "Android 15")
    with pytest.raises(kit_protocol.KitError, match="device 'x' not found"):
        run_kit_adb.Phone("adb", "x").facts()
    with pytest.raises(kit_protocol.KitError, match="use its own runner"):
        run_kit_adb.run(android(kit))


def core_ml_kit(tmp_path: Path) -> FakeKit:
    """A kit whose files are zip archives of packages."""
    kit = FakeKit(tmp_path / "kit")
    folder = kit.write()
    for file in kit.manifest.files:
        path = folder / file.name
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{Path(file.name).stem}.mlpackage/Manifest.json", "{}")
    return kit


class FakeTools:
    """What the Mac's runner uses of coremltools, on the simulated device."""

    version = "9.0"
    ComputeUnit = SimpleNamespace(CPU_AND_NE="ne", ALL="all", CPU_ONLY="cpu", CPU_AND_GPU="gpu")

    def __init__(self, kit: FakeKit, devices: int = 1) -> None:
        tools = self
        self.loaded: list[tuple[str, str, bool]] = []
        self.asked: list[tuple[str, int, Any]] = []
        self.DeviceType = str

        class Model:
            def __init__(self, path: str, compute_units: str, skip_model_load: bool) -> None:
                self.name = Path(path).stem
                tools.loaded.append((self.name, compute_units, skip_model_load))

            def get_spec(self) -> Any:
                given = SimpleNamespace(name="image")
                return SimpleNamespace(description=SimpleNamespace(input=[given]))

        class Benchmarker:
            def __init__(self, model: Model, device: Any) -> None:
                self.model, self.device = model, device

            async def benchmark_predict(self, inputs: Any, iterations: int, warmup: bool) -> Any:
                assert warmup
                assert list(inputs) == ["image"]
                tools.asked.append((self.model.name, iterations, self.device))
                ms = {Path(name).stem: ms for name, ms in kit.times().items()}[self.model.name]
                return SimpleNamespace(samples=[ms] * iterations)

        class Device:
            udid, os_version, os_build_number, session = "u", "18.1", "22B", None

            @staticmethod
            def get_connected_devices(device_type: str) -> list[Device]:
                assert device_type == "iphone"
                return [Device() for _ in range(devices)]

            async def prepare_for_model_debugging(self, credentials: Any) -> Device:
                assert credentials["development_team"] == "TEAM"
                return self

        self.MLModel, self.MLModelBenchmarker, self.Device = Model, Benchmarker, Device
        self.AppSigningCredentials = dict


def test_a_connected_iphone(tmp_path: Path) -> None:
    kit = core_ml_kit(tmp_path)
    tools = FakeTools(kit)
    output = tmp_path / "results.jsonl"
    words = ["--kit", str(kit.folder), "--target", "iphone", "--team", "TEAM", "--soc", "A17"]
    given = run_kit_mac.parse([*words, "--output", str(output)])
    run_kit_mac.time_on(kit_protocol.Kit.load(kit.folder), given, tools)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[0]["device"] == {
        "device": "iphone",
        "soc": "A17",
        "os": "iOS 18.1 (22B)",
        "runtime": {"name": "coreml", "version": "iOS 18.1 (22B)"},
        "compute_unit": "cpu-and-ne",
        "threads": None,
        "coremltools": "9.0",
    }
    assert lines[0]["protocol"]["rounds"] == run_kit_mac.REMOTE_PROTOCOL["rounds"]
    visited = [line["entry"] for line in lines if "entry" in line]
    assert sorted(visited) == sorted(entry.name for entry in kit.manifest.entries)
    assert {unit for _, unit, _ in tools.loaded} == {"ne"}
    assert all(skipped for *_, skipped in tools.loaded)
    assert all(device is not None for *_, device in tools.asked)
    assert max(count for _, count, _ in tools.asked) == run_kit_mac.REMOTE_SAMPLES


def test_the_mac_itself(tmp_path: Path) -> None:
    kit = core_ml_kit(tmp_path)
    tools = FakeTools(kit)
    output = tmp_path / "results.jsonl"
    words = ["--kit", str(kit.folder), "--output", str(output), "--compute-unit", "cpu"]
    run_kit_mac.time_on(kit_protocol.Kit.load(kit.folder), run_kit_mac.parse(words), tools)
    assert {unit for _, unit, _ in tools.loaded} == {"cpu"}
    assert not any(skipped for *_, skipped in tools.loaded)
    samples = json.loads(output.read_text().splitlines()[2])["rounds"][0]["samples_ms"]
    assert all(len(one) >= 3 for one in samples)


@pytest.mark.parametrize(
    ("devices", "team", "message"),
    [
        (0, "TEAM", "0 connected devices of kind iphone"),
        (2, "TEAM", "2 connected devices of kind iphone.*--udid"),
        (1, "", "--team must be your Apple developer team"),
    ],
)
def test_a_mac_says_what_is_missing(devices: int, team: str, message: str, tmp_path: Path) -> None:
    kit = core_ml_kit(tmp_path)
    given = run_kit_mac.parse(["--kit", str(kit.folder), "--target", "iphone", "--team", team])
    with pytest.raises(kit_protocol.KitError, match=message):
        run_kit_mac.connected(FakeTools(kit, devices), given)
