"""`slimnas prune`: from a trained network and a budget to the network that meets it."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from slimnas.cli.latency_options import Clock
from slimnas.cli.output import JsonOption, note, print_json, shown_path
from slimnas.cli.prune_inputs import Asked, check_before, open_inputs
from slimnas.cli.prune_rules import rules
from slimnas.cli.runs import RUNS, RunOn, no_empty_folder, plain_name, says_how_to_go_on
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from slimnas.report.pruning import ReportKind

DEFAULT_BUDGET = "70%"

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.command()(rules)


class Labels(str, Enum):
    """Whose labels importance and accuracy go by."""

    AUTO = "auto"
    DATA = "data"
    MODEL = "model"


class Basis(str, Enum):
    """The axes that single dims of a head are."""

    PRINCIPAL = "principal"
    CHANNELS = "channels"


class Method(str, Enum):
    """How units are chosen."""

    GREEDY = "greedy"
    EXACT = "exact"


class Correction(str, Enum):
    """What mends a pruned network without training."""

    NONE = "none"
    BIAS = "bias"
    LEAST_SQUARES = "least_squares"


class Measure(str, Enum):
    """What networks are timed with in the end."""

    AUTO = "auto"
    NONE = "none"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    TORCH = "torch"


class Report(str, Enum):
    """What is shown besides the budgets."""

    CHANNEL_RATIOS = "channel_ratios"
    IMPORTANCE = "importance"
    SENSITIVITY = "sensitivity"


@app.callback(invoke_without_command=True)
def prune(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Zoo name, run folder or architecture file.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="auto: published or the model's own; none; or a weights file.")
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="Images for importance: digits, photos, folder, parquet, tars, hub id."),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(help="Images for accuracy; else 20 % held out of --data.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images for importance, at most.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per minibatch.")] = 20,
    labels: Annotated[
        Labels, typer.Option(help="The data's or the model's predictions.")
    ] = Labels.AUTO,
    criterion: Annotated[
        str,
        typer.Option(
            help="fisher, taylor, taylor_weight, taylor_abs, magnitude or random.",
        ),
    ] = "fisher",
    basis: Annotated[
        Basis, typer.Option(help="principal: heads turned, function kept, so that dims can go.")
    ] = Basis.PRINCIPAL,
    macs: Annotated[
        list[str] | None, typer.Option(help="Budget such as 0.9G or 75%; repeat for several.")
    ] = None,
    params: Annotated[list[str] | None, typer.Option(help="Budget such as 4M or 70%.")] = None,
    latency: Annotated[
        list[str] | None, typer.Option(help="Budget such as 6ms or 80%; needs --device.")
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Share of the units that goes, such as 0.3.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Latency table of the model: a device's name, or a folder.")
    ] = None,
    units: Annotated[
        str, typer.Option(help="What may go: some of qk,v,ffn,head,embedding,layer.")
    ] = "qk,v,ffn",
    method: Annotated[Method, typer.Option(help="exact also tells greedy's gap.")] = Method.GREEDY,
    round_to: Annotated[int, typer.Option(min=1, help="Widths end at multiples of this.")] = 1,
    iterations: Annotated[
        int, typer.Option(min=1, help="Steps to the budget, scored anew after each.")
    ] = 1,
    correction: Annotated[
        Correction, typer.Option(help="Mend without training.")
    ] = Correction.NONE,
    finetune_epochs: Annotated[
        int, typer.Option(min=0, help="Train the result, taught by the unpruned network.")
    ] = 0,
    finetune_between: Annotated[
        bool, typer.Option("--finetune-between", help="After every iteration, not only the last.")
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of fine-tuning.")] = None,
    distillation: Annotated[
        float | None, typer.Option(help="Weight of the teacher in fine-tuning, 0 to 1.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of distillation.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="scores.safetensors of another run, instead of scoring.")
    ] = None,
    report: Annotated[
        list[Report] | None, typer.Option(help="What to show besides; repeat for several.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; else runs/prune-MODEL-DATA.")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded.")
    ] = False,
    measure: Annotated[
        Measure,
        typer.Option(help="Time the results here in this runtime; auto: as --device was, if here."),
    ] = Measure.AUTO,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to measure on.", show_default="1")
    ] = None,
    clock: Annotated[
        Clock | None,
        typer.Option(help="cpu: for machines never idle, one thread.", show_default="wall"),
    ] = None,
    prune_on: Annotated[RunOn, typer.Option(help="Where networks run.")] = RunOn.AUTO,
    seed: Annotated[int, seed_option("Seed of everything random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Remove what matters least of a trained network, to budgets of MACs, parameters or time.

    Scores every unit once on a few images, then plans and cuts one network per budget (70 % of
    the MACs if none is given). Stop it at any moment and give the same command again: it goes on.

    Example: slimnas prune --model deit_tiny --macs 0.9G --report channel_ratios
    """
    if context.invoked_subcommand is not None:
        return
    if model is None:
        raise typer.BadParameter("must be given", param_hint="'--model'")
    # Read by OpenMP when torch loads it; see slimnas.cli.search.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    finetune = {"lr": lr, "distillation": distillation, "temperature": temperature}
    asked = Asked(
        model=model,
        weights=weights,
        data=data,
        test_data=test_data,
        skip_bad_images=skip_bad_images,
        scores=scores,
        budgets=_budgets(macs, params, latency, ratio),
        device=device,
        settings={
            "images": images,
            "batch_size": batch_size,
            "labels": labels.value,
            "criterion": criterion,
            "basis": basis.value,
            "units": [word.strip() for word in units.split(",") if word.strip()],
            "method": method.value,
            "round_to": round_to,
            "iterations": iterations,
            "correction": correction.value,
            "finetune": _finetune(finetune_epochs, finetune, between=finetune_between),
            "finetune_between": finetune_between,
            "seed": seed,
        },
        prune_on=prune_on.value,
        reports=tuple(dict.fromkeys(kind.value for kind in report or ())),
        measure=measure.value,
        threads=threads,
        clock=None if clock is None else clock.value,
    )
    _prune(asked, output, as_json)


