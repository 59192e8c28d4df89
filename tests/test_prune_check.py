"""The check of importance: units are really gone, and small ones change the loss as predicted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from importance_cases import batches, unit_count
from prune_cases import ARCHITECTURES, FAMILIES, random_network, with_block
from torch.nn.functional import cross_entropy

from slimnas.errors import InputSizeError, PruneError
from slimnas.nn.build import Network
from slimnas.prune.apply import apply_plan
from slimnas.prune.check import KINDS, first_order_check, importance_of, removed, sample_units
from slimnas.prune.graph import Unit
from slimnas.prune.taylor import score, score_all
from slimnas.prune.widths import BlockPlan, WidthPlan


def without(plan: BlockPlan, unit: Unit) -> BlockPlan:
    """The plan that removes a unit; of qk and v dims, the same of every head."""

    def rest(dims: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dim for dim in dims if dim != unit.number)

    if unit.kind == "qk":
        return replace(plan, qk=tuple(rest(dims) for dims in plan.qk))
    if unit.kind == "v":
        return replace(plan, v=tuple(rest(dims) for dims in plan.v))
    if unit.kind == "ffn":
        return replace(plan, ffn=rest(plan.ffn))
    if unit.kind == "ffn_layer":
        return replace(plan, ffn=())
    kept = [h for h in plan.heads if unit.kind == "head" and h != unit.head]
    return BlockPlan(
        tuple(kept), tuple(plan.qk[h] for h in kept), tuple(plan.v[h] for h in kept), plan.ffn
    )


@contextlib.contextmanager
def removed_all(network: Network, units: list[Unit]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for unit in units:
            stack.enter_context(removed(network, unit))
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_unit_is_gone_as_after_surgery(family: str) -> None:
    network = random_network(ARCHITECTURES[family])
    images, _ = batches(network.architecture)[0]
    plan = WidthPlan.full(network.architecture)
    compared = 0
    for unit in sample_units(network, 4, 0, KINDS):
        if unit.kind == "embedding" or (unit.kind.endswith("_layer") and family[0] == "e"):
            continue  # LayerNorm counts the channel; EfficientFormer keeps its sub-layers
        block = plan.blocks[unit.part]
        heads = block.heads if unit.kind in ("qk", "v") else (unit.head,)
        pruned = apply_plan(with_block(plan, unit.part, without(block, unit)), network)
        with torch.no_grad(), removed_all(network, [unit._replace(head=h) for h in heads]):
            torch.testing.assert_close(network(images), pruned(images), rtol=1e-10, atol=1e-10)
        compared += 1
    assert compared >= 16
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_change_is_that_of_the_whole_network(family: str) -> None:
    network = random_network(ARCHITECTURES[family]).train()
    given = batches(network.architecture)
    calls: list[int] = []
    scores = score(network, given, "fisher")
    check = first_order_check(network, given, scores, 1000, 0, on_unit=calls.append)
    assert network.training
    assert (check.images, check.criterion) == (5, "fisher")
    network.eval()
    for record in check.units:
        changes = []
        with torch.no_grad():
            for images, labels in given:
                before = cross_entropy(network(images), labels, reduction="none")
                with removed(network, record.unit):
                    after = cross_entropy(network(images), labels, reduction="none")
                changes.append(after - before)
        change = torch.cat(changes)
        assert record.loss_change == pytest.approx(float(change.mean()), rel=1e-9, abs=1e-13)
        assert record.squared_change == pytest.approx(float(change.square().mean()), rel=1e-9)
        assert record.importance == importance_of(scores, record.unit)
    assert len(check.units) == len(set(check.units)) == unit_count(network.architecture)
    assert calls == list(range(1, 2 * len(check.units) + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_small_units_change_the_loss_as_predicted(family: str) -> None:
    """To first order the change of one minibatch's loss is the gate's gradient, and exactly so
    for units that add next to nothing."""
    network = random_network(ARCHITECTURES[family])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if (".proj." in name and "stem" not in name) or ".fc2." in name or "gamma" in name:
                parameter *= 1e-3
    given = batches(network.architecture, (6,))
    scores = score_all(network, given, ["taylor", "fisher"])
    compared = 0
    for kind in ("v", "ffn", "head", "attention_layer", "ffn_layer"):
        by_loss = first_order_check(network, given, scores["taylor"], 30, 1, kinds=(kind,))
        by_sample = first_order_check(network, given, scores["fisher"], 30, 1, kinds=(kind,))
        assert by_loss.units[0].unit == by_sample.units[0].unit
        for loss, sample in zip(by_loss.kinds(), by_sample.kinds(), strict=True):
            if loss.units >= 3:
                assert loss.with_loss is not None
                assert loss.with_loss > 0.99
                assert sample.with_samples is not None
                assert sample.with_samples > 0.99
                compared += loss.units
    assert compared >= 40


def test_a_wrong_criterion_is_found_out() -> None:
    network = random_network(ARCHITECTURES["vit"])
    given = batches(network.architecture)
    wrong = first_order_check(network, given, score(network, [], "random"), 40, 2, kinds=("ffn",))
    (found,) = wrong.kinds()
    assert found.units == 16
    assert found.with_samples is not None
    assert abs(found.with_samples) < 0.7
    few = first_order_check(network, given, score(network, [], "random"), 2, 2, kinds=("ffn",))
    assert few.of("ffn").with_loss is None


def test_samples_follow_the_seed() -> None:
    network = random_network(ARCHITECTURES["swin"])
    one, same, other = (sample_units(network, 5, seed, KINDS) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == 5 * 5 + 2 * 3  # three layers of each sort
    assert len(set(one)) == len(one)


def test_refusals() -> None:
    network = random_network(ARCHITECTURES["vit"])
    given = batches(network.architecture)
    scores = score(network, given, "taylor")
    with pytest.raises(PruneError, match="must have at least one image"):
        first_order_check(network, [], scores, 3, 0)
    with pytest.raises(InputSizeError, match="got 32x8"):
        first_order_check(network, [(given[0][0][..., :8], given[0][1])], scores, 3, 0)
    with pytest.raises(PruneError, match="must be for tiny_swin"):
        first_order_check(random_network(ARCHITECTURES["swin"]), given, scores, 3, 0)
