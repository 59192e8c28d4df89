"""EfficientFormerV2's published weights: both layouts give the same tensors, timm's the outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from efficientformerv2_cases import (
    NAMES,
    images,
    published_timm,
    small_architecture,
    small_timm,
    with_weights_of,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from slimnas.convert import from_timm
from slimnas.errors import SlimnasError, UnsupportedModuleError, WeightsError
from slimnas.nn.build import build
from slimnas.zoo.convert import convert_state_dict, detect_layout
from slimnas.zoo.create import create_model
from slimnas.zoo.registry import get
from slimnas.zoo.weights import load_weights

TENSORS = {
    "efficientformerv2_s0": (573, 568),
    "efficientformerv2_s1": (727, 722),
    "efficientformerv2_s2": (1063, 1054),
    "efficientformerv2_l": (1399, 1386),
}
"""In the official layout, which stores every attention's index too, and in timm's."""


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict as snap-research/EfficientFormer names it, from its modules' order."""
    made = {}
    for name, tensor in state.items():
        words = name.split(".")
        if words[0] == "stem":
            first = {"conv1": 0, "conv2": 3}[words[1]]
            words = ["patch_embed", str(first + (words[2] == "bn")), *words[3:]]
        elif words[0] == "head_dist":
            words = ["dist_head", *words[1:]]
        elif words[0] == "stages" and words[2] == "downsample":
            number = str(2 * int(words[1]) - 1)
            if words[3] == "attn":
                words = ["network", number, "attn", *sequential(words[4:])]
            elif words[1] == "3":  # with attention
                words = ["network", number, *words[4:]]
            else:
                words = ["network", number, {"conv": "proj", "bn": "norm"}[words[4]], *words[5:]]
        elif words[0] == "stages":
            number, block, rest = str(2 * int(words[1])), words[3], words[4:]
            if rest[0] == "mlp":
                norms = {"fc1": "norm1", "mid": "mid_norm", "fc2": "norm2"}
                rest = ["mlp", norms[rest[1]] if rest[2] == "bn" else rest[1], *rest[3:]]
            elif rest[0] in ("ls1", "ls2"):
                rest, tensor = [f"layer_scale_{rest[0][-1]}"], tensor[:, None, None]
            else:
                rest = [rest[0], *sequential(rest[1:])]
            words = ["network", number, block, *rest]
        made[".".join(words)] = tensor
        if words[-1] == "attention_biases":
            made[".".join([*words[:-1], "attention_bias_idxs"])] = torch.zeros(1)
    return made


def sequential(words: list[str]) -> list[str]:
    """A part of an attention: its modules lie in sequences, without names."""
    if words[:2] == ["q", "local"]:
        return ["q", "local", "0", *words[2:]]
    if words[0] == "proj":  # the activation comes first
        return ["proj", str(1 + (words[1] == "bn")), *words[2:]]
    if len(words) > 1 and words[-2] in ("conv", "bn"):
        return [*words[:-2], str(int(words[-2] == "bn")), words[-1]]
    return words


@pytest.mark.parametrize(
    "name", [NAMES[1], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != NAMES[1])]
)
def test_same_outputs_as_timm(name: str) -> None:
    reference, architecture = published_timm(name), get(name).architecture
    network = with_weights_of(reference, architecture)
    plain = published_timm(name, distillation=False)
    plain.eval()
    single = with_weights_of(plain, architecture.with_head(distilled=False)).eval()
    x = images((224, 224))
    with torch.inference_mode():
        reference.eval()
        ours, theirs = network.eval()(x), reference(x)
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-5
        assert (single(x) - plain(x)).abs().max() < 1e-5

        reference.train()
        pair, expected = network.train()(x), reference(x)
        assert isinstance(pair, tuple)
        assert len(pair) == len(expected) == 2
        assert not torch.equal(pair[0], pair[1])
        for got, wanted in zip(pair, expected, strict=True):
            assert (got - wanted).abs().max() < 1e-5

    # One batch in training moved BatchNorm's statistics alike.
    moved = convert_state_dict(reference.state_dict(), architecture)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, moved[key], msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_one_classifier_as_timm(name: str) -> None:
    with torch.device("meta"):
        reference = timm.create_model(name, distillation=False)
    state = {key: torch.zeros(tensor.shape) for key, tensor in reference.state_dict().items()}
    architecture = get(name).architecture.with_head(distilled=False)
    assert list(convert_state_dict(state, architecture)) == list(build(architecture).state_dict())
    with pytest.raises(WeightsError, match=r"missing head\.head_dist\.weight"):
        convert_state_dict(state, get(name).architecture)


@pytest.mark.parametrize("name", NAMES)
def test_official_names_give_the_same_tensors(name: str) -> None:
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    state = {key: torch.rand(tensor.shape) for key, tensor in shapes.items()}
    theirs = official(state)
    assert (len(theirs), len(state)) == TENSORS[name]
    assert not any(key.startswith(("stem.", "stages.")) for key in theirs)
    architecture = get(name).architecture
    assert detect_layout(state, architecture) == "timm"
    assert detect_layout(theirs, architecture) == "official"
    from_official = convert_state_dict(dict(sorted(theirs.items())), architecture)
    from_theirs = convert_state_dict(state, architecture)
    assert list(from_official) == list(from_theirs) == list(build(architecture).state_dict())
    compared = sum(torch.equal(from_official[key], from_theirs[key]) for key in from_theirs)
    assert compared == TENSORS[name][1]


def test_our_own_names_stay() -> None:
    architecture = small_architecture()
    state = build(architecture).state_dict()
    assert detect_layout(state, architecture) == "slimnas"
    assert convert_state_dict(state, architecture) == state


