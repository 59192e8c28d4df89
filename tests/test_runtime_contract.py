"""What every runtime keeps: PyTorch's numbers, in every number format it offers, for every family.

A runtime whose library is missing here is skipped, with what installs it as the reason.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from runtime_cases import (
    CONVERTING,
    EFFICIENTFORMERV2,
    EFFICIENTVIT,
    LIBRARIES,
    LITV2,
    MIXED,
    RUNNING,
    SWIN,
    VIT,
    image_of,
    logits,
    network_of,
)
from torch import nn

from slimnas.errors import ExportError, RuntimeUnavailableError
from slimnas.nn.efficientformer import MB4D
from slimnas.nn.fold import fold
from slimnas.runtimes.base import (
    BindableSession,
    ClockedRuntime,
    FileRuntime,
    bound,
    clock_of,
)
from slimnas.runtimes.registry import EXTRAS, RUNTIMES, get_runtime

FAMILIES = {
    "efficientformer": {"input": {"resolution": [64, 96]}, **MIXED},
    "vit": VIT,
    "swin": SWIN,
    "efficientformerv2": EFFICIENTFORMERV2,
    "efficientvit": EFFICIENTVIT,
    "litv2": LITV2,
}
LARGEST = {"fp32": 2e-5, "fp16": 0.01, "bf16": 0.05, "int8": 0.1}
"""Largest difference from PyTorch in single precision, as a share of the largest output."""
DTYPES = {
    "coreml": ("fp16", "fp32"),
    "executorch": ("fp32",),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "fp16", "int8"),
    "torch": ("fp32", "bf16", "fp16"),
}
FILES = ("coreml", "executorch", "onnxruntime", "openvino")


def install_line(name: str) -> str:
    return f"pip install 'slimnas[{name}]'" if name in EXTRAS else f"pip install {name}"


def on(name: str, *more: Any) -> Any:
    """Parameters of a test that needs this runtime to run here."""
    why = "runs on macOS" if name in CONVERTING else f"not installed; {install_line(name)}"
    skip = pytest.mark.skipif(name not in RUNNING, reason=f"{name}: {why}")
    return pytest.param(name, *more, marks=skip)


ALL = [on(name) for name in RUNTIMES]
FORMATS = [on(n, dtype) for n in DTYPES for dtype in DTYPES[n]]


def offered(name: str, dtype: str) -> Any:
    """The runtime, unless this processor lacks the arithmetic."""
    try:
        return get_runtime(name, dtype=dtype)
    except RuntimeUnavailableError as error:
        if not any(word in str(error) for word in ("no fast fp16", "this processor has no")):
            raise
        pytest.skip(str(error))


def test_every_runtime_is_looked_at() -> None:
    assert len(ALL) == len(RUNTIMES) == len(DTYPES) == 5
    assert {"onnxruntime", "torch"} <= set(RUNNING)
    for name in CONVERTING:
        module, attribute = RUNTIMES[name]
        assert getattr(importlib.import_module(module), attribute).dtypes == DTYPES[name]
    assert {LIBRARIES[name] for name in FILES} == {*FILES, "coremltools"} - {"coreml"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "dtype"), FORMATS)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_number_format_gives_pytorchs_numbers(
    name: str, dtype: str, family: str, batch: int
) -> None:
    runtime = offered(name, dtype)
    network = network_of(FAMILIES[family])
    x = image_of(network, batch)
    expected = logits(network, x)
    got = runtime.load(fold(network), x).run(x.numpy())
    assert (got.shape, got.dtype) == (expected.shape, np.float32)
    difference, largest = np.abs(got - expected).max(), np.abs(expected).max()
    assert difference <= LARGEST[dtype] * largest, (
        f"{name} {dtype}: max abs difference {difference:.3g}, largest output {largest:.3g}"
    )
    if dtype != "fp32":
        assert difference > 1e-6 * largest, f"{dtype} computes in single precision"
    assert (runtime.name, runtime.dtype, runtime.threads) == (name, dtype, 1)


@pytest.mark.parametrize("family", ["vit", "swin", "litv2"])
def test_int8_is_off_by_its_rounding_and_no_more(family: str) -> None:
    """ONNX Runtime as it fuses operators, and as it takes them one by one."""
    network = network_of(FAMILIES[family])
    x = image_of(network, 4)
    runtime = get_runtime("onnxruntime", dtype="int8")
    assert isinstance(runtime, FileRuntime)
    model = runtime.export(fold(network), x)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    expected = logits(network, x)
    (literal,) = plain.run(None, {"image": x.numpy()})
    got = runtime.open(model).run(x.numpy())
    rounding = np.abs(literal - expected).max()
    assert 0 < rounding < 0.1 * np.abs(expected).max()
    assert np.abs(got - literal).max() < rounding


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_lie_row_by_row(family: str) -> None:
    """ExecuTorch refuses others that XNNPACK does not take from it, as Swin-T's biases."""
    folded = fold(network_of(FAMILIES[family]))
    constants = [*folded.named_parameters(), *folded.named_buffers()]
    assert len(constants) > 10
    assert [name for name, tensor in constants if not tensor.is_contiguous()] == []


