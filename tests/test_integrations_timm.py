"""The zoo in timm's registry: what timm's users may ask of a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_model_data_config
from zoo_cases import TINY, save_run, trained

import slimnas
from slimnas.errors import RuntimeUnavailableError, SpecError, WeightsError, ZooError
from slimnas.integrations.timm import register
from slimnas.nn.build import build
from slimnas.zoo import registry
from slimnas.zoo.create import create_model
from slimnas.zoo.registry import builtin_names, get

ALIKE = ("efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0", "deit_tiny", "swin_tiny")
"""One of each family, to compare with timm's own."""


@pytest.fixture
def zoo(tmp_path: Path) -> Iterator[Path]:
    """A user's zoo with one trained entry, registered; afterwards the built-in models alone."""
    folder = tmp_path / "zoo"
    registry.add(save_run(tmp_path / "run"), name="tiny-1.6ms", zoo=folder)
    register(zoo=folder)
    yield folder
    register(zoo=tmp_path / "nothing")


def images(size: int | tuple[int, int] = 32, channels: int = 3) -> torch.Tensor:
    sides = (size, size) if isinstance(size, int) else size
    return torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0))


def test_every_model_is_listed(tmp_path: Path) -> None:
    names = register(zoo=tmp_path)
    assert names == tuple(f"slimnas_{name}".replace(".", "_") for name in builtin_names())
    assert len(names) >= 32
    assert set(timm.list_models("slimnas_*")) >= set(names)
    assert "slimnas_efficientvit_m4" in timm.list_models("slimnas_efficientvit*", pretrained=True)
    assert "slimnas_litv2_s" not in timm.list_models("slimnas_*", pretrained=True)
    assert timm.is_model("slimnas_swin_tiny")
    assert register(zoo=tmp_path) == names  # again, without a warning
    assert slimnas.integrations.timm.register is register


@pytest.mark.parametrize("name", ALIKE)
def test_settings_are_those_of_timms_own(name: str, tmp_path: Path) -> None:
    register(zoo=tmp_path)
    own = timm.get_pretrained_cfg(
        get(name).architecture.provenance["weights"]["repository"].removeprefix("timm/")
    )
    ours = timm.get_pretrained_cfg(f"slimnas_{name}")
    for key in ("mean", "std", "crop_pct", "interpolation", "input_size", "num_classes"):
        assert getattr(ours, key) == getattr(own, key), key
    assert ours.hf_hub_id == get(name).architecture.provenance["weights"]["repository"]


@pytest.mark.parametrize("name", ALIKE)
def test_it_computes_what_timms_own_does(name: str, tmp_path: Path) -> None:
    """Weights go through a file, as they do from the hub."""
    register(zoo=tmp_path)
    original = (
        get(name).architecture.provenance["weights"]["repository"].partition("/")[2].partition(".")
    )[0]
    torch.manual_seed(0)
    theirs = timm.create_model(original).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = timm.create_model(
        f"slimnas_{name}",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")},
    ).eval()
    x = images(224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours.num_features == theirs.num_features
    assert ours.num_classes == theirs.num_classes
    theirs_info = getattr(theirs, "feature_info", None)
    if theirs_info is not None and name != "deit_tiny":  # timm lists every block of a ViT
        keys = ("num_chs", "reduction")
        assert [[one[k] for k in keys] for one in ours.feature_info] == [
            [one[k] for k in keys] for one in theirs_info
        ]
    config = resolve_model_data_config(ours)
    assert config == resolve_model_data_config(theirs)


@pytest.mark.parametrize("name", ["efficientvit_m0", "deit_tiny_distilled", "efficientformer_l1"])
def test_parts_of_a_model(name: str, tmp_path: Path) -> None:
    register(zoo=tmp_path)
    model = timm.create_model(f"slimnas_{name}", num_classes=7, img_size=64).eval()
    distilled = get(name).architecture.head.distilled
    x = images(64)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        assert logits.shape == (2, 7)
        assert torch.equal(model.forward_head(features), logits)
        before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.num_features)
    classifier = model.get_classifier()
    assert isinstance(classifier, tuple) == distilled
    if not distilled:
        torch.testing.assert_close(classifier(before), logits)
    model.reset_classifier(0)
    assert model.num_classes == 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    assert {p.requires_grad for p in model.parameters()} == {True}


def test_training_a_distilled_model(tmp_path: Path) -> None:
    register(zoo=tmp_path)
    model = timm.create_model("slimnas_efficientformer_l1", img_size=64, num_classes=3).train()
    x = images(64)
    assert model(x).shape == (2, 3)
    model.set_distilled_training()
    assert [tuple(out.shape) for out in model(x)] == [(2, 3), (2, 3)]
    assert model.eval()(x).shape == (2, 3)


def test_names_are_those_of_slimnas(tmp_path: Path) -> None:
    register(zoo=tmp_path)
    model = timm.create_model("slimnas_efficientformer_l1", img_size=64, num_classes=5)
    network = create_model("efficientformer_l1", resolution=64, classes=5)
    assert list(model.state_dict()) == list(network.state_dict())
    biases = {name for name in network.state_dict() if name.endswith("attention_biases")}
    assert model.no_weight_decay() == biases
    assert set(model.group_matcher(coarse=True)) == {"stem", "blocks"}
    assert model.pretrained_cfg["classifier"] == ("head.head", "head.head_dist")
    assert model.pretrained_cfg["first_conv"] == "stem.conv1"
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3