@pytest.mark.parametrize("layout", ["timm", "official"])
def test_files(layout: str, tmp_path: Path) -> None:
    reference, architecture = small_timm(), small_architecture()
    reference.eval()
    if layout == "official":
        path = tmp_path / "v2.pth"
        torch.save({"model": official(reference.state_dict())}, path)
    else:
        path = tmp_path / "v2.safetensors"
        save_file(reference.state_dict(), path)
    network = build(architecture).eval()
    network.load_state_dict(load_weights(path, architecture))
    x = images((64, 96))
    with torch.no_grad():
        assert (network(x) - reference(x)).abs().max() < 1e-5


def test_other_classes_and_resolution(tmp_path: Path) -> None:
    reference = published_timm("efficientformerv2_s0")
    path = tmp_path / "v2.safetensors"
    save_file(reference.state_dict(), path)
    network = create_model(
        "efficientformerv2_s0", pretrained=path, classes=3, resolution=(64, 96), seed=2
    )
    assert network.eval()(images((64, 96))).shape == (2, 3)
    kept = network.get_submodule("stages.3.downsample.attn.v.conv")
    assert torch.equal(
        kept.weight, reference.get_submodule("stages.3.downsample.attn.v.conv").weight
    )
    with pytest.raises(SlimnasError, match="multiples of 32"):
        create_model("efficientformerv2_s0", resolution=300)


def test_another_size_of_model_does_not_fit() -> None:
    with torch.device("meta"):
        shapes = timm.create_model("efficientformerv2_s0").state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in shapes.items()}
    with pytest.raises(WeightsError) as caught:
        convert_state_dict(state, get("efficientformerv2_s1").architecture, source="x.pth")
    message = str(caught.value)
    assert message.startswith(
        "x.pth: does not fit efficientformerv2_s1: missing stages.0.blocks.2."
    )
    assert "stages.2.blocks.0.mlp.fc1.conv.weight: efficientformerv2_s1 needs shape" in message
    assert "\n" not in message


def test_unknown_layout() -> None:
    with pytest.raises(WeightsError, match=r"in no known layout of EfficientFormerV2 weights"):
        detect_layout({"features.0.weight": torch.zeros(1)}, small_architecture())


def test_weights_are_those_timm_publishes() -> None:
    compared = 0
    for name in NAMES:
        provenance = get(name).architecture.provenance
        config = timm.get_pretrained_cfg(name)
        assert provenance["weights"]["repository"] == config.hf_hub_id
        assert provenance["weights"]["file"] == "model.safetensors"
        assert tuple(provenance["preprocessing"]["mean"]) == config.mean
        compared += 1
    assert compared == 4
    assert timm.list_models("efficientformerv2_*") == sorted(NAMES)


# timm's model objects


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("size", [(64, 96), (120, 216)])
def test_timms_objects(size: tuple[int, int], distilled: bool) -> None:
    reference = small_timm(size, distilled=distilled).double()
    reference.eval()
    network = from_timm(reference, name="mine")
    assert not network.training
    assert network.architecture.name == "mine"
    rounded = tuple(-(-side // 16) * 16 for side in size)
    assert network.architecture == small_architecture(rounded, distilled=distilled)
    x = images(rounded).double()
    with torch.no_grad():
        assert (network(x) - reference(x)).abs().max() < 1e-11


def test_an_object_without_attention() -> None:
    reference = small_timm(num_vit=0, depths=(1, 1), embed_dims=(8, 12), mlp_ratios=(2, 3))
    reference.eval()
    network = from_timm(reference)
    assert network.architecture.input.resolution == 224
    assert network.architecture.count("v2_attention") == 0
    x = images((64, 96))
    with torch.no_grad():
        assert (network(x) - reference(x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_timms_objects_are_the_built_in_models(name: str) -> None:
    with torch.device("meta"):
        reference = timm.create_model(name)
    reference.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in reference.state_dict().values():
            tensor.zero_()
    network = from_timm(reference)
    assert network.architecture == get(name).architecture
    assert network.architecture.name == f"{name}.snap_dist_in1k"


def unpadded(model: nn.Module) -> None:
    model.get_submodule("stages.1.blocks.0.mlp.mid.conv").padding = (0, 0)  # type: ignore[assignment]


def another_activation(model: nn.Module) -> None:
    model.get_submodule("stages.2.blocks.1.token_mixer").act = nn.ReLU()


def another_scale(model: nn.Module) -> None:
    model.get_submodule("stages.3.downsample.attn").scale = 0.5  # type: ignore[assignment]


def aligned_corners(model: nn.Module) -> None:
    model.get_submodule("stages.2.blocks.1.token_mixer.upsample").align_corners = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unpadded, r"stages\.1\.blocks\.0\.mlp\.mid\.conv\.padding: must be \(1, 1\)"),
        (another_activation, r"token_mixer\.act: must be a GELU, is a ReLU"),
        (another_scale, r"stages\.3\.downsample\.attn\.scale: must be 0\.25"),
        (aligned_corners, r"upsample\.align_corners: must not be set"),
    ],
)
def test_other_modules_are_refused(change: Callable[[nn.Module], None], message: str) -> None:
    model = small_timm()
    change(model)
    with pytest.raises(UnsupportedModuleError, match=message):
        from_timm(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_layer": "relu"}, r"stem\.conv1\.bn\.act: must be a GELU, is a ReLU"),
        ({"norm_eps": 1e-3}, r"stem\.conv1\.bn\.eps: must be 1e-05"),
        ({"layer_scale_init_value": None}, r"ls2: must be a LayerScale2d, is a Identity"),
        ({"global_pool": ""}, "global_pool: must be 'avg'"),
        ({"num_classes": 0}, r"head: must be a Linear, is a Identity"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=message):
        from_timm(small_timm(**options))
