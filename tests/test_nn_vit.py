"""ViT and DeiT: the same numbers as timm's, and what pruned widths must keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from vit_cases import TIMM_NAMES, mixed_architecture, randomised, timm_model, with_depth

from slimnas.arch.cost import cost
from slimnas.errors import InputSizeError, WeightsError
from slimnas.nn.build import build, build_features
from slimnas.nn.efficientformer import FFN
from slimnas.nn.fold import fold
from slimnas.nn.resolution import adapt_state_dict, resize_position_embedding
from slimnas.nn.vit import Attention, TokenHead, ViTBlock
from slimnas.runtimes.onnx_export import export_onnx
from slimnas.zoo.convert import convert_state_dict
from slimnas.zoo.registry import builtin_names, get

FULL_DEPTH = ("deit_tiny", "deit_tiny_distilled", "vit_tiny_patch16")
CASES = [
    *(pytest.param(name, None, id=name) for name in FULL_DEPTH),
    *(pytest.param(name, 2, id=f"{name}-2") for name in TIMM_NAMES if name not in FULL_DEPTH),
    *(
        pytest.param(name, None, id=name, marks=pytest.mark.slow)
        for name in TIMM_NAMES
        if name not in FULL_DEPTH
    ),
]


def images(count: int = 1, height: int = 224, width: int = 224) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, height, width, generator=generator)


def test_every_vit_of_the_zoo_is_compared() -> None:
    ours = [name for name in builtin_names() if name.startswith(("deit_", "vit_"))]
    assert sorted(TIMM_NAMES) == ours
    assert len(ours) == 13
    assert len(CASES) == 13 + 10


@pytest.mark.parametrize(("name", "depth"), CASES)
def test_same_logits_as_timm(name: str, depth: int | None) -> None:
    reference, architecture = timm_model(name, depth), with_depth(name, depth)
    network = build(architecture, seed=5)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    x = images()
    with torch.inference_mode():
        theirs = reference(x)
        assert theirs.std() > 0.1
        assert (network.eval()(x) - theirs).abs().max() < 1e-4
        reference, network, x = reference.double(), network.double(), x.double()
        assert (network(x) - reference(x)).abs().max() < 1e-9
        if architecture.head.distilled:
            reference.set_distilled_training(True)
        got, wanted = network.train()(x), reference.train()(x)
        assert isinstance(got, tuple) == architecture.head.distilled
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_parameters_are_counted_as_timms(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAMES[name], num_classes=1000)
    architecture = get(name).architecture
    assert cost(architecture).params == sum(p.numel() for p in theirs.parameters())


def test_gradients_as_timms() -> None:
    reference, architecture = (
        timm_model("deit_tiny_distilled", 2),
        with_depth("deit_tiny_distilled", 2),
    )
    network = build(architecture).double()
    network.load_state_dict(convert_state_dict(reference.double().state_dict(), architecture))
    x = images(2).double()
    for model in (reference, network.eval()):
        model(x).square().sum().backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    gradients = {name: p.grad for name, p in network.named_parameters()}
    expected = convert_state_dict(theirs, architecture)
    assert len(gradients) == len(expected) == 4 + 2 * 12 + 6 + 1
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=name)


# Blocks of any width


@pytest.mark.parametrize(("heads", "qk_dim", "v_dim"), [(3, 5, 8), (1, 1, 1), (2, 6, 2)])
def test_attention_from_its_formula(heads: int, qk_dim: int, v_dim: int) -> None:
    torch.manual_seed(0)
    attention = Attention(width=12, tokens=7, heads=heads, qk_dim=qk_dim, v_dim=v_dim).double()
    x = torch.randn(1, 7, 12, dtype=torch.double)
    weight, bias = randomised(attention).qkv.weight, attention.qkv.bias
    mixed = torch.zeros(7, heads * v_dim, dtype=torch.double)
    for head in range(heads):
        rows = [
            slice(first + head * dim, first + (head + 1) * dim)
            for first, dim in (
                (0, qk_dim),
                (heads * qk_dim, qk_dim),
                (2 * heads * qk_dim, v_dim),
            )
        ]
        q, k, v = (x[0] @ weight[row].T + bias[row] for row in rows)
        for i in range(7):
            logits = torch.stack([q[i] @ k[j] / qk_dim**0.5 for j in range(7)])
            mixed[i, head * v_dim : (head + 1) * v_dim] = logits.softmax(0) @ v
    torch.testing.assert_close(
        attention(x)[0], mixed @ attention.proj.weight.T + attention.proj.bias
    )


def test_a_block_without_a_sub_layer_lacks_its_modules() -> None:
    x = torch.randn(2, 5, 8)
    no_attention = ViTBlock(width=8, tokens=5, heads=0, qk_dim=0, v_dim=0, ffn_dim=6)
    assert {name.split(".")[0] for name in no_attention.state_dict()} == {"norm2", "mlp"}
    assert isinstance(no_attention.mlp, FFN)
    torch.testing.assert_close(no_attention(x), x + no_attention.mlp(no_attention.norm2(x)))
    no_ffn = ViTBlock(width=8, tokens=5, heads=2, qk_dim=3, v_dim=2, ffn_dim=0)
    assert {name.split(".")[0] for name in no_ffn.state_dict()} == {"norm1", "attn"}
    torch.testing.assert_close(no_ffn(x), x + no_ffn.attn(no_ffn.norm1(x)))


@pytest.mark.parametrize("distilled", [False, True])
def test_a_network_of_unequal_blocks(distilled: bool, tmp_path: Path) -> None:
    architecture = mixed_architecture(distilled)
    network = randomised(build(architecture)).eval()
    assert cost(architecture).params == sum(p.numel() for p in network.parameters())
    x = images(1, 32, 24)
    with torch.inference_mode():
        expected = network(x)
        assert (network.double()(x.double()) - expected).abs().max() < 1e-5
    network.float()
    assert export_onnx(fold(network), x, tmp_path / "m.onnx", dynamic_batch=True) < 1e-5
    assert export_onnx(fold(network), x, tmp_path / "m.onnx", reference=network) < 1e-5


def test_folding_keeps_both_classifiers() -> None:
    network = randomised(build(mixed_architecture())).eval()
    folded = fold(network)
    assert isinstance(folded.head, TokenHead)
    assert folded.head.head_dist is not None
    x = images(1, 32, 24)
    torch.testing.assert_close(folded(x), network(x).detach(), rtol=0, atol=0)


def test_initial_weights() -> None:
    network = build(with_depth("deit_tiny_distilled", 1))
    spread = {name: p.std().item() for name, p in network.named_parameters() if p.dim() > 1}
    for name, std in spread.items():
        if name == "stem.cls_token":
            assert std < 2e-6
        elif name != "stem.proj.weight":  # torch's own start, as in timm
            assert std == pytest.approx(0.02, rel=0.15), name
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert sum(bool(p.any()) for p in biases) == 1  # the stem's
    again = build(with_depth("deit_tiny_distilled", 1))
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True)
    )


# Images, maps, other sizes


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled"])
def test_features_are_one_map_without_the_extra_tokens(name: str) -> None:
    reference, architecture = timm_model(name, 2), with_depth(name, 2)
    network = build_features(architecture).eval()
    state = convert_state_dict(reference.state_dict(), architecture)
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    with torch.inference_mode():
        (theirs,) = reference.forward_intermediates(images(), indices=1, intermediates_only=True)
        (ours,) = network(images())
    assert ours.shape == (1, 192, 14, 14)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(224, 225), (240, 224), (32, 32)])
def test_images_of_another_size(size: tuple[int, int]) -> None:
    network = build(with_depth("deit_tiny", 1))
    with pytest.raises(InputSizeError, match=r"deit_tiny: .* built for 224x224 images, got"):
        network(images(1, *size))


def test_attention_names_the_tokens_it_was_built_for() -> None:
    attention = Attention(width=4, tokens=5, heads=1, qk_dim=2, v_dim=2)
    with pytest.raises(InputSizeError, match="built for 5 tokens, got 4"):
        attention(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled"])
@pytest.mark.parametrize("size", [(160, 256), (384, 384), (64, 80)])
def test_another_resolution_as_timm(name: str, size: tuple[int, int]) -> None:
    reference, source = timm_model(name, 2), with_depth(name, 2)
    state = reference.state_dict()
    grid = (size[0] // 16, size[1] // 16)
    extra = 2 if "distilled" in name else 1
    resampled = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=extra)
    resized = timm_model(name, 2, img_size=size)
    resized.load_state_dict({**state, "pos_embed": resampled})

    target = source.with_resolution(size)
    network = build(target).eval()
    ours = convert_state_dict(state, source)
    network.load_state_dict(adapt_state_dict(ours, source=source, target=target))
    assert torch.equal(network.stem.pos_embed, resampled)
    with torch.inference_mode():
        assert (network(images(1, *size)) - resized(images(1, *size))).abs().max() < 1e-4


def test_resizing_to_the_same_grid_changes_nothing() -> None:
    embedding = torch.randn(1, 1 + 12, 5, dtype=torch.half)
    assert resize_position_embedding(embedding, (3, 4), (3, 4)) is embedding
    bigger = resize_position_embedding(embedding, (3, 4), (5, 2))
    assert bigger.shape == (1, 11, 5)
    assert bigger.dtype == torch.half
    assert torch.equal(bigger[:, :1], embedding[:, :1])
    constant = resize_position_embedding(torch.ones(1, 14, 5), (3, 4), (6, 7))
    torch.testing.assert_close(constant, torch.ones(1, 44, 5))


def test_an_embedding_of_another_grid() -> None:
    with pytest.raises(WeightsError, match=r"3x4 grid must be .*, got \(1, 11, 5\)"):
        resize_position_embedding(torch.zeros(1, 11, 5), (3, 4), (2, 2))


def test_weights_of_another_network_are_not_adapted() -> None:
    source, other = with_depth("deit_tiny", 1), with_depth("deit_tiny", 2)
    with pytest.raises(WeightsError, match="must differ in input resolution only"):
        adapt_state_dict({}, source=source, target=other)
    with pytest.raises(WeightsError, match=r"stem\.pos_embed is missing"):
        adapt_state_dict({}, source=source, target=source.with_resolution(32))


def test_modules_say_what_they_work_on() -> None:
    network = build(mixed_architecture())
    layouts = {type(m).__name__: m.layout for m in network.modules() if hasattr(m, "layout")}
    assert layouts == {"ViTStem": "map", "ViTBlock": "tokens", "TokenHead": "tokens"}
    assert isinstance(network.stem, nn.Module)
