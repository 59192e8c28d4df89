"""The training loop: schedule, groups, averages, and runs that stop and go on."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ctrl_c import press_ctrl_c
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.data.batches import ImageSet, MemoryPixels, Split
from slimnas.errors import RuntimeUnavailableError, SlimnasError, TrainingError, WeightsError
from slimnas.nn.tensorfiles import save_tensors
from slimnas.train import loop
from slimnas.train.checkpoint import TrainState, load_state, save_state
from slimnas.train.clipping import clip_adaptively, clip_gradients
from slimnas.train.evaluate import top1_percent
from slimnas.train.loop import (
    Loss,
    StepReport,
    TrainTask,
    Watch,
    accelerator_for,
    decay_groups,
    fit,
    start,
    train_step,
)
from slimnas.train.recipe import TrainRecipe, learning_rate_scale

CLASSES = 3
RECIPE = TrainRecipe(epochs=3, batch_size=4, lr=1e-2)
CPU = accelerator_for("cpu")


class Small(nn.Module):
    """Two branches, so that a step may leave one untouched; BN, so that there are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, CLASSES)
        self.second = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor, branch: int) -> Tensor:
        pooled = self.norm(self.conv(images)).relu().mean((2, 3))
        logits: Tensor = (self.first, self.second)[branch](pooled)
        return logits


def image_set(count: int = 17) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    return ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, (0.5,) * 3, (0.25,) * 3, True)


def task(
    recipe: TrainRecipe = RECIPE, *, branch: Callable[[int], int] = lambda step: step % 2
) -> TrainTask:
    torch.manual_seed(1)
    model = Small()

    def loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        return cross_entropy(model(images, branch(step)), labels)

    groups = decay_groups(dict(model.named_parameters()), recipe)
    return TrainTask(model, groups, loss, image_set(), recipe, seed=5)


def one_step(given: TrainTask, state: TrainState, step: int) -> float:
    epoch, batch = divmod(step, 4)
    images, labels = list(
        given.images.batches(4, device="cpu", seed=5, epoch=epoch, augment=given.recipe.augment)
    )[batch]
    return train_step(given, state, CPU, images, labels)[0]


def everything(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v.clone() for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v.clone() for k, v in state.ema.state_dict().items()}
    names = {p: n for n, p in state.model.named_parameters()}
    for parameter, values in state.optimizer.state.items():
        tensors |= {f"moments.{names[parameter]}.{k}": v.clone() for k, v in values.items()}
    return tensors


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 10), (0.1, 100), (0.5, 7), (0.9, 3), (0.1, 1)])
def test_learning_rate_rises_linearly_and_falls_along_a_cosine(warmup: float, steps: int) -> None:
    recipe = TrainRecipe(lr=0.1, min_lr=0.001, warmup=warmup)
    rates = [recipe.lr * learning_rate_scale(recipe, step, steps) for step in range(steps)]
    for step, rate in enumerate(rates):
        rising = warmup * steps
        if step < rising:
            expected = 0.001 + 0.099 * (step + 1) / (rising + 1)
        else:
            share = (step - rising) / max(1, steps - rising)
            expected = 0.0505 + 0.0495 * math.cos(math.pi * share)
        assert rate == pytest.approx(expected)
        assert 0.001 <= rate <= 0.1 + 1e-12
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_learning_rate_reaches_the_optimizer() -> None:
    given = task()
    state, seen = start(given, CPU), []
    for step in range(given.steps):
        one_step(given, state, step)
        seen.append({group["lr"] for group in state.optimizer.param_groups})
    assert seen == [
        {RECIPE.lr * learning_rate_scale(RECIPE, step, given.steps)} for step in range(12)
    ]


def test_vectors_and_attention_biases_are_not_decayed() -> None:
    parameters = {
        "conv.weight": nn.Parameter(torch.ones(2, 2, 3, 3)),
        "fc.weight": nn.Parameter(torch.ones(2, 2)),
        "fc.bias": nn.Parameter(torch.ones(2)),
        "norm.weight": nn.Parameter(torch.ones(2)),
        "ls1.gamma": nn.Parameter(torch.ones(2)),
        "token_mixer.attention_biases": nn.Parameter(torch.ones(2, 4)),
    }
    decayed, plain = decay_groups(parameters, TrainRecipe(weight_decay=0.3, lr=0.2))
    names = {id(p): n for n, p in parameters.items()}
    assert [names[id(p)] for p in decayed["params"]] == ["conv.weight", "fc.weight"]
    assert [names[id(p)] for p in plain["params"]] == list(parameters)[2:]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.2


def test_average_is_the_running_mean_by_hand() -> None:
    recipe = RECIPE.model_copy(update={"ema_decay": 0.2})
    given = task(recipe)
    state = start(given, CPU)
    by_hand = {k: v.clone().double() for k, v in state.ema.state_dict().items()}
    decays = []
    for step in range(5):
        one_step(given, state, step)
        decays.append(min(0.2, (2 + step) / (11 + step)))
        for name, value in given.model.state_dict().items():
            old = by_hand[name]
            whole = not value.is_floating_point()
            by_hand[name] = value.double() if whole else old + (value - old) * (1 - decays[-1])
    assert decays[0] < 0.2 == decays[-1]  # both branches of the formula
    for name, value in state.ema.state_dict().items():
        torch.testing.assert_close(value.double(), by_hand[name], rtol=1e-5, atol=1e-6)
    assert state.ema.state_dict()["norm.num_batches_tracked"] == 5


