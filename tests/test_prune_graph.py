"""The channel graph against the tensors of real networks and against the surgery."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from prune_cases import ARCHITECTURES, FAMILIES, random_network, random_plan
from torch import nn

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec
from slimnas.arch.walk import walk
from slimnas.errors import PruneError
from slimnas.nn.build import Network, build
from slimnas.nn.fold import fold
from slimnas.nn.units import unit_axes
from slimnas.prune.apply import apply_plan
from slimnas.prune.graph import Axis, ChannelGraph, Unit, channel_graph
from slimnas.prune.widths import WidthPlan, attention_dims, block_components
from slimnas.zoo.registry import builtin_names, get

COUNTS = {
    "vit": {
        "qk": 30, "v": 42, "ffn": 16, "embedding": 24, "head": 8,
        "attention_layer": 3, "ffn_layer": 2,
    },
    "swin": {
        "qk": 25, "v": 28, "ffn": 18, "embedding": 22, "head": 7,
        "attention_layer": 3, "ffn_layer": 3,
    },
    "efficientformer": {"qk": 22, "v": 21, "ffn": 23, "embedding": 20, "head": 5},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_counted_and_lint_is_content(family: str) -> None:
    graph = channel_graph(ARCHITECTURES[family])
    graph.lint()
    assert Counter(unit.kind for unit in graph.units()) == COUNTS[family]
    assert len(list(graph.units("ffn"))) == COUNTS[family]["ffn"]


def test_shipped_models_are_linted() -> None:
    tiny = [n for n in builtin_names() if "tiny" in n or n.endswith("_l1")]
    assert len(tiny) >= 5
    for name in tiny:
        graph = channel_graph(get(name).architecture)
        graph.lint()
        assert next(graph.units("ffn"))


def removed_units(plan: WidthPlan, architecture: Architecture) -> list[Unit]:
    """The single units that a plan takes away, read off the plan."""
    gone = []
    for part, block in block_components(architecture):
        kept = plan.blocks[part.name]
        heads, *sizes = attention_dims(block)
        for kind, size in zip(("qk", "v"), sizes, strict=True):
            stays = dict(zip(kept.heads, getattr(kept, kind), strict=True))
            gone += [
                Unit(kind, part.name, head, i)
                for head in range(heads)
                for i in range(size)
                if i not in stays.get(head, ())
            ]
        hidden = block.hidden(part.input.channels)
        gone += [Unit("ffn", part.name, -1, i) for i in range(hidden) if i not in kept.ffn]
        gone += [Unit("head", part.name, h) for h in range(heads) if h not in kept.heads]
        if heads and not kept.heads:
            gone.append(Unit("attention_layer", part.name))
        if hidden and not kept.ffn:
            gone.append(Unit("ffn_layer", part.name))
    for stage, channels in enumerate(plan.embedding):
        width = architecture.stages[stage].width
        stream = f"stages.{stage}"
        gone += [Unit("embedding", stream, -1, i) for i in range(width) if i not in channels]
    return gone


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_foretell_the_size_of_every_tensor_that_surgery_leaves(family: str) -> None:
    architecture = ARCHITECTURES[family]
    network, graph = random_network(architecture), channel_graph(architecture)
    compared = 0
    for seed in range(6):
        plan = random_plan(architecture, seed, embedding=True)
        removed: dict[Axis, set[int]] = defaultdict(set)
        for unit in removed_units(plan, architecture):
            for axis, positions in graph.removes(unit).items():
                removed[axis].update(positions)
        expected = []
        for name, tensor in network.state_dict().items():
            sizes = [n - len(removed[Axis(name, a)]) for a, n in enumerate(tensor.shape)]
            if name.startswith("stem.") and family == "efficientformer":
                continue  # its hidden channels are no units
            if 0 not in sizes:
                expected.append(tuple(sizes))
        pruned = apply_plan(plan, network).state_dict()
        skip = "stem." if family == "efficientformer" else "-"
        shapes = [tuple(t.shape) for n, t in pruned.items() if not n.startswith(skip)]
        assert shapes == expected
        compared += len(shapes)
    assert compared > 120


def drop_edge(graph: ChannelGraph) -> None:
    unit = next(graph.units("qk"))
    graph.graph.remove_edge(unit, next(iter(graph.removes(unit))))


def double_edge(graph: ChannelGraph) -> None:
    first, second, *_ = graph.units("embedding")
    axis, positions = next(iter(graph.removes(first).items()))
    graph.graph.add_edge(second, axis, positions=(*graph.removes(second)[axis], *positions))


def beyond_the_end(graph: ChannelGraph) -> None:
    unit = next(graph.units("ffn"))
    graph.graph.add_edge(unit, next(iter(graph.removes(unit))), positions=(99,))


def head_of_another(graph: ChannelGraph) -> None:
    first, second, *_ = graph.units("head")
    for axis in graph.removes(first):
        if axis.tensor.endswith("qkv.bias"):
            edges = graph.graph[first][axis], graph.graph[second][axis]
            a, b = (edge["positions"] for edge in edges)
            graph.graph.add_edge(first, axis, positions=b)
            graph.graph.add_edge(second, axis, positions=a)


def half_a_layer(graph: ChannelGraph) -> None:
    unit = next(graph.units("ffn_layer"))
    graph.graph.remove_edge(unit, Axis("stages.0.blocks.0.norm2.weight", 0))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (drop_edge, r"attn\.qkv\.weight, axis 0: position 0 of 39 is covered 0 times by units"),
        (double_edge, r"stem\.\w+, axis \d: position 0 of 24 is covered 2 times by units"),
        (beyond_the_end, r"mlp\.fc1\.weight, axis 0: position 8 of 8 is covered 0 times"),
        (head_of_another, r"attn\.qkv\.bias, axis 0: a head must be the union of its qk and v"),
        (half_a_layer, r"blocks\.0\.norm2\.weight: is covered 0 times by the layers of"),
    ],
)
def test_lint_finds_what_is_covered_wrongly(
    break_it: Callable[[ChannelGraph], None], message: str
) -> None:
    graph = channel_graph(ARCHITECTURES["vit"])
    break_it(graph)
    with pytest.raises(PruneError, match=message):
        graph.lint()


def test_a_component_without_declaration_is_refused_by_name() -> None:
    class Foreign(Spec):
        """A component nobody declared."""

    component = replace(next(walk(ARCHITECTURES["vit"])), spec=Foreign())
    with pytest.raises(PruneError, match=r"stem: Foreign cannot be pruned; known: Conv3x3, .*Swin"):
        unit_axes(component)


def other_activation(network: Network) -> nn.Module:
    network.get_submodule("stages.0.blocks.1.mlp").act = nn.SiLU()
    return network


def added_parameter(network: Network) -> nn.Module:
    network.get_submodule("stages.0.blocks.0").extra = nn.Parameter(torch.zeros(3))
    return network


def wider_layer(network: Network) -> nn.Module:
    network.get_submodule("head").head = nn.Linear(24, 9)
    return network


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_activation, r"stages\.0\.blocks\.1\.mlp\.act: SiLU cannot be pruned, .* has GELU"),
        (added_parameter, r"blocks\.0\.extra: must be not there as in tiny_vit, is \(3,\)"),
        (wider_layer, r"head\.head\.weight: must be \(7, 24\) as in tiny_vit, is \(9, 24\)"),
        (lambda network: network.stem, r"ViTStem: must be a network that slimnas built"),
    ],
)
def test_changed_networks_are_refused_by_path_and_type(
    change: Callable[[Network], nn.Module], message: str
) -> None:
    network = change(build(ARCHITECTURES["vit"]))
    for refuse in (channel_graph, lambda n: apply_plan(WidthPlan.full(ARCHITECTURES["vit"]), n)):
        with pytest.raises(PruneError, match=message):
            refuse(network)


def test_a_folded_network_is_refused() -> None:
    with pytest.raises(PruneError, match=r"stem\.norm1: Identity cannot be pruned, .* as built"):
        channel_graph(fold(build(ARCHITECTURES["efficientformer"])))


def test_an_unknown_unit_is_refused() -> None:
    graph = channel_graph(ARCHITECTURES["vit"])
    with pytest.raises(PruneError, match=r"tiny_vit: has no unit qk 5\.0 of stages\.0\.blocks\.0"):
        graph.removes(Unit("qk", "stages.0.blocks.0", 5, 0))
