"""One step of training: schedule, groups, averages, clipping, micro-batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from train_cases import (
    CPU,
    RECIPE,
    everything,
    one_step,
    task,
)

from slimnas import create_model
from slimnas.errors import TrainingError
from slimnas.train.clipping import clip_adaptively, clip_gradients
from slimnas.train.loop import (
    Loss,
    TrainTask,
    decay_groups,
    fit,
    start,
    train_step,
)
from slimnas.train.recipe import TrainRecipe, check_schedule, learning_rate_scale
from slimnas.train.recipes import load_recipe, shipped_recipes


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


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("deit_tiny_distilled", "deit_tiny_distilled_patch16_224"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("efficientvit_m0", "efficientvit_m0"),
        ("efficientformer_l1", "efficientformer_l1"),
    ],
)
def test_decayed_parameters_are_timms(ours: str, theirs: str) -> None:
    """As many numbers with weight decay as timm's own rule leaves it on."""
    model = timm.create_model(theirs)
    names = set(getattr(model, "no_weight_decay", set)()) | _tables(model)
    expected = _numbers(param_groups_weight_decay(model, 0.1, no_weight_decay_list=names))
    network = create_model(ours)
    groups = decay_groups(dict(network.named_parameters()), TrainRecipe(weight_decay=0.1))
    assert _numbers(groups) == expected


def _numbers(groups: Iterable[dict[str, Any]]) -> dict[float, int]:
    return {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in groups}


def _tables(model: nn.Module) -> set[str]:
    """Biases of attention, which timm leaves to its users in EfficientViT and EfficientFormer."""
    return {name for name, _ in model.named_parameters() if name.endswith("attention_biases")}


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


@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("warmup", [0.0, 1.5, 3.0, 5.0])
@pytest.mark.parametrize("epochs", [1, 3, 5, 6, 9])
def test_a_schedule_without_training_is_refused(epochs: int, warmup: float, cooldown: int) -> None:
    """One in which no rate lies between the highest and the lowest once the highest is reached."""
    recipe = TrainRecipe(
        epochs=epochs, lr=1.0, min_lr=0.01, warmup_epochs=warmup, cooldown_epochs=cooldown
    )
    rates = [learning_rate_scale(recipe, step, 8 * epochs) for step in range(8 * epochs)]
    falling = [rate for rate in rates[rates.index(max(rates)) + 1 :] if rate > 0.01 + 1e-9]
    if falling:
        check_schedule(recipe)
        return
    with pytest.raises(TrainingError, match=rf"the {warmup:g} of warm-up and {cooldown} of .* got"):
        check_schedule(recipe)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_schedules_train_and_refuse_what_is_too_short(name: str) -> None:
    recipe = load_recipe(name)
    check_schedule(recipe)
    short = recipe.model_copy(update={"epochs": 2})
    if recipe.warmup_epochs is None:
        check_schedule(short)
        return
    with pytest.raises(TrainingError, match=r"or --set warmup_epochs=0\.2$") as caught:
        check_schedule(short)
    key, _, value = str(caught.value).rpartition(" ")[2].partition("=")
    check_schedule(short.model_copy(update={key: float(value)}))


def test_fit_refuses_before_it_trains() -> None:
    given = task()
    late = dataclasses.replace(given, recipe=given.recipe.model_copy(update={"warmup_epochs": 3}))
    before = {name: value.clone() for name, value in late.model.state_dict().items()}
    with pytest.raises(TrainingError, match="3 of warm-up and 0 of cool-down, got 3"):
        fit(late, CPU)
    assert all(torch.equal(before[name], value) for name, value in late.model.state_dict().items())
