"""Networks that learn beside the sampled path, against networks taken out of the supernet."""

from __future__ import annotations

import random
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from hybrid_cases import every_supernet, hybrid_space
from supernet_cases import images, lively, micro_space, micro_supernet
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimnas.arch.space import IDENTITY, SearchSpace, Selection, shipped_spaces
from slimnas.nn.build import Network
from slimnas.supernet.inherit import own_order
from slimnas.supernet.sandwich import (
    Sandwich,
    Slices,
    draw_largest,
    draw_smallest,
    sandwich_loss,
)
from slimnas.supernet.supernet import Supernet

SPACES = {
    **{name: SearchSpace.load(name) for name in shipped_spaces()},
    "micro": micro_space(),
    "hybrid": hybrid_space(),
    "hybrid_last": hybrid_space(last=True),
}


def taken_out(supernet: Supernet, selection: Selection) -> Network:
    architecture = supernet.space.architecture(selection)
    return supernet.extract(architecture, selection=selection, order=own_order(supernet)).train()


def every_kind(space: SearchSpace, count: int) -> list[Selection]:
    rng = random.Random(3)
    drawn = [space.random(rng) for _ in range(count)]
    return [*drawn, draw_largest(space, rng), draw_smallest(space, rng)]


@pytest.mark.parametrize("distilled", [False, True])
def test_slices_are_the_networks_taken_out(distilled: bool) -> None:
    supernet = micro_supernet(distilled=distilled).train()
    slices, batch = Slices(supernet), images()
    for selection in every_kind(supernet.space, 12):
        out = taken_out(supernet, selection)(batch)
        want = (out[0] + out[1]) / 2 if distilled else out
        assert want.std() > 0.1
        torch.testing.assert_close(slices.logits(selection, batch), want, rtol=1e-4, atol=1e-5)


def test_slices_of_every_block() -> None:
    supernet = lively(every_supernet()).train()
    slices = Slices(supernet)
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    seen: Counter[str] = Counter()
    for selection in every_kind(supernet.space, 40):
        want = taken_out(supernet, selection)(batch)
        torch.testing.assert_close(slices.logits(selection, batch), want, rtol=1e-3, atol=1e-4)
        seen.update(choice for *_, choice in selection.active())
    assert len(seen) == 14


def test_gradients_reach_the_channels_that_are_kept_and_no_others() -> None:
    supernet = micro_supernet().double().train()
    labels, batch = torch.tensor([0, 3, 4]), images(dtype=torch.float64)
    looked_at = 0
    for selection in every_kind(supernet.space, 4):
        supernet.zero_grad()
        cross_entropy(Slices(supernet).logits(selection, batch), labels).backward()
        network = taken_out(supernet, selection).double()
        cross_entropy(network(batch), labels).backward()

        ghost = deepcopy(supernet)  # its weights are the gradients; taken out like weights
        given = 0.0
        with torch.no_grad():
            for own, weight in zip(ghost.parameters(), supernet.parameters(), strict=True):
                own.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
                given += float(own.square().sum())
        want = {name: p.grad for name, p in network.named_parameters()}
        got = dict(taken_out(ghost, selection).named_parameters())
        arrived = 0.0
        for name, gradient in want.items():
            assert gradient is not None
            torch.testing.assert_close(got[name].double(), gradient, rtol=1e-5, atol=1e-9)
            arrived += float(gradient.square().sum())
            looked_at += 1
        assert given == pytest.approx(arrived, rel=1e-6)  # so nothing went anywhere else
    assert looked_at > 200


def test_narrow_networks_leave_statistics_alone_and_wide_ones_do_not() -> None:
    supernet = micro_supernet().train()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    rng = random.Random(0)
    Slices(supernet).logits(draw_smallest(supernet.space, rng), images())
    assert all(torch.equal(b, before[name]) for name, b in supernet.named_buffers())
    largest, smallest, *_ = Sandwich(supernet, 2, seed=0).passes(0)
    smallest(images())
    assert all(torch.equal(b, before[name]) for name, b in supernet.named_buffers())
    largest(images())
    assert not all(torch.equal(b, before[name]) for name, b in supernet.named_buffers())


@pytest.mark.parametrize("name", list(SPACES))
def test_extremes_are_legal_and_every_slot_and_block_gets_its_turn(name: str) -> None:
    space = SPACES[name]
    rng = random.Random(1)
    offered = {
        (i, j, c) for i, s in enumerate(space.stages) for j in range(s.slots) for c in s.blocks
    }
    blocks = {(i, c) for i, _, c in offered}
    most = tuple(stage.width.max for stage in space.stages)
    least = tuple(stage.width.min for stage in space.stages)
    in_largest, in_smallest = set(), set()
    for _ in range(300):
        largest, smallest = draw_largest(space, rng), draw_smallest(space, rng)
        if space.limits.attention_last:
            assert space.fault(largest) is None
        assert space.fault(smallest) is None
        assert (largest.widths, smallest.widths) == (most, least)
        assert not any(IDENTITY in slots for slots in largest.paths)
        depths = [sum(c != IDENTITY for c in slots) for slots in smallest.paths]
        assert depths == [stage.min_depth for stage in space.stages]
        in_largest.update(largest.active())
        in_smallest.update(smallest.active())
    assert {(i, c) for i, _, c in in_largest} == blocks
    assert {(i, j) for i, j, _ in in_smallest} == {(i, j) for i, j, _ in offered}
    assert {(i, c) for i, _, c in in_smallest} == blocks


def test_networks_follow_from_seed_and_step() -> None:
    supernet = micro_supernet()
    drawn = {
        (seed, step): Sandwich(supernet, 5, seed=seed).selections(step)
        for seed in (0, 1)
        for step in range(4)
    }
    assert drawn[(1, 2)] == Sandwich(supernet, 5, seed=1).selections(2)
    assert len({tuple(selections) for selections in drawn.values()}) == 8
    for selections in drawn.values():
        assert len(selections) == 5
        assert all(supernet.space.fault(selection) is None for selection in selections)
    shorter = Sandwich(supernet, 2, seed=1).selections(2)
    assert shorter == drawn[(1, 2)][:2]


def test_a_forward_pass_with_others_is_all_of_them() -> None:
    supernet, batch = micro_supernet().train(), images()
    routes = supernet.fixed_routes(supernet.space.largest(2))
    passes = Sandwich(supernet, 3, seed=0).passes(0)
    together = supernet(batch, routes, passes)
    apart = [supernet(batch, routes), *(run(batch) for run in passes)]
    assert together.shape == (4, 3, 5)
    assert torch.equal(together, torch.stack(apart))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_loss_by_hand(distil: bool, soft: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2])
    targets: Tensor = torch.nn.functional.one_hot(labels, 5).double() if soft else labels
    loss = sandwich_loss(logits, targets, label_smoothing=0.2, distil=distil)
    smooth = 0.8 * np.eye(5)[labels.numpy()] + 0.2 / 5
    values = logits.detach().numpy()
    teacher = np.exp(log_softmax(values[1]))
    wanted = [smooth if number == 1 or not distil else teacher for number in range(3)]
    by_hand = [-(w * log_softmax(v)).sum(-1).mean() for v, w in zip(values, wanted, strict=True)]
    assert loss.item() == pytest.approx(np.mean(by_hand))
    loss.backward()
    assert logits.grad is not None
    gradients = [(np.exp(log_softmax(v)) - w) / 12 for v, w in zip(values, wanted, strict=True)]
    np.testing.assert_allclose(logits.grad.numpy(), np.stack(gradients), atol=1e-12)
