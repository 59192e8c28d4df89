"""`slimnas analyze mhsa-share` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_world import slimnas
from share_cases import exactly, small

from slimnas.analysis.speed import Speed, SpeedMeter
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.errors import LatencyTableError


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small ViT, and a machine whose time is MACs."""
    monkeypatch.chdir(tmp_path)
    small().save(tmp_path / "small.yaml")
    base_macs = cost(small()).macs

    def measured(self: SpeedMeter, architecture: Architecture) -> Speed:
        return exactly(base_macs / cost(architecture).macs)

    monkeypatch.setattr("slimnas.analysis.speed.SpeedMeter.__call__", measured)
    return tmp_path


ASKED = (
    *("analyze", "mhsa-share", "small.yaml", "--speedups", "1.25", "--shares", "20,50"),
    *("--tolerance", "8", "--step", "1", "--output", "out"),
)
TRAINED = (*ASKED, "--train", "1", "--max-images", "120", "--train-resolution", "32")


def test_the_command_writes_everything(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = slimnas(capfd, *TRAINED, "--train-on", "cpu", "--json")
    assert found.code == 0, found.err
    body = found.json()
    assert [one["share"] for one in body["networks"]] == [0.25, 0.5]
    assert all(one["within_tolerance"] for one in body["networks"])
    for one in (body["base"], *body["networks"]):
        assert 0 < one["memory_bound_share"] < 1
        assert 0 <= one["top1"] <= 100
    for one in body["networks"]:
        saved = Architecture.load(world / "out" / "networks" / f"{one['name']}.yaml")
        assert saved.digest == one["digest"]
        assert cost(saved).macs == one["macs"]
    names = {Path(name).name for name in body["files"]}
    assert names == {f"mhsa_share.{kind}" for kind in ("csv", "json", "svg", "png")}
    assert len((world / "out" / "mhsa_share.csv").read_text().splitlines()) == 4
    stored = json.loads((world / "out" / "mhsa_share.json").read_text())
    assert stored["provenance"]["training"]["recipe"]["epochs"] == 1
    assert not list((world / "out").glob("training-*"))

    def never(*_: Any, **__: Any) -> None:
        raise LatencyTableError("worked again")

    monkeypatch.setattr("slimnas.analysis.speed.SpeedMeter.__call__", never)
    monkeypatch.setattr("slimnas.analysis.budget.TrainingBudget.train", never)
    again = slimnas(capfd, *TRAINED, "--train-on", "cpu", "--json")
    assert again.code == 0, again.err
    assert again.json()["networks"] == body["networks"]


def test_the_command_prints_a_table(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = slimnas(capfd, *ASKED, "--no-memory")
    assert found.code == 0, found.err
    assert "small_vit-1.25x-50mhsa" in found.out
    assert "top-1" not in found.out
    assert "memory-bound" not in found.out
    assert "written: out/mhsa_share.csv" in found.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("efficientformer_l1",), "efficientformer_l1: has no block whose attention or FFN"),
        (("deit_tyni",), "no model, file or folder 'deit_tyni' (did you mean 'deit_tiny'?)"),
        (("deit_tiny", "--shares", "0,20"), "shares: must lie between 0 and 100 %, got 0 %"),
        (("deit_tiny", "--shares", "a lot"), "--shares: must be numbers between commas"),
        (("deit_tiny", "--speedups", "-1"), "--speedups: must be above 0, got '-1'"),
        (("deit_tiny", "--resolution", "8"), "the image must hold a patch of 16x16"),
        (("deit_tiny", "--clock", "cpu", "--threads", "2"), "--clock cpu times one thread"),
        (("deit_tiny", "--backend", "onnxruntime", "--device", "cuda"), "no compute unit 'cuda'"),
        (("deit_tiny", "--train", "1", "--lr", "0"), "lr: must be"),
    ],
)
def test_bad_input_is_one_line(
    world: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    found = slimnas(capfd, "analyze", "mhsa-share", *words, "--output", "out/deep")
    assert found.code == 1
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert not (world / "out").exists()
