"""The networks that ship with their weights: what they say of themselves is so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace
from slimnas.nn.tensorfiles import load_tensors
from slimnas.prune.pretrained import open_start
from slimnas.zoo.create import create_model
from slimnas.zoo.export import export_network
from slimnas.zoo.metrics import TEST_TOP1
from slimnas.zoo.preprocessing import normalisation_of
from slimnas.zoo.registry import TRAINED, builtin_names, get, list_entries
from slimnas.zoo.weights import load_weights, save_weights

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.name for path in TRAINED.iterdir())
SMALL_ENOUGH = 12_000_000
"""Bytes of a weights file."""


def benchmark_row(name: str) -> dict[str, object]:
    """What the benchmark that made an entry says of its network."""
    result = json.loads((ROOT / "benchmarks/results/search_quality_50000.json").read_text())
    (row,) = (
        row
        for row in result["rows"]
        if row["arm"] == "found" and name.endswith(f"_{row['target_ms']:g}ms")
    )
    assert isinstance(row, dict)
    return row


def test_they_are_in_the_zoo() -> None:
    assert [entry.name for entry in list_entries(family="found").entries] == NAMES
    assert set(NAMES) <= set(builtin_names())
    assert len(NAMES) == 2


@pytest.mark.parametrize("name", NAMES)
def test_files_and_figures(name: str) -> None:
    entry = get(name)
    assert (entry.name, entry.source, entry.folder) == (name, "built-in", None)
    assert entry.weights is not None
    assert entry.weights.stat().st_size < SMALL_ENOUGH
    tensors, _ = load_tensors(entry.weights, "weights")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    counted, row = cost(entry.architecture), benchmark_row(name)
    assert entry.metrics["params"].value == counted.params == row["params"]
    assert entry.metrics["macs"].value == counted.macs == row["macs"]
    assert entry.metrics["latency_ms"].value == row["measured_ms"]
    (top1,) = row["test_top1"]  # type: ignore[misc] # one seed
    assert entry.metrics[TEST_TOP1].value == pytest.approx(top1, abs=0.1)  # halves
    assert "10000 TEST images of cifar10" in entry.metrics[TEST_TOP1].provenance
    assert normalisation_of(entry.architecture) is not None
    card = (TRAINED / name / "README.md").read_text()
    assert f'slimnas.create_model("{name}", pretrained=True)' in card
    assert f"{counted.params:,}" in card


@pytest.mark.parametrize("name", NAMES)
def test_they_are_of_their_space(name: str) -> None:
    space = SearchSpace.load("efficientformer_micro").with_classes(10)
    architecture = get(name).architecture
    found = space.architecture(space.select(architecture))
    assert found.stages == architecture.stages


@pytest.mark.parametrize("name", NAMES)
def test_every_command_starts_from_their_weights(name: str) -> None:
    start = open_start(name, "auto")
    assert start.source == "the weights that ship with slimnas"
    assert start.normalisation == normalisation_of(get(name).architecture)
    state = start.network.state_dict()
    wanted = create_model(name, pretrained=True).state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_come_in_single_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    network = create_model(NAMES[0])
    architecture = network.architecture
    state = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    save_weights(tmp_path / "weights.safetensors", state, architecture)
    loaded = load_weights(tmp_path / "weights.safetensors", architecture)
    assert state.keys() == loaded.keys()
    for key, value in loaded.items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(value, state[key].to(value.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_loaded_in_full_precision_and_export(name: str, tmp_path: Path) -> None:
    network = create_model(name, pretrained=True)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    fresh = create_model(name).state_dict()
    same = [
        key
        for key, value in network.state_dict().items()
        if key.endswith(".weight") and value.ndim > 1 and torch.equal(value, fresh[key])
    ]
    assert same == []
    x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    export_network(network, tmp_path / "network.onnx", format="onnx")
    session = ort.InferenceSession(str(tmp_path / "network.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, network.eval()(x).numpy(), atol=1e-4)