@pytest.mark.parametrize("name", ALL)
def test_what_is_timed_is_what_runs(name: str) -> None:
    block = MB4D(width=6, ffn_dim=9).eval()
    x = torch.randn(1, 6, 8, 8)
    runtime = get_runtime(name)
    session = runtime.load(block, x)
    expected = session.run(x.numpy())
    call = bound(session, x.numpy())
    call()
    np.testing.assert_array_equal(np.asarray(call()).reshape(expected.shape), expected)
    clock = clock_of(runtime)
    assert isinstance(runtime, ClockedRuntime) == isinstance(session, BindableSession)
    assert clock() <= clock()


@pytest.mark.parametrize("name", [on(name) for name in FILES])
def test_loading_is_opening_what_was_exported(name: str) -> None:
    runtime = get_runtime(name)
    assert isinstance(runtime, FileRuntime)
    block = MB4D(width=6, ffn_dim=9)
    x = torch.randn(2, 6, 8, 8)
    file = runtime.export(block, x)
    assert isinstance(file, bytes)
    assert block.training
    opened, loaded = runtime.open(file), runtime.load(block, x)
    np.testing.assert_array_equal(opened.run(x.numpy()), loaded.run(x.numpy()))


@pytest.mark.parametrize("name", [on(name) for name in FILES])
@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_file_that_is_no_model(name: str, content: bytes) -> None:
    with pytest.raises(ExportError, match=r"^[^\n]+$"):
        get_runtime(name).open(content)


def test_a_module_of_processes_is_no_file_runtime() -> None:
    assert not isinstance(get_runtime("torch"), FileRuntime)


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_what_is_missing_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, name, ("slimnas_no_such_module", "Other"))
    with pytest.raises(RuntimeUnavailableError) as caught:
        get_runtime(name)
    assert str(caught.value).endswith(install_line(name))


@pytest.mark.parametrize("name", ALL)
def test_what_a_runtime_lacks(name: str) -> None:
    known = ", ".join(DTYPES[name])
    with pytest.raises(RuntimeUnavailableError, match=rf"no dtype 'fp8'.*it has: {known}$"):
        get_runtime(name, dtype="fp8")
    with pytest.raises(RuntimeUnavailableError, match=r"no compute unit 'tpu'.*it has: .*cpu"):
        get_runtime(name, unit="tpu")
    with pytest.raises(RuntimeUnavailableError, match=r"no option 'compil'.*it has: "):
        get_runtime(name, options=("compil",))


def test_a_runtime_that_has_no_such_number_format() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"^onnxruntime has no dtype 'bf16'.*int8$"):
        get_runtime("onnxruntime", dtype="bf16")
    with pytest.raises(RuntimeUnavailableError, match=r"no fast fp16 on the CPU.*fp32, bf16$"):
        get_runtime("torch", dtype="fp16")


def test_an_operator_that_has_no_form() -> None:
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i1e(x)

    looked_at = 0
    for name in set(FILES) & set(RUNNING):
        looked_at += 1
        with pytest.raises(ExportError, match=r"^[^\n]*i1e[^\n]*$"):
            get_runtime(name).load(Unknown(), torch.ones(1, 2))
    assert looked_at >= 1
