"""The network another one learns from, whatever images it was made for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.data.files import hub_errors
from slimnas.data.whole import Normalisation
from slimnas.errors import WeightsError, ZooError
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.zoo.create import create_model
from slimnas.zoo.hub import require_at_hand
from slimnas.zoo.preprocessing import normalisation_of
from slimnas.zoo.registry import get

TIMM = "timm:"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm looks for on the hub where a model names no file."""
WITHOUT = "or train with --distillation none"


class Teacher(nn.Module):
    """A trained network, in evaluation mode for good, that takes the pupil's images.

    Args:
        network: images to logits.
        seen: what the pupil's images are normalised with.
        wanted: what the network's are; None for the same.
        size: height and width the network takes.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        seen: Normalisation,
        wanted: Normalisation | None,
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.network, self.size = network, size
        (mean, std), (to_mean, to_std) = _columns(seen), _columns(wanted or seen)
        self.register_buffer("scale", std / to_std, persistent=False)
        self.register_buffer("shift", (mean - to_mean) / to_std, persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map the pupil's images (B, C, h, w) to logits (B, K)."""
        images = images * self.scale + self.shift
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True)
        logits: Tensor = self.network(images)
        return logits


@dataclass(frozen=True)
class _Found:
    network: nn.Module
    classes: int
    channels: int
    size: tuple[int, int]
    normalisation: Normalisation | None


def open_teacher(
    name: str,
    pupil: Architecture,
    normalisation: Normalisation,
    *,
    zoo: str | Path | None = None,
) -> Teacher:
    """Open a trained network to learn from.

    Args:
        name: zoo name, architecture file or run folder with weights; or one of timm's names, which
            `timm:` in front tells from the zoo's.
        pupil: what will learn, with the data's classes.
        normalisation: of the pupil's images.
        zoo: see `slimnas.zoo.registry.zoo_folder`.

    Raises:
        ZooError: nothing of that name.
        WeightsError: no weights or none in reach, other classes, or other channels.
    """
    found = _of_zoo(name, zoo) or _of_timm(name.removeprefix(TIMM))
    if found.classes != pupil.head.classes:
        raise WeightsError(
            f"teacher {name}: knows {found.classes} classes, the data have {pupil.head.classes}; "
            f"name one trained on these classes, {WITHOUT}"
        )
    if found.channels != pupil.input.channels:
        raise WeightsError(
            f"teacher {name}: takes images of {found.channels} channels, {pupil.name} of "
            f"{pupil.input.channels}; name another, {WITHOUT}"
        )
    return Teacher(found.network, seen=normalisation, wanted=found.normalisation, size=found.size)


def teacher_digest(teacher: Teacher) -> str:
    """SHA-256 over the teacher's weights."""
    return tensors_digest(teacher.network.state_dict())


def _of_zoo(name: str, zoo: str | Path | None) -> _Found | None:
    """The network of slimnas of that name; none if it can only be one of timm's."""
    if name.startswith(TIMM):
        return None
    try:
        architecture = get(name, zoo=zoo).architecture
    except ZooError:
        if Path(name).exists() or not _timm(name).is_model(name):
            raise
        return None
    shape = architecture.input.shape
    network = create_model(name, pretrained=True, zoo=zoo)
    return _Found(
        network,
        architecture.head.classes,
        shape.channels,
        (shape.height, shape.width),
        normalisation_of(architecture),
    )


def _of_timm(name: str) -> _Found:
    timm = _timm(name)
    failures: tuple[type[Exception], ...] = (RuntimeError, *hub_errors())
    try:
        _require_at_hand(timm.get_pretrained_cfg(name))
        network = timm.create_model(name, pretrained=True)
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"teacher {TIMM}{name}: cannot be had from timm ({reason}); connect to the network, "
            f"name a zoo entry or run folder, {WITHOUT}"
        ) from error
    config = network.pretrained_cfg
    channels, height, width = config["input_size"]
    normalisation = (tuple(config["mean"]), tuple(config["std"]))
    return _Found(network, int(network.num_classes), channels, (height, width), normalisation)


def _require_at_hand(published: Any) -> None:
    """Refuse at once what timm would try for a minute to get from the hub.

    Args:
        published: where timm has the weights from; it looks into torch's cache first.

    Raises:
        ConnectionError: they are in no cache, and the hub cannot be reached.
    """
    if published is None or not published.hf_hub_id:
        return
    cache = Path(torch.hub.get_dir(), "checkpoints")
    if published.url and (cache / Path(published.url).name).is_file():
        return
    named = published.hf_hub_filename
    require_at_hand(published.hf_hub_id, *([named] if named else HUB_FILES))


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision's, beside another torch
        reason = str(error).splitlines()[0]
        missing = isinstance(error, ImportError)
        cure = "pip install timm" if missing else "install the torchvision made for this torch"
        raise WeightsError(
            f"teacher {name}: is no zoo entry, file or folder here, and timm, which may have it, "
            f"cannot be imported ({reason}); {cure}, name another, {WITHOUT}"
        ) from error


def _columns(normalisation: Normalisation) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalisation)
    return mean, std