def _finetune(
    epochs: int, options: dict[str, float | None], *, between: bool
) -> dict[str, float] | None:
    """The recipe of the command line; None for no fine-tuning.

    Raises:
        typer.BadParameter: an option of a fine-tuning that was not asked for.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if epochs:
        return {"epochs": epochs, **given}
    unused = [f"--{key}" for key in given] + ["--finetune-between"] * between
    if unused:
        raise typer.BadParameter(
            f"{', '.join(unused)}: for fine-tuning; give --finetune-epochs as well"
        )
    return None


def _budgets(
    macs: list[str] | None,
    params: list[str] | None,
    latency: list[str] | None,
    ratio: list[float] | None,
) -> tuple[tuple[str, str], ...]:
    given = [("macs", text) for text in macs or ()]
    given += [("params", text) for text in params or ()]
    given += [("latency_ms", text) for text in latency or ()]
    given += [("units", f"{share:g}") for share in ratio or ()]
    return tuple(dict.fromkeys(given)) or (("macs", DEFAULT_BUDGET),)


def _prune(asked: Asked, output: Path | None, as_json: bool) -> None:
    from slimnas._lock import folder_lock
    from slimnas.cli.prune_output import json_body, print_result
    from slimnas.cli.prune_progress import PruneProgress
    from slimnas.cli.prune_report import write_reports
    from slimnas.prune.config import claim
    from slimnas.prune.run import run_prune

    kinds = cast("tuple[ReportKind, ...]", asked.reports)
    check_before(asked)
    folder = output or RUNS / _run_name(asked)
    with (
        no_empty_folder(folder),
        folder_lock(folder),
        PruneProgress() as progress,
        says_how_to_go_on(),
    ):
        inputs = open_inputs(asked, folder, progress)
        claim(folder, inputs.config)
        note(f"run folder {shown_path(folder)}")
        result = run_prune(
            inputs.config,
            inputs.start,
            inputs.calibration,
            folder,
            listener=progress,
            table=inputs.table,
            scored=inputs.scored,
            prune_on=asked.prune_on,
        )
        report, files = write_reports(result, inputs.config, kinds, folder, progress)
    if as_json:
        print_json(json_body(result, report.ratios, inputs.config, folder, files))
    else:
        print_result(result, report.ratios, blocks="channel_ratios" in kinds)
        for path in files.values():
            typer.echo(shown_path(path))
    if inputs.start.trained_on is not None:
        note(f"remember: weights {inputs.start.source}")


def _run_name(asked: Asked) -> str:
    return "-".join(["prune", plain_name(asked.model), plain_name(asked.data or "default")])
