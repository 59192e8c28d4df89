"""Making a kit: the networks of a plan, each once, that open, compute and match the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_world import slimnas
from kit_world import MICRO, RUNNERS, micro_scope
from measure_fakes import small_model

from slimnas.arch.space import SearchSpace
from slimnas.errors import ExportError, LatencyTableError, RunFolderError, RuntimeUnavailableError
from slimnas.measure import kit as kit_module
from slimnas.measure.imported_runs import read_run
from slimnas.measure.kit import KitJob, kit_runtime, make_kit
from slimnas.measure.kit_manifest import KitManifest
from slimnas.measure.kit_networks import KitNetworks, identity
from slimnas.measure.kit_weights import LEAST_BYTES, WEIGHTS_FILE, SharedWeights
from slimnas.measure.model_scope import ModelScope
from slimnas.measure.networks import network_and_input
from slimnas.measure.plan import make_plan
from slimnas.measure.results import timings
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Protocol
from slimnas.runtimes.onnxruntime_runtime import OnnxRuntime, OnnxSession

EASY = Protocol(
    rounds=1, passes=1, max_drift=0.99, visit_ms=1, sample_ms=0.1, warm_up_ms=2, extra_passes=0
)
"""Accepts what a busy machine gives: these tests do not look at times."""


def job(output: Path, **changes: Any) -> KitJob:
    plain = KitJob(output, "phone", micro_scope(), protocol=EASY, calibration=3, held_out=2)
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kits") / "onnx"
    make_kit(job(folder), kit_runtime("onnx"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    assert {path: path.read_bytes() for path in before} == before


def test_networks_are_those_of_the_plan_each_once() -> None:
    plan = make_plan(micro_scope(), calibration=3, held_out=2)
    networks = KitNetworks.of(plan)
    terms = [term.parts for entry in plan.entries for term in entry.terms]
    assert len({identity(parts) for parts in networks.parts.values()}) == len(networks.parts)
    assert {identity(parts) for parts in [plan.reference, *terms]} == {
        identity(parts) for parts in networks.parts.values()
    }
    assert len(networks.parts) < len(terms)
    for parts in terms:
        assert identity(networks.parts[networks.stem(parts)]) == identity(parts)


def test_the_manifest_is_true(kit: Path) -> None:
    manifest = KitManifest.load(kit)
    listed = [*manifest.files, *manifest.shared]
    on_disk = {p.relative_to(kit).as_posix() for p in (kit / "networks").iterdir()}
    assert {file.name for file in listed} == on_disk
    for file in listed:
        data = (kit / file.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
    assert manifest.size == sum(file.size for file in listed)
    assert {term.file for entry in manifest.entries for term in entry.terms} | {
        manifest.reference
    } == set(manifest.by_name)
    assert sorted(path.name for path in kit.iterdir()) == [
        "README.md",
        "kit_protocol.py",
        "manifest.json",
        "networks",
        "run_kit.py",
    ]
    for name in ("run_kit.py", "kit_protocol.py"):
        assert (kit / name).read_bytes() == (RUNNERS / name).read_bytes()


def test_the_plan_is_read_back(kit: Path) -> None:
    plan = KitManifest.load(kit).plan()
    made = make_plan(micro_scope(), calibration=3, held_out=2)
    assert [entry.name for entry in plan.entries] == [entry.name for entry in made.entries]
    assert [entry.key for entry in plan.entries] == [entry.key for entry in made.entries]
    assert plan.held_out == made.held_out
    assert plan.calibration == made.calibration
    for one, other in zip(plan.entries, made.entries, strict=True):
        assert [term.share for term in one.terms] == [term.share for term in other.terms]


def test_every_file_takes_what_the_manifest_says(kit: Path) -> None:
    looked_at = 0
    for file in KitManifest.load(kit).files:
        x = np.random.default_rng(0).standard_normal(file.input.shape).astype(file.input.dtype)
        output = OnnxSession(str(kit / file.name), threads=1).run(x)
        assert np.isfinite(output).all()
        looked_at += 1
    assert looked_at > 15


def test_weights_lie_apart_and_are_ordinary_numbers(kit: Path) -> None:
    weights = np.fromfile(kit / "networks" / WEIGHTS_FILE, np.float32)
    assert np.abs(weights).min() > 1e-3
    assert np.abs(weights).max() < 1
    shared = 0
    for path in sorted((kit / "networks").glob("*.onnx")):
        spans = []
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.raw_data) < LEAST_BYTES
                continue
            said = {entry.key: entry.value for entry in tensor.external_data}
            assert said["location"] == WEIGHTS_FILE
            assert int(said["length"]) == 4 * int(np.prod(tensor.dims))
            spans.append((int(said["offset"]), int(said["offset"]) + int(said["length"])))
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert not spans or spans[-1][1] <= weights.nbytes
        shared += len(spans)
    assert shared > 50


def test_sharing_weights_changes_numbers_only(tmp_path: Path) -> None:
    """With the network's own weights in the shared file, it computes what it did."""
    parts = tuple(make_plan(micro_scope(), calibration=0, held_out=1).entries[-1].terms[0].parts)
    module, x = network_and_input(parts, 1)
    model = OnnxRuntime().export(module, x)
    path = tmp_path / "network.onnx"
    path.write_bytes(SharedWeights().share(model))
    own = {t.name: t for t in onnx.load_from_string(model).graph.initializer}
    blob = bytearray()
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            offset = {entry.key: entry.value for entry in tensor.external_data}["offset"]
            blob.extend(bytes(int(offset) - len(blob)))
            blob.extend(onnx.numpy_helper.to_array(own[tensor.name]).tobytes())
    (tmp_path / WEIGHTS_FILE).write_bytes(blob)
    with torch.inference_mode():
        wanted = module.eval()(x).numpy()
    found = OnnxSession(str(path), threads=1).run(x.numpy())
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_weights_of_their_own(tmp_path: Path) -> None:
    made = make_kit(
        job(tmp_path / "kit", calibration=0, held_out=1, shared_weights=False), kit_runtime("onnx")
    )
    assert made.shared == ()
    biggest = max(made.files, key=lambda file: file.size)
    assert biggest.size > 1e5
    onnx.checker.check_model(onnx.load(str(tmp_path / "kit" / biggest.name)))


