"""What the command line of `slimnas evaluate` names, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from slimnas.cli.output import note, shown_path

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Mapping

    import torch

    from slimnas.arch.architecture import Architecture
    from slimnas.data.whole import Normalisation
    from slimnas.prune.config import PruneConfig
    from slimnas.search.config import SearchConfig
    from slimnas.train.config import TrainConfig
    from slimnas.train.evaluate import Predict
    from slimnas.train.evaluation_images import EvaluationImages, ImageRequest, SplitName
    from slimnas.train.evaluation_onnx import OnnxModel
    from slimnas.train.evaluation_transform import EvalTransform
    from slimnas.zoo.entry import Entry

    Run: TypeAlias = SearchConfig | TrainConfig | PruneConfig

AUTO, NONE = "auto", "none"
"""Values of `--weights` besides files; `auto` of `--normalisation` too."""
PYTORCH, ONNX = "pytorch", "onnx"
CONFIGS = ("config.yaml", "config.json")
"""Settings of a run, in its folder."""


@dataclass(frozen=True)
class Asked:
    """The command line of `slimnas evaluate`: every option as given."""

    model: str
    weights: str
    data: str | None
    onnx: Path | None
    split: SplitName
    resolution: int | None
    crop_pct: float | None
    resize: int | None
    interpolation: str
    normalisation: str
    batch_size: int
    max_images: int | None
    skip_bad_images: bool
    device: str
    seed: int | None


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything an evaluation needs.

    Attributes:
        asked: the command line.
        name: of the model.
        architecture: of the network, at the resolution of the images.
        weights: where they are from, in words.
        weights_digest: SHA-256 of the tensors; None where the ONNX file alone is evaluated.
        predictors: what is asked for logits, by name.
        onnx: the exported file, if there is one.
        images: to judge on.
        request: which they are.
        normalisation: where mean and deviation are from, in words.
        device: where the network runs.
        digest: of the images, filled while they are looked at.
    """

    asked: Asked
    name: str
    architecture: Architecture
    weights: str
    weights_digest: str | None
    predictors: Mapping[str, Predict]
    onnx: OnnxModel | None
    images: EvaluationImages
    request: ImageRequest
    normalisation: str
    device: torch.device
    digest: hashlib._Hash

    @property
    def classes(self) -> int:
        """Of the network."""
        return self.architecture.head.classes

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        shape = self.architecture.input.shape
        return shape.height, shape.width

    def provenance(self) -> dict[str, Any]:
        """What the numbers depend on, where and when they were found; once all was looked at."""
        from datetime import datetime, timezone

        from slimnas._versions import versions

        mean, std = self.images.normalisation
        request, transform = self.request, self.request.transform
        return {
            "model": self.name,
            "architecture": self.architecture.digest,
            "weights": self.weights,
            "weights_digest": self.weights_digest,
            "onnx": None if self.onnx is None else shown_path(self.onnx.path),
            "onnx_digest": None if self.onnx is None else self.onnx.digest,
            "data": request.data,
            "data_digest": self.digest.hexdigest(),
            "data_description": self.images.description,
            "split": request.split,
            "seed": request.options.seed,
            "max_images": request.max_images,
            "resolution": list(self.resolution),
            "transform": {
                "resize": list(self.resolution if transform is None else transform.scale),
                "crop": "largest centred" if transform is None else "centre",
                "interpolation": "bilinear" if transform is None else transform.interpolation,
            },
            "normalisation": {
                "mean": list(mean),
                "std": list(std),
                "source": self.normalisation,
            },
            "device": _place(self.device),
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def open_inputs(asked: Asked) -> Inputs:
    """Open network, exported file and images; what can be refused early is.

    Raises:
        SlimnasError: one line.
    """
    import hashlib

    from slimnas.nn.tensorfiles import tensors_digest
    from slimnas.train.devices import accelerator_for
    from slimnas.train.evaluation_images import open_images

    device = accelerator_for(asked.device).device
    entry = _entry(asked)
    architecture = _at_resolution(entry.architecture, asked.resolution)
    normalisation, whence = _normalisation(asked, entry.architecture)
    request = _request(asked, architecture, _run_of(entry), normalisation)
    onnx = None if asked.onnx is None else _open_onnx(asked.onnx, architecture)
    predictors: dict[str, Predict] = {}
    source, digest = f"ONNX file {asked.onnx}", None
    if asked.weights != NONE:
        network, source = _network(asked, architecture)
        digest = tensors_digest(network.state_dict())
        predictors[PYTORCH] = network.to(device)
    note(f"weights: {source}")
    if onnx is not None:
        predictors[ONNX] = onnx
    images = open_images(request)
    note(f"data: {images.description}")
    note(f"normalised by: {whence}")
    return Inputs(
        asked=asked,
        name=entry.name,
        architecture=architecture,
        weights=source,
        weights_digest=digest,
        predictors=predictors,
        onnx=onnx,
        images=images,
        request=request,
        normalisation=whence,
        device=device,
        digest=hashlib.sha256(),
    )


def _entry(asked: Asked) -> Entry:
    from slimnas.errors import ZooError
    from slimnas.zoo.registry import get

    if Path(asked.model).suffix == ".onnx":
        raise ZooError(
            f"{asked.model}: MODEL must be a zoo name, an architecture file or a run folder; give "
            "the file with --onnx, and --weights none to evaluate it alone"
        )
    return get(asked.model)


def _at_resolution(architecture: Architecture, resolution: int | None) -> Architecture:
    """The network at the size that is asked for, else at that it was trained at."""
    from slimnas.zoo.preprocessing import TRAINED_AT

    trained_at = architecture.provenance.get(TRAINED_AT)
    if resolution is not None:
        return architecture.with_resolution(resolution)
    if isinstance(trained_at, int) and trained_at > 0:
        resized = architecture.with_resolution(trained_at)
        own = architecture.input.shape
        if resized != architecture:
            note(
                f"resolution: {trained_at} px, which its weights were trained at; it is built for "
                f"{own.height} px, --resolution {own.height} judges it there"
            )
        return resized
    return architecture


def _run_of(entry: Entry) -> Run | None:
    """The settings of the run that made a network, if it lies in its run folder."""
    from slimnas.arch.documents import schema_of
    from slimnas.prune import config as prune
    from slimnas.search import config as search
    from slimnas.train import config as train
    from slimnas.zoo.entry import FOUND

    if entry.folder is None:
        return None
    folder = entry.folder
    places = [folder, folder.parent.parent] if folder.parent.name == FOUND else [folder]
    paths = [place / name for place in places for name in CONFIGS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    schema = schema_of(path, "the settings of a run")
    if schema == search.SCHEMA:
        return search.SearchConfig.load(path)
    if schema == prune.SCHEMA:
        return prune.PruneConfig.load(path)
    return train.TrainConfig.load(path) if schema == train.SCHEMA else None


def _open_onnx(path: Path, architecture: Architecture) -> OnnxModel:
    import torch

    from slimnas.train.evaluation_onnx import open_onnx

    classes = architecture.head.classes
    return open_onnx(path, architecture.input.shape, classes, threads=torch.get_num_threads())


def _network(asked: Asked, architecture: Architecture) -> tuple[Any, str]:
    """The trained network for images of this size, and where its weights are from."""
    from slimnas.cli.analyze_network import resized
    from slimnas.errors import WeightsError
    from slimnas.prune.pretrained import NoHubError, open_start

    try:
        start = open_start(asked.model, asked.weights)
    except NoHubError as error:
        raise WeightsError(f"{error}; give its weights with --weights FILE") from error
    network = start.network
    if network.architecture != architecture:
        shape = architecture.input.shape
        network = resized(network, (shape.height, shape.width))
    return network.eval(), start.source


def _normalisation(asked: Asked, architecture: Architecture) -> tuple[Normalisation | None, str]:
    from slimnas.errors import DataError
    from slimnas.train.evaluation_images import IMAGENET
    from slimnas.zoo.preprocessing import normalisation_of

    own = normalisation_of(architecture) if asked.normalisation == AUTO else None
    if own is not None:
        return own, "mean and deviation that the network's provenance names"
    if asked.normalisation != "imagenet":
        return None, "mean and deviation of the data's TRAIN images"
    if architecture.input.channels != len(IMAGENET[0]):
        raise DataError(
            f"--normalisation imagenet: is for 3 channels, {architecture.name} takes "
            f"{architecture.input.channels}; use --normalisation data"
        )
    return IMAGENET, "ImageNet's mean and deviation"


def _request(
    asked: Asked,
    architecture: Architecture,
    run: Run | None,
    normalisation: Normalisation | None,
) -> ImageRequest:
    from slimnas.data.splits import DataOptions
    from slimnas.prune.config import PruneConfig
    from slimnas.train.evaluation_images import ImageRequest

    shape = architecture.input.shape
    data, split = _which(asked, run)
    same = run is not None and data == run.data
    # What a search or training left out, and of how many images, decides what it held out.
    limits = run if same and not isinstance(run, PruneConfig) else None
    options = DataOptions(
        resolution=(shape.height, shape.width),
        channels=shape.channels,
        seed=_seed(asked, architecture, run),
        skip_bad_images=asked.skip_bad_images or (limits is not None and limits.skip_bad_images),
        max_images=None if limits is None else limits.max_images,
    )
    return ImageRequest(
        data=data,
        split=split,
        options=options,
        classes=architecture.head.classes,
        normalisation=normalisation,
        transform=_transform(asked, options.resolution),
        max_images=asked.max_images,
        divide=_division(run, data),
    )


def _which(asked: Asked, run: Run | None) -> tuple[str, SplitName]:
    """The data and which part of it: as given, else what the run was judged on."""
    from slimnas.data.photos import NAME as PHOTOS
    from slimnas.errors import DataError
    from slimnas.prune.config import PruneConfig

    if asked.data is not None:
        return asked.data, asked.split
    if run is None:
        raise DataError(
            f"{asked.model}: names no data that it was made with; give some with --data (digits, a "
            "folder, parquet, tars or a hub id)"
        )
    test_data: str | None = getattr(run, "test_data", None)
    data = test_data if test_data and asked.split == "test" else run.data
    if isinstance(run, PruneConfig) and data == PHOTOS:
        raise DataError(
            f"{asked.model}: was pruned on crops of two photographs, which have no labels; give "
            "images of its classes with --data"
        )
    return data, asked.split


def _division(run: Run | None, data: str) -> Literal["by_class", "by_row", "no"]:
    """How a source without test images is divided: as the run did it."""
    from slimnas.prune.config import PruneConfig

    if data == getattr(run, "test_data", None):
        return "no"
    pruned = isinstance(run, PruneConfig) and run.data == data
    return "by_row" if pruned else "by_class"


def _transform(asked: Asked, resolution: tuple[int, int]) -> EvalTransform | None:
    from slimnas.train.evaluation_transform import EvalTransform

    if asked.crop_pct is not None:
        return EvalTransform.of_crop(resolution, asked.crop_pct, asked.interpolation)
    if asked.resize is not None:
        return EvalTransform(resolution, (asked.resize, asked.resize), asked.interpolation)
    return None


def _seed(asked: Asked, architecture: Architecture, run: Run | None) -> int:
    """As given, else of the run that made the network, which decides what it never saw."""
    if asked.seed is not None:
        return asked.seed
    made_with = architecture.provenance.get("seed") if run is None else run.seed
    return made_with if isinstance(made_with, int) and made_with >= 0 else 0


def _place(device: torch.device) -> str:
    import torch

    from slimnas.measure.machine import this_machine

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {this_machine().cpu}, {torch.get_num_threads()} threads"
