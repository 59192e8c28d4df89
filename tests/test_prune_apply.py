"""Surgery against hooks that silence units in the network as it was, and against cuts by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from prune_cases import (
    ARCHITECTURES,
    FAMILIES,
    images,
    random_network,
    random_plan,
    with_block,
)
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.errors import PruneError
from slimnas.nn.build import Network, build
from slimnas.nn.efficientformer import MB4D
from slimnas.prune.apply import apply_plan
from slimnas.prune.graph import channel_graph
from slimnas.prune.widths import BlockPlan, WidthPlan, block_components

CLOSE = 1e-10
WRITTEN = ("norm", "stem.proj", "attn.proj", "fc2")
"""In names of transformers' tensors whose first axis is the residual stream."""


def silence(network: Network, plan: WidthPlan) -> Network:
    """A copy in which what the plan removes is set to zero while it runs.

    Queries and keys, hidden units and sub-layers become zero; values become their bias, which the
    surgery folds.
    """
    silenced = copy.deepcopy(network)
    for name, kept in plan.blocks.items():
        block = silenced.get_submodule(name)
        attention = getattr(block, "token_mixer", None) or getattr(block, "attn", None)
        if attention is not None and not isinstance(block, MB4D):
            if kept.heads:
                per_head = hasattr(block, "token_mixer")
                attention.qkv.register_forward_hook(silence_dims(attention, kept, per_head))
            else:
                attention.register_forward_hook(lambda *call: torch.zeros_like(call[2]))
        if getattr(block, "mlp", None) is not None:
            if kept.ffn:
                block.mlp.fc2.register_forward_pre_hook(silence_hidden(kept))
            else:
                block.mlp.register_forward_hook(lambda *call: torch.zeros_like(call[2]))
    return silenced


def silence_dims(
    attention: nn.Module, kept: BlockPlan, per_head: bool
) -> Callable[[nn.Module, object, Tensor], Tensor]:
    heads, qk_dim, v_dim = attention.heads, attention.qk_dim, attention.v_dim
    queries = torch.zeros(heads, qk_dim, dtype=torch.float64)
    values = torch.zeros(heads, v_dim, dtype=torch.float64)
    for head, dims, outs in zip(kept.heads, kept.qk, kept.v, strict=True):
        for dim in dims:
            queries[head, dim] = 1
        for out in outs:
            values[head, out] = 1
    if per_head:
        mask = torch.cat([queries, queries, values], dim=1).flatten()
        is_value = torch.cat([queries * 0, queries * 0, values * 0 + 1], dim=1).flatten()
    else:
        mask = torch.cat([queries.flatten(), queries.flatten(), values.flatten()])
        is_value = torch.cat([torch.zeros(2 * heads * qk_dim), torch.ones(heads * v_dim)])

    def hook(layer: nn.Module, _: object, out: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear)
        return out * mask + (1 - mask) * is_value * layer.bias

    return hook


