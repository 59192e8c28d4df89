"""Gates: their gradients are slopes of the loss, and the sums over rows that the papers write."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from importance_cases import (
    KINDS,
    attention_name,
    batches,
    has_attention,
    losses,
    qkv_rows,
    singles,
    unit_count,
)
from prune_cases import ARCHITECTURES, FAMILIES, random_network
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.nn.build import Network
from slimnas.prune.gates import Gates
from slimnas.prune.scores import blocks_of
from slimnas.prune.taylor import ScoreRun, score, score_all
from slimnas.prune.vector import UnitVector


def scaled(module: nn.Module, columns: Any, factor: float, offset: Any = 0.0) -> Any:
    """Scale these channels of what a module gives, after taking `offset` off."""

    def hook(_: nn.Module, given: Any, out: Tensor) -> Tensor:
        gate = torch.ones(out.shape[1] if out.dim() == 4 else out.shape[-1], dtype=out.dtype)
        gate[columns] = factor
        shape = (-1, 1, 1) if out.dim() == 4 else (-1,)
        return (out - offset) * gate.reshape(shape) + offset

    return module.register_forward_hook(hook)


def sub_layers(network: Network, block: Any) -> dict[str, nn.Module]:
    """Modules whose outputs a block adds to the stream, as far as they are linear in them."""
    module = network.get_submodule(block.name)
    found = {}
    if has_attention(block):
        found["attention_layer"] = module.get_submodule(attention_name(block))
    if block.spec.type == "mb4d":
        found["mixer"] = module.get_submodule("ls1")
    if block.spec.type in ("mb3d", "mb4d"):
        found["ffn_layer"] = module.get_submodule("ls2")
    elif block.spec.ffn_dim:
        found["ffn_layer"] = module.get_submodule("mlp")
    return found


def gate_hooks(network: Network, block: Any, kind: str) -> Iterator[Callable[[float], list[Any]]]:
    """For each unit of a kind, in order: what puts a gate of some factor on it."""
    module, spec = network.get_submodule(block.name), block.spec
    if kind in ("qk", "v", "head") and has_attention(block):
        qkv = module.get_submodule(f"{attention_name(block)}.qkv")
        bias = qkv.get_parameter("bias").detach()
        for head in range(spec.heads):
            size = spec.qk_dim if kind == "qk" else spec.v_dim
            dims = [[d] for d in range(size)] if kind != "head" else [list(range(size))]
            for dim in dims:
                rows = [qkv_rows(block, "q" if kind == "qk" else "v", head, d) for d in dim]
                offset = 0.0 if kind == "qk" else bias
                yield lambda z, r=rows, o=offset, m=qkv: [scaled(m, r, z, o)]
    if kind == "ffn" and spec.ffn_dim:
        act = module.get_submodule("mlp.act")
        for unit in range(spec.ffn_dim):
            yield lambda z, u=unit: [scaled(act, [u], z)]
    if kind in sub_layers(network, block):
        layer = sub_layers(network, block)[kind]
        yield lambda z: [scaled(layer, slice(None), z)]


def embedding_hooks(network: Network, stage: int) -> Iterator[Callable[[float], list[Any]]]:
    """For each channel: a gate on everything that is written into it."""
    blocks = [b for b in blocks_of(network.architecture) if b.stage == stage]
    first = network.stem if stage == 0 else network.stages[stage].downsample
    writers = [first, *(m for block in blocks for m in sub_layers(network, block).values())]
    for channel in range(network.architecture.widths[stage]):
        yield lambda z, c=channel: [scaled(writer, [c], z) for writer in writers]


def slope(
    network: Network, gate: Callable[[float], list[Any]], images: Tensor, labels: Tensor
) -> Tensor:
    """Central difference of every sample's loss in a gate, at 1."""
    values = []
    for factor in (1 + 1e-5, 1 - 1e-5):
        handles = gate(factor)
        with torch.no_grad():
            values.append(losses(network, images, labels))
        for handle in handles:
            handle.remove()
    return (values[0] - values[1]) / 2e-5


