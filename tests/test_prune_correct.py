"""Correction without training, against regressions written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from prune_cases import ARCHITECTURES, FAMILIES, random_network, random_plan
from torch import Tensor

from slimnas.errors import PruneError
from slimnas.nn.build import Network
from slimnas.prune.apply import apply_plan
from slimnas.prune.correct import CORRECTIONS, RIDGE, SHARPNESS, correct, position_importance
from slimnas.prune.widths import WidthPlan


def batches_of(network: Network, count: int = 12, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    shape = network.architecture.input.shape
    generator = torch.Generator().manual_seed(seed)
    size = (count, shape.channels, shape.height, shape.width)
    images = torch.randn(size, generator=generator, dtype=torch.float64)
    labels = torch.randint(network.architecture.head.classes, (count,), generator=generator)
    return [(images[i : i + 4], labels[i : i + 4]) for i in range(0, count, 4)]


def stream_behind(network: Network, images: Tensor) -> Tensor:
    """The residual stream that the head reads."""
    seen: list[Tensor] = []
    handle = network.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network.eval()(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CORRECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_the_stream_comes_back(family: str, method: str, seed: int) -> None:
    """Only the last linear maps change, and on the images of the fit the stream is closer."""
    network = random_network(ARCHITECTURES[family])
    plan = random_plan(network.architecture, seed)
    pruned = apply_plan(plan, network)
    batches = batches_of(network, 24)
    before = {key: value.clone() for key, value in pruned.state_dict().items()}
    corrected = correct(network, pruned, plan, batches, method)  # type: ignore[arg-type]
    images = torch.cat([images for images, _ in batches])
    changed = {
        ".".join(key.split(".")[-2:])
        for key, value in corrected.state_dict().items()
        if not value.equal(before[key])
    }
    last = {"proj.weight", "proj.bias", "fc2.weight", "fc2.bias"}
    assert changed
    assert changed <= (last if method == "least_squares" else {"proj.bias", "fc2.bias"})
    assert all(value.equal(before[key]) for key, value in pruned.state_dict().items())
    kept = list(plan.kept_channels(-1, network.architecture.widths[-1]))
    wanted = stream_behind(network, images)[..., kept]
    errors = [
        float((stream_behind(one, images) - wanted).square().mean()) for one in (pruned, corrected)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", ["vit"])
def test_the_first_map_is_the_ridge_regression(family: str) -> None:
    """proj of the first block, from an augmented least-squares problem solved by numpy."""
    network = random_network(ARCHITECTURES[family])
    full = WidthPlan.full(network.architecture)
    plan = random_plan(network.architecture, 1)
    plan = WidthPlan(full.source, plan.blocks)
    pruned = apply_plan(plan, network)
    batches = batches_of(network)
    corrected = correct(network, pruned, plan, batches)
    images = torch.cat([images for images, _ in batches])
    name = "stages.0.blocks.0"
    block: Any = pruned.get_submodule(name)
    mine: Any = network.get_submodule(name)
    assert getattr(block, "attn", None) is not None
    importance = position_importance(network, batches)[name].numpy() ** SHARPNESS
    weight = np.tile(importance / importance.mean(), len(images))
    with torch.no_grad():
        x = network.stem(images)
        seen: list[Tensor] = []
        handle = block.attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        block(x)
        handle.remove()
        target = (mine.attn(mine.norm1(x))).flatten(0, 1).numpy()
    inputs = seen[0].flatten(0, 1).numpy()
    start = block.attn.proj.weight.detach().numpy()
    x_mean = np.average(inputs, axis=0, weights=weight)
    t_mean = np.average(target, axis=0, weights=weight)
    root = np.sqrt(weight / weight.sum())[:, None]
    centred = (inputs - x_mean) * root
    pull = np.sqrt(RIDGE * (centred**2).sum() / inputs.shape[1])
    rows = np.vstack([centred, pull * np.eye(inputs.shape[1])])
    wanted = np.vstack([(target - t_mean) * root, pull * start.T])
    fitted = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    proj: Any = corrected.get_submodule(f"{name}.attn.proj")
    got = proj.weight.detach().numpy()
    np.testing.assert_allclose(got, fitted, rtol=1e-8, atol=1e-10)
    bias = proj.bias.detach().numpy()
    np.testing.assert_allclose(bias, t_mean - fitted @ x_mean, rtol=1e-8, atol=1e-10)


def test_a_network_is_as_it_was_after_a_pass_that_failed() -> None:
    network = random_network(ARCHITECTURES["vit"]).train()
    images, labels = batches_of(network)[0]
    with pytest.raises(IndexError, match="out of bounds"):
        position_importance(network, [(images, labels + 1000)])
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not network.stem._forward_hooks


def test_position_importance_is_the_squared_gradient() -> None:
    """Against one backward pass per image, by adding a zero to the stream."""
    network = random_network(ARCHITECTURES["vit"])
    batches = batches_of(network)
    name = "stages.0.blocks.1"
    block = network.get_submodule(name)
    total = torch.zeros(6, dtype=torch.float64)
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            zero = torch.zeros(1, 6, 24, dtype=torch.float64, requires_grad=True)
            handle = block.register_forward_hook(lambda _, __, out, zero=zero: out + zero)
            loss = torch.nn.functional.cross_entropy(network(image[None]), label[None])
            handle.remove()
            total += torch.autograd.grad(loss, zero)[0][0].square().sum(dim=1)
    found = position_importance(network, batches)[name]
    torch.testing.assert_close(found, total / total.mean())


def test_nothing_removed_is_left_alone() -> None:
    network = random_network(ARCHITECTURES["swin"])
    plan = WidthPlan.full(network.architecture)
    corrected = correct(network, apply_plan(plan, network), plan, batches_of(network))
    state = corrected.state_dict()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9)


def test_progress_and_refusals() -> None:
    network = random_network(ARCHITECTURES["vit"])
    plan = random_plan(network.architecture, 0)
    pruned = apply_plan(plan, network)
    seen: list[tuple[int, int]] = []
    correct(
        network,
        pruned,
        plan,
        batches_of(network),
        on_layer=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(PruneError, match=r"correction: must be one of .*got 'bais' \(did you"):
        correct(network, pruned, plan, [], "bais")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="at least one image, got none"):
        correct(network, pruned, plan, [])
    other = random_plan(network.architecture, 2)
    with pytest.raises(PruneError, match="the plan makes another network"):
        correct(network, pruned, other, batches_of(network))
