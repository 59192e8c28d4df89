"""Supernets trained by two processes: a sandwich, and a whole `slimnas search` under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sandwich_worker
import torch
from cli_world import SEARCH, lay_out, slimnas
from safetensors.torch import load_file

TWO = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node", "2"),
)


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TWO, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_sandwich_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    done = launch(tmp_path, sandwich_worker.__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    one = sandwich_worker.train().state_dict()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    parameters = [name for name in one if "running_" not in name and "num_batches" not in name]
    assert len(parameters) > 80
    for name in parameters:
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - one[name]).abs().max() < 1e-9, name
    alphas = [name for name in parameters if name.endswith(".alpha")]
    assert all(one[name].any() for name in alphas)


@pytest.mark.slow
def test_a_search_by_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(tmp_path)
    words = [*SEARCH, "--target-latency", "0.3ms", "--sandwich", "2", "--json"]
    done = launch(tmp_path, "-m", "slimnas", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(done.stdout)["found"]  # one object, of the main process alone
    assert found["latency_ms"] <= 0.3
    assert done.stderr.count("run folder") == 1
    run = tmp_path / "runs" / "small-digits-bench-0.3ms"
    assert not (run / "training.safetensors").exists()
    kept = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}

    # The same command in one process goes on with what two have made: nothing is left to do.
    monkeypatch.chdir(tmp_path)
    again = slimnas(capsys, *words)
    assert again.code == 0, again.err
    assert again.json()["found"] == [found]
    same = ("supernet.safetensors", "trajectory.jsonl", "architecture.yaml")
    for path in (run / name for name in same):
        assert path.read_bytes() == kept[path]
