"""`slimnas.convert.from_timm`: the same function, or a refusal by path and type."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientformer import EfficientFormer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vit_cases import SMALL, randomised

import slimnas
from slimnas.errors import SlimnasError, UnsupportedModuleError, WeightsError
from slimnas.zoo.registry import get


def image(side: int | tuple[int, int] = 32, channels: int = 3) -> Tensor:
    size = (side, side) if isinstance(side, int) else side
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def small(**options: Any) -> nn.Module:
    return randomised(VisionTransformer(**{**SMALL, **options})).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": (32, 48), "in_chans": 1},
        {"mlp_ratio": 1.5, "num_heads": 2, "depth": 3, "num_classes": 5},
        {"drop_rate": 0.5, "drop_path_rate": 0.3, "attn_drop_rate": 0.2, "pos_drop_rate": 0.1},
        {"dynamic_img_size": True},
    ],
)
def test_vit(options: dict[str, Any]) -> None:
    model = small(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = slimnas.convert.from_timm(model, name="mine")
    x = image(options.get("img_size", 32), options.get("in_chans", 3))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), model(x), rtol=0, atol=1e-5)
        model = model.double()
        torch.testing.assert_close(
            slimnas.convert.from_timm(model)(x.double()), model(x.double()), rtol=0, atol=1e-12
        )
    assert network.architecture.name == "mine"
    assert not network.training
    assert slimnas.convert.from_timm(model.train()).training
    for name, tensor in model.float().state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_weights_are_a_copy() -> None:
    model = small()
    network = slimnas.convert.from_timm(model)
    with torch.no_grad():
        network.stem.cls_token.zero_()
    assert bool(model.cls_token.all())


def test_distilled() -> None:
    model = randomised(VisionTransformerDistilled(**SMALL))
    model.set_distilled_training(True)
    network = slimnas.convert.from_timm(model)
    assert network.architecture.head.distilled
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(image()), model.train(mode)(image()))


def test_efficientformer() -> None:
    model = EfficientFormer(depths=(1, 2, 1, 3), embed_dims=(8, 12, 16, 24), num_vit=2)
    model.eval()
    network = slimnas.convert.from_timm(randomised(model))
    assert network.architecture.depths == (1, 2, 1, 3)
    assert network.architecture.count("mb3d") == 2
    x = image(224)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("deit_tiny_distilled", "deit_tiny_distilled_patch16_224"),
        ("vit_small_patch32", "vit_small_patch32_224"),
        ("efficientformer_l1", "efficientformer_l1"),
    ],
)
def test_the_zoos_architecture_comes_out(ours: str, theirs: str) -> None:
    network = slimnas.convert.from_timm(timm.create_model(theirs))
    assert network.architecture == get(ours).architecture
    tag = timm.get_pretrained_cfg(theirs).tag
    assert network.architecture.name == f"{theirs}.{tag}"
    assert network.architecture.provenance == {"source": f"timm: {theirs}.{tag}"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, r"blocks\.0\.attn\.q_norm: is a LayerNorm; slimnas has none there"),
        ({"init_values": 0.1}, r"blocks\.0\.ls1: is a LayerScale; slimnas has none"),
        ({"pre_norm": True}, r"patch_embed\.proj: a Conv2d without bias"),
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv: a Linear without bias"),
        ({"global_pool": "avg"}, "global_pool: must be 'token' in a VisionTransformer, is 'avg'"),
        ({"global_pool": "map"}, "global_pool: must be 'token'"),
        ({"act_layer": "gelu_tanh"}, r"blocks\.0\.mlp\.act: must be a GELU, is a GELUTanh"),
        ({"act_layer": lambda: nn.GELU("tanh")}, r"blocks\.0\.mlp\.act: an approximate GELU"),
        ({"norm_layer": "rmsnorm"}, r"blocks\.0\.norm1: must be a LayerNorm, is a RmsNorm"),
        (
            {"norm_layer": lambda *a, **k: nn.LayerNorm(*a, eps=1e-3, **k)},
            r"blocks\.0\.norm1\.eps: must be 1e-06 in a LayerNorm, is 0\.001",
        ),
        ({"reg_tokens": 4}, "reg_token: register tokens"),
        ({"patch_drop_rate": 0.1}, "patch_drop: is a PatchDropout"),
        ({"num_classes": 0}, "head: must be a Linear, is a Identity"),
        ({"final_norm": False}, "norm: must be a LayerNorm, is a Identity"),
        ({"fc_norm": True}, "norm: must be a LayerNorm, is a Identity"),
        ({"pos_embed": "none"}, "pos_embed: missing"),
        ({"no_embed_class": True}, "no_embed_class: must be False"),
        ({"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm: is a LayerNorm"),
        ({"attn_layer": "diff"}, r"blocks\.0\.attn: must be a Attention, is a DiffAttention"),
    ],
)
def test_what_slimnas_has_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=message) as caught:
        slimnas.convert.from_timm(VisionTransformer(**{**SMALL, **options}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "module", "message"),
    [
        ("blocks.1.attn", nn.Identity(), r"blocks\.1\.attn: must be a Attention, is a Identity"),
        ("patch_embed.proj", nn.Conv2d(3, 24, 8, stride=4), r"patch_embed\.proj\.stride: must be"),
        ("blocks.0.drop_path1", nn.ReLU(), r"blocks\.0\.drop_path1: is a ReLU"),
    ],
)
def test_exchanged_modules(path: str, module: nn.Module, message: str) -> None:
    model = small()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    with pytest.raises(UnsupportedModuleError, match=message):
        slimnas.convert.from_timm(model)


def test_another_attention_scale() -> None:
    model = small()
    model.blocks[1].attn.scale = 1.0
    with pytest.raises(UnsupportedModuleError, match=r"blocks\.1\.attn\.scale: must be 0\.35"):
        slimnas.convert.from_timm(model)


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "resnet18"])
def test_other_networks(name: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=r"takes timm's VisionTransformer, .*; got a "):
        slimnas.convert.from_timm(timm.create_model(name))


def test_other_efficientformers() -> None:
    sizes = {"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 8, 8), "num_vit": 1}
    with pytest.raises(UnsupportedModuleError, match="global_pool: must be 'avg'"):
        slimnas.convert.from_timm(EfficientFormer(global_pool="", **sizes))
    model = EfficientFormer(**sizes)
    model.stages[1].blocks[0].token_mixer.pool = nn.AvgPool2d(5, 1, 2, count_include_pad=False)
    with pytest.raises(UnsupportedModuleError, match=r"token_mixer\.pool\.kernel_size: must be 3"):
        slimnas.convert.from_timm(model)


def test_weights_that_are_not_finite() -> None:
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[3] = float("nan")
    wanted = r"blocks\.0\.mlp\.fc1\.bias: holds values that are not finite"
    with pytest.raises(WeightsError, match=wanted):
        slimnas.convert.from_timm(model)
    assert issubclass(UnsupportedModuleError, SlimnasError)


def test_timm_is_not_imported() -> None:
    code = "import sys, slimnas; slimnas.convert.from_timm; print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
