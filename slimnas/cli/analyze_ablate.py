"""`slimnas analyze ablate`: accuracy or importance against Q/K dimension and V ratio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.analyze_network import SkipOption
from slimnas.cli.analyze_training import (
    JOURNAL,
    AskedBudget,
    FirstSeedOption,
    LrOption,
    MaxImagesOption,
    SeedsOption,
    StepImagesOption,
    StudyProgress,
    TrainDataOption,
    TrainOnOption,
    numbers,
    open_budget,
    print_table,
    quiet_threads,
    whole_numbers,
)
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import RUNS, RunOn, no_empty_folder, says_how_to_go_on

if TYPE_CHECKING:
    from slimnas.analysis.ablate import Ablation, Point
    from slimnas.analysis.gates import Kept
    from slimnas.analysis.kept import ImportanceStudy
    from slimnas.arch.architecture import Architecture
    from slimnas.nn.build import Network


def ablate(
    model: Annotated[
        str, typer.Argument(help="Model with attention: zoo name, architecture file or folder.")
    ] = "efficientvit_m0",
    qk_dims: Annotated[
        str, typer.Option(help="Q/K dimensions per head, between commas; '' for none.")
    ] = "4,8,16,32",
    v_ratios: Annotated[
        str, typer.Option(help="V width over the stage's, between commas; '' for none.")
    ] = "0.4,0.6,0.8,1.0",
    importance: Annotated[
        bool,
        typer.Option(
            "--importance", help="Taylor importance of one trained network, not accuracy of many."
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="auto|FILE",
            help="For --importance: published weights or a file, instead of training.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs.")] = 10,
    seeds: SeedsOption = 1,
    data: TrainDataOption = "digits",
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the images; else the model's, 64 for digits.")
    ] = None,
    batch_size: StepImagesOption = 32,
    lr: LrOption = 1e-3,
    max_images: MaxImagesOption = None,
    skip_bad_images: SkipOption = False,
    train_on: TrainOnOption = RunOn.AUTO,
    seed: FirstSeedOption = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder; else runs/analyze-ablate-MODEL.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Top-1 against the Q/K dimension per head and the V ratio, one changed at a time.

    Every network is trained from scratch for the same budget. With --importance one network is
    trained, and shown is how much of its Taylor importance stays when every head keeps its most
    important channels. Stop it at any moment and give the same command again: it goes on.

    Example: slimnas analyze ablate efficientvit_m0 --epochs 10 --seeds 3
    """
    quiet_threads()
    from slimnas.analysis.ablate import ablation_points, has_cascade
    from slimnas.errors import AnalysisError
    from slimnas.zoo.registry import get

    base = get(model).architecture
    dims = whole_numbers(qk_dims, "--qk-dims") if qk_dims.strip() else []
    ratios = numbers(v_ratios, "--v-ratios") if v_ratios.strip() else []
    points = ablation_points(base, qk_dims=dims, v_ratios=ratios)
    if weights is not None and not importance:
        raise AnalysisError("--weights: is for --importance; accuracy is of networks trained anew")
    if ratios and not importance and has_cascade(base):
        note(
            "V ratios: with the cascade off, at every ratio; a cascade adds one head's V channels "
            "to the next head's input and so needs the ratio 1"
        )
    asked = AskedBudget(
        data=data,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        resolution=resolution,
        max_images=max_images,
        skip_bad_images=skip_bad_images,
        train_on=train_on.value,
    )
    seeds_used = tuple(range(seed, seed + seeds))
    if importance:
        folder = output or RUNS / f"analyze-ablate-importance-{base.name}"
        source = (model, weights)
        kept, blocks, settings = _importance(base, points, asked, source, seeds_used, folder)
        _report_importance(base, kept, blocks, (settings, folder, as_json))
        return
    folder = output or RUNS / f"analyze-ablate-{base.name}"
    found, settings = _accuracy(base, points, asked, seeds_used, folder)
    _report(found, settings, folder, as_json)


