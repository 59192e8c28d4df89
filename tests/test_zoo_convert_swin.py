"""Swin's published weights: three layouts give the same tensors, timm's objects their networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from swin_cases import images, like_timms, small_timm
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from slimnas.convert import from_timm
from slimnas.errors import UnsupportedModuleError, WeightsError
from slimnas.nn.build import build
from slimnas.zoo.convert import convert_state_dict, detect_layout
from slimnas.zoo.registry import get
from slimnas.zoo.weights import load_weights

NAMES = ["swin_tiny", "swin_small", "swin_base"]
LAYOUTS = ["official", "transformers 4", "transformers 5"]
TABLE = "attn.relative_position_bias_table"
HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    TABLE: f"attention.self.{TABLE.removeprefix('attn.')}",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_BLOCK_5 = {
    **HF_BLOCK,
    "attn.proj": "attention.o_proj",
    TABLE: f"attention.relative_position_bias.{TABLE.removeprefix('attn.')}",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HF_QKV = {
    "transformers 4": [f"attention.self.{part}" for part in ("query", "key", "value")],
    "transformers 5": [f"attention.{part}_proj" for part in "qkv"],
}
HF_WHOLE = {
    "patch_embed.proj": "swin.embeddings.patch_embeddings.projection",
    "patch_embed.norm": "swin.embeddings.norm",
    "norm": "swin.layernorm",
    "head.fc": "classifier",
}


def merging_before(name: str) -> str:
    """timm's name of a merging layer's tensor, counted to the stage before it."""
    return re.sub(
        r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
    )


def as_layout(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """timm's state dict under the names of another layout, in alphabetical order as on the hub."""
    made = official(state) if layout == "official" else hugging_face(state, layout)
    return dict(sorted(made.items()))


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {
        merging_before(name).replace("head.fc.", "head."): tensor for name, tensor in state.items()
    }
    made["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1)
    made["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    return made


def hugging_face(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    parts = HF_BLOCK if layout == "transformers 4" else HF_BLOCK_5
    made = {}
    for name, tensor in state.items():
        stem, _, kind = merging_before(name).rpartition(".")
        block = re.fullmatch(r"(layers\.\d+\.blocks\.\d+)\.(.+)", merging_before(name))
        if block is None:
            made[f"{HF_WHOLE.get(stem, f'swin.encoder.{stem}')}.{kind}"] = tensor
        elif block[2].startswith("attn.qkv"):
            for theirs, rows in zip(HF_QKV[layout], tensor.chunk(3), strict=True):
                made[f"swin.encoder.{block[1]}.{theirs}.{kind}"] = rows
        elif block[2] in parts:
            made[f"swin.encoder.{block[1]}.{parts[block[2]]}"] = tensor
        else:
            inside = block[2].rpartition(".")[0]
            made[f"swin.encoder.{block[1]}.{parts[inside]}.{kind}"] = tensor
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_tensors(layout: str) -> None:
    reference = small_timm((40, 24), 4, stages=3)
    architecture = like_timms((40, 24), 4, stages=3)
    state = reference.state_dict()
    made = as_layout(state, layout)
    expected = "official" if layout == "official" else "huggingface"
    assert detect_layout(state, architecture) == "timm"
    assert detect_layout(made, architecture) == expected
    ours, theirs = convert_state_dict(state, architecture), convert_state_dict(made, architecture)
    assert list(ours) == list(theirs) == list(build(architecture).state_dict())
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_names_of_the_published_model() -> None:
    with torch.device("meta"):
        names = timm.create_model("swin_tiny_patch4_window7_224").state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in names.items()}
    assert len(state) == 173
    for layout in LAYOUTS:
        convert_state_dict(as_layout(state, layout), get("swin_tiny").architecture)


def test_our_own_names_stay() -> None:
    architecture = like_timms((32, 32), 4)
    state = build(architecture).state_dict()
    assert detect_layout(state, architecture) == "slimnas"
    assert convert_state_dict(state, architecture) == state


def test_a_file_of_the_official_code(tmp_path: Path) -> None:
    reference = small_timm((32, 32), 4).eval()
    architecture = like_timms((32, 32), 4)
    path = tmp_path / "swin.pth"
    torch.save({"model": official(reference.state_dict())}, path)
    network = build(architecture).eval()
    network.load_state_dict(load_weights(path, architecture))
    x = images((32, 32)).float()
    with torch.no_grad():
        assert (network(x) - reference(x)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("swin.encoder.layers.0.blocks.0.attention.self.key.weight"), "missing"),
        (
            lambda s: s.update(
                {"swin.encoder.layers.0.blocks.0.attention.self.key.weight": torch.zeros(12, 3)}
            ),
            "missing stages.0.blocks.0.attn.qkv.weight; unknown",
        ),
        (lambda s: s.update({"swin.pooler.weight": torch.zeros(1)}), "unknown swin.pooler.weight"),
    ],
)
def test_damaged_weights(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    state = hugging_face(small_timm((32, 32), 4).state_dict(), "transformers 4")
    change(state)
    with pytest.raises(WeightsError, match=message):
        convert_state_dict(state, like_timms((32, 32), 4))


@pytest.mark.parametrize(
    ("size", "window"), [((32, 32), 4), ((40, 24), 4), ((56, 16), 5), ((20, 12), 7)]
)
def test_timms_objects(size: tuple[int, int], window: int) -> None:
    reference = small_timm(size, window).double().eval()
    network = from_timm(reference)
    assert not network.training
    x = images(size)
    with torch.no_grad():
        assert (network(x) - reference(x)).abs().max() < 1e-9


@pytest.mark.parametrize(
    "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_timms_objects_are_the_built_in_models(name: str) -> None:
    with torch.device("meta"):
        reference = timm.create_model(f"{name}_patch4_window7_224")
    reference.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.zero_()
    assert from_timm(reference).architecture == get(name).architecture


def without_bias(model: nn.Module) -> None:
    model.get_submodule("layers.0.blocks.0.attn.qkv").bias = None


def another_activation(model: nn.Module) -> None:
    model.get_submodule("layers.1.blocks.1.mlp").act = nn.ReLU()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_bias, r"layers\.0\.blocks\.0\.attn\.qkv: a Linear without bias"),
        (another_activation, r"layers\.1\.blocks\.1\.mlp\.act: must be a GELU, is a ReLU"),
    ],
)
def test_other_modules_are_refused(change: Callable[[nn.Module], None], message: str) -> None:
    model = small_timm((32, 32), 4)
    change(model)
    with pytest.raises(UnsupportedModuleError, match=message):
        from_timm(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": (4, 2)}, r"layers\.0\.blocks\.0\.window_size: must be square"),
        (
            {"window_size": 4, "always_partition": True},
            r"layers\.1\.blocks\.1\.shift_size: must be 2 along sides longer than 4",
        ),
        ({"global_pool": "max"}, "global_pool"),
        ({"num_classes": 0}, r"head\.fc: must be a Linear, is a Identity"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    small = {"img_size": 32, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
    model = SwinTransformer(**{**small, **options})
    with pytest.raises(UnsupportedModuleError, match=message):
        from_timm(model)
