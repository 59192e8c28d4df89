"""Backbones for images of any size, held against the networks built for each size."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from measure_fakes import SMALL_MODELS, small_model
from torch import Tensor, nn
from torch.func import functional_call

from slimnas.arch.architecture import Architecture
from slimnas.errors import InputSizeError
from slimnas.nn.build import FeatureNetwork, build_features
from slimnas.nn.dynamic import KEPT_SIZES, DynamicFeatureNetwork, dynamic
from slimnas.nn.fold import fold
from slimnas.nn.resolution import adapt_state_dict, resizings
from slimnas.zoo.registry import builtin_names, family_of, get

FAMILIES = tuple(SMALL_MODELS)
SIZES = ((48, 32), (64, 96), (80, 80), (16, 48))
STRIDES = {"efficientvit": (16, 32, 64)}
FOUR_STAGES = ("efficientformer", "efficientformerv2", "litv2", "swin", "found")
STRIDES |= dict.fromkeys(FOUR_STAGES, (4, 8, 16, 32))


def backbone(family: str) -> DynamicFeatureNetwork:
    """A small backbone, in double precision, every weight and statistic off its start."""
    network = build_features(small_model(family), seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.add_(0.2 * (noise if name.endswith("running_var") else noise - 0.5))
    return dynamic(network).eval()


def images(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)


def built_for(size: tuple[int, int], network: FeatureNetwork) -> FeatureNetwork:
    """The network that `with_resolution` gives, with the weights moved there."""
    source = network.architecture
    target = source.with_resolution(size)
    reference = build_features(target).double()
    state = adapt_state_dict(network.state_dict(), source=source, target=target)
    reference.load_state_dict(state)
    return reference.train(network.training)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_network_for_that_size_does(
    family: str, size: tuple[int, int]
) -> None:
    network, x = backbone(family), images(size)
    with torch.inference_mode():
        ours, theirs = network(x), built_for(size, network)(x)
    assert len(ours) == len(network.feature_info)
    for a, b, info in zip(ours, theirs, network.feature_info, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.shape[1] == info.channels
        assert (a.shape[2], a.shape[3]) == tuple(-(-side // info.stride) for side in size)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_its_own_size_it_is_the_plain_backbone(family: str) -> None:
    architecture = small_model(family)
    plain = build_features(architecture, seed=1).double().eval()
    network = dynamic(plain)
    assert list(network.state_dict()) == list(plain.state_dict())
    x = images((architecture.input.shape.height, architecture.input.shape.width))
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(network(x), plain(x), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_its_own_parameters(family: str) -> None:
    network, x = backbone(family), images((64, 96))
    source = network.architecture
    target = source.with_resolution((64, 96))
    sum(m.square().mean() for m in network(x)).backward()  # type: ignore[union-attr]
    mine = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    state = {name: tensors[name] for name in network.state_dict()}
    moved = adapt_state_dict(state, source=source, target=target)
    tables = resizings(source=source, target=target)
    assert tables or family == "litv2"
    reference = build_features(target).double().eval()
    maps = functional_call(reference, moved, (x,))
    sum(m.square().mean() for m in maps).backward()
    looked_at = 0
    for name, parameter in network.named_parameters():
        grad = mine[name]
        assert grad is not None, name
        assert parameter.grad is not None, name
        assert name not in tables or float(grad.abs().max()) > 0, name
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-12)
        looked_at += 1
    assert looked_at > 15


@pytest.mark.parametrize("family", ["efficientformer", "efficientvit", "efficientformerv2"])
def test_batch_norm_learns_from_every_size(family: str) -> None:
    network, x = backbone(family).train(), images((64, 96))
    reference = built_for((64, 96), network)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(x)
    reference(x)
    updated = 0
    for name, buffer in reference.named_buffers():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(dict(network.named_buffers())[name], buffer)
            updated += int(not torch.equal(buffer, before[name]))
    assert updated > 10


def test_frozen_batch_norm_stays_frozen() -> None:
    network = backbone("efficientformer").train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = copy.deepcopy(network.state_dict())
    for _ in range(2):
        network(images((64, 96)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("family", ["swin", "vit"])
def test_weights_that_change_later_count(family: str) -> None:
    network, x = backbone(family), images((48, 32))
    before = network(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    after = network(x)
    assert not torch.allclose(before[-1], after[-1])
    torch.testing.assert_close(after[-1], built_for((48, 32), network)(x)[-1])


def test_other_number_formats_and_copies() -> None:
    network, x = backbone("swin"), images((48, 32))
    wanted = network(x)[-1]
    halved = network.float()(x.float())[-1]
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved.double(), wanted, rtol=1e-4, atol=1e-4)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(made(x.float())[-1], halved)
        with torch.no_grad():
            next(made.parameters()).add_(1.0)
        assert not torch.equal(made(x.float())[-1], halved)
    assert torch.equal(network(x.float())[-1], halved)


def test_only_the_last_sizes_are_kept() -> None:
    network = backbone("efficientformer")
    for width in range(32, 32 + 16 * (KEPT_SIZES + 3), 16):
        network(images((48, width)))
    assert len(network._sizes) == KEPT_SIZES
    assert (48, 32) not in network._sizes
    made = network._sizes[48, width]
    network(images((48, width)))
    assert network._sizes[48, width] is made
    # Layers are the backbone's own: a size costs its tables alone.
    own = {id(tensor) for tensor in network.parameters()}
    layers = (m for m in made.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert all(id(layer.weight) in own for layer in layers)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("vit", (4, 32), r"^small_vit for images of 4x32: the image must hold a patch of 8x8"),
        ("efficientformerv2", (40, 48), r"^small_efficientformerv2 for images of 40x48: stages"),
    ],
)
def test_sizes_that_a_family_cannot_take(family: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(InputSizeError, match=message) as caught:
        backbone(family)(images(size))
    assert "\n" not in str(caught.value)


def test_a_folded_backbone_keeps_its_size() -> None:
    folded = fold(backbone("efficientformer"))
    with pytest.raises(InputSizeError, match=r"has no .* any more .*so it takes 32x32 images only"):
        folded(images((48, 32)))
    assert len(folded(images((32, 32)))) == 2


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(InputSizeError, match=r"takes images \(batch, 3, height, width\)"):
        backbone("efficientformer")(torch.zeros(1, 4, 48, 32, dtype=torch.float64))


def test_feature_info_of_every_built_in_model() -> None:
    looked_at = 0
    for name in builtin_names():
        architecture = get(name).architecture
        network = with_meta(architecture)
        stem = architecture.stem
        patch = (stem.patch,) if hasattr(stem, "patch") else ()
        assert tuple(info.stride for info in network.feature_info) == STRIDES.get(
            family_of(name), patch
        )
        assert tuple(info.channels for info in network.feature_info) == architecture.widths
        for index, info in enumerate(network.feature_info):
            assert network.get_submodule(info.module) is network.stages[index]
        looked_at += 1
    assert looked_at >= 32


def with_meta(architecture: Architecture) -> FeatureNetwork:
    with torch.device("meta"):
        return build_features(architecture)
