"""`slimnas analyze spectrum`: which spatial frequencies parts of a network give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from slimnas.cli.analyze_network import (
    AUTO,
    AskedNetwork,
    BatchOption,
    ControlOption,
    DataOption,
    Device,
    DeviceOption,
    ImagesOption,
    ModelArgument,
    OutputOption,
    ResolutionOption,
    SeedOption,
    SkipOption,
    WeightsOption,
    open_subject,
)
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import RUNS, no_empty_folder, require_writable

if TYPE_CHECKING:
    from slimnas.analysis.spectrum import Spectrum


def spectrum(
    model: ModelArgument,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Block or module by name, or NAME:hi and NAME:lo of a HiLo; repeat for several.",
            show_default="both branches of every HiLo",
        ),
    ] = None,
    weights: WeightsOption = AUTO,
    data: DataOption = None,
    images: ImagesOption = 100,
    batch_size: BatchOption = 20,
    resolution: ResolutionOption = None,
    device: DeviceOption = Device.CPU,
    control: ControlOption = True,
    skip_bad_images: SkipOption = False,
    seed: SeedOption = 0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Radially averaged frequency spectra of a network's parts, and how much of them is high.

    Compares the Hi-Fi and Lo-Fi outputs of HiLo attention, or any blocks named with --part. All
    channels count, each map's mean is taken off, and the same network with random weights shows
    what follows from its structure alone.

    Example: slimnas analyze spectrum deit_tiny --part stages.0.blocks.0 --part stages.0.blocks.11
    """
    from slimnas.analysis.spectrum import branch_parts, find_part, spectra
    from slimnas.report.analysis_spectrum import spectra_document, write_spectra
    from slimnas.zoo.create import create_model
    from slimnas.zoo.registry import get

    asked = AskedNetwork(
        model=model,
        weights=weights,
        resolution=resolution,
        data=data,
        images=images,
        batch_size=batch_size,
        skip_bad_images=skip_bad_images,
        seed=seed,
        device=device.value,
    )
    # Before any download or training: names of parts depend on neither.
    untrained = create_model(model, seed=seed)
    parts = [find_part(untrained, text) for text in dict.fromkeys(part or ())]
    parts = parts or branch_parts(untrained)
    folder = output or RUNS / f"analyze-spectrum-{get(model).name}"
    with no_empty_folder(folder):
        require_writable(folder)
        subject = open_subject(asked, folder / "pretrained")
        found = spectra(subject.network, parts, subject.batches())
        other: list[Spectrum] = []
        if control and not subject.is_random:
            note("control: the same network with random weights")
            other = spectra(subject.with_random_weights(), parts, subject.batches())
        provenance = subject.provenance()
        files = write_spectra(found, other, provenance, folder)
    if as_json:
        shown = {key: shown_path(path) for key, path in files.items()}
        print_json({**spectra_document(found, other, provenance), "files": shown})
        return
    for line in _lines(found, other):
        typer.echo(line)
    for path in files.values():
        typer.echo(shown_path(path))


def _lines(found: Sequence[Spectrum], control: Sequence[Spectrum]) -> Iterable[str]:
    width = max(len("part"), *(len(one.part.name) for one in found))
    yield (
        f"energy above half the Nyquist frequency, mean over {found[0].images} images; each map's "
        "mean, whose share comes last, is taken off before"
    )
    yield (
        f"{'part':<{width}}  {'map':>9}  channels  {'high %':>6}  {'+-':>4}  "
        f"{'random weights':>14}  {'white noise':>11}  {'mean %':>6}"
    )
    others = {one.part: one for one in control}
    for one in found:
        other = others.get(one.part)
        yield (
            f"{one.part.name:<{width}}  {f'{one.size[0]}x{one.size[1]}':>9}  {one.channels:8d}  "
            f"{_percent(one.high_percent):>6}  {_percent(one.high_deviation):>4}  "
            f"{_percent(other.high_percent if other else None):>14}  {one.white_percent:11.1f}  "
            f"{one.mean_percent:6.1f}"
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
