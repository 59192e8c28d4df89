"""Networks taken out of a supernet: same outputs, channels sliced alike, nothing changed."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from supernet_cases import CLASSES, images, lively, micro_space, micro_supernet
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import MB3D, MB4D, ConvStem
from slimnas.arch.space import ATTENTION, IDENTITY, SearchSpace, Selection
from slimnas.arch.walk import Component
from slimnas.errors import SpecError
from slimnas.nn.build import build
from slimnas.nn.resolution import resize_attention_bias
from slimnas.supernet.channel_order import taylor_order
from slimnas.supernet.inherit import (
    ChannelOrder,
    Inheritance,
    magnitude_order,
    place,
    supernet_parts,
)
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import weights_digest

CERTAIN = 100.0


def random_selections(space: SearchSpace, count: int, seed: int) -> list[Selection]:
    rng = random.Random(seed)
    return [space.random(rng) for _ in range(count)]


def full_width(space: SearchSpace, selection: Selection) -> Selection:
    return replace(selection, widths=tuple(stage.width.max for stage in space.stages))


def force(supernet: Supernet, selection: Selection) -> None:
    """Set the alphas so that every draw takes the selection's choices."""
    chosen = [choice for slots in selection.paths for choice in slots]
    with torch.no_grad():
        for path, choice in zip(supernet.meta_paths(), chosen, strict=True):
            path.alpha.fill_(-CERTAIN)
            path.alpha[path.choices.index(choice)] = CERTAIN


def random_order(supernet: Supernet, seed: int) -> ChannelOrder:
    generator = torch.Generator().manual_seed(seed)
    return {
        group: torch.randperm(len(order), generator=generator)
        for group, order in magnitude_order(supernet).items()
    }


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_forced_supernet_is_the_extracted_network(distilled: bool) -> None:
    supernet, batch = micro_supernet(distilled=distilled), images()
    space = supernet.space
    compared = attention_in_both = 0
    selections = [full_width(space, s) for s in random_selections(space, 24, seed=1)]
    for number, selection in enumerate([*selections, space.largest(4), space.largest(5)]):
        force(supernet, selection)
        network = supernet.extract(space.architecture(selection)).eval()
        want = network(batch)
        assert want.std() > 0.1  # or any two would be equal
        for mixing, noise in itertools.product(("sampled", "soft"), ("gumbel", "uniform")):
            generator = torch.Generator().manual_seed(number)
            routes = supernet.draw_routes(1.0, mixing=mixing, noise=noise, generator=generator)
            assert (supernet(batch, routes) - want).abs().max() < 1e-5
            compared += 1
        assert (supernet(batch, supernet.fixed_routes(selection)) - want).abs().max() < 1e-5
        assert (supernet(batch, supernet.likeliest_routes()) - want).abs().max() < 1e-5
        attention_in_both += all(ATTENTION in selection.paths[i] for i in (2, 3))
    assert compared == 4 * 26
    assert attention_in_both >= 3


@torch.no_grad()
def test_extracted_network_trains_like_the_supernet_path() -> None:
    supernet, batch = micro_supernet(), images()
    selection = supernet.space.largest(3)
    network = supernet.extract(supernet.space.architecture(selection), selection=selection)
    routes = supernet.fixed_routes(selection)
    torch.testing.assert_close(network.train()(batch), supernet.train()(batch, routes))
    torch.testing.assert_close(  # and the running statistics moved alike
        network.eval()(batch), supernet.eval()(batch, routes)
    )


# Which channels the leading axes of a tensor hold: the stage's (o), the stage's before (i), the
# FFN's or stem's hidden (h), or always all (.). The first pattern that fits counts.
SLICES = (
    (r".*num_batches_tracked", ""),
    (r"stem\.(conv|norm)1\..*", "h"),
    (r"stem\.conv2\.weight", "oh"),
    (r".*downsample\.conv\.weight", "oi"),
    (r"head\.norm\..*", "o"),
    (r"head\.\w+\.weight", ".o"),
    (r"head\.\w+\.bias", "."),
    (r".*mlp\.fc1\.weight", "ho"),
    (r".*mlp\.fc2\.weight", "oh"),
    (r".*mb4d\.mlp\.norm1\..*|.*mlp\.fc1\.bias", "h"),
    (r".*qkv\.weight", ".o"),
    (r".*qkv\.bias|.*attention_biases", "."),
    (r".*", "o"),
)


