"""`slimnas analyze heads`: how alike the heads of a network's attentions are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

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
    from slimnas.analysis.heads import HeadReport, LayerHeads


def heads(
    model: ModelArgument,
    weights: WeightsOption = AUTO,
    data: DataOption = None,
    images: ImagesOption = 200,
    batch_size: BatchOption = 20,
    resolution: ResolutionOption = None,
    device: DeviceOption = Device.CPU,
    control: ControlOption = True,
    skip_bad_images: SkipOption = False,
    seed: SeedOption = 0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """How alike heads are in each layer: attention maps and head outputs, in both readings.

    The similarity of two heads is the cosine of their maps, or outputs, on one image. A layer's
    number is that of its most alike pair, or the mean over heads of each one's nearest; both are
    averaged over the images.

    Example: slimnas analyze heads deit_tiny --data photos
    """
    from slimnas.analysis.heads import head_similarity
    from slimnas.report.analysis_heads import heads_document, write_heads
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
    _refuse_without_attention(asked)
    folder = output or RUNS / f"analyze-heads-{get(model).name}"
    with no_empty_folder(folder):
        require_writable(folder)
        subject = open_subject(asked, folder / "pretrained")
        found = head_similarity(subject.network, subject.batches())
        other = None
        if control and not subject.is_random:
            note("control: the same network with random weights")
            other = head_similarity(subject.with_random_weights(), subject.batches())
        provenance = subject.provenance()
        files = write_heads(found, other, subject.network.architecture, provenance, folder)
    if as_json:
        shown = {key: shown_path(path) for key, path in files.items()}
        print_json({**heads_document(found, other, provenance), "files": shown})
        return
    for line in _lines(found, other):
        typer.echo(line)
    for path in files.values():
        typer.echo(shown_path(path))


def _refuse_without_attention(asked: AskedNetwork) -> None:
    """Look for heads in the untrained network, before any download or training."""
    import torch

    from slimnas.analysis.heads import head_similarity
    from slimnas.zoo.create import create_model

    network = create_model(asked.model, resolution=asked.resolution)
    shape = network.architecture.input.shape
    head_similarity(network, [torch.zeros(1, shape.channels, shape.height, shape.width)])


def _lines(found: HeadReport, control: HeadReport | None) -> Iterable[str]:
    from slimnas.analysis.heads import MEASURES

    names = [_name(layer) for layer in found.layers]
    width = max(len("layer"), *(len(name) for name in names))
    yield f"head similarity, mean over {found.images} images; in brackets with random weights"
    titles = {"maps_max": "maps max", "maps_mean": "maps mean"}
    titles |= {"outputs_max": "outputs max", "outputs_mean": "outputs mean"}
    yield f"{'layer':<{width}}  heads  {'  '.join(f'{titles[m]:>14}' for m in MEASURES)}"
    others = {_name(layer): layer for layer in control.layers} if control else {}
    for name, layer in zip(names, found.layers, strict=True):
        cells = (_cell(measure, layer, others.get(name)) for measure in MEASURES)
        yield f"{name:<{width}}  {layer.heads:5d}  {'  '.join(f'{c:>14}' for c in cells)}"


def _name(layer: LayerHeads) -> str:
    return f"{layer.module} {layer.branch}".rstrip()


def _cell(measure: str, layer: LayerHeads, control: LayerHeads | None) -> str:
    if measure not in layer.measures:
        return "-"
    text = f"{layer.measures[measure].mean:.3f}"
    if control is None or measure not in control.measures:
        return text
    return f"{text} ({control.measures[measure].mean:.3f})"
