"""The published network beside the found ones."""

from __future__ import annotations

import pytest
import torch
from micro import micro_space

from slimnas.arch.space import SearchSpace
from slimnas.latency.devices import find_device
from slimnas.latency.estimate import estimate
from slimnas.search.config import SearchConfig
from slimnas.search.evaluator import SelectionEvaluator
from slimnas.search.found import Origin, price_reference
from slimnas.supernet.inherit import Inheritance
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import TrainedSupernet
from slimnas.zoo.registry import get

SIDE = 32


def origin(space: SearchSpace, images: torch.Tensor, labels: torch.Tensor) -> Origin:
    """A search of `space` with an untrained supernet, judged on `images`."""
    supernet = Supernet(space, resolution=SIDE, seed=1, layer_scale=1.0).eval()
    config = SearchConfig(
        space=space.name,
        space_digest="0",
        device="iphone12",
        table_digest="0",
        targets_ms=(2.0,),
        resolution=SIDE,
    )
    return Origin(
        config,
        space,
        find_device("iphone12"),
        TrainedSupernet(supernet, "0", {}),
        SelectionEvaluator(Inheritance(supernet), images, images, labels),
        len(labels),
        ((0.5,), (0.25,)),
    )


def test_l1_is_judged_with_inherited_weights_and_the_datas_classes() -> None:
    space = SearchSpace.load("efficientformer_tiny").with_classes(5)
    images = torch.randn(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 5
    made = origin(space, images, labels)
    reference = price_reference(made)
    assert reference is not None
    architecture = get("efficientformer_l1").architecture.with_head(classes=5, distilled=False)
    assert reference.architecture == architecture
    assert reference.estimate == estimate(architecture, made.table)

    network = made.trained.supernet.extract(architecture.with_resolution(SIDE)).eval()
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        network(images)
        right = network.eval()(images).argmax(dim=1) == labels
    assert reference.search_top1 == pytest.approx(100.0 * right.double().mean().item())


def test_outside_the_space_it_has_a_latency_and_no_accuracy() -> None:
    space = micro_space()
    images = torch.zeros(4, 1, SIDE, SIDE)
    reference = price_reference(origin(space, images, torch.arange(4)))
    assert reference is not None
    assert reference.estimate.latency_ms > 0
    assert reference.search_top1 is None
