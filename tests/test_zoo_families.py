"""What every family of the zoo does alike: weights by name, other sizes, clear refusals."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from zoo_cases import save_run

from slimnas.errors import SpecError, WeightsError, ZooError
from slimnas.nn.build import build
from slimnas.zoo.convert import convert_state_dict
from slimnas.zoo.create import create_model
from slimnas.zoo.registry import get
from slimnas.zoo.state import SHOWN, expected_shapes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "runs" / "first")


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("efficientvit_m0", "efficientvit_m1"),
        ("efficientformerv2_s0", "efficientformerv2_s1"),
        ("efficientformer_l1", "efficientformer_l3"),
        ("litv2_s", "litv2_m"),
        ("deit_tiny", "deit_small"),
        ("swin_tiny", "swin_small"),
    ],
)
@pytest.mark.parametrize("layout", ["slimnas", "timm"])
def test_weights_of_another_variant(wanted: str, given: str, layout: str) -> None:
    architecture = get(wanted).architecture
    weights = get(given).architecture.provenance.get("weights")
    if layout == "slimnas":
        shapes = expected_shapes(get(given).architecture)
    elif weights is None:
        pytest.skip("not in timm")
    else:
        import timm

        with torch.device("meta"):
            model = timm.create_model(weights["repository"].split("/")[1].split(".")[0])
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    with pytest.raises(WeightsError, match=f"^other: .*{wanted}") as caught:
        convert_state_dict(state, architecture, source="other")
    line = str(caught.value)
    assert "\n" not in line
    named = re.findall(rf"{wanted} needs shape \([\d, ]*\), got \([\d, ]*\)", line)
    listed = [part.split(", ") for part in re.findall(r"(?:missing|unknown) ([^;(]*)", line)]
    assert 0 < len(named) <= SHOWN or listed
    assert all(len(names) <= SHOWN for names in listed)
    assert len(line) < 4000


def test_dynamic_backbones(run: Path) -> None:
    backbone = create_model(run, pretrained=True, features_only=True, dynamic=True).eval()
    x = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    plain = create_model(run, pretrained=True, features_only=True, resolution=(48, 64)).eval()
    with torch.inference_mode():
        for ours, theirs in zip(backbone(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ZooError, match="dynamic=True needs features_only=True"):
        create_model(run, dynamic=True)  # type: ignore[call-overload]


def test_a_resolution_that_a_family_cannot_take() -> None:
    line = r"^deit_tiny for images of 8x8: the image must hold a patch of 16x16, got 8x8$"
    with pytest.raises(SpecError, match=line):
        create_model("deit_tiny", resolution=8)


def test_weights_that_no_hub_has() -> None:
    with pytest.raises(WeightsError, match=r"^litv2_s: .*give (a|the) (weights )?file"):
        create_model("litv2_s", pretrained=True)


def test_published_weights_of_another_family(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import timm

    asked = []

    def hub(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    state = timm.create_model("efficientvit_m4").state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr("slimnas.zoo.hub.hub_in_reach", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    network = create_model("efficientvit_m4", pretrained=True, classes=7, seed=3)
    assert asked == [("timm/efficientvit_m4.r224_in1k", "model.safetensors")]
    ours = network.state_dict()
    assert torch.equal(ours["stem.conv1.conv.weight"], state["patch_embed.conv1.conv.weight"])
    classifier = [name for name in ours if ours[name].shape[:1] == (7,)]
    fresh = build(network.architecture, seed=3).state_dict()
    assert len(classifier) == 2
    assert all(torch.equal(ours[name], fresh[name]) for name in classifier)
