"""Importance: criteria against loops written out, runs that continue, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importance_cases import (
    Batch,
    assert_same_units,
    batches,
    losses,
    qkv_rows,
    singles,
    unit_count,
)
from prune_cases import ARCHITECTURES, FAMILIES, random_network
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.arch.architecture import SCHEMA, Architecture
from slimnas.errors import DataError, InputSizeError, PruneError, SlimnasError
from slimnas.nn.build import build
from slimnas.prune.check import importance_of
from slimnas.prune.graph import ChannelGraph, Unit, channel_graph
from slimnas.prune.scores import BlockScores, blocks_of
from slimnas.prune.taylor import CRITERIA, ScoreRun, score, score_all
from slimnas.prune.vector import UnitVector


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_is_taylor_of_single_images(family: str) -> None:
    network = random_network(ARCHITECTURES[family])
    given = batches(network.architecture)
    by_sample = score(network, given, "fisher", data="")
    alone = score(network, singles(given), "taylor", data="")
    compared = assert_same_units(by_sample, alone, rtol=1e-10)
    assert compared == UnitVector(network.architecture).size


def test_taylor_is_a_loop_over_a_vit_of_timm() -> None:
    torch.manual_seed(0)
    reference = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    ).double()
    block = {"type": "vit", "heads": 3, "qk_dim": 8, "v_dim": 8, "repeat": 2}
    architecture = Architecture.from_dict(
        {
            "schema": SCHEMA,
            "name": "small",
            "input": {"resolution": 32},
            "stem": {"type": "vit_stem", "width": 24, "patch": 8},
            "stages": [{"width": 24, "blocks": [block]}],
            "head": {"type": "token", "classes": 5},
        }
    )
    network = build(architecture).double()
    renamed = (("patch_embed.", "stem."), ("blocks.", "stages.0.blocks."), ("norm.", "head.norm."))
    state = {}
    with torch.no_grad():
        for name, value in reference.state_dict().items():
            value += 0.2 * torch.randn_like(value)
            ours = next(
                (new + name[len(old) :] for old, new in renamed if name.startswith(old)), ""
            )
            where = "head." if name.startswith("head.") else "stem."
            state[ours or where + name] = value
    network.load_state_dict(state)
    given = batches(architecture)
    scores = score(network, given, "taylor")
    want: dict[str, Tensor] = {}
    for images, labels in given:
        reference.zero_grad()
        cross_entropy(reference(images), labels).backward()
        for i, part in enumerate(reference.blocks):
            rows = (part.attn.qkv.weight * part.attn.qkv.weight.grad).sum(dim=1).detach()
            biases = (part.attn.qkv.bias * part.attn.qkv.bias.grad).detach()
            columns = (part.mlp.fc2.weight * part.mlp.fc2.weight.grad).sum(dim=0).detach()
            values = rows[48:].reshape(3, 8)
            found = {
                "qk": (rows + biases)[:24].reshape(3, 8),
                "v": values,
                "head": values.sum(dim=1),
                "ffn": columns,
            }
            for kind, value in found.items():
                key = f"stages.0.blocks.{i} {kind}"
                want[key] = want.get(key, torch.zeros_like(value)) + value.square() / len(given)
    for key, value in want.items():
        name, kind = key.split()
        np.testing.assert_allclose(getattr(scores.blocks[name], kind), value, rtol=1e-9)
    assert sum(value.numel() for value in want.values()) == 2 * (24 + 24 + 3 + 96)


def graph_sum(graph: ChannelGraph, unit: Unit, values: dict[str, Tensor]) -> float:
    """Sum over the elements that the channel graph says go with `unit`."""
    masks: dict[str, Tensor] = {}
    for axis, positions in graph.removes(unit).items():
        if axis.tensor in values:
            mask = masks.setdefault(axis.tensor, torch.zeros(values[axis.tensor].shape).bool())
            mask.index_fill_(axis.axis, torch.tensor(positions), True)
    if unit.kind in ("v", "head"):  # biases of values stay, folded
        for name in masks:
            if name.endswith("qkv.bias"):
                masks[name] &= ~value_rows(graph.architecture, unit.part, len(masks[name]))
    return sum(float(values[name][mask].sum()) for name, mask in masks.items())


def value_rows(architecture: Architecture, part: str, count: int) -> Tensor:
    block = next(b for b in blocks_of(architecture) if b.name == part)
    rows = torch.zeros(count).bool()
    heads, dims = range(block.spec.heads), range(block.spec.v_dim)  # type: ignore[attr-defined]
    rows[[qkv_rows(block, "v", head, dim) for head in heads for dim in dims]] = True
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_criteria_sum_over_what_the_graph_removes(family: str) -> None:
    network = random_network(ARCHITECTURES[family])
    given = batches(network.architecture)
    scores = score_all(network, given, ["magnitude", "taylor_weight", "taylor_abs"])
    weights = {name: value.detach() for name, value in network.named_parameters()}
    gradients = []
    for images, labels in given:
        network.zero_grad()
        losses(network, images, labels).mean().backward()
        gradients.append({n: p.grad.clone() for n, p in network.named_parameters()})
    whole = {n: (3 * gradients[0][n] + 2 * gradients[1][n]) / 5 for n in weights}
    values = {
        "magnitude": {n: w.square() for n, w in weights.items()},
        "taylor_abs": {n: (w * whole[n]).abs() for n, w in weights.items()},
        "taylor_weight": {
            n: sum((w * g[n]).square() for g in gradients) / 2 for n, w in weights.items()
        },
    }
    graph = channel_graph(network)
    units = list(graph.units())
    for criterion, value in values.items():
        want = [graph_sum(graph, unit, value) for unit in units]
        mine = [importance_of(scores[criterion], unit) for unit in units]
        np.testing.assert_allclose(mine, want, rtol=1e-9)
        assert min(mine) > 0
    # EfficientFormer's sub-layers cannot be removed, so the graph has none of them.
    layers = family != "efficientformer"
    assert len(units) == unit_count(network.architecture, layers=layers) > 80


@pytest.mark.parametrize("criteria", [["fisher"], list(CRITERIA)])
def test_the_network_is_left_as_it_was(criteria: list[str]) -> None:
    network = random_network(ARCHITECTURES["efficientformer"])
    network.train()
    network.stages[0].eval()
    for parameter in network.stages[1].parameters():
        parameter.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    wanted = [parameter.requires_grad for parameter in network.parameters()]

    def assert_as_before() -> None:
        assert [module.training for module in network.modules()] == modes
        assert [parameter.requires_grad for parameter in network.parameters()] == wanted
        assert all(parameter.grad is None for parameter in network.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)

    score_all(network, batches(network.architecture), criteria)
    assert_as_before()
    with pytest.raises(InputSizeError, match="got 16x16"):
        score_all(network, [(torch.zeros(1, 3, 16, 16), torch.zeros(1).long())], criteria)
    assert_as_before()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_continued_run_ends_the_same(family: str, tmp_path: Path) -> None:
    network = random_network(ARCHITECTURES[family]).float()
    given = batches(network.architecture, (2, 2, 1))
    whole = score_all(network, given, list(CRITERIA))
    path = tmp_path / "run.safetensors"
    for number, batch in enumerate(given):
        run = ScoreRun(network, list(CRITERIA))
        if number:
            run.load(path)
        assert run.batches == number
        run.step(*batch)
        run.save(path)
    run.load(path)
    for criterion, scores in run.result().items():
        assert scores.header == whole[criterion].header
        same = assert_same_units(scores, whole[criterion])
        assert same == UnitVector(network.architecture).size
    assert whole["fisher"].images == 5
    assert whole["fisher"].batch_size == 2


def test_foreign_runs_are_not_continued(tmp_path: Path) -> None:
    network = random_network(ARCHITECTURES["vit"])
    path = tmp_path / "run.safetensors"
    run = ScoreRun(network, ["taylor"])
    run.save(path)
    ScoreRun(network, ["taylor"]).load(path)  # nothing seen yet
    run.step(*batches(network.architecture)[0])
    run.save(path)
    others = {
        "weights": ScoreRun(random_network(ARCHITECTURES["vit"], seed=5), ["taylor"]),
        "architecture": ScoreRun(random_network(ARCHITECTURES["swin"]), ["taylor"]),
        "criteria": ScoreRun(network, ["fisher"]),
        "seed": ScoreRun(network, ["taylor"], seed=1),
        "given_data": ScoreRun(network, ["taylor"], data="abc"),
    }
    for key, other in others.items():
        with pytest.raises(PruneError, match=f"run.safetensors: {key}: must be") as caught:
            other.load(path)
        assert "\n" not in str(caught.value)
    score(network, [], "magnitude").save(path)
    with pytest.raises(PruneError, match="schema: must be 'slimnas/score-run/1'"):
        run.load(path)
    path.write_bytes(b"x" * 99)
    with pytest.raises(SlimnasError, match="an unfinished importance run"):
        run.load(path)


def test_gradients_and_outputs_that_are_not_finite_are_named() -> None:
    network = random_network(ARCHITECTURES["vit"])
    first, second = batches(network.architecture)

    def refused(criteria: list[str], message: str, *given: Batch) -> None:
        with pytest.raises(PruneError, match=message) as caught:
            score_all(network, given, criteria)
        assert "\n" not in str(caught.value)

    def spoil(module: nn.Module, given: Any, out: Tensor) -> None:
        if len(out) == 2:  # the second minibatch
            out.register_hook(lambda gradient: gradient * float("nan"))

    handle = network.stages[0].blocks[1].mlp.register_forward_hook(spoil)
    refused(["fisher"], r"^stages.0.blocks.1 \(ffn\): its gradient .* minibatch 2;", first, second)
    refused(["taylor_abs"], "^stages.0.blocks.1.mlp.*bias: its grad.* minibatch 2", first, second)
    handle.remove()
    broken = torch.full_like(second[0], float("inf"))
    refused(["taylor"], "^minibatch 2: images must be finite", first, (broken, second[1]))
    with torch.no_grad():
        network.stages[0].blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    refused(["taylor"], r"^stages.0.blocks.1.mlp.fc1: its output .* minibatch 1", first)


def test_bad_requests_are_one_line() -> None:
    network = random_network(ARCHITECTURES["vit"])
    images, labels = batches(network.architecture)[0]
    with pytest.raises(PruneError, match=r"got 'fischer' \(did you mean 'fisher'"):
        ScoreRun(network, ["fischer"])
    with pytest.raises(PruneError, match="must see at least one image"):
        score(network, [], "taylor")
    with pytest.raises(PruneError, match="must be a network that slimnas built"):
        ScoreRun(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labels must be 0 to 6"):
        score(network, [(images, labels + 7)], "taylor")
    with pytest.raises(DataError, match="one label per image"):
        score(network, [(images, labels[:2])], "taylor")
    with pytest.raises(DataError, match="one label per image"):
        score(network, [(images[:0], labels[:0])], "taylor")


def test_some_criteria_need_no_images() -> None:
    network = random_network(ARCHITECTURES["swin"])

    def none() -> Iterator[Batch]:
        raise AssertionError("images were asked for")
        yield

    found = score_all(network, none(), ["magnitude", "random"], seed=3)
    assert [s.images for s in found.values()] == [0, 0]
    again, other = (score(network, none(), "random", seed=seed) for seed in (3, 4))
    assert assert_same_units(found["random"], again) == UnitVector(network.architecture).size
    assert not np.array_equal(again.embedding[0], other.embedding[0])


def test_scores_say_what_they_saw() -> None:
    network = random_network(ARCHITECTURES["vit"])
    given = batches(network.architecture)
    calls: list[tuple[int, int]] = []
    run = score(network, given, "taylor", on_batch=lambda r: calls.append((r.batches, r.images)))
    assert calls == [(1, 3), (2, 5)]
    assert (run.images, run.batch_size, run.criterion) == (5, 3, "taylor")
    run.check(network.architecture)
    same, other = score(network, given, "fisher"), score(network, given[::-1], "fisher")
    assert run.data == same.data != other.data
    assert score(network, given, "fisher", data="known").data == "known"
    assert isinstance(run.blocks["stages.0.blocks.2"], BlockScores)
    assert run.blocks["stages.0.blocks.2"].ffn.size == 0