def hand_sliced(
    full: dict[str, Tensor], order: ChannelOrder, architecture: Architecture, sources: list[str]
) -> dict[str, Tensor]:
    """Slices of a full-width network's tensors, written without the toolkit's table of axes.

    `full` holds tensors by the supernet's names; `sources` the supernet block of each block.
    """
    widths = architecture.widths
    parts = [("stem", "stem", 0), ("head", "head", len(widths) - 1)]
    remaining = iter(sources)
    for i, spec in enumerate(architecture.stages):
        parts += [(f"stages.{i}.downsample",) * 2 + (i,)] * (i > 0)
        parts += [(f"stages.{i}.blocks.{j}", next(remaining), i) for j in range(len(spec.blocks))]
    sliced = {}
    for name, source, i in parts:
        channels = {
            "o": (f"stages.{i}", widths[i]),
            "i": (f"stages.{i - 1}", widths[i - 1]),
            "h": (f"{source}.hidden", widths[0] // 2 if name == "stem" else 2 * widths[i]),
        }
        for key, tensor in full.items():
            if not key.startswith(f"{source}."):
                continue
            axes = next(axes for pattern, axes in SLICES if re.fullmatch(pattern, key))
            for axis, letter in enumerate(axes):
                if letter != ".":
                    group, count = channels[letter]
                    kept = sorted(order[group].tolist()[:count])
                    tensor = torch.stack([tensor.select(axis, k) for k in kept], dim=axis)
            sliced[name + key.removeprefix(source)] = tensor
    return sliced


def test_narrow_networks_are_sliced_as_by_hand() -> None:
    supernet, narrow, compared = micro_supernet(), 0, 0
    space, order = supernet.space, random_order(supernet, seed=4)
    for selection in random_selections(space, 20, seed=5):
        architecture = space.architecture(selection)
        network = supernet.extract(architecture, selection=selection, order=order)
        sources = [f"stages.{i}.slots.{j}.blocks.{c}" for i, j, c in selection.active()]
        by_hand = hand_sliced(supernet.state_dict(), order, architecture, sources)
        state, built = network.state_dict(), build(architecture).state_dict()
        assert state.keys() == by_hand.keys() == built.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, by_hand[name]), name
            assert tensor.shape == built[name].shape
            compared += 1
        narrow += selection != full_width(space, selection)
        assert network(images()).shape == (3, CLASSES)
    assert narrow >= 15
    assert compared > 20 * 60