def test_parameters_off_the_path_are_not_touched() -> None:
    given = task(branch=lambda step: 0 if step < 2 else 1)
    state = start(given, CPU)
    initial = everything(state)
    one_step(given, state, 0)
    one_step(given, state, 1)
    before = everything(state)
    off = [n for n in before if n.startswith(("model.second", "moments.second"))]
    assert off == ["model.second.weight", "model.second.bias"]  # never used: no moments
    assert all(torch.equal(initial[n], before[n]) for n in off)
    one_step(given, state, 2)
    after = everything(state)
    off = [n for n in before if n.startswith(("model.first", "moments.first"))]
    assert len(off) == 2 + 2 * 3
    assert all(torch.equal(before[n], after[n]) for n in off)
    assert not torch.equal(before["model.second.weight"], after["model.second.weight"])


def test_gradients_are_clipped() -> None:
    given = task(RECIPE.model_copy(update={"clip_norm": 1e-3}))
    state = start(given, CPU)
    one_step(given, state, 0)
    gradients = [p.grad for p in given.model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


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


class StoppedError(Exception):
    """Stands for whatever ends a run."""


def stop_at(step: int) -> Watch:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise StoppedError("stopped on purpose")

    return Watch(on_step)


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


def ctrl_c_at(step: int, times: int = 1) -> Watch:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            for _ in range(times):
                press_ctrl_c()

    return Watch(on_step)


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


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """The loss of unequal parts is the mean over the images."""
    recipe = RECIPE.model_copy(update={"clip": "none"})
    norms = {}
    for accumulation in (1, 3):
        given = task(recipe.model_copy(update={"accumulation": accumulation}))
        given.model.norm.eval()  # type: ignore[union-attr]
        normal = given.loss

        def loss(
            model: nn.Module, x: Tensor, y: Tensor, step: int, normal: Loss = normal
        ) -> Tensor:
            model.norm.eval()  # type: ignore[union-attr]
            return normal(model, x, y, step)

        fixed = TrainTask(given.model, given.groups, loss, given.images, given.recipe, 5)
        state = start(fixed, CPU)
        images, labels = next(given.images.batches(4, device="cpu", seed=5, epoch=0, augment=False))
        value, norm = train_step(fixed, state, CPU, images, labels)
        gradients = torch.cat(
            [p.grad.flatten() for p in given.model.parameters() if p.grad is not None]
        )
        assert norm == pytest.approx(float(gradients.norm()), rel=1e-6)
        norms[accumulation] = (value, gradients)
    assert norms[1][0] == pytest.approx(norms[3][0], rel=1e-6)
    torch.testing.assert_close(norms[1][1], norms[3][1], rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("factor", [0.02, 0.5])
def test_adaptive_clipping_is_timms(factor: float) -> None:
    from timm.utils.agc import adaptive_clip_grad

    torch.manual_seed(0)
    shapes = [(6, 3, 3, 3), (5, 4), (7,), (), (4, 1, 3, 3)]
    mine = [nn.Parameter(torch.randn(shape) * 0.1) for shape in shapes]
    for parameter in mine:
        parameter.grad = torch.randn_like(parameter) * torch.rand(()).mul(0.2)
    mine.append(nn.Parameter(torch.zeros(3, 2)))  # weights below the least norm
    mine[-1].grad = torch.ones(3, 2)
    mine.append(nn.Parameter(torch.ones(2)))  # no gradient
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    for a, b in zip(mine, theirs, strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    clip_adaptively(mine, factor)
    adaptive_clip_grad(theirs, factor)
    changed = 0
    for a, b in zip(mine, theirs, strict=True):
        if a.grad is None:
            assert b.grad is None
            continue
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
        changed += 1
    assert changed == 6


def test_adaptive_clipping_leaves_the_classifier_alone() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    norm = clip_gradients(model, TrainRecipe(clip="agc", clip_norm=0.02))
    assert norm == pytest.approx(10.0 * 24**0.5)
    assert float(model["head"].weight.grad.max()) == 10.0  # type: ignore[union-attr]
    assert float(model["body"].weight.grad.abs().max()) < 0.1  # type: ignore[union-attr]


def test_warm_up_in_epochs_and_cool_down() -> None:
    recipe = TrainRecipe(
        epochs=10, lr=1.0, min_lr=0.01, warmup_epochs=2, warmup_lr=0.001, cooldown_epochs=3
    )
    rates = [learning_rate_scale(recipe, step, 40) for step in range(40)]
    assert rates[:8] == pytest.approx([0.001 + 0.999 * (step + 1) / 9 for step in range(8)])
    assert rates[8] == pytest.approx(1.0)
    falling = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates[8:28] == pytest.approx(falling)
    assert rates[28:] == pytest.approx([0.01] * 12)


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
