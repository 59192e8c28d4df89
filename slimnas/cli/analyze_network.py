"""What analyses of a trained network have in common: the network, its weights and the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import note
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from torch import Tensor

    from slimnas.data.batches import ImageSet
    from slimnas.data.whole import Normalisation
    from slimnas.nn.build import Network
    from slimnas.prune.pretrained import Start
    from slimnas.train.loop import StepReport
    from slimnas.zoo.entry import Entry

AUTO, NONE = "auto", "none"
"""Values of `--weights` besides files."""

ModelArgument = Annotated[str, typer.Argument(help="Zoo name, architecture file or run folder.")]
WeightsOption = Annotated[
    str, typer.Option(help="auto: published or the model's own; none: random; or a weights file.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="digits, photos, folder, parquet, tars or hub id.",
        show_default="photos: crops of two photographs",
    ),
]
ImagesOption = Annotated[int, typer.Option(min=1, help="Images, at most.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per batch.")]
ControlOption = Annotated[
    bool, typer.Option("--control/--no-control", help="Also with random weights, to compare.")
]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded.")
]
ResolutionOption = Annotated[
    int | None,
    typer.Option(min=1, help="Input side in pixels.", show_default="the model's own"),
]
SeedOption = Annotated[int, seed_option("Seed of everything random.")]
OutputOption = Annotated[
    Path | None, typer.Option(help="Folder of the results.", show_default="runs/analyze-...")
]


class Device(str, Enum):
    """Where networks run."""

    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[Device, typer.Option(help="Where networks run.")]


@dataclass(frozen=True)
class AskedNetwork:
    """The network and images that a command line asks for.

    Attributes:
        model, weights, resolution, data, images, batch_size, skip_bad_images, seed: as given.
        device: cpu or cuda.
    """

    model: str
    weights: str
    resolution: int | None
    data: str | None
    images: int
    batch_size: int
    skip_bad_images: bool
    seed: int
    device: str


@dataclass(frozen=True)
class Subject:
    """A network to analyse, and images for it.

    Attributes:
        network: in evaluation mode, on the device.
        name: of the model.
        weights: where they are from, in words.
        data: the images in words.
        images: the images.
        asked: the command line.
    """

    network: Network
    name: str
    weights: str
    data: str
    images: ImageSet
    asked: AskedNetwork

    def batches(self) -> Iterator[Tensor]:
        """Every image once, normalised, on the device."""
        device, size = self.asked.device, self.asked.batch_size
        return (x for x, _ in self.images.eval_batches(size, device=device))

    @property
    def is_random(self) -> bool:
        """Whether it has random weights itself, and needs no control that has."""
        return self.asked.weights == NONE

    def with_random_weights(self) -> Network:
        """The same architecture, fresh."""
        from slimnas.nn.build import build

        fresh = build(self.network.architecture, seed=self.asked.seed)
        return fresh.eval().to(self.asked.device)

    def provenance(self) -> dict[str, Any]:
        """What the results depend on, for JSON."""
        shape = self.network.architecture.input.shape
        return {
            "model": self.name,
            "architecture": self.network.architecture.digest,
            "weights": self.weights,
            "data": self.data,
            "resolution": [shape.height, shape.width],
            "seed": self.asked.seed,
        }


def open_subject(asked: AskedNetwork, spare: Path) -> Subject:
    """Open a network with its weights, and the images; says on stderr what they are.

    Where weights cannot be had, the model is trained briefly on digits, as `slimnas prune` does.

    Args:
        asked: the command line.
        spare: where weights trained here go if the user's cache cannot be written.

    Raises:
        SlimnasError: one line.
    """
    import torch

    from slimnas.errors import AnalysisError

    if asked.device == Device.CUDA.value and not torch.cuda.is_available():
        raise AnalysisError(
            f"--device cuda: torch {torch.__version__} finds none here; use --device cpu"
        )
    network, name, weights, normalisation, trained_on = _network(asked, spare)
    note(f"weights: {weights}")
    images, description = _images(asked, network, normalisation, trained_on)
    note(f"data: {description}")
    network = network.eval().to(asked.device)
    return Subject(network, name, weights, description, images, asked)


def _network(
    asked: AskedNetwork, spare: Path
) -> tuple[Network, str, str, Normalisation | None, str | None]:
    from slimnas.zoo.create import create_model
    from slimnas.zoo.registry import get

    entry = get(asked.model)
    if asked.weights == NONE:
        network = create_model(asked.model, resolution=asked.resolution, seed=asked.seed)
        return network, entry.name, f"random, seed {asked.seed}", None, None
    start = _start(asked, entry, spare)
    network = start.network
    if asked.resolution is not None:
        network = resized(network, asked.resolution)
    return network, start.name, start.source, start.normalisation, start.trained_on


def _start(asked: AskedNetwork, entry: Entry, spare: Path) -> Start:
    from slimnas.cli.prune_progress import PruneProgress
    from slimnas.errors import WeightsError
    from slimnas.prune.pretrained import NoHubError, open_start, train_start

    published = entry.source == "built-in" and entry.architecture.provenance.get("weights")
    try:
        return open_start(asked.model, asked.weights)
    except WeightsError as error:
        out_of_reach = isinstance(error, NoHubError) or not (published or entry.weights)
        if asked.weights != AUTO or not out_of_reach:
            raise
        note(
            f"no trained weights: {error}; training {entry.name} briefly on digits instead. Give "
            "--weights FILE for real ones, or --weights none for random ones"
        )
    with PruneProgress() as progress:

        def on_step(report: StepReport) -> None:
            state = f"{report.images_per_s:.0f} images/s loss {report.loss:.3f}"
            progress.stage("training", report.step, report.steps, state)

        return train_start(
            asked.model, seed=asked.seed, train_on="auto", spare=spare, on_step=on_step
        )


def resized(network: Network, resolution: int | tuple[int, int]) -> Network:
    """The same network for images of another size, what depends on it interpolated."""
    from slimnas.nn.build import build
    from slimnas.nn.resolution import adapt_state_dict

    source = network.architecture
    target = source.with_resolution(resolution)
    resized = build(target)
    resized.load_state_dict(adapt_state_dict(network.state_dict(), source=source, target=target))
    return resized


def _images(
    asked: AskedNetwork,
    network: Network,
    normalisation: Normalisation | None,
    trained_on: str | None,
) -> tuple[ImageSet, str]:
    from slimnas.data.photos import NAME
    from slimnas.data.splits import DataOptions
    from slimnas.data.whole import open_whole

    data = asked.data or trained_on or NAME
    if asked.data is None and data == NAME:
        note(
            "no --data: random crops of two photographs stand in for images; --data with images "
            "like the model's own says more"
        )
    shape = network.architecture.input.shape
    options = DataOptions(
        resolution=(shape.height, shape.width),
        channels=shape.channels,
        seed=asked.seed,
        skip_bad_images=asked.skip_bad_images,
        max_images=asked.images,
    )
    whole = open_whole(data, options, normalisation=normalisation)
    return whole.images, whole.description
