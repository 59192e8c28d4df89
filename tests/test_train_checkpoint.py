"""The state of a training run on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from train_cases import (
    CPU,
    assert_equal,
    everything,
    one_step,
    task,
)

from slimnas.errors import SlimnasError, WeightsError
from slimnas.nn.tensorfiles import save_tensors
from slimnas.train.checkpoint import TrainState, load_state, save_state
from slimnas.train.loop import (
    fit,
    start,
)


def test_checkpoint_gives_bitwise_the_same_next_step(tmp_path: Path) -> None:
    first = task()
    state = start(first, CPU)
    for step in range(3):
        one_step(first, state, step)
    save_state(tmp_path / "a.safetensors", state, "me")
    second = task()
    resumed = start(second, CPU)
    load_state(tmp_path / "a.safetensors", resumed, "me")
    assert resumed.step == 3
    assert_equal(everything(state), everything(resumed))
    assert one_step(first, state, 3) == one_step(second, resumed, 3)
    assert_equal(everything(state), everything(resumed))
    save_state(tmp_path / "b.safetensors", state, "me")
    save_state(tmp_path / "c.safetensors", resumed, "me")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def saved(tmp_path: Path) -> Path:
    given = task()
    state = start(given, CPU)
    one_step(given, state, 0)
    save_state(tmp_path / "state.safetensors", state, "me")
    return tmp_path / "state.safetensors"


def refused(path: Path, match: str, identity: str = "me") -> None:
    with pytest.raises(WeightsError, match=match) as caught:
        fit(task(), CPU, checkpoint=path, identity=identity)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = path.read_bytes()
    lengths = [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        refused(path, "damaged or not safetensors")
    path.write_bytes(data + b"x")
    refused(path, "damaged or not safetensors")


def test_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    for position in (8, len(data) // 2, len(data) - 3):
        altered = bytearray(data)
        altered[position] ^= 0x10
        path.write_bytes(altered)
        refused(path, "damaged|does not match|schema|other settings")


def test_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    refused(path, "other settings, data or seed", identity="you")
    path.write_text("not tensors at all")
    refused(path, "damaged or not safetensors")
    save_tensors(path, {"a": torch.zeros(2)}, {})
    refused(path, "schema: must be")
    other = nn.Linear(2, 2)
    state = TrainState(other, nn.Linear(2, 2), torch.optim.AdamW(other.parameters()), other)
    save_state(path, state, "me")
    refused(path, "does not fit this run")


def test_checkpoint_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SlimnasError, match="cannot be written") as caught:
        fit(task(), CPU, checkpoint=tmp_path / "file" / "s.safetensors")
    assert "\n" not in str(caught.value)
