"""Building networks: reproducible, counted right, and clear when used wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.documents import Spec
from slimnas.arch.walk import component_cost, walk
from slimnas.errors import InputSizeError, SpecError
from slimnas.nn.build import build, build_features, make_module
from slimnas.nn.layout import to_map, to_tokens
from slimnas.zoo.registry import get

MODELS = ["efficientformer_l1", "efficientformer_l3", "efficientformer_l7"]
PUBLISHED_COSTS = {
    "efficientformer_l1": (12_289_928, 1_291_284_736),
    "efficientformer_l3": (31_406_000, 3_906_573_312),
    "efficientformer_l7": (82_229_328, 10_119_325_696),
}
# Counted by running the released code: (params, MACs at 224 px) of one component.
PUBLISHED_COMPONENTS = [
    ("efficientformer_l1", "stem", 11_232, 40_642_560),
    ("efficientformer_l1", "stages.0.blocks.2", 19_248, 57_802_752),
    ("efficientformer_l1", "stages.1.downsample", 41_760, 32_514_048),
    ("efficientformer_l1", "stages.1.blocks.1", 75_360, 57_802_752),
    ("efficientformer_l1", "stages.2.downsample", 194_208, 37_933_056),
    ("efficientformer_l1", "stages.2.blocks.5", 405_216, 78_675_968),
    ("efficientformer_l1", "stages.3.downsample", 904_512, 44_255_232),
    ("efficientformer_l1", "stages.3.blocks.2", 1_613_248, 78_675_968),
    ("efficientformer_l1", "stages.3.blocks.3", 2_759_816, 137_946_368),
    ("efficientformer_l1", "head", 896 + 898_000, 896_000),
    ("efficientformer_l3", "stem", 19_584, 68_640_768),
    ("efficientformer_l3", "stages.2.blocks.11", 824_640, 160_563_200),
    ("efficientformer_l3", "stages.3.blocks.1", 2_105_856, 102_760_448),
    ("efficientformer_l3", "stages.3.blocks.2", 3_415_944, 170_059_008),
    ("efficientformer_l7", "stem", 43_200, 146_313_216),
    ("efficientformer_l7", "stages.3.downsample", 2_656_512, 130_056_192),
    ("efficientformer_l7", "stages.3.blocks.0", 6_695_816, 330_622_208),
    ("efficientformer_l7", "head", 1_536 + 1_538_000, 1_536_000),
]


class OutputElements(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products write."""

    OPERATORS = ("aten.convolution.", "aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func).startswith(self.OPERATORS):
            self.elements += out.numel()
        return out


def counted(module: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Parameters, MACs and activation bytes, by what torch runs and not by formula."""
    params = sum(parameter.numel() for parameter in module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        module(x)
    with torch.no_grad(), OutputElements() as outputs:
        module(x)
    assert flops.get_total_flops() % 2 == 0
    return params, flops.get_total_flops() // 2, 4 * outputs.elements


def random_architecture(seed: int, *, small: bool = False) -> Architecture:
    """A random network: any mix of blocks, odd and unequal sides, missing downsamples."""
    rng = random.Random(seed)
    most = 2 if small else 4

    def block() -> dict[str, Any]:
        spec: dict[str, Any] = {"type": rng.choice(["mb4d", "mb3d"]), "repeat": rng.randint(1, 2)}
        if rng.random() < 0.5:
            spec["ffn_dim"] = rng.randint(3, 40)
        if spec["type"] == "mb3d":
            spec |= {"heads": rng.randint(1, 4), "qk_dim": rng.randint(2, 9)}
            spec["v_dim"] = rng.randint(2, 9)
        return spec

    width = 2 * rng.randint(2, 10)
    stages: list[dict[str, Any]] = []
    for index in range(rng.randint(1, most)):
        down = index > 0 and rng.random() < 0.8
        now = rng.randint(4, 30) if down else (stages[-1]["width"] if stages else width)
        stage = {"width": now, "blocks": [block() for _ in range(rng.randint(1, 3))]}
        stages.append(stage | ({"downsample": {"type": "conv3x3"}} if down else {}))
    return Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": f"random_{seed}",
            "input": {
                "channels": rng.randint(1, 4),
                "resolution": [rng.randint(9, 48), rng.randint(9, 48)],
            },
            "stem": {"type": "conv_stem", "width": width, "act": rng.choice(["relu", "gelu"])},
            "stages": stages,
            "head": {"type": "linear", "classes": rng.randint(2, 9), "distilled": seed % 2 == 0},
        }
    )


def image(architecture: Architecture, batch: int = 1) -> Tensor:
    shape = architecture.input.shape
    return torch.randn(batch, shape.channels, shape.height, shape.width)


@pytest.mark.parametrize("name", MODELS)
def test_counts_of_published_models(name: str) -> None:
    architecture = get(name).architecture
    with torch.device("meta"):
        params, macs, activation_bytes = counted(build(architecture).eval(), image(architecture))
    assert (params, macs) == PUBLISHED_COSTS[name]
    report = cost(architecture)
    assert (report.params, report.macs) == (params, macs)
    assert report.activation_bytes == activation_bytes


@pytest.mark.parametrize("seed", range(20))
def test_counts_of_random_architectures(seed: int) -> None:
    architecture = random_architecture(seed)
    with torch.device("meta"):
        found = counted(build(architecture).eval(), image(architecture))
    report = cost(architecture)
    assert (report.params, report.macs, report.activation_bytes) == found


@pytest.mark.parametrize(("model", "name", "params", "macs"), PUBLISHED_COMPONENTS)
def test_counts_of_components(model: str, name: str, params: int, macs: int) -> None:
    architecture = get(model).architecture
    (component,) = [part for part in walk(architecture) if part.name == name]
    shape = component.input
    with torch.device("meta"):
        module = make_module(component).eval()
        x = torch.empty(1, shape.channels, shape.height, shape.width)
        x = to_tokens(x) if module.layout == "tokens" else x
        found = counted(module, x)
    formula = component_cost(component)
    assert found[:2] == (params, macs)
    assert (formula.params, formula.macs, formula.activation_bytes) == found


@pytest.mark.parametrize("seed", range(6))
def test_modules_are_named_and_shaped_as_walked(seed: int) -> None:
    architecture = random_architecture(seed)
    network = build(architecture).eval()
    modules = dict(network.named_modules())
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(name: str) -> Any:
        return lambda _module, _args, out: shapes.__setitem__(name, tuple(out.shape))

    components = list(walk(architecture))
    for part in components:
        modules[part.name].register_forward_hook(hook(part.name))
    with torch.inference_mode():
        network(image(architecture))
    for part in components:
        out = part.output
        on_map = (1, out.channels, out.height, out.width)
        expected = {
            "map": (1, out.channels) if part.kind == "head" else on_map,
            "tokens": (1, out.channels)
            if part.kind == "head"
            else (1, out.positions, out.channels),
        }
        assert shapes[part.name] == expected[modules[part.name].layout]


@pytest.mark.parametrize("seed", range(4))
def test_forward_is_the_components_in_order(seed: int) -> None:
    architecture = random_architecture(seed, small=True)
    network = build(architecture).eval()
    x = expected = image(architecture, batch=2)
    with torch.inference_mode():
        for part in walk(architecture):
            module = network.get_submodule(part.name)
            if part.kind != "head" and module.layout == "tokens":
                expected = to_map(module(to_tokens(expected)), part.output)
            else:
                expected = module(expected)
        torch.testing.assert_close(network(x), expected)


def test_no_layout_change_between_blocks_of_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[str] = []

    def counting(name: Literal["to_map", "to_tokens"]) -> None:
        original = {"to_map": to_map, "to_tokens": to_tokens}[name]

        def call(*args: Any) -> Tensor:
            changes.append(name)
            return original(*args)

        monkeypatch.setattr(f"slimnas.nn.layout.{name}", call)

    counting("to_map")
    counting("to_tokens")
    architecture = get("efficientformer_l7").architecture
    with torch.device("meta"):
        build(architecture)(image(architecture, batch=2))
    assert changes == ["to_tokens"]  # eight attention blocks and the head share one layout


def test_same_seed_same_weights_and_global_state_untouched() -> None:
    architecture = random_architecture(3)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = build(architecture, seed=7).state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(12)
    second = build(architecture, seed=7).state_dict()
    other = build(architecture, seed=8).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.conv1.weight"], other["stem.conv1.weight"])


def test_initialisation() -> None:
    network = build(get("efficientformer_l1").architecture.with_resolution(64))
    checked = 0
    for name, module in network.named_modules():
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        if isinstance(module, nn.Linear) or pointwise:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name
            checked += 1
    assert checked == 14 * 2 + 4 + 2
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            assert (parameter == 1e-5).all()
        if name.endswith("attention_biases"):
            assert not parameter.any()


def test_distilled_head_gives_a_pair_in_training_and_their_mean_in_evaluation() -> None:
    architecture = random_architecture(2)
    assert architecture.head.distilled
    network = build(architecture)
    x = image(architecture, batch=3)
    with torch.inference_mode():
        network.eval()
        network.head.train()
        pair = network(x)
        network.eval()
        torch.testing.assert_close(network(x), (pair[0] + pair[1]) / 2)
    plain = build(architecture.with_head(distilled=False))
    assert isinstance(plain.train()(x), Tensor)


def test_attention_refuses_another_image_size() -> None:
    network = build(get("efficientformer_l1").architecture.with_resolution(64)).eval()
    wanted = "efficientformer_l1: its attention blocks were built for 64x64 images, got 96x64"
    with pytest.raises(InputSizeError, match=wanted):
        network(torch.zeros(1, 3, 96, 64))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3)])
def test_only_batches_of_images(shape: tuple[int, ...]) -> None:
    network = build(get("efficientformer_l1").architecture.with_resolution(64))
    with pytest.raises(InputSizeError, match=r"takes images \(batch, 3, height, width\), got \("):
        network(torch.zeros(shape))


def test_without_attention_any_image_size_will_do() -> None:
    data = get("efficientformer_l1").architecture.to_dict()
    for stage in data["stages"]:
        stage["blocks"] = [{"type": "mb4d"}]
    network = build(Architecture.from_dict(data).with_resolution(64)).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 96, 160)).shape == (1, 1000)
        sides = [tuple(x.shape[2:]) for x in network.forward_features(torch.zeros(1, 3, 96, 160))]
    assert sides == [(24, 40), (12, 20), (6, 10), (3, 5)]


def test_features_are_the_networks_own() -> None:
    architecture = random_architecture(9)
    network = build(architecture, seed=4).eval()
    backbone = build_features(architecture, seed=4).eval()
    assert set(backbone.state_dict()) == {
        name for name in network.state_dict() if not name.startswith("head.")
    }
    x = image(architecture)
    with torch.inference_mode():
        maps, expected = backbone(x), network.forward_features(x)
    assert [x.dim() for x in maps] == [4] * len(architecture.stages)
    assert all(torch.equal(got, wanted) for got, wanted in zip(maps, expected, strict=True))


def test_unknown_component() -> None:
    class Other(Spec):
        pass

    component = replace(next(walk(random_architecture(0))), spec=Other())
    wanted = "stem: no module for Other; known: .*Conv3x3, .*ConvStem, .* needs a maker"
    with pytest.raises(SpecError, match=wanted):
        make_module(component)


def test_gradients_reach_every_parameter() -> None:
    architecture = random_architecture(4)
    network = build(architecture)
    outputs = network(image(architecture, batch=4))
    sum(out.square().sum() for out in outputs).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not without