def test_weight_decay_leaves_out_what_timm_leaves_out(tmp_path: Path) -> None:
    register(zoo=tmp_path)
    own = timm.create_model("slimnas_deit_tiny_distilled", num_classes=5)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    named = {name.removeprefix("stem.") for name in own.no_weight_decay()}
    assert named == {"pos_embed", "cls_token", "dist_token"}
    assert named == theirs.no_weight_decay() - {"reg_token"}  # which neither has


def test_a_model_of_the_users_zoo(zoo: Path) -> None:
    assert "slimnas_tiny-1_6ms" in timm.list_models("slimnas_tiny*", pretrained=True)
    model = timm.create_model("slimnas_tiny-1_6ms", pretrained=True).eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), trained()(x))
        other = timm.create_model("slimnas_tiny-1_6ms", pretrained=True, num_classes=3).eval()
        assert other(x).shape == (2, 3)
    weights = save_run(zoo.parent / "again") / "weights.safetensors"
    loaded = timm.create_model("slimnas_tiny-1_6ms", checkpoint_path=str(weights)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), trained()(x))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels: int, zoo: Path) -> None:
    model = timm.create_model("slimnas_tiny-1_6ms", pretrained=True, in_chans=channels).eval()
    adapted = timm.models.adapt_input_conv(channels, trained().state_dict()["stem.conv1.weight"])
    assert torch.equal(model.stem.conv1.weight, adapted)
    assert model.in_chans == channels
    assert resolve_model_data_config(model)["input_size"] == (channels, 32, 32)
    assert model(images(channels=channels)).shape == (2, 10)
    fresh = timm.create_model("slimnas_tiny-1_6ms", in_chans=channels, seed=3)
    expected = build(TINY, seed=3).state_dict()["head.head.weight"]
    assert torch.equal(fresh.state_dict()["head.head.weight"], expected)


@pytest.mark.parametrize(
    ("indices", "stages"), [(None, (0, 1)), ((1,), (1,)), (1, (1,)), ((-2,), (0,))]
)
def test_features_only(indices: Any, stages: tuple[int, ...], zoo: Path) -> None:
    model = timm.create_model(
        "slimnas_tiny-1_6ms", pretrained=True, features_only=True, out_indices=indices
    ).eval()
    channels, strides = [TINY.widths[i] for i in stages], [(4, 8)[i] for i in stages]
    assert model.feature_info.channels() == channels
    assert model.feature_info.reduction() == strides
    assert model.feature_info.module_name() == [f"stages.{i}" for i in stages]
    for size in ((32, 32), (64, 48)):
        x = images(size)
        with torch.no_grad():
            maps = model(x)
            reference = create_model(
                zoo / "tiny-1.6ms", pretrained=True, features_only=True, resolution=size
            ).eval()(x)
        assert [tuple(m.shape) for m in maps] == [
            (2, c, size[0] // s, size[1] // s) for c, s in zip(channels, strides, strict=True)
        ]
        for ours, index in zip(maps, stages, strict=True):
            torch.testing.assert_close(ours, reference[index])
    assert "num_classes" not in model.pretrained_cfg


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 0.1}, "drop_rate must be 0"),
        ({"global_pool": "max"}, "global_pool must be left out"),
        ({"num_clases": 3}, r"no option 'num_clases' \(did you mean 'num_classes'\?\); it takes: "),
        ({"features_only": True, "out_indices": (2,)}, "out_indices must be stages from 0 to 1"),
        ({"cache_dir": "x"}, "cache_dir is not looked at; set HF_HOME"),
    ],
)
def test_what_they_do_not_take(options: dict[str, Any], message: str, zoo: Path) -> None:
    with pytest.raises(ZooError, match=message):
        timm.create_model("slimnas_tiny-1_6ms", **options)


def test_what_timms_scripts_always_give(zoo: Path) -> None:
    model = timm.create_model(
        "slimnas_tiny-1_6ms", drop_rate=0.0, drop_path_rate=0.0, global_pool="avg", num_classes=4
    )
    assert model(images()).shape == (2, 4)


def test_no_weights_and_other_weights(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"litv2_s: "):
        timm.create_model("slimnas_litv2_s", pretrained=True)
    wrong = trained().state_dict()
    safetensors.torch.save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors: .*efficientvit_m0"):
        timm.create_model(
            "slimnas_efficientvit_m0",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors")},
        )
    with pytest.raises(SpecError, match="deit_tiny for images of 8x8: the image must hold a patch"):
        timm.create_model("slimnas_deit_tiny", img_size=8)


def test_two_models_of_one_name(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    for name in ("a.b", "a_b"):
        registry.add(run, name=name, zoo=tmp_path / "zoo")
    with pytest.raises(ZooError, match=r"a_b and a\.b would both be slimnas_a_b in timm"):
        register(zoo=tmp_path / "zoo")


def test_a_damaged_entry_is_left_out(zoo: Path) -> None:
    (zoo / "tiny-1.6ms" / "metrics.json").write_text("{")
    with pytest.warns(UserWarning, match="not registered with timm: .*not valid JSON"):
        names = register(zoo=zoo)
    assert len(names) == len(builtin_names())


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "slimnas.integrations.timm_models", raising=False)
    monkeypatch.delattr(slimnas.integrations, "timm_models", raising=False)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'timm>=1\.0\.15'"):
        register()


def test_slimnas_does_not_import_timm() -> None:
    code = "import sys, slimnas.integrations.timm; print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
