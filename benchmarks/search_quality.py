"""Are found networks worth their search? Found and other networks, trained alike, by latency.

    python benchmarks/search_quality.py --data cifar10 --epochs 30 --seeds 3

1. Builds the latency table of a space on this machine (or takes --table).
2. Trains a supernet once, as `slimnas search` does.
3. `slimnas search` for targets at shares of the largest network's latency (or --targets).
4. Puts beside each found network, at the same latency by the table: EfficientFormer-L1 scaled
   uniformly; random networks; and the best of NSGA-II on the same supernet and images, with as
   many evaluations as the search made.
5. Trains every network from random weights on TRAIN, with one recipe. SEARCH chooses the best of
   the random ones, in a training of its own; the figures are on TEST, which chooses nothing.
6. Measures all networks side by side on the table's device, and writes table, figure and verdicts:
   is every found network on or above every baseline's front?

Every stage is kept under --cache; interrupted, even killed, the same command goes on. The same
command in a second shell shares the training. A stage's results are named by what they depend on,
so other epochs, seeds or targets reuse what they have in common. --until ends after a stage: train
on another machine with a copy of the cache, and measure here. --quick takes minutes, on a small
space and `digits`; its figures say that the command works and no more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _quality_report import quality_figure, summary, table_lines, verdicts
from _quality_settings import QUICK, Settings
from _quality_stages import Bench
from _quality_training import duration, note, waiting_lock
from _quality_zoo import ship

import slimnas
from slimnas._files import atomic_write_text
from slimnas._versions import versions
from slimnas.arch.cost import cost
from slimnas.errors import SlimnasError
from slimnas.measure.machine import load_average, this_machine
from slimnas.report.figures import save_figure
from slimnas.search.checks import table_digest

HERE = Path(__file__).resolve().parent
NAME = "search_quality"
STAGES = ("table", "supernet", "search", "networks", "train")


def rows_of(bench: Bench) -> list[dict[str, Any]]:
    """A row per network with all its figures."""
    measured = bench.measured()
    rows = []
    for candidate, trained in bench.chosen:
        architecture = candidate.architecture
        timing = measured.get(architecture.digest)
        counted = cost(architecture)
        first = bench.jobs(candidate)[0]
        rows.append(
            {
                "arm": candidate.arm,
                "target_ms": candidate.target_ms,
                "predicted_ms": candidate.predicted_ms,
                "measured_ms": timing and timing["latency_ms"],
                "measured_error_ms": timing and timing["error_ms"],
                "inherited_top1": candidate.inherited_top1,
                "search_top1": [one.search_top1 for one in trained],
                "test_top1": [one.test_top1 for one in trained],
                "images_per_s": [one.images_per_s for one in trained],
                "params": counted.params,
                "macs": counted.macs,
                "widths": architecture.widths,
                "depths": architecture.depths,
                "mb3d": architecture.count("mb3d"),
                "architecture": architecture.to_dict(),
                "trained": f"trained/{bench.finals.key(first)}",
            }
        )
    return rows


def report(bench: Bench) -> dict[str, Any]:
    """Everything worth keeping, as plain data."""
    settings, data, device = bench.settings, bench.data, bench.table.device
    rows = rows_of(bench)
    accelerator = bench.finals.accelerator
    threads = f", {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    final_data = bench.final_data
    found = verdicts(rows, len(final_data.test))
    return {
        "benchmark": NAME,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "slimnas": slimnas.__version__,
        "python": platform.python_version(),
        "versions": versions(),
        "machine": asdict(this_machine()),
        "load_average": load_average(),
        "trained_on": f"{accelerator.device.type}{threads}, torch {torch.__version__}",
        "settings": asdict(settings),
        "space": bench.space.to_yaml(),
        "deployed_at": bench.space.input.resolution,
        "data": {
            "title": Path(settings.data).name,
            "description": final_data.description,
            "digest": final_data.digest,
            "of_the_search": {
                "description": data.description,
                "digest": data.digest,
                "train_images": len(data.train),
            },
            "resolution": bench.resolution,
            "train_images": len(final_data.train),
            "search_images": len(final_data.search),
            "test_images": len(final_data.test),
        },
        "table": {
            "runtime": device.runtime.model_dump(),
            "kind": device.kind,
            "soc": device.soc,
            "protocol": device.protocol,
            "date": device.date,
            "errors": [figure.model_dump() for figure in device.errors],
            "digest": table_digest(bench.table),
        },
        "recipe": settings.recipe.model_dump(mode="json"),
        "targets_ms": bench.targets_ms,
        "evaluations": bench.evaluations,
        "rows": rows,
        "random_trials": bench.random_trials(),
        "ranking": bench.ranking(),
        "verdicts": [
            {
                **asdict(one),
                "margin": None if one.margin == float("inf") else one.margin,
                "holds": one.holds,
                "words": one.words,
            }
            for one in found
        ],
    }


def write(result: dict[str, Any], output: Path) -> list[str]:
    """Write figures, JSON, Markdown and the line of RESULTS.md; gives the Markdown."""
    quick = result["settings"]["quick"]
    kind = "quick" if quick else result["settings"]["final_images"]
    name = NAME if kind is None else f"{NAME}_{kind}"
    lines = table_lines(result)
    folder = output / "results"
    atomic_write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    atomic_write_text(folder / f"{name}.md", "\n".join(lines) + "\n")
    save_figure(quality_figure(result), folder / name)
    results = output / "RESULTS.md"
    before = results.read_text(encoding="utf-8") if results.is_file() else ""
    atomic_write_text(results, before + summary(result) + "\n")
    return lines


def parse(words: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--space", default="efficientformer_tiny", help="name or .yaml file")
    add("--data", default="digits", help="as slimnas search takes it")
    add("--backend", default="onnxruntime", help="onnxruntime, openvino, ...")
    add("--threads", type=int, default=1, help="of the latencies")
    add("--clock", choices=("wall", "cpu"), default="wall")
    add("--deploy", type=int, help="side of the images that latency is of; else the space's")
    add("--resolution", type=int, help="side of training images; else the space's")
    add("--max-images", type=int, help="of the data, and of its test split")
    add(
        "--final-images",
        type=int,
        help="as --max-images, for the trainings that give the figures; else the same images",
    )
    add("--search-images", type=int, default=1000, help="that judge a candidate of the search")
    add("--supernet-epochs", type=int, default=30)
    add("--epochs", type=int, default=30, help="of every network's training")
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=2e-3)
    add("--layer-scale", type=float, default=0.1, help="at the beginning of training")
    add("--seeds", type=int, default=1, help="trainings per network")
    add("--seed", type=int, default=0)
    add("--random", type=int, default=8, help="random networks per target")
    add("--shares", type=float, nargs="+", default=(0.7, 0.5, 0.3), help="of the largest network")
    add("--targets", type=float, nargs="+", default=(), help="in ms, instead of --shares")
    add("--train-on", default="cpu", help="auto, cpu, cuda or mps")
    add("--train-threads", type=int, help="of this process on a CPU; else torch's choice")
    add("--no-measure", dest="measure", action="store_false", help="latencies by the table alone")
    add("--quick", action="store_true", help="does it work? no figures to keep")
    add("--table", type=Path, help="folder of a table, instead of building one")
    add("--until", choices=STAGES, help="end after this stage")
    add("--cache", type=Path, default=HERE / f".{NAME}_cache")
    add("--output", type=Path, default=HERE, help="where results go")
    add(
        "--zoo",
        type=Path,
        help="write a zoo entry here for each found network that is below no baseline's front",
    )
    given = parser.parse_args(words)
    fields = {name: getattr(given, name) for name in Settings.__dataclass_fields__}
    fields |= {name: tuple(fields[name]) for name in ("shares", "targets")}
    settings = Settings(**fields)
    return (replace(settings, **QUICK) if settings.quick else settings), given


def stages_of(bench: Bench) -> dict[str, Callable[[], object]]:
    """The stages by name, in order; each does what it lacks."""
    return {
        "table": lambda: bench.table_folder,
        "supernet": lambda: bench.supernet,
        "search": lambda: bench.run,
        "networks": lambda: bench.candidates,
        "train": lambda: bench.chosen,
    }


def compare(settings: Settings, given: argparse.Namespace) -> int:
    """Make every stage, then write and print; or end after the one that was asked for."""
    if given.train_threads is not None:
        torch.set_num_threads(given.train_threads)
    bench = Bench(settings, given.cache, given.table)
    for name, make in stages_of(bench).items():
        began = time.monotonic()
        if name == "train":
            make()  # shared with other processes
        else:
            with waiting_lock(given.cache):
                make()
        note(f"stage {name}: {duration(time.monotonic() - began)}")
        if given.until == name:
            return 0
    with waiting_lock(given.cache):
        result = report(bench)
        lines = write(result, given.output)
        names = [] if given.zoo is None else ship(bench, result, given.zoo)
    print("\n".join(lines))
    for name in names:
        note(f"added {name} in {given.zoo}")
    return 0


def main() -> int:
    """Compare; faults are one line."""
    settings, given = parse()
    try:
        return compare(settings, given)
    except SlimnasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