def silence_hidden(kept: BlockPlan) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def hook(layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = given
        axis = 1 if isinstance(layer, nn.Conv2d) else 2
        mask = torch.zeros(x.shape[axis], dtype=x.dtype)
        mask[list(kept.ffn)] = 1
        return (x * mask.view([-1 if a == axis else 1 for a in range(x.dim())]),)

    return hook


def without(indexes: tuple[int, ...], index: int) -> tuple[int, ...]:
    return tuple(i for i in indexes if i != index)


def single_removals(full: BlockPlan, *, layers: bool) -> Iterator[tuple[str, BlockPlan]]:
    """Every unit of a block on its own; dims go from all heads, each head another one."""
    for unit in full.ffn:
        yield "ffn", replace(full, ffn=without(full.ffn, unit))
    for i in range(full.qk_dim):
        qk = tuple(without(d, (i + h) % full.qk_dim) for h, d in enumerate(full.qk))
        yield "qk", replace(full, qk=qk)
    for i in range(full.v_dim):
        v = tuple(without(d, (i + h) % full.v_dim) for h, d in enumerate(full.v))
        yield "v", replace(full, v=v)
    for head in full.heads:
        yield "head", BlockPlan(without(full.heads, head), full.qk[1:], full.v[1:], full.ffn)
    if layers and full.heads:
        yield "attention_layer", BlockPlan((), (), (), full.ffn)
    if layers and full.ffn:
        yield "ffn_layer", replace(full, ffn=())


SINGLES = {
    "vit": {"ffn": 16, "qk": 11, "v": 16, "head": 8, "attention_layer": 2, "ffn_layer": 2},
    "swin": {"ffn": 18, "qk": 11, "v": 12, "head": 7, "attention_layer": 3, "ffn_layer": 3},
    "efficientformer": {"ffn": 23, "qk": 9, "v": 8, "head": 5},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removing_any_unit_is_silencing_it(family: str) -> None:
    architecture = ARCHITECTURES[family]
    network, x = random_network(architecture), images(architecture)
    whole = network(x)
    full = WidthPlan.full(architecture)
    compared: dict[str, int] = {}
    least = 1.0
    for part, _ in block_components(architecture):
        for kind, kept in single_removals(
            full.blocks[part.name], layers=family != "efficientformer"
        ):
            if kept.vanishes:
                continue  # the third block of the ViT has attention only; see the random plans
            plan = with_block(full, part.name, kept)
            pruned, silenced = apply_plan(plan, network)(x), silence(network, plan)(x)
            assert (pruned - silenced).abs().max() < CLOSE, (part.name, kind, kept)
            least = min(least, float((pruned - whole).abs().max()))
            compared[kind] = compared.get(kind, 0) + 1
    assert compared == SINGLES[family]
    assert least > 1e-5  # the comparison could have failed, for every unit


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_random_plans_are_silencing(family: str) -> None:
    architecture = ARCHITECTURES[family]
    network, x = random_network(architecture, 3), images(architecture, 4)
    removed = {"heads": 0, "sub-layers": 0, "blocks": 0}
    for seed in range(25):
        plan = random_plan(architecture, seed)
        pruned = apply_plan(plan, network)
        assert (pruned(x) - silence(network, plan)(x)).abs().max() < CLOSE, seed
        for name, full in WidthPlan.full(architecture).blocks.items():
            kept = plan.blocks[name]
            removed["heads"] += len(full.heads) - len(kept.heads)
            removed["sub-layers"] += bool(full.heads) > bool(kept.heads)
            removed["blocks"] += kept.vanishes
    wanted = 0 if family == "efficientformer" else 1
    assert removed["heads"] > 20
    assert min(removed["sub-layers"], removed["blocks"]) >= wanted


@torch.no_grad()
def test_embedding_of_a_vit_cut_by_hand() -> None:
    architecture = ARCHITECTURES["vit"]
    network, x = random_network(architecture), images(architecture)
    keep = [0, 3, 4, 7, 8, 9, 11, 15, 16, 22, 23]
    plan = replace(WidthPlan.full(architecture), embedding=(tuple(keep),))
    pruned = apply_plan(plan, network)
    by_hand = build(pruned.architecture).double().eval()
    old, cut = network.state_dict(), 0
    for name, target in by_hand.state_dict().items():
        given = old[name]
        if name in ("stem.cls_token", "stem.dist_token", "stem.pos_embed"):
            given = given[:, :, keep]
        elif name.endswith(("qkv.weight", "fc1.weight", "head.weight", "head_dist.weight")):
            given = given[:, keep]
        elif any(written in name for written in WRITTEN):
            given = given[keep]
        cut += given.shape != old[name].shape
        target.copy_(given)
    assert cut == 5 + 2 * 10 + 5 + 4  # stem, two whole blocks, one without FFN, head
    assert (pruned(x) - by_hand(x)).abs().max() < CLOSE
    assert (pruned(x) - network(x)).abs().max() > 1e-3


@torch.no_grad()
def test_embedding_of_a_swin_cut_by_hand() -> None:
    architecture = ARCHITECTURES["swin"]
    network, x = random_network(architecture), images(architecture)
    first, second = [0, 2, 3, 6, 7], [1, 2, 4, 5, 8, 9, 10, 13]
    plan = replace(WidthPlan.full(architecture), embedding=(tuple(first), tuple(second)))
    pruned = apply_plan(plan, network)
    by_hand = build(pruned.architecture).double().eval()
    old, cut = network.state_dict(), 0
    for name, target in by_hand.state_dict().items():
        given, keep = old[name], second if name.startswith(("stages.1", "head")) else first
        if name.startswith("stages.1.downsample"):
            # (.., 4 neighbours, C): the first stage's channels of each neighbour stay.
            by_neighbour = given.reshape(*given.shape[:-1], 4, 8)[..., first]
            given = by_neighbour.reshape(*given.shape[:-1], 4 * len(first))
            given = given[second] if name.endswith("reduction.weight") else given
        elif name.endswith(("qkv.weight", "fc1.weight", "head.weight")):
            given = given[:, keep]
        elif any(written in name for written in WRITTEN):
            given = given[keep]
        cut += given.shape != old[name].shape
        target.copy_(given)
    assert cut == 4 + 3 * 10 + 3 + 3  # stem, blocks, merging, head
    assert (pruned(x) - by_hand(x)).abs().max() < CLOSE
    assert (pruned(x) - network(x)).abs().max() > 1e-3


@torch.no_grad()
def test_embedding_of_an_efficientformer_cut_by_hand() -> None:
    architecture = ARCHITECTURES["efficientformer"]
    network, x = random_network(architecture), images(architecture)
    first, second = [1, 2, 3, 5, 6, 7], [0, 2, 3, 6, 7, 9, 10]
    plan = replace(WidthPlan.full(architecture), embedding=(tuple(first), tuple(second)))
    pruned = apply_plan(plan, network)
    by_hand = build(pruned.architecture).double().eval()
    old, cut = network.state_dict(), 0
    # The stem's hidden channels: half of 6 stay, those with the largest weights around them.
    size = old["stem.conv1.weight"].pow(2).sum((1, 2, 3)) + old["stem.conv1.bias"].pow(2)
    size = size + old["stem.norm1.weight"].pow(2) + old["stem.norm1.bias"].pow(2)
    size = size + old["stem.conv2.weight"].pow(2).sum((0, 2, 3))
    hidden = sorted(size.topk(3).indices.tolist())
    for name, target in by_hand.state_dict().items():
        given, keep = old[name], second if name.startswith(("stages.1", "head")) else first
        if given.dim() == 0:
            pass
        elif name.startswith(("stem.conv1", "stem.norm1")):
            given = given[hidden]
        elif name == "stem.conv2.weight":
            given = given[first][:, hidden]
        elif name == "stages.1.downsample.conv.weight":
            given = given[second][:, first]
        elif "mlp.norm1" in name or name.endswith(("fc1.bias", "qkv.bias", "biases")):
            pass
        elif name.endswith(("qkv.weight", "fc1.weight", "head.weight", "head_dist.weight")):
            given = given[:, keep]
        elif not name.startswith("head.head"):
            given = given[keep]
        cut += given.shape != old[name].shape
        target.copy_(given)
    # stem, downsample, two MB4D, two MB3D, head
    assert cut == 12 + 6 + 2 * 9 + 2 * 12 + 4
    assert (pruned(x) - by_hand(x)).abs().max() < CLOSE
    assert (pruned(x) - network(x)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_at_once_is_one_after_the_other(family: str) -> None:
    architecture = ARCHITECTURES[family]
    network, x = random_network(architecture), images(architecture)
    for seed in range(5):
        plan = random_plan(architecture, seed, embedding=True)
        inner = apply_plan(replace(plan, embedding=()), network)
        outer = replace(WidthPlan.full(inner.architecture), embedding=plan.embedding)
        both = apply_plan(plan, network)
        assert both.architecture == apply_plan(outer, inner).architecture
        assert (both(x) - apply_plan(outer, inner)(x)).abs().max() < CLOSE


@torch.no_grad()
def test_ffn_units_of_timms_vit_cut_by_hand() -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=7, mlp_ratio=2
    )
    theirs = theirs.double().eval()
    ours = build(
        Architecture.from_yaml(
            """schema: slimnas/architecture/1
name: timms
input: {resolution: 32}
stem: {type: vit_stem, width: 24, patch: 16}
stages:
- {width: 24, blocks: [{type: vit, heads: 3, qk_dim: 8, v_dim: 8, ffn_dim: 48, repeat: 2}]}
head: {type: token, classes: 7}
"""
        )
    ).double()
    names = (
        ("patch_embed.proj", "stem.proj"), ("cls_token", "stem.cls_token"),
        ("pos_embed", "stem.pos_embed"), ("blocks", "stages.0.blocks"),
        ("norm", "head.norm"), ("head", "head.head"),
    )  # fmt: skip
    state = {}
    for key, value in theirs.state_dict().items():
        old, new = next(pair for pair in names if key.startswith(pair[0]))
        state[new + key[len(old) :]] = value
    ours.load_state_dict(state)
    plan = WidthPlan.full(ours.architecture)
    kept = ([0, 3, 17, 20, 47], list(range(5, 40, 3)))
    for i, units in enumerate(kept):
        name = f"stages.0.blocks.{i}"
        plan = with_block(plan, name, replace(plan.blocks[name], ffn=tuple(units)))
        mlp = theirs.blocks[i].mlp
        fc1, fc2 = nn.Linear(24, len(units)).double(), nn.Linear(len(units), 24).double()
        fc1.weight.copy_(mlp.fc1.weight[units])
        fc1.bias.copy_(mlp.fc1.bias[units])
        fc2.weight.copy_(mlp.fc2.weight[:, units])
        fc2.bias.copy_(mlp.fc2.bias)
        mlp.fc1, mlp.fc2 = fc1, fc2
    x = images(ours.architecture)
    assert (apply_plan(plan, ours).eval()(x) - theirs(x)).abs().max() < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_given_network_is_left_as_it_was(family: str) -> None:
    architecture = ARCHITECTURES[family]
    network = random_network(architecture)
    network.train()
    network.stages[0].eval()
    network.head.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    plan = random_plan(architecture, 1, embedding=True)
    pruned = apply_plan(plan, network, name="smaller")
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7)
        for buffer in pruned.buffers():
            buffer.zero_()
    after = network.state_dict()
    assert len(before) == len(after) > 30
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in network.modules()] == modes
    assert (network.architecture, pruned.architecture.name) == (architecture, "smaller")
    # What the new one takes over.
    assert pruned.training
    assert pruned.head.training
    assert not any(module.training for module in pruned.stages[0].modules())
    assert {name for name, p in pruned.named_parameters() if not p.requires_grad} == {
        f"head.{name}" for name, _ in pruned.head.named_parameters()
    }
    assert {p.dtype for p in pruned.parameters()} == {torch.float64}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_plan_changes_nothing(family: str) -> None:
    network = build(ARCHITECTURES[family], seed=5)
    pruned = apply_plan(WidthPlan.full(network.architecture), network)
    assert pruned.architecture == network.architecture
    assert {p.dtype for p in pruned.parameters()} == {torch.float32}
    old, new = network.state_dict(), pruned.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_plan_for_another_network_is_refused() -> None:
    plan = WidthPlan.full(ARCHITECTURES["swin"])
    given, wanted = ARCHITECTURES["vit"].digest[:12], plan.source[:12]
    with pytest.raises(PruneError, match=rf"architecture {wanted}, tiny_vit is {given}; apply it"):
        apply_plan(plan, build(ARCHITECTURES["vit"]))


@torch.no_grad()
def test_channels_between_a_stem_and_a_first_downsampling_all_stay() -> None:
    data = ARCHITECTURES["efficientformer"].to_dict()
    data["stages"][0] |= {"width": 10, "downsample": {"type": "conv3x3"}}
    architecture = Architecture.from_dict(data)
    network, x = random_network(architecture), images(architecture)
    graph = channel_graph(network)
    graph.lint()
    assert len(list(graph.units("embedding"))) == 10 + 12
    keep = (0, 3, 4, 8, 9)
    plan = replace(WidthPlan.full(architecture), embedding=(keep, tuple(range(12))))
    pruned = apply_plan(plan, network)
    assert (pruned.architecture.stem.width, pruned.architecture.widths) == (8, (5, 12))
    assert torch.equal(pruned.stem(x), network.stem(x))
    first, second = pruned.stages[0].downsample, network.stages[0].downsample
    x = network.stem(x)
    assert (first(x) - second(x)[:, keep]).abs().max() < CLOSE
