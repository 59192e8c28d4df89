"""Published weights: timm's and the official code's networks give the same outputs as ours."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn
from vit_cases import TIMM_NAMES, hugging_face_layout, timm_model, with_depth

from slimnas.arch.architecture import Architecture
from slimnas.errors import WeightsError
from slimnas.nn.build import build
from slimnas.zoo.convert import convert_state_dict, detect_layout
from slimnas.zoo.create import create_model, find_weights
from slimnas.zoo.hub import download
from slimnas.zoo.registry import builtin_names, get

NAMES = ["efficientformer_l1", "efficientformer_l3", "efficientformer_l7"]
FEATURE_CHANNELS = {
    "efficientformer_l1": (48, 96, 224, 448),
    "efficientformer_l3": (64, 128, 320, 512),
    "efficientformer_l7": (96, 192, 384, 768),
}


def randomised_timm(name: str, seed: int = 0) -> nn.Module:
    """timm's network with every parameter that starts at a constant moved away from it."""
    model = timm.create_model(name)
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 1.5)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
        for key, parameter in model.named_parameters():
            if key.endswith("gamma"):
                uniform(parameter, 0.3, 1.0)
            elif key.endswith("attention_biases"):
                uniform(parameter, -2.0, 2.0)
            elif key.endswith("bias") and "norm" not in key:
                uniform(parameter, -0.1, 0.1)
    model.set_distilled_training(True)
    return model


