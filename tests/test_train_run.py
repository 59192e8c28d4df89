"""A training run in its folder: what it leaves, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_world import ARCHITECTURE, EPOCHS, STEPS, Watching, config, images, train

import slimnas
from slimnas.arch.cost import cost
from slimnas.data.batches import ImageSet
from slimnas.data.training import TrainingData
from slimnas.errors import (
    DataError,
    RunFolderError,
    SpecError,
    TrainingError,
    WeightsError,
)
from slimnas.nn.build import build
from slimnas.nn.layers import LayerScale
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.report.training import training_curves
from slimnas.train import loop, run
from slimnas.train.config import TrainConfig, claim
from slimnas.train.history import append_row, read_history
from slimnas.train.result import TrainResult, best_row, load_result
from slimnas.train.start import find_start
from slimnas.zoo.entry import load_entry
from slimnas.zoo.weights import load_weights

ROW = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "wait_share", "test_top1"}


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return images()


@pytest.fixture(scope="module")
def whole(
    data: TrainingData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, Watching]:
    """A run that was never stopped, and what its listener heard."""
    listener = Watching()
    return train(tmp_path_factory.mktemp("whole"), data, listener=listener), listener


def judged(network: nn.Module, test: ImageSet) -> float:
    """Top-1 by counting one image after the other."""
    network.eval()
    right = 0
    for pixels, labels in test.eval_batches(1, device="cpu"):
        with torch.no_grad():
            right += int(network(pixels)[0].argmax()) == int(labels[0])
    return 100.0 * right / len(test)


def started(*_: Any, **__: Any) -> None:
    pytest.fail("training started")


def test_the_folder_is_a_model_that_reaches_what_it_says(
    whole: tuple[TrainResult, Watching], data: TrainingData
) -> None:
    result, _ = whole
    assert data.test is not None
    network = slimnas.create_model(result.folder, pretrained=True)
    assert tensors_digest(network.state_dict()) == result.digest
    assert judged(network, data.test) == pytest.approx(result.top1)
    network.load_state_dict(load_weights(result.folder / "best.safetensors", ARCHITECTURE))
    assert judged(network, data.test) == pytest.approx(result.best_top1)
    entry = load_entry(result.folder)
    assert entry.architecture == ARCHITECTURE
    assert entry.metrics["params"].value == cost(ARCHITECTURE).params
    assert entry.metrics["test_top1_percent"].value == result.top1
    assert "40 TEST images of digits at 16x16 px" in entry.metrics["test_top1_percent"].provenance
    preprocessing = entry.architecture.provenance["preprocessing"]
    assert preprocessing == {"mean": list(data.mean), "std": list(data.std)}


def test_every_epoch_has_its_line(whole: tuple[TrainResult, Watching]) -> None:
    result, listener = whole
    rows = read_history(result.folder / "metrics.jsonl")
    assert rows == result.rows == listener.epochs[-1]
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    assert [row["step"] for row in rows] == [STEPS // EPOCHS * (i + 1) for i in range(EPOCHS)]
    for row in rows:
        assert row.keys() >= ROW
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert 0 <= (row["wait_share"] or 0) <= 1
    per_epoch = STEPS // EPOCHS
    of_last = [report.loss for report in listener.steps[-per_epoch:]]
    assert rows[-1]["loss"] == pytest.approx(sum(of_last) / per_epoch)
    assert [report.step for report in listener.steps] == list(range(1, STEPS + 1))
    assert rows[-1]["test_top1"] == result.top1


def test_the_folder_holds_one_best_and_one_last(whole: tuple[TrainResult, Watching]) -> None:
    result, _ = whole
    there = {path.name for path in result.folder.iterdir()}
    assert there == {
        *("config.yaml", "training.safetensors", "best.safetensors", "architecture.yaml"),
        *("weights.safetensors", "metrics.jsonl", "metrics.json", "result.json"),
    }
    body = json.loads((result.folder / "result.json").read_text())
    assert body["digest"] == result.digest
    assert body["provenance"].keys() >= {"date", "device", "versions", "precision", "processes"}
    assert TrainConfig.load(result.folder / "config.yaml").data_digest is not None


@pytest.mark.parametrize("stop_at", [1, STEPS // EPOCHS, STEPS // EPOCHS + 2, STEPS - 1, STEPS])
def test_a_stopped_run_ends_as_one_never_stopped(
    stop_at: int, whole: tuple[TrainResult, Watching], data: TrainingData, tmp_path: Path
) -> None:
    result, _ = whole
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data, listener=Watching(stop_at))
    assert load_result(tmp_path) is None
    listener = Watching()
    again = train(tmp_path, data, listener=listener)
    assert [report.step for report in listener.steps] == list(range(stop_at + 1, STEPS + 1))
    assert again.digest == result.digest
    assert (again.top1, again.best_top1, again.best_epoch) == (
        *(result.top1, result.best_top1),
        result.best_epoch,
    )
    for name in ("weights.safetensors", "best.safetensors"):
        assert (tmp_path / name).read_bytes() == (result.folder / name).read_bytes()


def test_a_finished_run_is_not_trained_again(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(tmp_path, data, config(epochs=1))
    monkeypatch.setattr(run, "fit", started)
    assert train(tmp_path, data, config(epochs=1)) == result
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(pytest.fail.Exception, match="training started"):
        train(tmp_path, data, config(epochs=1))


def test_another_run_s_folder_is_refused(data: TrainingData, tmp_path: Path) -> None:
    claim(tmp_path, config())
    with pytest.raises(RunFolderError, match=r"recipe\.lr was 0\.002, now 0\.01"):
        train(tmp_path, data, config(lr=0.01))
    claim(tmp_path, config())
    with pytest.raises(RunFolderError, match="data_digest was None"):
        train(tmp_path, data)  # claimed before its data were open
    (tmp_path / "config.yaml").write_text("schema: slimnas/search-config/1\n")
    with pytest.raises(SpecError, match="must be 'slimnas/train-config/1'"):
        train(tmp_path, data)


def test_mixed_targets_are_smoothed_as_the_recipe_says(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watched(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return train_step(*arguments)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", watched)
    train(tmp_path, data, config(mixup=0.8, label_smoothing=0.2, epochs=1))
    assert len(seen) == STEPS // EPOCHS
    for shares in seen:
        assert shares.sum(dim=1) == pytest.approx(1.0)
        assert shares.min() == pytest.approx(0.2 / 10)  # of a class that neither image has


def test_what_is_learnt_later_does_not_count_before(data: TrainingData, tmp_path: Path) -> None:
    full = run.completed(config(), data, None)
    claim(tmp_path, full)
    claim(tmp_path, config())  # the data are not open yet
    with pytest.raises(RunFolderError, match="data_digest was"):
        claim(tmp_path, full.model_copy(update={"data_digest": "0" * 64}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 1000}, DataError, "not be larger than the data, got 1000 for 160"),
        ({"warmup_epochs": 3}, TrainingError, "3 of warm-up and 0 of cool-down, got 3"),
        ({"accumulation": 5}, TrainingError, "must be a multiple of 5"),
        ({"distillation": "hard", "teacher": "x"}, WeightsError, "needs a teacher and got none"),
    ],
)
def test_what_cannot_end_well_is_refused(
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    data: TrainingData,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        train(tmp_path / "run", data, config(**change))


def test_a_loss_that_is_not_finite_names_step_and_way_out(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network_loss(*_: Any) -> Any:
        def loss(model: nn.Module, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
            logits: Tensor = model(pixels)[0]
            return logits.mean() * (math.nan if step == 7 else 1.0)

        return loss

    monkeypatch.setattr(run, "network_loss", network_loss)
    with pytest.raises(WeightsError, match=r"loss is nan at step 7.*--lr"):
        train(tmp_path, data)


def test_out_of_memory_names_the_flags(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network_loss(*_: Any) -> Any:
        def loss(*_: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return loss

    monkeypatch.setattr(run, "network_loss", network_loss)
    with pytest.raises(TrainingError, match=r"out of memory.*--batch-size.*accumulation"):
        train(tmp_path, data)


def test_no_space_on_disk_is_refused_before_anything_is_written(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunFolderError, match=r"needs .* GB there"):
        train(tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["{", '{"schema": "slimnas/other/1"}', "[]", "{}"])
def test_a_damaged_result_is_one_line(damage: str, data: TrainingData, tmp_path: Path) -> None:
    train(tmp_path, data, config(epochs=1))
    (tmp_path / "result.json").write_text(damage)
    with pytest.raises(RunFolderError, match=r"result\.json: is not the result of a training run"):
        load_result(tmp_path)


def test_a_history_replaces_what_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((5, 2.0), (10, 1.5), (15, 1.0), (10, 1.25)):
        append_row(path, {"step": step, "loss": loss, "grad_norm": math.inf})
    assert read_history(path) == (
        {"step": 5, "loss": 2.0, "grad_norm": None},
        {"step": 10, "loss": 1.25, "grad_norm": None},
    )
    path.write_text('{"step": 5}\n{"loss": 1}\n')
    with pytest.raises(RunFolderError, match="line 2 is no epoch"):
        read_history(path)
    assert read_history(tmp_path / "absent.jsonl") == ()


def test_the_best_epoch_is_the_first_of_the_highest() -> None:
    tops = (None, 50.0, 75.0, 75.0, 60.0)
    rows = tuple({"step": i, "epoch": i, "test_top1": top1} for i, top1 in enumerate(tops))
    best = best_row(rows)
    assert best is not None
    assert best["epoch"] == 2
    assert best_row(rows[:1]) is None


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_judging(
    processes: int, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "EVAL_BATCH", 16)
    network = build(ARCHITECTURE, seed=3)
    assert data.test is not None
    expected = judged(network, data.test)

    def part(index: int) -> float:
        accelerator: Any = SimpleNamespace(
            process_index=index,
            num_processes=processes,
            device=torch.device("cpu"),
            reduce=lambda value, _: value,
        )
        assert data.test is not None
        return run.top1_of_all(network, data.test, accelerator)

    assert sum(part(index) for index in range(processes)) == pytest.approx(expected)


class _StoppedError(Exception):
    """Raised where training would begin."""


@pytest.mark.parametrize(("weights", "expected"), [("fresh", 0.1), ("mini.safetensors", 1e-5)])
def test_layer_scale_is_set_in_fresh_networks_alone(
    weights: str,
    expected: float,
    data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise _StoppedError("here")

    monkeypatch.setattr(run, "fit", stopped)
    network = build(ARCHITECTURE, seed=0)
    given = config().model_copy(update={"weights": weights})
    with pytest.raises(_StoppedError, match="here"):
        train(tmp_path, data, given, network=network)
    scales = [m.gamma for m in network.modules() if isinstance(m, LayerScale)]
    assert len(scales) == 6
    for scale in scales:
        assert scale.detach().flatten().tolist() == pytest.approx([expected] * scale.numel())


def test_weights_that_are_there_are_begun_with(data: TrainingData, tmp_path: Path) -> None:
    result = train(tmp_path / "run", data, config(epochs=1))
    start = find_start(str(result.folder))
    assert start.words == str(result.weights)
    assert start.normalisation == (tuple(data.mean), tuple(data.std))
    same = start.build(10, seed=1)
    assert tensors_digest(same.state_dict()) == result.digest
    other = start.build(7, seed=1).state_dict()
    mine = load_weights(result.weights, ARCHITECTURE)
    kept = [name for name in mine if torch.equal(mine[name], other[name])]
    assert {name for name in mine if name not in kept} == {
        *("head.head.weight", "head.head.bias", "head.head_dist.weight", "head.head_dist.bias")
    }
    fresh = find_start(str(result.folder), from_scratch=True)
    assert (fresh.words, fresh.normalisation) == ("fresh", None)
    assert tensors_digest(fresh.build(10, seed=1).state_dict()) != result.digest
    assert find_start(str(result.folder), resolution=32).architecture.input.shape.height == 32


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"pretrained": True, "from_scratch": True}, SpecError, "exclude each other"),
        ({"weights": Path("absent.safetensors")}, WeightsError, "absent.safetensors: no such file"),
        ({"pretrained": True}, WeightsError, "no weights beside the architecture"),
    ],
)
def test_starts_that_cannot_be(
    given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    ARCHITECTURE.save(tmp_path / "mini.yaml")
    with pytest.raises(error, match=message):
        find_start(str(tmp_path / "mini.yaml"), **given)


def test_a_resolution_the_family_cannot_take() -> None:
    with pytest.raises(SpecError, match="deit_tiny for images of 8x8"):
        find_start("deit_tiny", resolution=8)


def test_curves_mark_the_best_epoch(whole: tuple[TrainResult, Watching]) -> None:
    result, _ = whole
    figure = training_curves(result.rows)
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["training loss", "TEST top-1 of averaged weights, %", "learning rate"]
    (said,) = [text.get_text() for text in figure.axes[1].texts]
    assert (
        said
        == f"last {result.top1:.1f} %\nbest {result.best_top1:.1f} % (epoch {result.best_epoch})"
    )
    assert training_curves(()) is None
    without_test = [{**row, "test_top1": None} for row in result.rows]
    figure = training_curves(without_test)
    assert figure is not None
    assert len(figure.axes) == 2
