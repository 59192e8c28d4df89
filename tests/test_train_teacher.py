"""Teachers: seen as they expect it, refused where they cannot teach; trackers by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_world import ARCHITECTURE, CPU, config, images, train

from slimnas.errors import RuntimeUnavailableError, WeightsError, ZooError
from slimnas.nn.build import build
from slimnas.train import teacher as teachers
from slimnas.train import trackers
from slimnas.train.teacher import Teacher, open_teacher, teacher_digest
from slimnas.zoo.entry import save_model

SEEN = ((0.2,), (0.5,))


class Mean(nn.Module):
    """Says what it sees."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)


def saved(folder: Path, **changes: Any) -> Path:
    """A teacher on disk: `mini` with other classes or channels."""
    architecture = ARCHITECTURE.with_head(**changes.pop("head", {}))
    architecture = architecture.renamed("guide", changes.get("provenance", {}))
    weights = build(architecture, seed=5).state_dict()
    save_model(folder, architecture=architecture, weights=weights, metrics={})
    return folder


def test_a_teacher_sees_images_normalised_its_way() -> None:
    raw = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(Mean(), seen=SEEN, wanted=((0.3,), (0.25,)), size=(4, 4))
    given = teacher((raw - 0.2) / 0.5)
    assert torch.allclose(given, ((raw - 0.3) / 0.25).flatten(1), atol=1e-6)
    same = Teacher(Mean(), seen=SEEN, wanted=None, size=(4, 4))
    assert torch.allclose(same(raw), raw.flatten(1), atol=1e-6)
    assert Teacher(Mean(), seen=SEEN, wanted=None, size=(8, 6))(raw).shape == (2, 48)


def test_a_teacher_stays_as_it_is() -> None:
    teacher = Teacher(build(ARCHITECTURE), seen=SEEN, wanted=None, size=(16, 16))
    assert not teacher.train().training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_a_run_folder_teaches_with_its_own_normalisation(tmp_path: Path) -> None:
    made = {"provenance": {"preprocessing": {"mean": [0.4], "std": [0.5]}}}
    folder = saved(tmp_path / "guide", **made)
    teacher = open_teacher(str(folder), ARCHITECTURE, SEEN)
    pixels = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    network = build(ARCHITECTURE, seed=5).eval()
    with torch.no_grad():
        expected = network((pixels - 0.4) / 0.5)
    assert torch.allclose(teacher((pixels - 0.2) / 0.5), expected, atol=1e-5)
    assert teacher_digest(teacher) == teacher_digest(
        Teacher(network, seen=SEEN, wanted=None, size=(16, 16))
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_pupil_learns_and_the_teacher_counts(kind: str, tmp_path: Path) -> None:
    data = images()
    given = config(epochs=1, distillation=kind, teacher="guide", label_smoothing=0.0)
    digests = []
    for seed in (5, 6):
        network = build(ARCHITECTURE, seed=seed)
        teacher = Teacher(network, seen=SEEN, wanted=None, size=(16, 16))
        result = train(tmp_path / str(seed), data, given, teacher=teacher)
        digests.append(result.digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": {"classes": 7}}, "knows 7 classes, the data have 10"),
    ],
)
def test_teachers_that_cannot_teach(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "guide", **change)
    with pytest.raises(WeightsError, match=message):
        open_teacher(str(folder), ARCHITECTURE, SEEN)


def test_a_teacher_of_other_channels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_timm(monkeypatch, lambda name, pretrained: timm_model())
    with pytest.raises(WeightsError, match="takes images of 3 channels, mini of 1"):
        open_teacher("timm:resnet", ARCHITECTURE, SEEN)


def test_timm_s_models_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_timm(monkeypatch, lambda name, pretrained: timm_model(channels=1))
    for name in ("timm:resnet", "resnet.tag"):
        teacher = open_teacher(name, ARCHITECTURE, SEEN)
        assert teacher.size == (32, 32)
        raw = torch.rand(1, 1, 32, 32)
        seen = teacher((raw - 0.2) / 0.5)
        assert torch.allclose(seen, ((raw - 0.1) / 0.2).flatten(1), atol=1e-5)