def official_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict under the names of snap-research/EfficientFormer."""
    official = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "stem":
            order = {"conv1": 0, "norm1": 1, "conv2": 3, "norm2": 4}
            key = f"patch_embed.{order[parts[1]]}.{parts[2]}"
        elif parts[0] == "stages" and parts[2] == "downsample":
            name = "proj" if parts[3] == "conv" else "norm"
            key = f"network.{2 * int(parts[1]) - 1}.{name}.{parts[4]}"
        elif parts[0] == "stages":
            rest = ".".join(parts[3:])
            rest = re.sub(r"ls([12])\.gamma", r"layer_scale_\1", rest)
            key = f"network.{2 * int(parts[1])}.{rest}"
        elif parts[0] == "head_dist":
            key = f"dist_head.{parts[1]}"
        official[key] = tensor
    return official


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def test_every_built_in_efficientformer_is_compared() -> None:
    assert [name for name in builtin_names() if name.startswith("efficientformer_")] == NAMES
    assert timm.list_models("efficientformer_*") == NAMES


@pytest.mark.parametrize(
    "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_same_outputs_as_timm(name: str) -> None:
    reference = randomised_timm(name)
    architecture = get(name).architecture
    network = build(architecture, seed=5)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    before = network.stem.norm1.running_mean.clone()
    x = images()
    with torch.inference_mode():
        ours, theirs = network.eval()(x), reference.eval()(x)
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-5

        # timm's train() returns None, so it cannot be chained
        reference.train()
        pair, expected = network.train()(x), reference(x)
        assert isinstance(pair, tuple)
        assert len(pair) == len(expected) == 2
        assert not torch.equal(pair[0], pair[1])
        for got, wanted in zip(pair, expected, strict=True):
            assert (got - wanted).abs().max() < 1e-5

    # One batch in training moved BatchNorm's statistics alike.
    moved = convert_state_dict(reference.state_dict(), architecture)
    assert not torch.equal(moved["stem.norm1.running_mean"], before)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, moved[key], msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_official_names_give_the_same_tensors(name: str) -> None:
    with torch.device("meta"):
        names = timm.create_model(name).state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in names.items()}
    official = official_layout(state)
    assert not any(key.startswith(("stem.", "stages.")) for key in official)
    assert len(official) == len(state) == {"l1": 281, "l3": 457, "l7": 649}[name[-2:]]
    architecture = get(name).architecture
    from_official = convert_state_dict(official, architecture)
    from_timm = convert_state_dict(state, architecture)
    assert list(from_official) == list(from_timm)
    assert all(from_official[key] is from_timm[key] for key in from_timm)


def test_our_own_names_stay() -> None:
    architecture = get("efficientformer_l1").architecture
    state = build(architecture).state_dict()
    assert convert_state_dict(state, architecture) == state


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_as_timms(name: str) -> None:
    architecture = get(name).architecture
    with torch.device("meta"):
        maps = build(architecture).forward_features(torch.empty(1, 3, 224, 224))
        theirs = timm.create_model(name, features_only=True)(torch.empty(1, 3, 224, 224))
    expected = [
        (1, channels, side, side)
        for channels, side in zip(FEATURE_CHANNELS[name], (56, 28, 14, 7), strict=True)
    ]
    assert [tuple(x.shape) for x in maps] == [tuple(x.shape) for x in theirs] == expected


def test_feature_values_as_timms() -> None:
    reference = randomised_timm("efficientformer_l1").eval()
    architecture = get("efficientformer_l1").architecture
    network = build(architecture).eval()
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    x = images(1)
    with torch.inference_mode():
        theirs = reference.forward_intermediates(x, intermediates_only=True)
        ours = network.forward_features(x)
    assert len(ours) == len(theirs) == 4
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("model", "key", "layout"),
    [
        ("efficientformer_l1", "patch_embed.0.weight", "official"),
        ("efficientformer_l1", "stem.conv1.weight", "timm"),
        ("deit_tiny", "stem.proj.bias", "slimnas"),
        ("deit_tiny", "blocks.3.norm1.bias", "timm"),
        ("deit_tiny", "cls_token", "timm"),
        ("deit_tiny", "vit.embeddings.cls_token", "huggingface"),
        ("deit_tiny", "deit.encoder.layer.0.output.dense.bias", "huggingface"),
        ("deit_tiny", "encoder.layer.0.output.dense.bias", "huggingface"),
    ],
)
def test_layout_is_detected(model: str, key: str, layout: str) -> None:
    assert detect_layout({key: torch.zeros(1)}, get(model).architecture) == layout


@pytest.mark.parametrize("model", ["efficientformer_l1", "deit_tiny", "swin_tiny"])
@pytest.mark.parametrize("names", [[], [f"features.{i}.weight" for i in range(12)]])
def test_unknown_layout(model: str, names: list[str]) -> None:
    state = {name: torch.zeros(1) for name in names}
    with pytest.raises(WeightsError, match=rf"x\.pth: in no known layout .*{model}") as caught:
        detect_layout(state, get(model).architecture, source="x.pth")
    assert str(caught.value).endswith(f"first tensors: {', '.join(names[:10]) or 'none'}")


def test_another_size_of_model_does_not_fit() -> None:
    state = timm.create_model("efficientformer_l1").state_dict()
    with pytest.raises(WeightsError, match=r"x\.pth: does not fit efficientformer_l3: missing"):
        convert_state_dict(state, get("efficientformer_l3").architecture, source="x.pth")


def test_shapes_are_checked() -> None:
    state = timm.create_model("efficientformer_l1", num_classes=10).state_dict()
    wanted = r"head\.head\.weight: efficientformer_l1 needs shape \(1000, 448\), got \(10, 448\)"
    with pytest.raises(WeightsError, match=wanted):
        convert_state_dict(state, get("efficientformer_l1").architecture)


# ViT and DeiT


def small_vit(name: str) -> tuple[dict[str, Tensor], Architecture]:
    """timm's randomised weights of two blocks, and the architecture they are for."""
    return timm_model(name, 2).state_dict(), with_depth(name, 2)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("deit_tiny", "vit"), ("deit_tiny_distilled", "deit"), ("vit_small_patch32", "vit")],
)
def test_hugging_face_names_give_the_same_tensors(name: str, kind: str) -> None:
    state, architecture = small_vit(name)
    theirs = hugging_face_layout(state, kind)
    assert len(theirs) == len(state) + 2 * 2 * 2  # three for one, weight and bias of two blocks
    assert not set(theirs) & set(state)
    expected = convert_state_dict(state, architecture)
    assert_same(convert_state_dict(theirs, architecture), expected)
    shuffled = dict(reversed(list(theirs.items())))
    shuffled[f"{kind}.pooler.dense.weight"] = torch.zeros(1)
    shuffled[f"{kind}.embeddings.mask_token"] = torch.zeros(1)
    assert_same(convert_state_dict(shuffled, architecture), expected)


