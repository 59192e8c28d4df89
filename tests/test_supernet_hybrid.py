"""Supernets of any blocks: same outputs as networks taken out, narrower ones as if zeroed."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hybrid_cases import EVERY_CHOICE, every_space, every_supernet
from supernet_cases import lively
from torch import Tensor, nn

from slimnas.arch.space import Selection
from slimnas.arch.walk import Component
from slimnas.errors import SpecError
from slimnas.nn.build import build
from slimnas.supernet.channel_order import taylor_order
from slimnas.supernet.gumbel import Route
from slimnas.supernet.inherit import (
    ChannelOrder,
    Inheritance,
    group_chunks,
    magnitude_order,
    order_of,
    place,
    supernet_parts,
)
from slimnas.supernet.supernet import Supernet


def images(count: int = 2, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


def random_order(supernet: Supernet, seed: int) -> ChannelOrder:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        group: torch.rand(len(order), generator=generator)
        for group, order in magnitude_order(supernet).items()
    }
    return order_of(scores, group_chunks(supernet))


def with_choices(first: str, second: str, third: str = "identity") -> Selection:
    return Selection((24, 48), ((first,), (second, third)))


@torch.no_grad()
def test_every_choice_runs_as_in_the_extracted_network() -> None:
    supernet = lively(every_supernet()).eval()
    space, seen = supernet.space, set()
    for number, choice in enumerate(EVERY_CHOICE):
        selection = with_choices(choice, EVERY_CHOICE[number - 1], EVERY_CHOICE[number - 5])
        network = supernet.extract(space.architecture(selection), selection=selection).eval()
        want = network(images())
        assert want.std() > 0.02
        torch.testing.assert_close(
            supernet(images(), supernet.fixed_routes(selection)), want, rtol=1e-4, atol=1e-4
        )
        seen.add(choice)
    assert len(seen) == 14


def test_every_choice_learns() -> None:
    """Loss reaches every weight of the routed blocks and the architecture parameters."""
    supernet = every_supernet().train()
    alphas = [path.alpha for path in supernet.meta_paths()]
    for number, choice in enumerate(EVERY_CHOICE):
        supernet.zero_grad()
        selection = with_choices(choice, choice)
        routes = [
            Route(route.index, torch.softmax(alpha, 0))
            for route, alpha in zip(supernet.fixed_routes(selection), alphas, strict=True)
        ]
        supernet(images(4), routes).square().sum().backward()
        for stage in (0, 1):
            block = supernet.get_submodule(f"stages.{stage}.slots.0.blocks.{choice}")
            for name, parameter in block.named_parameters():
                assert parameter.grad is not None, (choice, name)
                assert parameter.grad.isfinite().all(), (choice, name)
        assert all(alpha.grad is not None and alpha.grad.any() for alpha in alphas), number


def test_batch_norms_that_start_silent_are_heard() -> None:
    supernet = Supernet(every_space(), resolution=32, seed=0, layer_scale=0.25)
    scales = supernet.get_submodule("stages.0.slots.0.blocks.cga.mixer.proj.bn").weight
    assert torch.equal(scales, torch.full_like(scales, 0.25))
    others = supernet.get_submodule("stages.0.slots.0.blocks.cga.mixer.qkvs.0.bn").weight
    assert torch.equal(others, torch.ones_like(others))


def test_every_parameter_belongs_to_a_part_and_axes_name_tensors_that_exist() -> None:
    supernet = every_supernet()
    named, by_type = set(), {}
    for part in supernet_parts(supernet):
        tensors = {**dict(part.module.named_parameters()), **dict(part.module.named_buffers())}
        named |= {f"{part.name}.{name}" for name, _ in part.module.named_parameters()}
        for name, axes in part.channels.axes.items():
            if name not in tensors:
                continue  # a variant of the block without it
            by_type.setdefault(part.name.rpartition(".")[2], set()).add(name)
            for axis, runs in enumerate(axes):
                if runs is not None:
                    lengths = [last - first for first, last in map(part.bounds, runs)]
                    assert sum(lengths) == tensors[name].shape[axis], (part.name, name)
    alphas = {name for name, _ in supernet.named_parameters() if name.endswith(".alpha")}
    assert named | alphas == {name for name, _ in supernet.named_parameters()}
    assert all(len(by_type[choice]) >= 8 for choice in EVERY_CHOICE)


@torch.no_grad()
def test_every_width_of_every_choice_fits_the_built_network() -> None:
    supernet = lively(every_supernet()).eval()
    space, inheritance = supernet.space, Inheritance(supernet, random_order(supernet, 1))
    built = 0
    for number, choice in enumerate(EVERY_CHOICE):
        for widths in ((8, 16), (16, 40), (24, 24)):
            other = EVERY_CHOICE[number - 3]
            selection = Selection(widths, ((choice,), (choice, other)))
            architecture = space.architecture(selection)
            network = inheritance.extract(architecture, selection=selection).eval()
            shapes = {name: value.shape for name, value in build(architecture).state_dict().items()}
            assert {n: value.shape for n, value in network.state_dict().items()} == shapes
            assert network(images()).isfinite().all()
            built += 1
    assert built == 3 * 14


# What a narrow network leaves out, as zeros in the wide one: where the stage's dropped channels
# (o) and the FFN's (h) are set to zero. Attention whose heads share channels has its own rules.
SILENCED = {
    "o": (
        "norm1",
        "norm2",
        "token_mixer",
        "attn",
        "mixer",
        "mlp",
        "mixer.reduce.conv",
        "mixer.reduce.norm",
        "mixer.stride_conv",
        "mixer.proj_1",
        "mixer.near",
        "mixer.far",
        "mixer.point",
    ),
    "h": ("mlp.fc1", "mlp.dwconv", "mlp.norm1"),
}


def keep_only(mask: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """A forward hook that zeroes channels of tokens (last axis) or of a map (second)."""

    def hook(module: nn.Module, given: object, out: Tensor) -> Tensor:
        return out * (mask if out.dim() == 3 else mask[:, None, None])

    return hook


def mask_of(order: Tensor, kept: int) -> Tensor:
    mask = torch.zeros(len(order))
    mask[order[:kept]] = 1
    return mask


def silence(block: nn.Module, choice: str, order: ChannelOrder, source: str, width: int) -> Tensor:
    """Zero in a wide block what a narrow one leaves out; returns the mask of the stage."""
    stage = mask_of(order["stages.1"], width)
    masks = {"o": stage, "h": mask_of(order[f"{source}.hidden"], 2 * width)}
    modules = dict(block.named_modules())
    for kind, names in SILENCED.items():
        for name in names:
            if name in modules:
                modules[name].register_forward_hook(keep_only(masks[kind]))
    if choice == "hilo":  # 4 heads, the first of them Hi-Fi
        dim = width // 4
        hi_qk, hi_v = (mask_of(order[f"{source}.hi_{part}"], dim) for part in ("qk", "v"))
        lo_qk, lo_v = (mask_of(order[f"{source}.lo_{part}"], 3 * dim) for part in ("qk", "v"))
        modules["attn.h_qkv"].register_forward_hook(keep_only(torch.cat([hi_qk, hi_qk, hi_v])))
        modules["attn.l_q"].register_forward_hook(keep_only(lo_qk))
        modules["attn.l_kv"].register_forward_hook(keep_only(torch.cat([lo_qk, lo_v])))
    if choice == "cga":  # 8 heads; what a head gives is added to the next one's share
        shares = stage.view(8, -1)
        for head in range(8):
            given = torch.cat([torch.ones(2 * 3), shares[(head + 1) % 8]])
            modules[f"mixer.qkvs.{head}"].register_forward_hook(keep_only(given))
    return stage


def without_layer_norms(block: nn.Module) -> nn.Module:
    """LayerNorm sees how many channels there are; nothing else here does."""
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, nn.Identity())
    return block


@pytest.mark.parametrize("width", [16, 32, 48])
@pytest.mark.parametrize("choice", EVERY_CHOICE)
@torch.no_grad()
def test_narrowing_is_zeroing(choice: str, width: int) -> None:
    supernet = lively(every_supernet()).eval()
    order = random_order(supernet, seed=width)
    source = f"stages.1.slots.1.blocks.{choice}"
    shape = list(supernet.meta_paths())[2].shape.with_channels(width)
    component = Component(
        "block", "block", 1, supernet.space.blocks.block(choice, width), shape, shape
    )
    narrow = without_layer_norms(Inheritance(supernet, order).module(component, source).eval())
    wide = without_layer_norms(deepcopy(supernet.get_submodule(source)))
    stage = silence(wide, choice, order, source, width)
    kept = stage.nonzero().flatten()
    assert len(kept) == width
    x = torch.randn(2, 48, shape.height, shape.width) * stage[:, None, None]
    if type(narrow).layout == "tokens":
        x = x.flatten(2).transpose(1, 2)
        got, want = narrow(x[..., kept]), wide(x)[..., kept]
    else:
        got, want = narrow(x[:, kept]), wide(x)[:, kept]
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_heads_keep_equally_many_channels_and_narrower_is_a_subset() -> None:
    supernet = lively(every_supernet())
    chunks = group_chunks(supernet)
    assert chunks["stages.0"] == chunks["stages.1"] == 8  # of 4 and 8 heads
    source = "stages.1.slots.0.blocks.hilo"
    assert chunks[f"{source}.lo_qk"] == chunks[f"{source}.lo_v"] == 3
    assert f"{source}.hi_qk" not in chunks  # one head
    orders = [magnitude_order(supernet), random_order(supernet, 3)]
    routes = [supernet.fixed_routes(s) for s in supernet.space.every_block()]
    orders.append(taylor_order(supernet.eval(), routes, [(images(4), torch.tensor([0, 1, 2, 3]))]))
    for order in orders:
        for group in ("stages.0", "stages.1"):
            full = len(order[group])
            assert sorted(order[group].tolist()) == list(range(full))
            before: set[int] = set()
            for width in range(8, full + 1, 8):
                kept = set(order[group][:width].tolist())
                share = full // 8
                assert {sum(k // share == i for k in kept) for i in range(8)} == {width // 8}
                assert before < kept
                before = kept


def test_each_head_keeps_its_own_best() -> None:
    scores = {"a": torch.tensor([5.0, 1.0, 3.0, 9.0, 8.0, 7.0]), "b": torch.tensor([1.0, 2.0])}
    order = order_of(scores, {"a": 2})
    assert order["a"].tolist() == [0, 3, 2, 4, 1, 5]
    assert order["b"].tolist() == [1, 0]


@torch.no_grad()
def test_a_network_at_another_size() -> None:
    supernet = lively(every_supernet()).eval()
    ran = 0
    for choice in EVERY_CHOICE:
        selection = Selection((16, 32), ((choice,), (choice, "identity")))
        architecture = supernet.space.architecture(selection).with_resolution((48, 64))
        network = supernet.extract(architecture).eval()
        assert network(torch.randn(1, 3, 48, 64)).isfinite().all()
        ran += 1
    assert ran == 14


def test_place_keeps_the_order_of_choices() -> None:
    supernet = every_supernet()
    space, rng = supernet.space, random.Random(0)
    for _ in range(30):
        selection = space.random(rng)
        placed = place(supernet, space.architecture(selection))
        assert space.architecture(placed) == space.architecture(selection)
        assert [[c for c in slots if c != "identity"] for slots in placed.paths] == [
            [c for c in slots if c != "identity"] for slots in selection.paths
        ]


def test_a_resolution_that_a_block_cannot_take_is_refused() -> None:
    fault = "every_choice: cannot train its supernet at this resolution: sra of .* 1x1"
    with pytest.raises(SpecError, match=fault):
        Supernet(every_space(), resolution=8, seed=0)
