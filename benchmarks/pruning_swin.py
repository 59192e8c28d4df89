"""Pruning of a scaled-down Swin that is trained here, in minutes, on CIFAR-10 or images like it.

    python benchmarks/pruning_swin.py --data cifar10

`--data` is what `slimnas prune` takes; of parquet files, the folder of `train` and `test`. The
network has Swin-T's plan (patch merging between four stages, shifted windows) at 32 px with a third
of its width, patches of 2 and windows of 4. It is trained by `slimnas.train.loop` on one thread and
kept with its weights in `OUTPUT/model`; then the analysis is the command line's, `slimnas prune` at
75, 50 and 30 % of the MACs and `slimnas prune rules`, once per arm:

    principal       importance `fisher` in the principal basis of every head
    channels        the same in the network's own channels, as EfficientViT's analysis has it
    random          units chosen at random, to compare with

Says nothing about Swin-T on ImageNet: another network, other images, hardly trained. Stopped at any
moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from supernet_throughput import RESULTS_HEAD

from slimnas._files import atomic_write_text
from slimnas.arch.architecture import Architecture
from slimnas.data.splits import DataOptions
from slimnas.data.whole import WholeData, open_whole
from slimnas.errors import SlimnasError, WeightsError
from slimnas.measure.machine import load_average, this_machine
from slimnas.nn.build import build
from slimnas.prune.finetune import evaluate, train_on_labels
from slimnas.prune.ratios import TITLES, ChannelRatios, RatioKind, RatioSet
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import StepReport
from slimnas.train.recipe import TrainRecipe
from slimnas.zoo.entry import ARCHITECTURE, load_entry, save_model
from slimnas.zoo.metrics import TEST_TOP1, Metric
from slimnas.zoo.registry import get

HERE = Path(__file__).resolve().parent
NAME = "swin_scaled_down"
SIDE, PATCH, WINDOW, WIDTH, HEAD_DIM = 32, 2, 4, 32, 16
DEPTHS = (2, 2, 4, 2)
RECIPE = TrainRecipe(epochs=5, batch_size=64, lr=1e-3, weight_decay=0.05, ema_decay=0.98)
BUDGETS = ("75%", "50%", "30%")
ARMS = {
    "principal": ("--criterion", "fisher", "--basis", "principal"),
    "channels": ("--criterion", "fisher", "--basis", "channels"),
    "random": ("--criterion", "random", "--basis", "channels"),
}
ALWAYS = ("--correction", "least_squares", "--report", "channel_ratios", "--report", "importance")
STATE, CLOCK = "training.safetensors", "clock.json"
SHOWN: tuple[RatioKind, ...] = ("q", "v", "ffn")  # keys go with queries
STEPS_BETWEEN_NOTES = 50


def scaled_down(classes: int) -> Architecture:
    """Swin-T's plan for images of 32 px; see the top of this file."""
    data = get("swin_tiny").architecture.to_dict()
    data["name"] = NAME
    data["provenance"] = {}
    data["input"]["resolution"] = [SIDE, SIDE]
    data["stem"] |= {"width": WIDTH, "patch": PATCH}
    data["head"]["classes"] = classes
    for number, (stage, depth) in enumerate(zip(data["stages"], DEPTHS, strict=True)):
        width = stage["width"] = WIDTH * 2**number
        sizes = {
            "heads": width // HEAD_DIM,
            "qk_dim": HEAD_DIM,
            "v_dim": HEAD_DIM,
            "ffn_dim": 4 * width,
            "window": WINDOW,
        }
        stage["blocks"] = [
            {**stage["blocks"][0], **sizes, "shift": WINDOW // 2 * (block % 2)}
            for block in range(depth)
        ]
    return Architecture.from_dict(data)


class Clock:
    """Time that training took, kept beside its checkpoint: a run may be stopped and go on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self._wall, self._cpu = kept.get("wall_s", 0.0), kept.get("cpu_s", 0.0)
        self._began, self._cpu_began = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> dict[str, float]:
        """Of the clock on the wall, and of the processor."""
        wall, cpu = time.monotonic() - self._began, time.process_time() - self._cpu_began
        return {"wall_s": round(self._wall + wall, 1), "cpu_s": round(self._cpu + cpu, 1)}

    def keep(self, report: StepReport) -> None:
        """Write the time down now and then, and say where the run is."""
        if report.step % STEPS_BETWEEN_NOTES and report.step < report.steps:
            return
        atomic_write_text(self._path, json.dumps(self.seconds) + "\n")
        line = f"step {report.step}/{report.steps} loss {report.loss:.3f}"
        print(f"{line} {report.images_per_s:.0f} images/s", file=sys.stderr, flush=True)


def trained_model(arguments: argparse.Namespace) -> Path:
    """The folder of the trained network; trains it if it is not there yet.

    Raises:
        WeightsError: the folder holds a network of other settings.
        DataError: the images are missing or damaged.
    """
    folder: Path = arguments.output / "model"
    options = DataOptions(
        resolution=(SIDE, SIDE), channels=3, seed=arguments.seed, max_images=arguments.max_images
    )
    data = open_whole(arguments.data, options, hold_out=True)
    architecture = scaled_down(len(data.class_names))
    recipe = RECIPE.model_copy(update={"epochs": arguments.epochs})
    settings = [architecture.digest, recipe.model_dump(mode="json"), arguments.seed, data.digest]
    identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if (folder / ARCHITECTURE).is_file():
        if load_entry(folder).architecture.provenance.get("identity") != identity:
            raise WeightsError(
                f"{folder}: holds a network of other data or settings; give the same ones, or "
                "another --output"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _train(architecture, data, recipe, identity, folder, arguments.seed)
    return folder


def _train(
    architecture: Architecture,
    data: WholeData,
    recipe: TrainRecipe,
    identity: str,
    folder: Path,
    seed: int,
) -> None:
    clock = Clock(folder / CLOCK)
    accelerator = accelerator_for("cpu")
    network = train_on_labels(
        build(architecture, seed=seed),
        data.images,
        recipe,
        accelerator,
        seed=seed,
        checkpoint=folder / STATE,
        identity=identity,
        on_step=clock.keep,
    )
    seconds = clock.seconds
    assert data.test is not None
    top1 = evaluate(network, data.test, accelerator.device)
    origin = {
        "source": "benchmarks/pruning_swin.py: trained from random weights",
        "data": data.description,
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "training": seconds,
        "identity": identity,
        "preprocessing": {"mean": list(data.images.mean), "std": list(data.images.std)},
    }
    measured = f"measured on the {len(data.test)} images that training has not seen"
    save_model(
        folder,
        architecture=architecture.renamed(NAME, origin),
        weights=network.state_dict(),
        metrics={TEST_TOP1: Metric(top1, measured)},
    )
    for name in (STATE, CLOCK):
        (folder / name).unlink(missing_ok=True)


def slimnas_json(*words: str) -> dict[str, Any]:
    """What a `slimnas` command says with --json.

    Raises:
        SystemExit: the command failed; it has said why.
    """
    print(shlex.join(["slimnas", *words]), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "slimnas", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    body: dict[str, Any] = json.loads(done.stdout)
    return body


def analyse(arm: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune and read the rule, by the command line; the figures of one arm."""
    folder = arguments.output / arm
    budgets = [word for budget in BUDGETS for word in ("--macs", budget)]
    more = ("--report", "sensitivity") if arm == "principal" else ()
    given = ("--model", str(model), "--data", arguments.data, "--output", str(folder))
    how = (*ARMS[arm], *ALWAYS, *more, "--prune-on", "cpu", "--seed", str(arguments.seed))
    body = slimnas_json("prune", *given, *budgets, *how)
    rules = slimnas_json("prune", "rules", str(folder))
    ratios = RatioSet.load(folder / "channel_ratios.json")
    whole = body["before"]["macs"]
    networks = [
        {
            "budget": budget,
            "macs": after["macs"],
            "macs_left": after["macs"] / whole,
            "params": after["params"],
            "top1_percent": after["accuracy_after"],
            "kept_by_stage": kept_by_stage(kept),
            "blocks": after["blocks"],
        }
        for budget, after, kept in zip(BUDGETS, body["after"], ratios.budgets, strict=True)
    ]
    return {
        "arm": arm,
        "unpruned": body["before"],
        "data": body["data"],
        "networks": networks,
        "rule": rules["rule"],
        "findings": rules["findings"],
    }


def kept_by_stage(ratios: ChannelRatios) -> list[dict[RatioKind, float]]:
    """Share of a stage's channels that stays by kind, mean over its blocks."""
    stages = []
    for _, run in groupby(ratios.blocks, key=lambda block: block.stage):
        blocks = list(run)
        kept = {kind: [block.kept(kind) or 0.0 for block in blocks] for kind in SHOWN}
        stages.append({kind: statistics.mean(shares) for kind, shares in kept.items()})
    return stages


def lines(arms: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of accuracies, then what stays by stage, then the findings."""
    yield f"{'arm':11}{'budget':8}{'MACs left':>10}  top-1 %"
    for arm in arms:
        for found in arm["networks"]:
            top1 = ", ".join(f"{name} {value:.1f}" for name, value in found["top1_percent"].items())
            left = f"{100 * found['macs_left']:.1f} %"
            yield f"{arm['arm']:11}{found['budget']:8}{left:>10}  {top1}"
    for arm in arms:
        for found in arm["networks"]:
            for number, kept in enumerate(found["kept_by_stage"], start=1):
                shares = ", ".join(f"{TITLES[k]} {100 * v:.0f} %" for k, v in kept.items())
                yield f"{arm['arm']} {found['budget']}, stage {number}: {shares}"
        for finding in arm["findings"]:
            values = ", ".join(
                "-" if value is None else f"{value:.2f}" for value in finding["values"].values()
            )
            yield f"{arm['arm']}: {finding['finding']}: {finding['verdict']} ({values})"


def main() -> int:
    """Train what is missing, analyse, print, write the figures down."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the commands
    try:
        model = trained_model(arguments)
    except SlimnasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stored = load_entry(model)
    results = [analyse(arm, model, arguments) for arm in ARMS]
    made = stored.architecture.provenance
    minutes = made["training"]["cpu_s"] / 60
    machine = (
        f"{this_machine().cpu}, cpu, {arguments.threads} thread, torch {torch.__version__}, "
        f"numpy {np.__version__}"
    )
    body = {
        "benchmark": "pruning_swin",
        "about": f"a scaled-down Swin trained for {minutes:.1f} minutes of one processor; says "
        "nothing about Swin-T on ImageNet",
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "load_average": load_average(),
        "architecture": scaled_down(stored.architecture.head.classes).to_dict(),
        "training": {key: made[key] for key in ("data", "recipe", "seed", "training")},
        "top1_percent": stored.metrics[TEST_TOP1].value,
        "arms": results,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(arguments.results, json.dumps(body, indent=1) + "\n")
    print("\n".join(lines(results)))
    _append(body, minutes)
    return 0


def _append(body: dict[str, Any], minutes: float) -> None:
    path = HERE / "RESULTS.md"
    text = path.read_text() if path.is_file() else RESULTS_HEAD
    settings = f"scaled-down Swin, {minutes:.1f} min of training, {body['arms'][0]['data']}"
    pruned = "; ".join(
        f"{arm['arm']} "
        + ", ".join(
            "/".join(f"{v:.1f}" for v in n["top1_percent"].values()) for n in arm["networks"]
        )
        for arm in body["arms"]
    )
    result = (
        f"top-1 % unpruned {body['top1_percent']:.1f}; cut/refitted at {', '.join(BUDGETS)} of the "
        f"MACs: {pruned}"
    )
    line = f"| {body['date']} | pruning_swin | {body['machine']} | {settings} | {result} |\n"
    atomic_write_text(path, text.rstrip("\n") + "\n" + line)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="as slimnas prune takes it")
    parser.add_argument("--max-images", type=int, default=20_000, help="to train on")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/pruning_swin"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "pruning_swin.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
