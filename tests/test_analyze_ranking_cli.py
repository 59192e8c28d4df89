"""`slimnas analyze ranking` from the command line, of a small search that was run to its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import SEARCH, lay_out, slimnas
from PIL import Image
from scipy.stats import kendalltau

from slimnas.analysis.budget import TrainingBudget
from slimnas.analysis.ranking import draw_networks
from slimnas.arch.architecture import Architecture
from slimnas.cli.main import main
from slimnas.data.splits import open_data
from slimnas.nn.build import build
from slimnas.search.config import SearchConfig
from slimnas.search.importance import ImportanceRecord
from slimnas.search.run import open_evaluator
from slimnas.supernet.inherit import place
from slimnas.supernet.train import load_supernet

TARGET = ("--target-latency", "0.3ms", "--output", "runs/found")
ASKED = ("analyze", "ranking", "runs/found", "--networks", "4", "--train-on", "cpu")
SHORT = (*ASKED, "--epochs", "1", "--output", "out", "--json")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the folder of a finished search."""
    folder = tmp_path_factory.mktemp("searched")
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*SEARCH, *TARGET]) == 0
    return folder


@pytest.fixture
def world(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to write to."""
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_ranks_and_goes_on(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = slimnas(capfd, *SHORT)
    assert found.code == 0, found.err
    body = found.json()
    assert body["n"] == len(body["networks"]) == 4
    assert body["ceiling"] is None
    own = [one["own_search_top1"] for one in body["networks"]]
    for one in body["correlations"]:
        key = {"inherited": "inherited_search_top1"}.get(one["predictor"], one["predictor"])
        values = [network[key] for network in body["networks"]]
        if len(set(values)) > 1 and len(set(own)) > 1:
            assert one["search"]["tau"] == pytest.approx(kendalltau(values, own).statistic)
        assert one["search"]["n"] == one["test"]["n"] == 4
    names = {Path(name).name for name in body["files"]}
    assert names == {f"ranking.{kind}" for kind in ("csv", "json", "svg", "png")}
    assert (world / "out" / "ranking.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((world / "out" / "ranking.json").read_text())
    assert stored["schema"] == "slimnas/analysis-ranking/1"
    assert stored["provenance"]["layer_scale"] == 0.1
    assert len((world / "out" / "ranking.csv").read_text().splitlines()) == 5
    assert {path.name for path in (world / "out").iterdir()} == {*names, "finished.jsonl"}
    more = slimnas(capfd, *SHORT, "--seeds", "2")
    assert more.code == 0, more.err
    assert [one["own_search_top1_by_seed"][:1] for one in more.json()["networks"]] == [
        one["own_search_top1_by_seed"] for one in body["networks"]
    ]
    assert more.json()["ceiling"]["n"] == 4

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("done again")

    monkeypatch.setattr("slimnas.analysis.budget.TrainingBudget.train", never)
    monkeypatch.setattr("slimnas.search.run.open_evaluator", never)
    again = slimnas(capfd, *SHORT)
    assert again.json() == body
    assert "went on after 12 finished parts" in again.err
    table = slimnas(capfd, *SHORT[:-1], "--seeds", "2")
    assert "own top-1 of 4 networks, ranked by" in table.out
    assert "ceiling: trainings of two seeds agree with tau" in table.out
    assert "written: out/ranking.csv" in table.out
    other = slimnas(capfd, *SHORT, "--lr", "0.01")
    assert other.code == 1
    assert "belongs to a run with recipe.lr 0.001, now it is 0.01" in other.errors[0]


def test_what_the_supernet_says_is_what_the_search_says(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importance from the run's record; accuracy from the network with its weights, all images."""

    def quick(self: TrainingBudget, architecture: Architecture, *, seed: int) -> Any:
        return build(self.adapted(architecture), seed=seed).eval()

    monkeypatch.setattr("slimnas.analysis.budget.TrainingBudget.train", quick)
    body = slimnas(capfd, *SHORT).json()
    config = SearchConfig.load(world / "runs/found/config.yaml")
    supernet = load_supernet(world / "runs/found/supernet.safetensors").supernet
    record = json.loads((world / "runs/found/importance.json").read_text())["stages"]
    drawn = {one.digest: one for one in draw_networks(supernet.space, 4, seed=0)}
    data = open_data(
        "digits", resolution=(32, 32), channels=3, seed=config.seed, max_images=config.max_images
    )
    calibration, _ = next(
        data.train.batches(config.calibration_images, device="cpu", seed=0, epoch=1, augment=False)
    )
    images, labels = next(
        data.search.batches(config.search_images, device="cpu", seed=0, epoch=0, augment=False)
    )
    alphas = ImportanceRecord(supernet.alphas(), {})
    order = open_evaluator(config, supernet, alphas, data.for_search()).inheritance.order
    assert {one["digest"] for one in body["networks"]} == set(drawn)
    for one in body["networks"]:
        selection = place(supernet, drawn[one["digest"]])
        total = sum(record[i]["slots"][j]["importance"] for i, j, _ in selection.active())
        assert one["importance"] == pytest.approx(total)
        network = supernet.extract(drawn[one["digest"]], selection=selection, order=order)
        for part in network.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = None
                part.reset_running_stats()
        network.train()
        with torch.no_grad():
            network(calibration)
            right = network.eval()(images).argmax(dim=1) == labels
        assert one["inherited_search_top1"] == pytest.approx(100 * float(right.float().mean()))


def test_ctrl_c_says_how_to_go_on(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(self: TrainingBudget, architecture: Architecture, *, seed: int) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(architecture.digest)
        return build(self.adapted(architecture), seed=seed).eval()

    monkeypatch.setattr("slimnas.analysis.budget.TrainingBudget.train", train)
    stopped = slimnas(capfd, *SHORT)
    assert stopped.code == 130
    assert stopped.out == ""
    assert "stopped; the same command goes on where it was" in stopped.err
    kept = (world / "out" / "finished.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 4 + 2
    trained.clear()
    assert slimnas(capfd, *SHORT).code == 0
    assert len(trained) == 2


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def another_seed(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 5"))


def another_supernet(folder: Path) -> None:
    (folder / "supernet.safetensors").unlink()
    path = folder / "config.yaml"
    config = SearchConfig.load(path)
    config.model_copy(update={"recipe": None, "supernet_digest": "0"}).save(path)


def two_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        photos = Path("photos") / name
        photos.mkdir(parents=True)
        for number in range(6):
            pixels = np.full((8, 8, 3), 20 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(photos / f"{number}.png")


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (shutil.rmtree, (), "runs/found: no such folder; give the run folder of a search"),
        (without("config.yaml"), (), "runs/found: has no config.yaml; give the run folder"),
        (
            without("supernet.safetensors"),
            (),
            "runs/found: has no supernet.safetensors: it is not trained to its end",
        ),
        (another_supernet, (), "the run took it from elsewhere; give the run that trained it"),
        (
            two_classes,
            ("--data", "photos"),
            "--data photos: has 2 classes, the supernet of runs/found was trained on 10",
        ),
        (another_seed, (), "--data digits: must be the images that the supernet of runs/found"),
        (lambda _: None, ("--networks", "2"), "networks: must be at least 3"),
        (lambda _: None, ("--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    world: Path,
    capfd: pytest.CaptureFixture[str],
    change: Any,
    words: tuple[str, ...],
    message: str,
) -> None:
    change(Path("runs/found"))
    found = slimnas(capfd, *ASKED, *words, "--output", "out/deep")
    assert found.code == 1
    assert len(found.errors) == 1, found.err
    assert message in found.errors[0]
    assert not (world / "out").exists()
