"""`slimnas zoo` from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner
from zoo_cases import TINY, save_run, trained

from slimnas.arch.architecture import Architecture
from slimnas.cli.zoo import app
from slimnas.errors import WeightsError, ZooError
from slimnas.zoo.registry import add, builtin_names

CAPTIONS = ("name", "params", "MACs", "top-1", "latency or throughput", "source")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "runs" / "first")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return tmp_path / "zoo"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_cli_list(zoo: Path, run: Path) -> None:
    add(run, name="mine", zoo=zoo)
    add(run, name="broken", zoo=zoo)
    (zoo / "broken" / "architecture.yaml").write_text("schema: other\n")
    result = invoke("list", "--json", "--zoo", zoo)
    entries = json.loads(result.stdout)["entries"]
    assert [entry["name"] for entry in entries] == [*builtin_names(), "mine"]
    counted = {entry["name"]: (entry["params"], entry["macs"]) for entry in entries}
    assert counted["efficientformer_l1"] == (12_289_928, 1_291_284_736)
    assert {entry["source"] for entry in entries} == {"built-in", "zoo"}
    assert "skipped" in result.stderr
    by_name = {entry["name"]: entry for entry in entries}
    l1 = by_name["efficientformer_l1"]
    assert l1["top1"]["value"] == 79.2
    assert l1["top1"]["provenance"].startswith("official README")
    assert l1["latency"]["metric"] == "iphone12_latency_ms"
    assert (l1["latency"]["value"], l1["latency"]["unit"]) == (1.6, "ms")
    assert (l1["family"], l1["weights"]) == ("efficientformer", "download")
    assert by_name["mine"]["top1"] is by_name["mine"]["latency"] is None
    assert by_name["litv2_s"]["weights"] is None
    plain = invoke("list", "--zoo", zoo).stdout
    assert "12,289,928" in plain


def test_cli_list_of_a_part(zoo: Path) -> None:
    plain = invoke("list", "--family", "efficientformer", "--zoo", zoo).stdout
    title, *lines = plain.splitlines()
    assert re.split(" {2,}", title) == list(CAPTIONS)
    assert re.fullmatch(
        r"efficientformer_l1 +12,289,928 +1,291,284,736 +79\.2 \[1\] +1\.6 ms iphone12 \[2\] +"
        r"built-in",
        lines[0],
    )
    assert len([line for line in lines if line.startswith("efficient")]) == 3
    assert lines[-2].startswith("[1] official README: ImageNet-1k, 224 px, 300 epochs")
    assert lines[-1].startswith("[2] official README: iPhone 12")
    matching = json.loads(invoke("list", "*vit_m?", "--zoo", zoo, "--json").stdout)["entries"]
    assert [entry["name"] for entry in matching] == [f"efficientvit_m{i}" for i in range(6)]
    speed = matching[4]["latency"]
    assert (speed["value"], speed["unit"], speed["device"]) == (15914, "images/s", "v100")
    nothing = invoke("list", "nothing*", "--zoo", zoo)
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "no model matches 'nothing*'" in nothing.stderr
    assert json.loads(invoke("list", "nothing*", "--json").stdout) == {"entries": [], "damaged": []}
    with pytest.raises(ZooError, match="no family 'efficientvits'"):
        invoke("list", "--family", "efficientvits")


def test_cli_show(run: Path) -> None:
    shown = json.loads(invoke("show", run, "--json").stdout)
    assert Architecture.from_dict(shown["architecture"]) == TINY
    assert shown["metrics"]["digits_top1"]["value"] == 0.97
    plain = invoke("show", run).stdout
    assert "digits_top1: 0.97 (slimnas evaluate, 360 test images)" in plain


def test_cli_add_then_export(zoo: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo.parent)
    added = json.loads(invoke("add", run, "--name", "mine", "--zoo", zoo, "--json").stdout)
    assert added == {"name": "mine", "folder": "zoo/mine"}
    result = json.loads(invoke("export", "mine", "--zoo", zoo, "--json").stdout)
    assert result["file"] == "zoo/mine/exports/mine.onnx"
    assert result["trained"]
    assert 0 <= result["max_abs_difference"] < 1e-4
    session = onnxruntime.InferenceSession(result["file"], providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 32, 32)
    (got,) = session.run(None, {"image": x.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(got, trained()(x).numpy(), atol=1e-4)


def test_cli_export_untrained_to_a_file(tmp_path: Path) -> None:
    TINY.save(tmp_path / "tiny.yaml")
    output = tmp_path / "out" / "net.onnx"
    result = invoke("export", tmp_path / "tiny.yaml", "--untrained", "--output", output)
    assert result.stdout.startswith("ok: ")
    assert output.is_file()
    with pytest.raises(WeightsError, match="no weights beside"):
        invoke("export", tmp_path / "tiny.yaml", "--output", output)


def test_cli_usage_errors(run: Path) -> None:
    result = invoke("export", run, "--untrained", "--weights", run / "weights.safetensors")
    assert result.exit_code == 2
    assert invoke("export", run, "--format", "tflite").exit_code == 2