def test_files_made_ahead_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several processes, as for the formats that take seconds."""
    small = {"calibration": 0, "held_out": 1, "shared_weights": False}
    plain = make_kit(job(tmp_path / "plain", **small), kit_runtime("onnx"))
    monkeypatch.setattr("slimnas.measure.kit.exports_slowly", lambda runtime: True)
    monkeypatch.setattr("slimnas.measure.exports.usable_cores", lambda: (0, 0))
    shown: list[tuple[int, int, str]] = []
    ahead = make_kit(
        job(tmp_path / "ahead", **small), kit_runtime("onnx"), lambda *each: shown.append(each)
    )
    assert ahead.files == plain.files
    assert len(ahead.files) > 5
    count = len(ahead.files)
    assert shown[: count + 1] == [(made, count, "exporting") for made in range(count + 1)]
    assert shown[-1] == (count, count, "checking")


def test_a_kit_of_a_model(tmp_path: Path) -> None:
    scope = ModelScope(small_model("vit"))
    order = job(tmp_path / "kit", scope=scope, calibration=1, held_out=1)
    made = make_kit(order, kit_runtime("onnx"))
    assert made.scope.kind == "model"
    assert KitManifest.load(tmp_path / "kit").plan().held_out[0].name.endswith("_pruned")
    tokens = [file for file in made.files if len(file.input.shape) == 3]
    assert tokens


def test_readme_says_what_to_do(kit: Path) -> None:
    manifest, text = KitManifest.load(kit), (kit / "README.md").read_text()
    assert f"{len(manifest.files)} small neural networks" in text
    assert "python run_kit.py" in text
    assert "slimnas latency import results.jsonl --device phone" in text
    assert "$" not in text
    for name in ("coreml", "executorch"):
        other = manifest.model_copy(update={"format": name})
        said = kit_module.readme(other)
        assert kit_module.RUNNERS[name] in said
        assert "${" not in said


def start(kit: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "run_kit.py", *words],
        cwd=kit,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_runner_runs_is_killed_goes_on_and_is_imported(kit: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    words = ("--output", str(output), "--clock", "cpu")
    first = start(kit, *words)
    while first.poll() is None and not (
        output.exists() and len(output.read_bytes().splitlines()) > 5
    ):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = len(output.read_bytes().splitlines())
    assert kept > 5
    second = start(kit, *words)
    _, said = second.communicate()
    assert second.returncode == 0, said
    manifest = KitManifest.load(kit)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    names = [line["entry"] for line in lines if "entry" in line]
    assert sorted(names) == sorted(entry.name for entry in manifest.entries)
    assert lines[0]["kit"] == manifest.digest
    assert lines[0]["device"]["runtime"]["name"] == "onnxruntime"
    assert sum("session" in line for line in lines) == 2
    assert "finished" in lines[-1]
    # One round on a busy machine may be too noisy for a table, so only what must not depend on
    # times is asked: the plan finds every entry it needs.
    timed = timings(manifest.plan().entries, read_run(output.read_text(), "results").visits)
    assert sorted(timed) == sorted(names)


def test_the_runner_checks_the_files(kit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(kit, copy)
    done = start(copy, "--check")
    _, said = done.communicate()
    assert (done.returncode, "all files are what the manifest says" in said) == (0, True)
    name = KitManifest.load(copy).files[3].name
    (copy / name).write_bytes(b"x")
    done = start(copy)
    _, said = done.communicate()
    assert done.returncode == 1
    assert f"1 of {len(KitManifest.load(copy).files) + 1} files are missing or damaged" in said
    assert name in said
    assert not (copy / "results.jsonl").exists()
    done = start(kit, "--providers", "NoSuchExecutionProvider", "--output", str(tmp_path / "r"))
    _, said = done.communicate()
    assert "NoSuchExecutionProvider is not in this onnxruntime; it has" in said


class Broken(OnnxRuntime):
    """Fails at the third network."""

    count = 0

    def export(self, module: Any, example: Any) -> bytes:
        Broken.count += 1
        if Broken.count == 3:
            raise ExportError("no form for an operator")
        return super().export(module, example)


def test_a_failed_kit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no form for an operator"):
        make_kit(job(tmp_path / "kit"), Broken())
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_computes_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: SharedWeights, folder: Path, seed: int) -> Path:
        path = folder / WEIGHTS_FILE
        path.write_bytes(np.full(self.size // 4, np.nan, np.float32).tobytes())
        return path

    monkeypatch.setattr(SharedWeights, "write", write)
    with pytest.raises(ExportError, match="must compute finite numbers, not all zero"):
        make_kit(job(tmp_path / "kit", calibration=0, held_out=0), kit_runtime("onnx"))
    assert list(tmp_path.iterdir()) == []


def test_bad_orders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = kit_runtime("onnx")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunFolderError, match="taken: is there already"):
        make_kit(job(tmp_path / "taken"), runtime)
    with pytest.raises(LatencyTableError, match=r"a device's name, .* must be letters.*'my phone'"):
        make_kit(job(tmp_path / "kit", device="my phone"), runtime)
    with pytest.raises(LatencyTableError, match=r"--format must be one of .*did you mean 'onnx'"):
        kit_runtime("onx")
    with pytest.raises(RuntimeUnavailableError, match="dtype"):
        kit_runtime("onnx", "fp8")
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(kit_module.shutil, "disk_usage", lambda _: full)
    with pytest.raises(RunFolderError, match=r"needs about .* MB, 0 MB are free"):
        make_kit(job(tmp_path / "kit"), runtime)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("micro.yaml").write_text(MICRO)
    words = ["latency", "kit", "--device", "phone", "--output", "kit", "--networks", "1"]
    words += ["--held-out", "1"]
    answer = slimnas(capsys, *words)
    assert (answer.code, "give --space or --model" in answer.err.replace("\n", " ")) == (2, True)
    answer = slimnas(capsys, *words, "--space", "micro.yaml", "--json")
    assert answer.code == 0
    said = json.loads(answer.out)
    manifest = KitManifest.load(Path("kit"))
    assert said["kit"] == manifest.digest
    assert (said["bytes"], said["files"]) == (manifest.size, len(manifest.files))
    answer = slimnas(capsys, *words, "--space", "micro.yaml")
    assert (answer.code, "kit: is there already" in answer.err) == (1, True)


def fixed_scope() -> SpaceScope:
    """Of one width per stage, for formats that take seconds to write."""
    text = MICRO.replace("{min: 16, max: 32, step: 16}", "{min: 16, max: 16, step: 16}")
    return SpaceScope(SearchSpace.from_yaml(text))


@pytest.mark.slow
def test_executorch_programs(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    made = make_kit(
        job(tmp_path / "kit", scope=fixed_scope(), file_format="executorch", held_out=1),
        kit_runtime("executorch"),
    )
    assert made.checked.startswith("every file run in executorch")
    assert {Path(file.name).suffix for file in made.files} == {".pte"}
    assert all(file.input.dtype == "float32" for file in made.files)
    assert (tmp_path / "kit" / "run_kit_adb.py").is_file()


@pytest.mark.slow
def test_core_ml_packages(tmp_path: Path) -> None:
    ct = pytest.importorskip("coremltools")
    made = make_kit(
        job(tmp_path / "kit", scope=fixed_scope(), file_format="coreml", held_out=1),
        kit_runtime("coreml"),
    )
    assert (tmp_path / "kit" / "run_kit_mac.py").is_file()
    for number, file in enumerate(made.files):
        folder = tmp_path / f"{number}"
        with zipfile.ZipFile(tmp_path / "kit" / file.name) as archive:
            archive.extractall(folder)
        (package,) = folder.glob("*.mlpackage")
        spec = ct.models.utils.load_spec(str(package))
        (given,) = spec.description.input
        assert tuple(given.type.multiArrayType.shape) == file.input.shape
        assert spec.WhichOneof("Type") == "mlProgram"