def test_one_classifier_behind_two_tokens() -> None:
    """DeiTForImageClassification: a distillation token, but no classifier that reads it."""
    state, architecture = small_vit("deit_tiny_distilled")
    theirs = hugging_face_layout(state, "deit")
    del theirs["distillation_classifier.weight"], theirs["distillation_classifier.bias"]
    theirs = {name.replace("cls_classifier", "classifier"): t for name, t in theirs.items()}
    plain = architecture.with_head(distilled=False)
    network = build(plain)
    network.load_state_dict(convert_state_dict(theirs, plain))
    assert torch.equal(network.stem.dist_token, state["dist_token"])
    assert torch.equal(network.head.head.weight, state["head.weight"])


def test_blocks_are_counted_through_stages() -> None:
    state, architecture = small_vit("deit_tiny")
    data = architecture.to_dict()
    block = {**data["stages"][0]["blocks"][0], "repeat": 1}
    data["stages"] = [{"width": 192, "blocks": [block]}] * 2
    split = Architecture.from_dict(data)
    ours = convert_state_dict(state, split)
    assert torch.equal(ours["stages.1.blocks.0.mlp.fc1.bias"], state["blocks.1.mlp.fc1.bias"])
    x = images(1)
    with torch.inference_mode():
        networks = [build(split).eval(), build(architecture).eval()]
        networks[0].load_state_dict(ours)
        networks[1].load_state_dict(convert_state_dict(state, architecture))
        assert torch.equal(networks[0](x), networks[1](x))


def test_missing_and_unknown_tensors_are_named() -> None:
    state, architecture = small_vit("deit_tiny")
    deeper = timm_model("deit_tiny", 3).state_dict()
    names = "blocks.2.norm1.weight, blocks.2.norm1.bias, blocks.2.attn.qkv.weight"
    with pytest.raises(WeightsError, match=f"does not fit deit_tiny: unknown {names}") as caught:
        convert_state_dict(deeper, architecture)
    assert str(caught.value).endswith("blocks.2.mlp.fc1.bias and 2 more")
    assert str(caught.value).count(",") == 9
    with pytest.raises(
        WeightsError, match=r"missing stages\.0\.blocks\.2\.norm1\.weight, .* 2 more"
    ):
        convert_state_dict(state, with_depth("deit_tiny", 3))
    theirs = hugging_face_layout(state, "vit")
    del theirs["vit.encoder.layer.0.attention.attention.key.bias"]
    wanted = r"missing stages\.0\.blocks\.0\.attn\.qkv\.bias; unknown .*query\.bias, .*value\.bias"
    with pytest.raises(WeightsError, match=wanted):
        convert_state_dict(theirs, architecture)
    theirs["vit.encoder.layer.0.attention.attention.key.bias"] = torch.zeros(())
    with pytest.raises(WeightsError, match=r"missing stages\.0\.blocks\.0\.attn\.qkv\.bias"):
        convert_state_dict(theirs, architecture)


def test_shapes_of_both_sides_are_given() -> None:
    state, _ = small_vit("deit_tiny")
    with pytest.raises(WeightsError) as caught:
        convert_state_dict(state, with_depth("deit_small", 2), source="w.safetensors")
    message = str(caught.value)
    assert "stem.cls_token: deit_small needs shape (1, 1, 384), got (1, 1, 192)" in message
    assert message.startswith("w.safetensors: does not fit deit_small: ")
    assert message.count("needs shape") == 10
    assert re.search(r" and \d+ more$", message)
    assert "\n" not in message


