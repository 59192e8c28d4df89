"""Whole training runs: stopped, gone on with, refused, out of memory."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from train_cases import (
    CPU,
    RECIPE,
    Small,
    StoppedError,
    assert_equal,
    ctrl_c_at,
    stop_at,
    task,
)

from slimnas.errors import RuntimeUnavailableError, TrainingError, WeightsError
from slimnas.train import loop
from slimnas.train.checkpoint import load_state
from slimnas.train.devices import accelerator_for
from slimnas.train.evaluate import top1_percent
from slimnas.train.loop import StepReport, TrainTask, Watch, decay_groups, fit, start
from slimnas.train.recipe import TrainRecipe, learning_rate_scale


@pytest.mark.parametrize("every_seconds", [0.0, 1e9])
def test_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_seconds: float
) -> None:
    uninterrupted = fit(task(), CPU).state_dict()
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", every_seconds)
    stopped = 0
    for step in range(1, task().steps + 1):
        checkpoint = tmp_path / f"{step}.safetensors"
        with pytest.raises(StoppedError, match="on purpose"):
            fit(task(), CPU, checkpoint=checkpoint, identity="x", watch=stop_at(step))
        # on_step comes before the save: with a save after every step the last one is lost.
        assert checkpoint.is_file() == (every_seconds == 0.0 and step > 1)
        resumed = fit(task(), CPU, checkpoint=checkpoint, identity="x").state_dict()
        assert_equal(uninterrupted, resumed)
        stopped += 1
    assert stopped == 12


def test_ctrl_c_keeps_the_step_it_came_in(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    uninterrupted = fit(task(), CPU).state_dict()
    stopped = 0
    for step in range(1, task().steps + 1):
        checkpoint, seen = tmp_path / f"{step}.safetensors", []
        with pytest.raises(KeyboardInterrupt):
            fit(task(), CPU, checkpoint=checkpoint, identity="x", watch=ctrl_c_at(step))
        assert signal.getsignal(signal.SIGINT) is handler
        watch = Watch(lambda report, seen=seen: seen.append(report.step))
        resumed = fit(task(), CPU, checkpoint=checkpoint, identity="x", watch=watch).state_dict()
        assert seen == list(range(step + 1, task().steps + 1))
        assert_equal(uninterrupted, resumed)
        stopped += 1
    assert stopped == 12


def test_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    checkpoint = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(task(), CPU, checkpoint=checkpoint, identity="x", watch=ctrl_c_at(2, times=2))
    assert not checkpoint.exists()


def test_run_stopped_twice_sees_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    checkpoint, seen = tmp_path / "s.safetensors", []
    for stop in (3, 7, None):
        with_stop = stop_at(stop) if stop else Watch()

        def on_step(report: StepReport, watch: Watch = with_stop) -> None:
            seen.append(report.step)
            watch.on_step(report)

        try:
            fit(task(), CPU, checkpoint=checkpoint, identity="x", watch=Watch(on_step))
        except StoppedError:
            assert stop is not None
    assert seen == [1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    checkpoint, steps = tmp_path / "s.safetensors", []
    first = fit(task(), CPU, checkpoint=checkpoint, identity="x").state_dict()
    again = fit(
        task(),
        CPU,
        checkpoint=checkpoint,
        identity="x",
        watch=Watch(lambda report: steps.append(report.step)),
    )
    assert steps == []
    assert_equal(first, again.state_dict())
    assert not again.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_step(value: float) -> None:
    given = task()
    normal = given.loss

    def loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        return normal(model, images, labels, step) * (value if step == 2 else 1.0)

    broken = TrainTask(given.model, given.groups, loss, given.images, given.recipe, given.seed)
    with pytest.raises(WeightsError, match="at step 2; lower the learning rate"):
        fit(broken, CPU)
    assert all(bool(p.isfinite().all()) for p in given.model.parameters())


def test_loss_that_is_not_finite_names_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "state.safetensors"
    given = task()
    normal = given.loss

    def loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        return normal(model, images, labels, step) * (math.nan if step == 2 else 1.0)

    broken = TrainTask(given.model, given.groups, loss, given.images, given.recipe, given.seed)
    with pytest.raises(WeightsError, match=f"the last good state, of step 2, is in {path}"):
        fit(broken, CPU, checkpoint=path)
    resumed = start(task(), CPU)
    load_state(path, resumed, "")
    assert resumed.step == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_says_what_to_lower(error: RuntimeError) -> None:
    given = task()

    def loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        raise error

    broken = TrainTask(given.model, given.groups, loss, given.images, given.recipe, given.seed)
    with pytest.raises(TrainingError, match=r"out of memory with batches of 4 .*--batch-size"):
        fit(broken, CPU)


def test_other_runtime_errors_are_not_memory() -> None:
    given = task()

    def loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        raise RuntimeError("something else")

    broken = TrainTask(given.model, given.groups, loss, given.images, given.recipe, given.seed)
    with pytest.raises(RuntimeError, match="something else"):
        fit(broken, CPU)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"batch_size": 4, "accumulation": 3}, r"multiple of 3 \(1 processes x accumulation 3\)"),
        ({"batch_size": 20, "accumulation": 2}, "at most the 17 images of TRAIN, got 20"),
    ],
)
def test_batches_that_do_not_divide(recipe: dict[str, int], message: str) -> None:
    with pytest.raises(TrainingError, match=f"batch_size: must be .*{message}"):
        fit(task(TrainRecipe(epochs=1, **recipe)), CPU)


class Dropping(Small):
    """Draws from torch's generator in every step."""

    def forward(self, images: Tensor, branch: int) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.5, self.training), branch)


def dropping_task() -> TrainTask:
    given = task()
    model = Dropping()
    model.load_state_dict(given.model.state_dict())
    groups = decay_groups(dict(model.named_parameters()), RECIPE)
    return TrainTask(model, groups, given.loss, given.images, RECIPE, seed=5)


def test_what_modules_draw_follows_from_the_step(tmp_path: Path) -> None:
    given = dropping_task()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    uninterrupted = fit(given, CPU).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    plain = fit(task(), CPU).state_dict()
    assert any(not torch.equal(plain[name], uninterrupted[name]) for name in plain)
    path = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(dropping_task(), CPU, checkpoint=path, identity="x", watch=ctrl_c_at(5))
    resumed = fit(dropping_task(), CPU, checkpoint=path, identity="x").state_dict()
    assert_equal(uninterrupted, resumed)


def test_reports_say_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[StepReport] = []
    epochs: list[StepReport] = []
    fit(task(), CPU, watch=Watch(steps.append, lambda model, report: epochs.append(report)))
    assert [report.step for report in epochs] == [4, 8, 12]
    for i, report in enumerate(epochs):
        of_epoch = steps[4 * i : 4 * i + 4]
        assert report.loss == pytest.approx(sum(one.loss for one in of_epoch) / 4)
        assert report.grad_norm == pytest.approx(sum(one.grad_norm for one in of_epoch) / 4)
        assert report.lr == of_epoch[-1].lr
    assert all(0.0 <= report.wait_share <= 1.0 for report in steps)
    assert steps[5].lr == pytest.approx(RECIPE.lr * learning_rate_scale(RECIPE, 5, 12))


def test_unknown_training_device_is_refused() -> None:
    with pytest.raises(RuntimeUnavailableError, match="'tpu' is not available here; choose one"):
        accelerator_for("tpu")


def test_top1_counts_every_image_once() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3, 3]]
    labels = torch.tensor([0, 1, 0, 3, 2])
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    assert top1_percent(lambda x: x, batches) == pytest.approx(60.0)
