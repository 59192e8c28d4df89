"""Drop path against timm's networks and with everything dropped; layer scale."""

from __future__ import annotations

from typing import Any

import efficientformerv2_cases
import pytest
import torch
from litv2_cases import litv2_architecture
from measure_fakes import SMALL_MODELS, small_model
from timm.layers import DropPath
from timm.layers.drop import calculate_drop_path_rates
from timm.models.efficientformer import EfficientFormer
from timm.models.efficientformer_v2 import EfficientFormerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vit_cases import SMALL, randomised

import slimnas
from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import walk
from slimnas.errors import SpecError
from slimnas.nn.build import Stage, build, build_features
from slimnas.nn.dynamic import dynamic
from slimnas.nn.fold import fold
from slimnas.nn.layers import LayerScale, ResidualBlock
from slimnas.nn.layout import layout_of, to_tokens
from slimnas.nn.regularisation import set_drop_path, set_layer_scale
from slimnas.nn.resolution import adapt_state_dict
from slimnas.zoo.registry import get

MIXERS: list[dict[str, Any]] = [
    {"type": "mhsa", "heads": 3},
    {"type": "mhsa", "heads": 3, "ffn": "conv"},
    {"type": "lka"},
    {"type": "cga", "heads": 2, "kernels": [5, 3]},
    {"type": "strided", "heads": 3},
]
FAMILIES = [*SMALL_MODELS, "mixers", "hilo"]
ALL_DROPPED = 1.0 - 1e-12


def architecture_of(family: str) -> Architecture:
    """A small network; `mixers` and `hilo` have blocks that the others lack."""
    if family == "hilo":
        return litv2_architecture()
    if family != "mixers":
        return small_model(family)
    return Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": "mixers",
            "input": {"resolution": 32},
            "stem": {"type": "conv_stem", "width": 24},
            "stages": [{"width": 24, "blocks": MIXERS}],
            "head": {"type": "linear", "classes": 5},
        }
    )


def images(architecture: Architecture, count: int = 3) -> Tensor:
    shape = architecture.input.shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, shape.channels, shape.height, shape.width, generator=generator)


def stirred(network: nn.Module) -> nn.Module:
    """Every residual branch with something to say, and BatchNorms with statistics."""
    generator = torch.Generator().manual_seed(0)
    set_layer_scale(network, 0.5)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return network


def blocks_of(network: nn.Module) -> list[tuple[Stage, nn.Module]]:
    return [
        (stage, block)
        for stage in network.modules()
        if isinstance(stage, Stage)
        for block in stage.blocks
    ]