@pytest.mark.parametrize("choice", ["mb4d", "mb3d"])
@pytest.mark.parametrize("kept", [1, 9, 30])
@torch.no_grad()
def test_removing_hidden_units_is_zeroing_them(choice: str, kept: int) -> None:
    supernet = micro_supernet()
    order = random_order(supernet, seed=8)
    source = f"stages.2.slots.1.blocks.{choice}"
    path = list(supernet.meta_paths())[4]
    spec = (
        MB4D(ffn_dim=kept) if choice == "mb4d" else MB3D(heads=2, qk_dim=3, v_dim=5, ffn_dim=kept)
    )
    component = Component("block", "block", 2, spec, path.shape, path.shape)
    small = Inheritance(supernet, order).module(component, source).eval()
    full = supernet.get_submodule(source)
    assert full.mlp.fc1.weight.shape[0] == 32
    full.mlp.fc2.weight[:, order[f"{source}.hidden"][kept:]] = 0
    x = torch.randn(2, path.shape.channels, path.shape.height, path.shape.width)
    x = x if choice == "mb4d" else x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(small(x), full(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_removing_stem_channels_is_zeroing_them() -> None:
    supernet = micro_supernet()
    order = random_order(supernet, seed=8)
    path = next(iter(supernet.meta_paths()))
    image = micro_space().input.shape
    component = Component("stem", "stem", 0, ConvStem(width=4), image, path.shape.with_channels(4))
    small = Inheritance(supernet, order).module(component, "stem").eval()
    full = supernet.stem
    full.conv2.weight[:, order["stem.hidden"][2:]] = 0
    kept = order["stages.0"][:4].sort().values
    torch.testing.assert_close(small(images()), full(images())[:, kept], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_removing_the_width_of_a_convolutional_block_is_zeroing_it() -> None:
    supernet = micro_supernet()
    order, source = random_order(supernet, seed=8), "stages.0.slots.1.blocks.mb4d"
    path = next(iter(supernet.meta_paths()))
    narrow = path.shape.with_channels(4)
    component = Component("block", "block", 0, MB4D(ffn_dim=16), narrow, narrow)
    small = Inheritance(supernet, order).module(component, source).eval()
    kept = order["stages.0"][:4].sort().values
    x = torch.randn(2, 8, narrow.height, narrow.width)
    x[:, order["stages.0"][4:]] = 0
    full = supernet.get_submodule(source)
    torch.testing.assert_close(small(x[:, kept]), full(x)[:, kept], rtol=1e-5, atol=1e-5)


def test_narrower_channels_are_a_subset_in_their_own_order() -> None:
    supernet = micro_supernet()
    inheritance = Inheritance(supernet, random_order(supernet, seed=2))
    widest = supernet.space.largest(0)
    names = ["stem.conv2.bias", "stages.0.blocks.0.ls1.gamma", "stages.0.blocks.0.mlp.fc1.bias"]
    before = None
    for width in (8, 6, 4):
        selection = widest.with_width(0, width)
        architecture = supernet.space.architecture(selection)
        state = inheritance.extract(architecture, selection=selection).state_dict()
        if before is not None:
            for name in names:
                wider, narrower = before[name].tolist(), iter(before[name].tolist())
                assert set(state[name].tolist()) < set(wider)
                assert all(value in narrower for value in state[name].tolist())  # a subsequence
        before = state


def test_extract_at_another_size_resizes_attention_biases_only() -> None:
    supernet = micro_supernet()
    selection = supernet.space.largest(4)
    architecture = supernet.space.architecture(selection)
    same = supernet.extract(architecture).state_dict()
    other = supernet.extract(architecture.with_resolution((56, 72))).eval()
    assert other(torch.randn(1, 3, 56, 72)).shape == (1, CLASSES)
    biases = 0
    for name, tensor in other.state_dict().items():
        if name.endswith("attention_biases"):
            stage = int(name.split(".")[1])
            grids = {2: ((3, 3), (4, 5)), 3: ((2, 2), (2, 3))}[stage]
            assert torch.equal(tensor, resize_attention_bias(same[name], *grids))
            biases += 1
        else:
            assert torch.equal(tensor, same[name])
    assert biases == 4


def bare_space() -> SearchSpace:
    return SearchSpace.from_yaml(
        """
schema: slimnas/search-space/1
name: bare
input: {channels: 3, resolution: 8}
stages: [{width: {min: 4, max: 6, step: 2}, slots: 1, choices: [mb4d]}]
head: {type: linear, classes: 3}
blocks: {mb4d: {ffn_ratio: 1}}
"""
    )


def hand_sums(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What reads or writes each channel of the bare space, summed."""
    block = "stages.0.slots.0.blocks.mb4d"
    v, b = values, f"{block}.mlp"
    everything = (1, 2, 3)
    hidden = sum(v[f"stem.{n}"] for n in ("conv1.bias", "norm1.weight", "norm1.bias"))
    hidden = hidden + v["stem.conv1.weight"].sum(everything)
    hidden = hidden + v["stem.conv2.weight"].sum((0, 2, 3))
    ffn = v[f"{b}.fc1.bias"] + v[f"{b}.norm1.weight"] + v[f"{b}.norm1.bias"]
    ffn = ffn + v[f"{b}.fc1.weight"].sum(everything) + v[f"{b}.fc2.weight"].sum((0, 2, 3))
    width = v["stem.conv2.weight"].sum(everything) + v["stem.conv2.bias"]
    width = width + v["stem.norm2.weight"] + v["stem.norm2.bias"]
    width = width + v[f"{block}.ls1.gamma"] + v[f"{block}.ls2.gamma"]
    width = width + v[f"{b}.fc1.weight"].sum((0, 2, 3)) + v[f"{b}.fc2.weight"].sum(everything)
    width = width + v[f"{b}.fc2.bias"] + v[f"{b}.norm2.weight"] + v[f"{b}.norm2.bias"]
    width = width + v["head.norm.weight"] + v["head.norm.bias"] + v["head.head.weight"].sum(0)
    return {"stem.hidden": hidden, f"{block}.hidden": ffn, "stages.0": width}


def assert_order(order: ChannelOrder, scores: dict[str, Tensor]) -> None:
    assert order.keys() == scores.keys()
    for group, score in scores.items():
        want = sorted(range(len(score)), key=lambda i: -float(score[i]))
        assert order[group].tolist() == want, group


def bare_supernet(seed: int) -> Supernet:
    return lively(Supernet(bare_space(), resolution=8, seed=seed), seed).eval()


@pytest.mark.parametrize("seed", range(3))
def test_magnitude_order_by_hand(seed: int) -> None:
    supernet = bare_supernet(seed)
    squares = {n: p.detach().double().square() for n, p in supernet.named_parameters()}
    assert_order(magnitude_order(supernet), hand_sums(squares))


@pytest.mark.parametrize("seed", range(3))
def test_taylor_order_by_hand(seed: int) -> None:
    supernet = bare_supernet(seed)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, label]))
        for label in (0, 1, 2)
    ]
    routes = supernet.fixed_routes(supernet.space.largest())
    order = taylor_order(supernet, [routes], iter(batches))

    scores: dict[str, Tensor] = {}
    for batch, labels in batches:
        supernet.zero_grad()
        cross_entropy(supernet(batch, routes), labels).backward()
        products = {
            name: (p.grad * p).detach().double()
            for name, p in supernet.named_parameters()
            if p.grad is not None
        }
        for group, value in hand_sums(products).items():
            scores[group] = scores.get(group, torch.zeros(len(value))) + value.square()
    assert_order(order, scores)


def test_taylor_falls_back_to_magnitude_off_the_measured_routes() -> None:
    supernet = micro_supernet()
    routes = supernet.fixed_routes(supernet.space.largest(0))
    order = taylor_order(supernet, [routes], [(images(), torch.tensor([0, 1, 2]))])
    by_magnitude = magnitude_order(supernet)
    off = [group for group in order if "mb3d" in group]
    assert len(off) == 5
    assert all(torch.equal(order[group], by_magnitude[group]) for group in off)
    assert any(not torch.equal(order[group], by_magnitude[group]) for group in order)


def placements(blocks: tuple[str, ...], slots: int) -> Iterator[tuple[str, ...]]:
    for chosen in itertools.combinations(range(slots), len(blocks)):
        path = [IDENTITY] * slots
        for slot, block in zip(chosen, blocks, strict=True):
            path[slot] = block
        yield tuple(path)


def test_place_is_the_best_of_all_placements() -> None:
    supernet, moved = micro_supernet(), 0
    space, rng = supernet.space, random.Random(6)
    for selection in random_selections(space, 30, seed=7):
        with torch.no_grad():
            for path in supernet.meta_paths():
                path.alpha.copy_(torch.tensor([rng.gauss(0, 2) for _ in path.choices]))
        architecture = space.architecture(selection)
        placed = place(supernet, architecture)
        assert placed.widths == selection.widths
        assert space.architecture(placed) == architecture
        for i, stage in enumerate(supernet.super_stages()):
            logs = [
                dict(zip(s.choices, torch.log_softmax(s.alpha, 0).tolist(), strict=True))
                for s in stage.slots
            ]
            blocks = tuple(block.type for block in architecture.stages[i].blocks)

            def score(path: tuple[str, ...], logs: list[dict[str, float]] = logs) -> float:
                return sum(log[choice] for log, choice in zip(logs, path, strict=True))

            best = max(placements(blocks, len(logs)), key=score)
            assert score(placed.paths[i]) == pytest.approx(score(best), abs=1e-9)
            moved += placed.paths[i] != selection.paths[i]
    assert moved > 10  # the alphas mattered


def snapshot(supernet: Supernet) -> tuple[object, ...]:
    return (
        {name: value.clone() for name, value in supernet.state_dict().items()},
        [module.training for module in supernet.modules()],
        [p.requires_grad for p in supernet.parameters()],
        {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None},
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in supernet.modules()
        ],
        torch.get_rng_state(),
    )


def assert_same(before: tuple[object, ...], after: tuple[object, ...]) -> None:
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def ask_draw(supernet: Supernet) -> None:
    generator = torch.Generator().manual_seed(0)
    for mixing, noise in itertools.product(("sampled", "soft"), ("gumbel", "uniform")):
        supernet.draw_routes(1.0, mixing=mixing, noise=noise, generator=generator)


def ask_taylor(supernet: Supernet) -> None:
    routes = supernet.fixed_routes(supernet.space.largest(2))
    taylor_order(supernet, [routes], [(images(), torch.tensor([0, 1, 2]))])


def ask_extract(supernet: Supernet) -> None:
    selection = random_selections(supernet.space, 1, seed=3)[0]
    network = supernet.extract(supernet.space.architecture(selection)).train()
    network(images()).sum().backward()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.zero_()  # shares no memory with the supernet


def ask_forward(supernet: Supernet) -> None:
    was = supernet.training
    supernet.eval()
    with torch.no_grad():
        supernet(images(), supernet.likeliest_routes())
    supernet.train(was)


QUESTIONS: dict[str, Callable[[Supernet], object]] = {
    "draw_routes": ask_draw,
    "taylor_order": ask_taylor,
    "magnitude_order": magnitude_order,
    "extract": ask_extract,
    "forward": ask_forward,
    "alphas": lambda s: s.alphas(),
    "likeliest": lambda s: s.likeliest_routes(),
    "digest": weights_digest,
    "parts": lambda s: list(supernet_parts(s)),
    "place": lambda s: place(s, s.space.architecture(s.space.largest(1))),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_no_question_changes_the_supernet(question: str, training: bool) -> None:
    supernet = micro_supernet().train(training)
    supernet.head.eval()  # a mixture of flags must survive too
    for index, parameter in enumerate(supernet.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5) if index % 2 else None
        parameter.requires_grad_(index % 3 != 0)
    if question == "forward":  # which has to set the flags itself
        supernet.train(training)
    before = snapshot(supernet)
    QUESTIONS[question](supernet)
    assert_same(before, snapshot(supernet))


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (Supernet(micro_space(), resolution=48, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert weights_digest(first) == weights_digest(again)
    assert weights_digest(first) != weights_digest(other)


def test_every_parameter_belongs_to_a_part() -> None:
    supernet = micro_supernet()
    named = {
        f"{part.name}.{name}"
        for part in supernet_parts(supernet)
        for name, _ in part.module.named_parameters()
    }
    alphas = {name for name, _ in supernet.named_parameters() if name.endswith(".alpha")}
    assert named | alphas == {name for name, _ in supernet.named_parameters()}
    assert len(alphas) == 8


def test_extract_refuses_what_the_supernet_cannot_give() -> None:
    supernet = micro_supernet()
    architecture = supernet.space.architecture(supernet.space.largest(1))
    with pytest.raises(SpecError, match="its head must be the supernet's"):
        supernet.extract(architecture.with_head(classes=7))
    wider = architecture.to_dict()
    wider["stages"][3]["width"] = 24
    with pytest.raises(SpecError, match="outside search space micro"):
        supernet.extract(Architecture.from_dict(wider))
    gray = architecture.to_dict()
    gray["input"]["channels"] = 1
    with pytest.raises(SpecError, match=r"input\.channels: must be the supernet's, 3, got 1"):
        supernet.extract(Architecture.from_dict(gray))
    other = supernet.space.largest(2)
    with pytest.raises(SpecError, match="selection must be one that gives this architecture"):
        supernet.extract(architecture, selection=other)
