"""`slimnas analyze ranking`: does a run's supernet rank networks as training them alone does?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.analyze_training import (
    JOURNAL,
    AskedBudget,
    LrOption,
    SeedsOption,
    StepImagesOption,
    StudyProgress,
    TrainOnOption,
    open_budget,
    quiet_threads,
)
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import RUNS, RunOn, no_empty_folder, says_how_to_go_on
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from rich.console import Console

    from slimnas.analysis.budget import TrainingBudget
    from slimnas.analysis.ranking import Inherited, Ranking
    from slimnas.arch.architecture import Architecture
    from slimnas.data.splits import DataSplits
    from slimnas.search.config import SearchConfig
    from slimnas.search.evaluator import SelectionEvaluator
    from slimnas.supernet.train import TrainedSupernet


@dataclass(frozen=True)
class OpenedRun:
    """A search's folder: its settings and its trained supernet."""

    folder: Path
    config: SearchConfig
    trained: TrainedSupernet


def ranking(
    run: Annotated[Path, typer.Argument(help="Run folder of a search, with its supernet.")],
    data: Annotated[
        str | None,
        typer.Option(help="The run's images, if they have moved.", show_default="the run's"),
    ] = None,
    networks: Annotated[int, typer.Option(help="Random networks to rank, at least 3.")] = 12,
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs of each.")] = 5,
    seeds: SeedsOption = 1,
    batch_size: StepImagesOption = 32,
    lr: LrOption = 1e-3,
    train_on: TrainOnOption = RunOn.AUTO,
    seed: Annotated[int, seed_option("Seed of the draw, and the first one.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder; else runs/analyze-ranking-RUN.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """How a supernet ranks random networks of its space, beside training each of them alone.

    Kendall's tau and Spearman's rho between the accuracy of networks trained from scratch and
    what the supernet says of them: their accuracy with inherited weights, and the sum of their
    importances; beside it what parameters and MACs alone would say. Stop it at any moment and
    give the same command again: it goes on. More --networks or --seeds add to what is there.

    Example: slimnas analyze ranking runs/efficientformer_tiny-digits-iphone12-1.6ms
    """
    quiet_threads()
    from slimnas.analysis.ranking import draw_networks

    opened = _open_run(run)
    drawn = draw_networks(opened.trained.supernet.space, networks, seed=seed)
    asked = AskedBudget(
        data=data or opened.config.data,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        resolution=opened.trained.supernet.resolution,
        max_images=opened.config.max_images,
        skip_bad_images=opened.config.skip_bad_images,
        train_on=train_on.value,
    )
    folder = output or RUNS / f"analyze-ranking-{run.resolve().name}"
    found, provenance = _rank(opened, drawn, asked, tuple(range(seed, seed + seeds)), folder)
    _report(found, provenance, folder, as_json)


def _open_run(folder: Path) -> OpenedRun:
    from slimnas.errors import RunFolderError
    from slimnas.search.config import FILE, SearchConfig
    from slimnas.search.run import SUPERNET
    from slimnas.supernet.train import load_supernet

    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder; give the run folder of a search")
    if not (folder / FILE).is_file():
        raise RunFolderError(f"{folder}: has no {FILE}; give the run folder of a search")
    config = SearchConfig.load(folder / FILE)
    if not (folder / SUPERNET).is_file():
        why = "it is not trained to its end; give its search again, which goes on"
        if config.recipe is None:
            why = "the run took it from elsewhere; give the run that trained it"
        raise RunFolderError(f"{folder}: has no {SUPERNET}: {why}")
    return OpenedRun(folder, config, load_supernet(folder / SUPERNET))


def _rank(
    opened: OpenedRun,
    drawn: tuple[Architecture, ...],
    asked: AskedBudget,
    seeds: tuple[int, ...],
    folder: Path,
) -> tuple[Ranking, dict[str, Any]]:
    from dataclasses import replace

    from slimnas._files import remove_leftovers
    from slimnas._lock import folder_lock
    from slimnas.analysis.finished import Finished
    from slimnas.analysis.ranking import run_ranking, trained_alone

    with (
        no_empty_folder(folder),
        folder_lock(folder),
        says_how_to_go_on(),
        StudyProgress() as progress,
    ):
        remove_leftovers(folder)
        budget = open_budget(asked, drawn[0], folder, progress, seed=opened.config.seed)
        _require_its_data(opened, asked.data, budget.data)
        budget = replace(budget, layer_scale=_layer_scale(opened))
        settings = _settings(opened, budget)
        finished = Finished(folder / JOURNAL, settings)
        if len(finished):
            note(f"went on after {len(finished)} finished parts of an earlier run")
        found = run_ranking(
            drawn,
            _inheriting(opened, budget),
            trained_alone(budget),
            finished,
            seeds=seeds,
            on_step=progress.step,
        )
    data = budget.data
    provenance = {
        **settings,
        "run": shown_path(opened.folder),
        "space": opened.trained.supernet.space.name,
        "macs_resolution": drawn[0].input.resolution,
        "data": data.description,
        "search_top1_images": len(data.search),
        "test_top1_images": len(data.test),
        "inherited_images": min(opened.config.search_images, len(data.search)),
    }
    return found, provenance


def _require_its_data(opened: OpenedRun, spec: str, data: DataSplits) -> None:
    """Refuse images whose SEARCH split may hold what the supernet was trained on."""
    from slimnas.errors import AnalysisError
    from slimnas.supernet.supernet import head_classes

    classes = head_classes(opened.trained.supernet)
    if data.classes != classes:
        raise AnalysisError(
            f"--data {spec}: has {data.classes} classes, the supernet of {opened.folder} was "
            f"trained on {classes}; give the images it was trained on"
        )
    if opened.trained.provenance.get("data") != data.digest:
        raise AnalysisError(
            f"--data {spec}: must be the images that the supernet of {opened.folder} was trained "
            "on, unchanged; of others it may have seen what it is judged by"
        )


def _layer_scale(opened: OpenedRun) -> float | None:
    """Where the supernet's layer scales started: networks alone start there too."""
    recipe = opened.trained.recipe
    return None if recipe is None else recipe.layer_scale


def _settings(opened: OpenedRun, budget: TrainingBudget) -> dict[str, Any]:
    """What must agree before results may be mixed."""
    config = opened.config
    return {
        "supernet_digest": opened.trained.digest,
        "inherited": {
            "search_images": config.search_images,
            "calibration_images": config.calibration_images,
            "seed": config.seed,
        },
        **budget.settings(),
    }


def _inheriting(opened: OpenedRun, budget: TrainingBudget) -> Callable[[Architecture], Inherited]:
    """What the supernet says of an architecture whose blocks lie in its likeliest slots."""
    from slimnas.analysis.ranking import Inherited
    from slimnas.search.importance import ImportanceRecord
    from slimnas.search.run import open_evaluator
    from slimnas.supernet.inherit import place

    supernet = opened.trained.supernet
    importance = ImportanceRecord(supernet.alphas(), {"supernet_digest": opened.trained.digest})

    @cache
    def evaluator() -> SelectionEvaluator:  # only where something is left to judge
        supernet.to(budget.accelerator.device)
        data = budget.data.for_search()
        order = opened.trained.channel_order()
        return open_evaluator(opened.config, supernet, importance, data, order=order)

    def inherit(architecture: Architecture) -> Inherited:
        selection = place(supernet, architecture)
        judge = evaluator()
        judge.move_to(selection)  # forgets the modules of the network before
        paths = ((stage, slot) for stage, slot, _ in selection.active())
        total = sum(importance.path_importance(stage, slot) for stage, slot in paths)
        return Inherited(judge.top1(selection), total)

    return inherit


def _report(found: Ranking, provenance: dict[str, Any], folder: Path, as_json: bool) -> None:
    from slimnas import __version__
    from slimnas.report.analysis_ranking import ranking_document, write_ranking

    provenance = {"tool_version": __version__, **provenance}
    files = [shown_path(path) for path in write_ranking(found, folder, provenance)]
    if as_json:
        print_json({**ranking_document(found, provenance), "files": files})
        return
    _print(found, provenance)
    typer.echo(f"written: {', '.join(files)}")


def _print(found: Ranking, provenance: dict[str, Any]) -> None:
    from rich.console import Console

    from slimnas.report.analysis_ranking import with_interval

    console = Console(width=None if sys.stdout.isatty() else 120)
    _print_networks(found, console)
    console.print()
    _print_correlations(found, console)
    splits = with_interval(found.splits.tau, found.splits.tau_interval)
    lines = [
        f"epochs alone: {provenance['recipe']['epochs']}, seeds: "
        f"{', '.join(map(str, found.seeds))}; {provenance['data']}",
        f"own top-1 on SEARCH and on TEST agree with tau {splits}",
    ]
    if found.ceiling is None:
        lines.append("with --seeds 3 a ceiling is known: how well one training tells another")
    else:
        ceiling = with_interval(found.ceiling.tau, found.ceiling.tau_interval)
        lines.append(f"ceiling: trainings of two seeds agree with tau {ceiling}")
    inherited, macs = found.of("inherited").search.tau, found.of("macs").search.tau
    if inherited is None:
        lines.append("nothing to rank: the supernet, or training, finds all equally good")
    elif macs is not None and macs >= inherited:
        lines.append("the supernet ranks these networks no better than their MACs do")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _print_networks(found: Ranking, console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("network", "widths", "depths"):
        table.add_column(heading, no_wrap=True)
    for heading in ("params M", "GMACs", "importance", "inherited", "own SEARCH", "own TEST"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.networks:
        table.add_row(
            one.architecture.name,
            "-".join(map(str, one.architecture.widths)),
            "-".join(map(str, one.architecture.depths)),
            f"{one.params / 1e6:.2f}",
            f"{one.macs / 1e9:.3f}",
            f"{one.inherited.importance:.4g}",
            f"{one.inherited.search_top1:.1f} %",
            f"{one.search_top1:.1f} %",
            f"{one.test_top1:.1f} %",
        )
    console.print(table)


def _print_correlations(found: Ranking, console: Console) -> None:
    from rich.table import Table

    from slimnas.report.analysis_ranking import WORDS, with_interval

    table = Table(box=None, pad_edge=False)
    table.add_column(f"own top-1 of {len(found.networks)} networks, ranked by", no_wrap=True)
    for heading in ("Kendall tau", "Spearman", "tau on TEST", "tau beyond MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.correlations:
        beyond = one.tau_beyond_macs
        table.add_row(
            WORDS[one.predictor],
            with_interval(one.search.tau, one.search.tau_interval),
            with_interval(one.search.spearman, one.search.spearman_interval),
            with_interval(one.test.tau, one.test.tau_interval),
            "-" if beyond is None else f"{beyond:.2f}",
        )
    console.print(table)