def all_gates(network: Network) -> Iterator[tuple[str, str, list[Callable[[float], list[Any]]]]]:
    for block in blocks_of(network.architecture):
        for kind in KINDS:
            yield block.name, kind, list(gate_hooks(network, block, kind))
    for stage in range(len(network.architecture.stages)):
        yield "embedding", str(stage), list(embedding_hooks(network, stage))


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_the_slopes_of_the_loss(family: str) -> None:
    network = random_network(ARCHITECTURES[family])
    images, labels = batches(network.architecture, (3,))[0]
    units = UnitVector(network.architecture)
    gates = Gates(network, units)
    with gates.recording(len(images)):
        losses(network, images, labels).sum().backward()
    found = gates.gradients()
    compared = 0
    for owner, kind, hooks in all_gates(network):
        mine = found[:, units.where(owner, kind)]
        want = [slope(network, gate, images, labels) for gate in hooks]
        if want:
            torch.testing.assert_close(mine, torch.stack(want, dim=1), rtol=1e-5, atol=1e-7)
        elif mine.numel():
            assert not mine.any()  # a sub-layer that is not there
        compared += len(want)
    assert compared == unit_count(network.architecture) > 90


def weight_gates(network: Network, block: Any) -> dict[str, Tensor]:
    """Sums of gradient x weight over the rows or columns of one side of each unit."""
    module = network.get_submodule(block.name)
    products = {n: p.detach() * p.grad for n, p in module.named_parameters() if p.grad is not None}
    found = {}
    if has_attention(block):
        name, spec = attention_name(block), block.spec
        rows = products[f"{name}.qkv.weight"].sum(dim=1)
        biases = products[f"{name}.qkv.bias"]
        for kind, size in (("q", spec.qk_dim), ("k", spec.qk_dim), ("v", spec.v_dim)):
            index = [qkv_rows(block, kind, h, d) for h in range(spec.heads) for d in range(size)]
            found[kind] = (rows + biases)[index]
            found[f"{kind}_without_bias"] = rows[index]
        found["proj"] = products[f"{name}.proj.weight"].sum(dim=0)
    if block.spec.ffn_dim:
        found["ffn"] = products["mlp.fc2.weight"].flatten(1).sum(dim=0)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_sides_of_a_unit_agree_and_are_its_gate(family: str) -> None:
    """The identities between tied rows and columns, and `fisher` as a loop over single images."""
    network = random_network(ARCHITECTURES[family])
    given = batches(network.architecture)
    scores = score(network, given, "fisher")
    sums: dict[tuple[str, str], Tensor] = {}
    for images, labels in singles(given):
        network.zero_grad(set_to_none=True)
        # Twice: torch 2.13 gets BatchNorm's gradients wrong for one image after attention.
        losses(network, images.repeat(2, 1, 1, 1), labels.repeat(2)).mean().backward()
        for block in blocks_of(network.architecture):
            gates = weight_gates(network, block)
            if has_attention(block):
                torch.testing.assert_close(gates["q"], gates["k"], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(gates["v"], gates["proj"], rtol=1e-9, atol=1e-12)
            for kind, value in gates.items():
                key = (block.name, kind)
                sums[key] = sums.get(key, torch.zeros_like(value)) + value.square()
    compared = 0
    for (name, side), value in sums.items():
        kind = {"q": "qk", "v_without_bias": "v", "ffn": "ffn"}.get(side)
        if kind is not None:
            mine = getattr(scores.blocks[name], kind)
            np.testing.assert_allclose(mine.reshape(-1), value / 5, rtol=1e-9, atol=1e-15)
            compared += mine.size
    assert compared == sum(b.qk.size + b.v.size + b.ffn.size for b in scores.blocks.values()), (
        "a block was left out"
    )


def test_stages_of_one_stream_share_their_channels() -> None:
    body = ARCHITECTURES["vit"].to_dict()
    blocks = body["stages"][0]["blocks"]
    cut = {**body, "stages": [{"width": 24, "blocks": [b]} for b in blocks]}
    whole, split = (Architecture.from_dict(data) for data in (body, cut))
    networks = [random_network(whole), random_network(split)]
    criteria = ["taylor", "fisher", "magnitude", "taylor_weight"]
    one, two = (score_all(n, batches(whole), criteria) for n in networks)
    for criterion in criteria:
        first, second = two[criterion].embedding
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, one[criterion].embedding[0], rtol=1e-12)


def test_activations_are_freed() -> None:
    network = random_network(ARCHITECTURES["vit"])
    seen = []
    for name, module in network.named_modules():
        if name.startswith("stages."):
            module.register_forward_hook(lambda m, given, out: seen.append(weakref.ref(out)))
    given = batches(network.architecture)[0]
    run = ScoreRun(network, ["fisher"])
    run.step(*given)
    assert len(seen) > 10
    assert not [reference for reference in seen if reference() is not None]
