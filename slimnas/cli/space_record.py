"""`slimnas space record`: what a trained supernet says about its space, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.runs import RunOn, says_how_to_go_on
from slimnas.cli.search_record import record_lines

if TYPE_CHECKING:
    from slimnas.data.splits import DataSplits
    from slimnas.search.config import SearchConfig
    from slimnas.search.record import RecordedData, SearchRecord
    from slimnas.search.record_making import Subject
    from slimnas.supernet.train import TrainedSupernet


def record(
    run: Annotated[Path, typer.Argument(help="Run folder of a search that trained a supernet.")],
    output: Annotated[Path, typer.Option(help="The record to write, a .yaml file.")],
    selections: Annotated[
        int, typer.Option(min=20, help="Random networks to measure, beside single changes.")
    ] = 300,
    walks: Annotated[
        int, typer.Option(min=0, help="Searches for made-up devices to measure along.")
    ] = 12,
    search_images: Annotated[
        int, typer.Option(min=1, help="SEARCH images that judge a network, at most.")
    ] = 2000,
    data: Annotated[
        str | None, typer.Option(help="The run's images, where they have moved.")
    ] = None,
    evaluate_on: Annotated[RunOn, typer.Option(help="Where networks are judged.")] = RunOn.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Record what the supernet of a search says about its space.

    Measures some hundred networks with the supernet's weights and writes their top-1 with the
    architecture parameters. `slimnas search --supernet FILE` then answers any device and target
    without images and training. Stop it at any moment and give the same command again: it goes on.

    Example: slimnas space record runs/mine --output mine.yaml
    """
    from slimnas._lock import folder_lock
    from slimnas.cli.progress import RecordProgress
    from slimnas.errors import SpecError
    from slimnas.search.config import FILE, SearchConfig
    from slimnas.search.record import SUFFIXES
    from slimnas.search.record_making import Plan, make_record

    if output.suffix not in SUFFIXES:
        raise SpecError(f"{output}: a record must be a .yaml file; give such an --output")
    config = SearchConfig.load(run / FILE)
    changes: dict[str, Any] = {"search_images": search_images}
    if data is not None:
        changes["data"] = data
    config = config.model_copy(update=changes)
    plan = Plan(selections, walks, config.seed)
    with folder_lock(run), RecordProgress() as progress, says_how_to_go_on():
        subject = _subject(run, config, evaluate_on.value)
        made = make_record(subject, plan, progress)
        made.save(output)
    for line in record_lines(made):
        note(line)
    if as_json:
        print_json(_json_body(made, output))
    else:
        typer.echo(shown_path(output))


def _subject(run: Path, config: SearchConfig, evaluate_on: str) -> Subject:
    """The supernet of a run on its own images, and the journal of what it said before."""
    from slimnas.errors import RunFolderError
    from slimnas.search.checks import require_fitting
    from slimnas.search.importance import ImportanceRecord
    from slimnas.search.record_making import JOURNAL, JournaledEvaluator, Subject
    from slimnas.search.run import SUPERNET, open_evaluator
    from slimnas.supernet.train import load_supernet
    from slimnas.train.devices import accelerator_for

    if not (run / SUPERNET).is_file():
        raise RunFolderError(
            f"{run}: has no {SUPERNET}; name the run folder of a search that trained its supernet"
        )
    trained = load_supernet(run / SUPERNET)
    splits = _images(config, trained)
    seen = splits.for_search()
    require_fitting(trained, trained.supernet.space, seen, config.resolution, str(run / SUPERNET))
    device = accelerator_for(evaluate_on).device
    trained.supernet.to(device)
    importance = ImportanceRecord(trained.supernet.alphas(), {})
    evaluator = open_evaluator(
        config, trained.supernet, importance, seen, order=trained.channel_order()
    )
    space = trained.supernet.space
    start = importance.start(space)
    evaluator.move_to(start)

    def evaluate(selection: Any) -> float:
        top1 = evaluator.top1(selection)
        evaluator.move_to(start)  # lets go of the modules of the one before
        return top1

    images = min(config.search_images, len(seen.search))
    identity = {
        "supernet_digest": trained.digest,
        "data_digest": seen.digest,
        "search_images": images,
        "calibration_images": config.calibration_images,
        "seed": config.seed,
    }
    journal = JournaledEvaluator(run / JOURNAL, identity, space, evaluate)
    details = {
        "resolution": config.resolution,
        "search_images": images,
        "supernet_digest": trained.digest,
        "recipe": dict(trained.provenance.get("recipe") or {}),
    }
    return Subject(
        space, importance, journal.top1, _recorded(config, splits), details, _made(device.type)
    )


def _images(config: SearchConfig, trained: TrainedSupernet) -> DataSplits:
    from slimnas.data.splits import open_data

    return open_data(
        config.data,
        resolution=(config.resolution, config.resolution),
        channels=trained.supernet.space.input.channels,
        seed=config.seed,
        skip_bad_images=config.skip_bad_images,
        max_images=config.max_images,
    )


def _recorded(config: SearchConfig, splits: DataSplits) -> RecordedData:
    from slimnas.search.record import RecordedData

    return RecordedData(
        source=config.data,
        description=splits.description,
        digest=splits.digest,
        classes=splits.classes,
        images={name: len(getattr(splits, name)) for name in ("train", "search", "test")},
    )


def _made(device: str) -> dict[str, str]:
    from slimnas._versions import versions
    from slimnas.measure.machine import this_machine

    machine = this_machine()
    return {"judged_on": f"{device}, {machine.cpu}, {machine.system}", **versions()}


def _json_body(made: SearchRecord, output: Path) -> dict[str, Any]:
    return {
        "record": shown_path(output),
        "space": made.space,
        "digest": made.digest,
        "supernet_digest": made.supernet_digest,
        "measured": len(made.rows),
        "search_images": made.search_images,
        "held_out": [error.model_dump() for error in made.errors],
    }