def _accuracy(
    base: Architecture,
    points: tuple[Point, ...],
    asked: AskedBudget,
    seeds: tuple[int, ...],
    folder: Path,
) -> tuple[Ablation, dict[str, Any]]:
    from slimnas._lock import folder_lock
    from slimnas.analysis.ablate import run_ablation
    from slimnas.analysis.finished import Finished

    with (
        no_empty_folder(folder),
        folder_lock(folder),
        says_how_to_go_on(),
        StudyProgress() as progress,
    ):
        budget = open_budget(asked, base, folder, progress, seed=seeds[0])
        settings = {"model": base.name, "model_digest": base.digest, **budget.settings()}
        finished = Finished(folder / JOURNAL, settings)
        if len(finished):
            note(f"went on after {len(finished)} trained networks of an earlier run")
        found = run_ablation(
            base,
            points,
            budget.trained_top1,
            finished,
            seeds=seeds,
            on_step=progress.step,
        )
    return found, {**settings, "data": budget.data.description, "seeds": list(seeds)}


def _importance(
    base: Architecture,
    points: tuple[Point, ...],
    asked: AskedBudget,
    source: tuple[str, str | None],
    seeds: tuple[int, ...],
    folder: Path,
) -> tuple[tuple[Kept, ...], tuple[str, ...], dict[str, Any]]:
    from slimnas._lock import folder_lock
    from slimnas.analysis.finished import Finished
    from slimnas.analysis.kept import ImportanceStudy, run_importance

    model, weights = source
    with (
        no_empty_folder(folder),
        folder_lock(folder),
        says_how_to_go_on(),
        StudyProgress() as progress,
    ):
        budget = open_budget(asked, base, folder, progress, seed=seeds[0])
        network = None if weights is None else _loaded(model, weights, budget.resolution)
        study: ImportanceStudy = ImportanceStudy(
            base=base,
            budget=budget,
            network=network,
            axes={axis: _values(points, axis) for axis in ("qk_dim", "v_ratio")},
            seeds=seeds if network is None else seeds[:1],
        )
        settings = study.settings()
        finished = Finished(folder / JOURNAL, settings)
        kept, blocks = run_importance(study, finished, on_step=progress.step)
    return kept, blocks, {**settings, "data": budget.data.description}


def _values(points: tuple[Point, ...], axis: str) -> tuple[float, ...]:
    return tuple(point.value for point in points if point.axis == axis)


def _report(found: Ablation, settings: dict[str, Any], folder: Path, as_json: bool) -> None:
    from slimnas import __version__
    from slimnas.analysis.ablate import AXES, row
    from slimnas.report.analysis_ablate import ablation_document, write_ablation

    provenance = {"tool_version": __version__, **settings}
    files = [shown_path(path) for path in write_ablation(found, folder, provenance)]
    if as_json:
        print_json({**ablation_document(found, provenance), "files": files})
        return
    rows = []
    for one in found.points:
        cells = row(one)
        rows.append(
            (
                AXES[one.point.axis],
                f"{one.point.value:g}",
                f"{one.mean_top1:.2f} %",
                " ".join(f"{value:.2f}" for value in one.top1),
                f"{cells['params'] / 1e6:.3f} M",
                f"{cells['macs'] / 1e6:.1f} M",
            )
        )
    print_table(("axis", "value", "top-1", "by seed", "params", "MACs"), rows)
    typer.echo(f"written: {', '.join(files)}")


def _report_importance(
    base: Architecture,
    kept: tuple[Kept, ...],
    blocks: tuple[str, ...],
    where: tuple[dict[str, Any], Path, bool],
) -> None:
    from slimnas import __version__
    from slimnas.analysis.ablate import AXES
    from slimnas.report.analysis_ablate import importance_document, write_importance

    settings, folder, as_json = where
    provenance = {"tool_version": __version__, **settings}
    files = [shown_path(p) for p in write_importance(base, kept, blocks, folder, provenance)]
    if as_json:
        print_json({**importance_document(base, kept, blocks, provenance), "files": files})
        return
    rows = []
    for one in kept:
        known = {name: part for name, part in zip(blocks, one.by_block, strict=True) if part}
        least = min(known, key=known.__getitem__, default="")
        rows.append(
            (
                AXES[one.axis],
                f"{one.value:g}",
                f"{100 * one.share:.1f} %",
                f"{100 * known[least]:.1f} % in {least}" if known else "",
            )
        )
    print_table(("axis", "value", "importance that stays", "least in a block"), rows)
    typer.echo(f"written: {', '.join(files)}")


def _loaded(model: str, weights: str, resolution: int | tuple[int, int]) -> Network:
    from slimnas.zoo.create import create_model

    pretrained: bool | Path = True if weights == "auto" else Path(weights)
    return create_model(model, pretrained=pretrained, resolution=resolution)
