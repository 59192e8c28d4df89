"""Accuracies of candidates: with kept activations and without, and by the extracted network."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from micro import MICRO
from torch import Tensor, nn

from slimnas.arch.space import SearchSpace, Selection
from slimnas.search import evaluator as evaluator_module
from slimnas.search.evaluator import SelectionEvaluator
from slimnas.supernet.inherit import Inheritance
from slimnas.supernet.supernet import Supernet

SIDE = 32


def small_supernet(seed: int) -> Supernet:
    """Random weights, statistics and architecture parameters, none at its starting value."""
    space = SearchSpace.from_yaml(MICRO)
    supernet = Supernet(space, resolution=SIDE, seed=seed, layer_scale=0.7)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4.0)  # small initial weights would make all images look alike
    return supernet.eval()


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return small_supernet(3)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(96, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return torch.randn(40, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def labels(supernet: Supernet, images: Tensor, calibration: Tensor) -> Tensor:
    """What the largest network says, so that every other network gets some images wrong."""
    network = by_hand(supernet, supernet.space.largest(1), calibration)
    with torch.no_grad():
        return network(images).argmax(dim=1)


def norms(network: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def by_hand(supernet: Supernet, selection: Selection, calibration: Tensor) -> nn.Module:
    """The extracted network after one pass that measures its BatchNorm statistics."""
    architecture = supernet.space.architecture(selection).with_resolution(supernet.resolution)
    network = supernet.extract(architecture, selection=selection).eval()
    for norm in norms(network):
        norm.train()
        norm.momentum = 1.0  # keep nothing of the old statistics
    with torch.no_grad():
        network(calibration)
    return network.eval()


def walk(space: SearchSpace, seed: int, count: int) -> list[Selection]:
    """A random walk: each selection a change or two away from the one before it."""
    rng = random.Random(seed)
    every = list(space.selections())
    found = [space.largest(2)]
    while len(found) < count:
        last = found[-1]
        near = [
            s
            for s in every
            if s != last
            and sum(a != b for a, b in zip(s.widths, last.widths, strict=True))
            + sum(
                a != b
                for x, y in zip(s.paths, last.paths, strict=True)
                for a, b in zip(x, y, strict=True)
            )
            <= 2
        ]
        found.append(rng.choice(near))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_kept_activations_change_nothing(
    supernet: Supernet, images: Tensor, labels: Tensor, calibration: Tensor, seed: int
) -> None:
    inheritance = Inheritance(supernet)
    keeping = SelectionEvaluator(inheritance, calibration, images, labels)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    found = []
    for selection in walk(supernet.space, seed, 10):
        fresh = SelectionEvaluator(Inheritance(supernet), calibration, images, labels)
        found.append(keeping.top1(selection))
        assert found[-1] == fresh.top1(selection)
        keeping.move_to(selection)
        assert keeping.top1(selection) == found[-1]
    assert len(set(found)) >= 5  # networks that differ, differ in accuracy
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items())


def test_candidates_do_not_disturb_each_other(
    supernet: Supernet, images: Tensor, labels: Tensor, calibration: Tensor
) -> None:
    """The order in which candidates of a step are asked does not matter."""
    one = SelectionEvaluator(Inheritance(supernet), calibration, images, labels)
    candidates = walk(supernet.space, 7, 6)
    one.move_to(candidates[0])
    forward = [one.top1(candidate) for candidate in candidates]
    backward = [one.top1(candidate) for candidate in reversed(candidates)]
    assert forward == backward[::-1]


def test_only_what_changed_is_run(
    supernet: Supernet,
    images: Tensor,
    labels: Tensor,
    calibration: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[nn.Module] = []
    original = evaluator_module.run_module
    monkeypatch.setattr(
        evaluator_module, "run_module", lambda m, x, s: (ran.append(m), original(m, x, s))[1]
    )
    space = supernet.space
    start = space.largest(0)  # stem, 2 blocks, downsample, 3 blocks, head
    keeping = SelectionEvaluator(Inheritance(supernet), calibration, images, labels)
    keeping.move_to(start)
    assert len(dict.fromkeys(ran)) == 8
    for changed, expected in [
        (start.with_path(1, 2, "identity"), 1),  # the head alone
        (start.with_path(1, 1, "identity"), 2),
        (start.with_path(1, 2, "mb3d"), 2),
        (start.with_width(1, 32).with_width(0, 32), 8),
        (start.with_path(0, 1, "identity"), 5),
        (start, 0),
    ]:
        ran.clear()
        keeping.top1(changed)
        assert len(dict.fromkeys(ran)) == expected


@pytest.mark.parametrize("seed", range(4))
def test_statistics_are_those_of_the_extracted_network(
    supernet: Supernet, images: Tensor, labels: Tensor, calibration: Tensor, seed: int
) -> None:
    evaluator = SelectionEvaluator(Inheritance(supernet), calibration, images, labels)
    *earlier, selection = walk(supernet.space, seed, 4)
    for other in earlier:  # what was asked before must not show
        evaluator.move_to(other)
    evaluator.top1(supernet.space.largest(0))
    network = by_hand(supernet, selection, calibration)
    expected = {k: v for k, v in network.state_dict().items() if "running_" in k}
    buffers = evaluator.calibrated_buffers(selection)
    assert set(buffers) == set(expected)
    assert len(expected) == 2 * len(list(norms(network)))
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_found_network_is_as_accurate_as_it_was_judged(
    supernet: Supernet, images: Tensor, labels: Tensor, calibration: Tensor, seed: int
) -> None:
    inheritance = Inheritance(supernet)
    evaluator = SelectionEvaluator(inheritance, calibration, images, labels)
    selection = walk(supernet.space, 10 + seed, 5)[-1]
    judged = evaluator.top1(selection)
    network = inheritance.extract(supernet.space.architecture(selection), selection=selection)
    network.load_state_dict({**network.state_dict(), **evaluator.calibrated_buffers(selection)})
    with torch.no_grad():
        right = int((network.eval()(images).argmax(dim=1) == labels).sum())
    assert judged == 100.0 * right / len(labels)
    assert 0 < judged < 100


def test_the_teacher_agrees_with_itself(
    supernet: Supernet, images: Tensor, labels: Tensor, calibration: Tensor
) -> None:
    evaluator = SelectionEvaluator(Inheritance(supernet), calibration, images, labels)
    assert evaluator.top1(supernet.space.largest(1)) == 100.0
    assert len(labels.unique()) >= 4