def test_a_share_of_images_is_dropped_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    block = ResidualBlock()
    branch = torch.ones(20_000, 2, 3)
    assert block.kept(branch) is branch
    block.drop_path = 0.3
    kept = block.kept(branch)
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (kept[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    assert block.eval().kept(branch) is branch


@pytest.mark.parametrize("shape", [(7, 3), (7, 5, 3), (7, 3, 4, 2)])
def test_it_drops_what_timms_drops(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = ResidualBlock(), DropPath(0.4)
    ours.drop_path = 0.4
    torch.manual_seed(1)
    wanted = theirs(x)
    torch.manual_seed(1)
    assert torch.equal(ours.kept(x), wanted)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("name", ["litv2_s", "efficientformer_l1", "swin_tiny"])
def test_rates_grow_from_block_to_block(name: str, rate: float) -> None:
    network = build_meta(name)
    depths = [len(stage.blocks) for stage in network.stages]
    rates = set_drop_path(network, rate)
    assert rates == pytest.approx(
        [r for stage in calculate_drop_path_rates(rate, depths, stagewise=True) for r in stage]
    )
    assert [block.drop_path for _, block in blocks_of(network)] == list(rates)
    assert not any(
        part.drop_path
        for stage in network.stages
        if stage.downsample is not None
        for part in stage.downsample.modules()
        if isinstance(part, ResidualBlock)
    )


def build_meta(name: str) -> Any:
    with torch.device("meta"):
        return build(get(name).architecture)


def test_a_lone_block_drops_nothing() -> None:
    body = small_model("vit").to_dict()
    body["stages"][0]["blocks"][0]["repeat"] = 1
    assert set_drop_path(build(Architecture.from_dict(body)), 0.5) == (0.0,)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(SpecError, match=r"^drop path must be a share of images, .*got "):
        set_drop_path(build(small_model("vit")), rate)


def timms(family: str, rate: float) -> nn.Module:
    """A small network of timm's with drop path."""
    torch.manual_seed(0)
    if family == "vit":
        return VisionTransformer(**{**SMALL, "depth": 4}, drop_path_rate=rate)
    if family == "swin":
        return SwinTransformer(
            img_size=32,
            num_classes=5,
            embed_dim=12,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            drop_path_rate=rate,
        )
    if family == "efficientformer":
        return EfficientFormer(
            depths=(1, 2, 1, 3), embed_dims=(8, 12, 16, 24), num_vit=2, drop_path_rate=rate
        )
    model = efficientformerv2_cases.small_timm(drop_path_rate=rate)
    assert isinstance(model, EfficientFormerV2)
    return model


@pytest.mark.parametrize("family", ["vit", "swin", "efficientformer", "efficientformerv2"])
def test_networks_drop_what_timms_drop(family: str) -> None:
    theirs = randomised(timms(family, 0.5)).train()
    if hasattr(theirs, "set_distilled_training"):
        theirs.set_distilled_training(True)
    ours = slimnas.convert.from_timm(theirs).train()
    rates = set_drop_path(ours, 0.5)
    assert rates[-1] == 0.5
    x = images(ours.architecture, count=8)
    torch.manual_seed(3)
    wanted = theirs(x)
    torch.manual_seed(3)
    given = ours(x)
    pairs = zip(wanted, given, strict=True) if isinstance(wanted, tuple) else [(wanted, given)]
    for their, our in pairs:
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)
    torch.manual_seed(4)
    other = ours(x)
    first = given[0] if isinstance(given, tuple) else given
    assert not torch.allclose(other[0] if isinstance(other, tuple) else other, first, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_with_everything_dropped_is_no_block(family: str) -> None:
    """So no residual branch of any family is left out."""
    architecture = architecture_of(family)
    network = stirred(build(architecture)).train()
    torch.manual_seed(0)
    looked_at = 0
    for stage, block in blocks_of(network):
        assert isinstance(block, ResidualBlock)
        shape = stage.shape
        x = torch.randn(3, shape.channels, shape.height, shape.width)
        if layout_of(block) == "tokens":
            x = torch.randn(3, shape.positions, shape.channels)
        assert not torch.allclose(block(x), x, atol=1e-2)
        for part in block.modules():
            if isinstance(part, ResidualBlock):
                part.drop_path = ALL_DROPPED
        assert torch.equal(block(x), x)
        looked_at += 1
    assert looked_at == sum(part.kind == "block" for part in walk(architecture)) > 1


def test_every_type_of_block_is_looked_at() -> None:
    seen = {
        type(block) for family in FAMILIES for _, block in blocks_of(build(architecture_of(family)))
    }
    known = {kind for kind in all_residual_blocks() if kind.__name__ != "InteractionFFN"}
    known -= {kind for kind in known if kind.__name__ == "TransformerBlock"}  # a base
    assert seen == known
    assert len(seen) > 10


def all_residual_blocks() -> set[type[ResidualBlock]]:
    found: set[type[ResidualBlock]] = set()
    waiting = [ResidualBlock]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            if kind.__module__.startswith("slimnas"):
                found.add(kind)
                waiting.append(kind)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_evaluation_and_folding_stay(family: str) -> None:
    architecture = architecture_of(family)
    network = stirred(build(architecture)).eval()
    x = images(architecture)
    with torch.inference_mode():
        plain, folded = network(x), fold(network)(x)
    names = [name for name, _ in network.named_modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    set_drop_path(network, 0.5)
    with torch.inference_mode():
        assert torch.equal(network(x), plain)
        assert torch.equal(fold(network)(x), folded)
    assert [name for name, _ in network.named_modules()] == names
    after = network.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_nothing_of_it_is_exported() -> None:
    architecture = small_model("efficientformer")
    network = build(architecture).eval()
    set_drop_path(network, 0.5)
    program = torch.export.export(network, (images(architecture),))
    operators = {str(node.target) for node in program.graph.nodes}
    assert len(operators) > 5
    assert not any("bernoulli" in name or "rand" in name for name in operators)


def test_it_holds_for_images_of_other_sizes() -> None:
    source = small_model("efficientformer")
    network = dynamic(build_features(source, seed=1)).train()
    target = source.with_resolution((48, 32))
    x = torch.randn(4, 3, 48, 32, generator=torch.Generator().manual_seed(2))
    network(x)  # made before the rates are set
    for rate in (0.6, 0.0):
        set_drop_path(network, rate)
        reference = build_features(target).train()
        reference.load_state_dict(
            adapt_state_dict(network.state_dict(), source=source, target=target)
        )
        set_drop_path(reference, rate)
        torch.manual_seed(5)
        wanted = reference(x)[-1]
        torch.manual_seed(5)
        torch.testing.assert_close(network(x)[-1], wanted)


def test_layer_scale_and_silent_norms_start_where_asked() -> None:
    former = build(small_model("efficientformer"))
    set_layer_scale(former, 0.1)
    gammas = [part.gamma for part in former.modules() if isinstance(part, LayerScale)]
    assert len(gammas) == 2 * 5
    assert all((gamma == 0.1).all() for gamma in gammas)
    vit = build(small_model("efficientvit"))
    norms = [part for part in vit.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))]
    silent = [norm for norm in norms if not norm.weight.any()]
    assert 0 < len(silent) < len(norms)
    set_layer_scale(vit, 0.25)
    assert all((norm.weight == 0.25).all() for norm in silent)
    assert all((norm.weight == 1).all() for norm in norms if norm not in silent)


def test_tokens_and_maps_are_dropped_alike() -> None:
    block = ResidualBlock()
    block.drop_path = 0.5
    x = torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    of_map = block.kept(x)
    torch.manual_seed(2)
    assert torch.equal(to_tokens(of_map), block.kept(to_tokens(x)))