def test_plain_weights_lack_the_distillation_token() -> None:
    state, _ = small_vit("deit_tiny")
    wanted = (
        r"missing stem\.dist_token, head\.head_dist\.weight, head\.head_dist\.bias; stem\.pos_embed"
    )
    with pytest.raises(WeightsError, match=wanted):
        convert_state_dict(state, with_depth("deit_tiny_distilled", 2))


@pytest.mark.parametrize("layout", ["timm", "official", "huggingface"])
def test_files_of_every_layout(layout: str, tmp_path: Path) -> None:
    reference = timm_model("deit_tiny_distilled")
    state, path = reference.state_dict(), tmp_path / "w.safetensors"
    if layout == "official":
        path = tmp_path / "w.pth"
        torch.save({"model": state}, path)
    elif layout == "huggingface":
        theirs = hugging_face_layout(state, "deit")
        save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, path)
    else:
        save_file(state, path)
    network = create_model("deit_tiny_distilled", pretrained=path).eval()
    with torch.inference_mode():
        assert (network(images(1)) - reference(images(1))).abs().max() < 1e-4


def test_other_classes_resolution_and_features(tmp_path: Path) -> None:
    state = timm_model("deit_tiny").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    network = create_model(
        "deit_tiny", pretrained=tmp_path / "w.safetensors", classes=3, resolution=(64, 96), seed=2
    )
    fresh = build(network.architecture, seed=2)
    assert network.stem.pos_embed.shape == (1, 1 + 4 * 6, 192)
    assert torch.equal(network.head.head.weight, fresh.head.head.weight)
    assert torch.equal(network.head.norm.bias, state["norm.bias"])
    assert network.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 3)
    features = create_model("deit_tiny", pretrained=tmp_path / "w.safetensors", features_only=True)
    assert [tuple(x.shape) for x in features(images(1))] == [(1, 192, 14, 14)]


# Downloads


def test_downloads_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    plain, cached = tmp_path / "w.safetensors", tmp_path / digest
    plain.write_bytes(content)
    cached.write_bytes(content)
    snapshot = tmp_path / "model.safetensors"
    snapshot.symlink_to(cached)  # as the hub's cache has it
    monkeypatch.setattr("slimnas.zoo.hub.hub_in_reach", lambda: True)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, file: str(tmp_path / file)
    )
    assert download("a/b", "w.safetensors") == plain
    assert download("a/b", "w.safetensors", sha256=digest) == plain
    assert download("a/b", "model.safetensors") == snapshot
    with pytest.raises(
        WeightsError, match=rf"a/b: w\.safetensors: has SHA-256 {digest}, expected 0"
    ):
        download("a/b", "w.safetensors", sha256="0" * 64)
    cached.write_bytes(content[:-1])
    with pytest.raises(WeightsError, match=rf"expected {digest}; delete .*{digest} and download"):
        download("a/b", "model.safetensors")


def test_published_weights_of_the_zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def offline(repository: str, file: str) -> str:
        asked.append(f"{repository}/{file}")
        raise LocalEntryNotFoundError("cannot find it")

    monkeypatch.setattr("slimnas.zoo.hub.hub_in_reach", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for name, theirs in TIMM_NAMES.items():
        wanted = "cannot download" if name != "vit_large_patch32" else "no weights beside"
        with pytest.raises(WeightsError, match=wanted):
            find_weights(get(name))
        config = timm.get_pretrained_cfg(theirs)
        if config.num_classes:
            assert asked.pop() == f"{config.hf_hub_id}/model.safetensors"
    assert not asked
    assert len(TIMM_NAMES) == 13
