"""The principal basis keeps the function and sorts the dims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.errors import PruneError
from slimnas.nn.build import Network, build
from slimnas.prune.apply import apply_plan
from slimnas.prune.basis import to_principal_basis
from slimnas.prune.widths import BlockPlan, WidthPlan

VIT: dict[str, Any] = {
    "name": "vit",
    "input": {"resolution": 32},
    "stem": {"type": "vit_stem", "width": 24, "patch": 8},
    "stages": [
        {
            "width": 24,
            "blocks": [
                {"type": "vit", "heads": 3, "qk_dim": 8, "v_dim": 8},
                {"type": "vit", "heads": 2, "qk_dim": 6, "v_dim": 30, "ffn_dim": 20},
                {"type": "vit", "heads": 0, "qk_dim": 0, "v_dim": 0, "ffn_dim": 20},
            ],
        }
    ],
    "head": {"type": "token", "classes": 5},
}
SWIN: dict[str, Any] = {
    "name": "swin",
    "input": {"resolution": 40},
    "stem": {"type": "swin_stem", "width": 12},
    "stages": [
        {
            "width": 12,
            "blocks": [
                {"type": "swin", "heads": 2, "qk_dim": 6, "v_dim": 6, "window": 4, "shift": s}
                for s in (0, 2)
            ],
        },
        {
            "width": 24,
            "downsample": {"type": "patch_merging"},
            "blocks": [{"type": "swin", "heads": 3, "qk_dim": 8, "v_dim": 8, "window": 4}],
        },
    ],
    "head": {"classes": 5},
}
EFFICIENTFORMER: dict[str, Any] = {
    "name": "former",
    "input": {"resolution": 32},
    "stem": {"width": 16},
    "stages": [
        {
            "width": 16,
            "blocks": [{"type": "mb4d"}, {"type": "mb3d", "heads": 2, "qk_dim": 6, "v_dim": 10}],
        }
    ],
    "head": {"classes": 5},
}
MODELS = {"vit": VIT, "swin": SWIN, "efficientformer": EFFICIENTFORMER}


def network_of(data: dict[str, Any]) -> Network:
    network = build(Architecture.model_validate(data), seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise
    return network


def images_of(network: Network, count: int = 24, seed: int = 3) -> Tensor:
    side = network.architecture.input.shape.height
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)


def batches_of(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(8)]


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_on_images_never_seen(name: str) -> None:
    network = network_of(MODELS[name])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    turned = to_principal_basis(network, batches_of(images_of(network)))
    fresh = images_of(network, 4, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(turned(fresh), network(fresh), rtol=1e-9, atol=1e-9)
    assert turned.architecture == network.architecture
    changed = [key for key, value in turned.state_dict().items() if not value.equal(before[key])]
    kinds = {".".join(key.split(".")[-2:]) for key in changed}
    assert kinds == {"qkv.weight", "qkv.bias", "proj.weight"}
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def attention_output_error(network: Network, plan: WidthPlan, images: Tensor) -> float:
    """Mean squared change of the logits when a plan is applied."""
    with torch.no_grad():
        pruned = apply_plan(plan, network)
        return float((pruned(images) - network(images)).square().mean())


def keep_first(network: Network, qk: int, v: int) -> WidthPlan:
    """Keep the first dims of every head of the first block."""
    full = WidthPlan.full(network.architecture)
    name = next(iter(full.blocks))
    block = full.blocks[name]
    cut = BlockPlan(
        heads=block.heads,
        qk=tuple(dims[:qk] for dims in block.qk),
        v=tuple(dims[:v] for dims in block.v),
        ffn=block.ffn,
    )
    return WidthPlan(source=full.source, blocks={**full.blocks, name: cut})


@pytest.mark.parametrize(("qk", "v"), [(4, 8), (8, 4), (2, 8)])
def test_the_first_dims_carry_most(qk: int, v: int) -> None:
    """Against the mean over random subsets of the dims as they were."""
    network = network_of(VIT)
    images = images_of(network)
    turned = to_principal_basis(network, batches_of(images))
    principal = attention_output_error(turned, keep_first(turned, qk, v), images)
    generator = torch.Generator().manual_seed(4)
    errors = []
    for _ in range(12):
        plan = keep_first(network, qk, v)
        name, block = next(iter(plan.blocks.items()))
        pick = [
            tuple(sorted(torch.randperm(8, generator=generator)[:qk].tolist())) for _ in range(3)
        ]
        pick_v = [
            tuple(sorted(torch.randperm(8, generator=generator)[:v].tolist())) for _ in range(3)
        ]
        cut = BlockPlan(heads=block.heads, qk=tuple(pick), v=tuple(pick_v), ffn=block.ffn)
        other = WidthPlan(source=plan.source, blocks={**plan.blocks, name: cut})
        errors.append(attention_output_error(network, other, images))
    # A network of random weights has flat spectra; trained ones gain far more.
    assert principal < 0.75 * sum(errors) / len(errors)


def test_values_are_cut_as_well_as_any_matrix_of_that_rank_could() -> None:
    """Eckart and Young: the error of k dims is the tail of the singular values, head by head."""
    network = network_of(VIT)
    images = images_of(network)
    turned = to_principal_basis(network, batches_of(images))
    block = turned.get_submodule("stages.0.blocks.0.attn")
    seen: list[Tensor] = []
    handle = block.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        turned(images)
    handle.remove()
    mixed = seen[0].reshape(-1, 3, 8)
    mixed = mixed - mixed.mean(dim=0)
    weight = block.proj.weight.detach().reshape(-1, 3, 8)
    for head in range(3):
        output = mixed[:, head] @ weight[:, head].T
        tail = torch.linalg.svdvals(output)[4:].square().sum()
        cut = mixed[:, head, 4:] @ weight[:, head, 4:].T
        torch.testing.assert_close(cut.square().sum(), tail, rtol=1e-9, atol=1e-12)


def test_refusals() -> None:
    network = network_of(VIT)
    with pytest.raises(PruneError, match="at least one image, got none"):
        to_principal_basis(network, [])
    images = images_of(network)
    images[0] = torch.nan
    with pytest.raises(PruneError, match=r"stages\.0\.blocks\.0\.attn: its queries must be finite"):
        to_principal_basis(network, batches_of(images))


def test_training_mode_is_kept_and_the_same_images_give_the_same_weights() -> None:
    network = network_of(VIT).train()
    batches = batches_of(images_of(network))
    seen: list[int] = []
    first = to_principal_basis(network, batches, on_batch=seen.append)
    second = to_principal_basis(network, batches)
    assert first.training
    assert network.training
    assert seen == [8, 16, 24]
    state = second.state_dict()
    assert all(value.equal(state[key]) for key, value in first.state_dict().items())
