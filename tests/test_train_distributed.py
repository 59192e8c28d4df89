"""Two processes on CPUs train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import TASKS, train
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("distributed_worker.py")
TOLERANCE = {"plain": 1e-9, "single": 1e-5, "accumulating": 1e-9, "supernet": 1e-9}


def launch(folder: Path, *arguments: str, restarts: int = 0) -> str:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", "--max-restarts", str(restarts)),
        *(str(WORKER), str(folder), *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(folder)
    return folder


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    assert len(one) > 20
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("name", list(TASKS))
def test_two_processes_give_the_weights_of_one_with_the_whole_batch(
    name: str, of_two: Path
) -> None:
    one = train(name).state_dict()
    begun = TASKS[name]().model.state_dict()
    assert largest_difference(one, begun) > 1e-3  # there was something to learn
    two = load_file(of_two / f"{name}.safetensors")
    assert largest_difference(one, two) < TOLERANCE[name]


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_nothing_is_lost(tmp_path: Path, of_two: Path) -> None:
    said = launch(tmp_path, "7", restarts=1)
    assert "TrainingError: another process of this run ended" in said
    assert (tmp_path / "killed").exists()
    again = load_file(tmp_path / "plain.safetensors")
    whole = load_file(of_two / "plain.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert again.keys() == whole.keys()