def test_timm_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> nn.Module:
        raise OSError("no route to host\nand more")

    offer_timm(monkeypatch, create)
    with pytest.raises(WeightsError, match=r"from timm \(no route to host\); connect"):
        open_teacher("timm:resnet", ARCHITECTURE, SEEN)
    with pytest.raises(ZooError, match="no model, file or folder 'efficientformer_l11'"):
        open_teacher("efficientformer_l11", ARCHITECTURE, SEEN)


def test_timm_is_not_asked_for_what_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, ...]] = []

    def unreachable(*files: str) -> None:
        asked.append(files)
        raise ConnectionError("no answer")

    address = "https://example.org/resnet-abc.pth"
    published = SimpleNamespace(hf_hub_id="timm/resnet", hf_hub_filename=None, url=address)
    offer_timm(monkeypatch, lambda name, pretrained: timm_model(channels=1), published)
    monkeypatch.setattr(teachers, "require_at_hand", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"from timm \(no answer\); connect"):
        open_teacher("timm:resnet", ARCHITECTURE, SEEN)
    published.hf_hub_filename = "own.bin"
    with pytest.raises(WeightsError, match=r"no answer"):
        open_teacher("timm:resnet", ARCHITECTURE, SEEN)
    assert asked == [
        ("timm/resnet", "model.safetensors", "pytorch_model.bin"),
        ("timm/resnet", "own.bin"),
    ]
    cached = tmp_path / "hub" / "checkpoints" / "resnet-abc.pth"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert open_teacher("timm:resnet", ARCHITECTURE, SEEN).size == (32, 32)


@pytest.mark.parametrize("name", ["timm:resnet", "resnet"])
@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (ModuleNotFoundError("No module named 'timm'"), "pip install timm"),
        (RuntimeError("operator torchvision::nms does not exist"), "install the torchvision"),
    ],
)
def test_timm_that_cannot_be_imported_is_one_line(
    name: str, error: Exception, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(WeightsError, match=rf"teacher resnet: .*\({error}\); {cure}"):
        open_teacher(name, ARCHITECTURE, SEEN)


def timm_model(channels: int = 3) -> nn.Module:
    model: Any = Mean()
    model.num_classes = 10
    model.pretrained_cfg = {"input_size": (channels, 32, 32), "mean": (0.1,), "std": (0.2,)}
    if channels == 3:
        model.pretrained_cfg |= {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    found: nn.Module = model
    return found


def offer_timm(monkeypatch: pytest.MonkeyPatch, create: Any, published: Any = None) -> None:
    """timm with one model."""
    module = SimpleNamespace(
        create_model=create,
        is_model=lambda name: name.split(".")[0] == "resnet",
        get_pretrained_cfg=lambda name: published,
    )
    real = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: module if name == "timm" else real(name)
    )


@pytest.mark.parametrize(
    ("asked", "installed", "expected"),
    [
        ((), ("tensorboard", "wandb"), ("tensorboard",)),
        ((), ("wandb",), ()),
        (("auto", "wandb"), ("tensorboard", "wandb"), ("tensorboard", "wandb")),
        (("none",), ("tensorboard",), ()),
        (("wandb", "wandb"), ("wandb",), ("wandb",)),
    ],
)
def test_trackers_by_name(
    asked: tuple[str, ...],
    installed: tuple[str, ...],
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: list(installed))
    assert trackers.tracker_names(asked) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", r"--tracker wandb: is not installed; pip install wandb"),
        ("tensorbord", r"must be one of auto, none, .*did you mean 'tensorboard'"),
    ],
)
def test_trackers_that_are_not_there(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(RuntimeUnavailableError, match=message):
        trackers.tracker_names([name])


def test_nothing_is_tracked_without_trackers() -> None:
    with trackers.tracking(CPU, {"lr": 1.0}):
        trackers.track(CPU, {"step": 1, "loss": 2.0}, "step")
    assert CPU.trackers == []
