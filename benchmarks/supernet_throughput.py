"""Training speed and peak memory of a supernet beside plain networks of its space.

    python benchmarks/supernet_throughput.py

Every mode runs whole training steps (forward, backward, clipping, AdamW, weight averaging) with
the toolkit's own loop, on the same images and threads. Speed: all modes in one process, taking
turns in rounds, so that a machine that slows down slows all of them; ratios are formed within a
round. Memory: each mode alone in a fresh process.

Modes, for the largest network with 0 and with N MB3D blocks (--attention; by default as many as
the space allows, which is its network of most parameters and MACs):

    plain_0, plain_N                    the plain network
    sampled_as_plain_0, ..._N           the supernet, alphas so large that every step takes
                                        exactly that network's path: what the supernet adds
    sampled                             as at the start of a search: alphas 0, random paths,
                                        identity among them, so mostly shorter than plain
    soft                                all paths of every slot, mixed
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# As the search command does, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import slimnas
from slimnas._files import atomic_write_text
from slimnas.arch.space import SearchSpace, Selection
from slimnas.data.batches import ImageSet, MemoryPixels, Split
from slimnas.measure.machine import load_average, this_machine
from slimnas.nn.build import build
from slimnas.supernet.supernet import Supernet, mean_logits
from slimnas.supernet.train import SupernetRecipe, supernet_task
from slimnas.train.checkpoint import TrainState
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import TrainTask, decay_groups, start, train_step

HERE = Path(__file__).resolve().parent
CERTAIN = 60.0
"""Alpha of a choice that is taken always: the noise reaches 37 with probability 1e-16."""
LEAST_SPEED, MOST_MEMORY = 0.9, 1.15
"""Asked of the sampled supernet, as shares of the plain largest network's."""
MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    space: str
    resolution: int
    batch: int
    attention: int
    classes: int
    device: str
    threads: int
    rounds: int
    steps: int
    warmup: int
    memory_steps: int


class Bench:
    """Makes the training step of a mode."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        self.space = SearchSpace.load(settings.space).with_classes(settings.classes)
        self.accelerator: Accelerator = accelerator_for(settings.device)
        side, count = settings.resolution, settings.batch
        generator = torch.Generator().manual_seed(0)
        shape = (count, self.space.input.channels, side, side)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, settings.classes, (count,), generator=generator)
        mean, std = (0.5,) * shape[1], (0.25,) * shape[1]
        self.set = ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, mean, std, False)
        self.images = self.set.normalise(pixels).to(self.accelerator.device)
        self.labels = labels.to(self.accelerator.device)

    def modes(self) -> list[str]:
        """Names of the modes."""
        counts = dict.fromkeys((0, self.settings.attention))
        pairs = [(f"plain_{n}", f"sampled_as_plain_{n}") for n in counts]
        return [*(name for pair in pairs for name in pair), "sampled", "soft"]

    def runner(self, mode: str) -> tuple[TrainState, Callable[[], object]]:
        """The state of a run in `mode`, and what does one step of it."""
        task = self._task(mode)
        state = start(task, self.accelerator)
        return state, lambda: train_step(task, state, self.accelerator, self.images, self.labels)

    def _task(self, mode: str) -> TrainTask:
        # Far more epochs than are measured: tau and learning rate stay near their start.
        recipe = SupernetRecipe(
            mixing="soft" if mode == "soft" else "sampled",
            batch_size=self.settings.batch,
            epochs=100_000,
        )
        if mode.startswith("plain_"):
            selection = self.space.largest(int(mode.rpartition("_")[2]))
            architecture = self.space.architecture(selection)
            network = build(architecture.with_resolution(self.settings.resolution))
            groups = decay_groups(dict(network.named_parameters()), recipe)
            return TrainTask(network, groups, plain_loss, self.set, recipe, 0)
        supernet = Supernet(self.space, resolution=self.settings.resolution, seed=0)
        if mode.startswith("sampled_as_plain_"):
            force(supernet, self.space.largest(int(mode.rpartition("_")[2])))
        return supernet_task(supernet, self.set, recipe, seed=0)

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.accelerator.device.type == "mps":
            torch.mps.synchronize()


def plain_loss(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """The loss the supernet has too."""
    return cross_entropy(mean_logits(model(images)), labels, label_smoothing=0.1)


def force(supernet: Supernet, selection: Selection) -> None:
    """Set the alphas so that every draw takes `selection`'s path."""
    chosen = [choice for slots in selection.paths for choice in slots]
    with torch.no_grad():
        for path, choice in zip(supernet.meta_paths(), chosen, strict=True):
            path.alpha.fill_(-4 * CERTAIN)  # divided by tau, which starts at 4
            path.alpha[path.choices.index(choice)] = 4 * CERTAIN


def measure_speed(bench: Bench) -> dict[str, list[float]]:
    """Images per second of every mode in every round."""
    modes = bench.modes()
    steps = {mode: bench.runner(mode)[1] for mode in modes}
    for mode in modes:
        for _ in range(bench.settings.warmup):
            steps[mode]()
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(bench.settings.rounds):
        turn = number % len(modes)
        for mode in modes[turn:] + modes[:turn]:
            bench.wait()
            began = time.perf_counter()
            for _ in range(bench.settings.steps):
                steps[mode]()
            bench.wait()
            seconds = time.perf_counter() - began
            speeds[mode].append(bench.settings.steps * bench.settings.batch / seconds)
        print(f"round {number + 1} of {bench.settings.rounds} done", file=sys.stderr)
    return speeds


def measure_memory(bench: Bench, mode: str) -> dict[str, float]:
    """Peak memory of this process (or of its GPU) while `mode` trains, in MiB."""
    cuda = bench.accelerator.device.type == "cuda"
    before = 0.0 if cuda else peak_mib()
    state, step = bench.runner(mode)
    for _ in range(bench.settings.memory_steps):
        step()
    peak = torch.cuda.max_memory_allocated() / MIB if cuda else peak_mib()
    return {"peak_mib": peak, "before_mib": before, "state_mib": state_mib(state)}


def state_mib(state: TrainState) -> float:
    """Weights, averaged weights and moments, in MiB."""
    tensors = [*state.model.state_dict().values(), *state.ema.state_dict().values()]
    for values in state.optimizer.state.values():
        tensors += [value for value in values.values() if isinstance(value, Tensor)]
    return float(sum(t.numel() * t.element_size() for t in tensors)) / MIB


def peak_mib() -> float:
    """Most memory this process ever held, in MiB."""
    # Not getrusage on Linux: there a child starts from its parent's peak.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / MIB if platform.system() == "Darwin" else peak / 1024


def memory_in_fresh_process(settings: Settings, mode: str) -> dict[str, float]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", mode]
    for name, value in asdict(settings).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "q1": low, "q3": high}


def ratios(speeds: dict[str, list[float]], mode: str, base: str) -> dict[str, float]:
    """Quartiles over the rounds of speed of `mode` / speed of `base`."""
    return quartiles([a / b for a, b in zip(speeds[mode], speeds[base], strict=True)])


def report(bench: Bench, speeds: dict[str, list[float]], memory: dict[str, Any]) -> dict[str, Any]:
    """Everything worth keeping, as plain data."""
    settings = bench.settings
    rows: dict[str, Any] = {}
    bases = [mode for mode in speeds if mode.startswith("plain_")]
    for mode in speeds:
        mine = [f"plain_{mode.rpartition('_')[2]}"] if "_as_plain_" in mode else bases
        rows[mode] = {
            "images_per_s": quartiles(speeds[mode]),
            "ratio": {base: ratios(speeds, mode, base) for base in mine if base != mode},
            **memory[mode],
        }
    return {
        "benchmark": "supernet_throughput",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "slimnas": slimnas.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": asdict(this_machine()),
        "device_name": torch.cuda.get_device_name()
        if bench.accelerator.device.type == "cuda"
        else this_machine().cpu,
        "precision": bench.accelerator.mixed_precision,
        "load_average": load_average(),
        "settings": asdict(settings),
        "modes": rows,
        "rounds_images_per_s": speeds,
    }


def table(result: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, one row per mode."""
    lines = [
        "| mode | images/s, median [quartiles] | times the plain network's, median [quartiles] "
        "| peak memory, MiB | above the bare process | of it weights, average, moments |",
        "|---|---|---|---|---|---|",
    ]
    for mode, row in result["modes"].items():
        speed = row["images_per_s"]
        compared = "; ".join(f"{_spread(r, 2)} of {base}" for base, r in row["ratio"].items())
        lines.append(
            f"| {mode} | {_spread(speed, 1)} | {compared or '-'} "
            f"| {row['peak_mib']:.0f} | {row['peak_mib'] - row['before_mib']:.0f} "
            f"| {row['state_mib']:.0f} |"
        )
    return lines


def _spread(values: dict[str, float], digits: int) -> str:
    median, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def verdict(result: dict[str, Any]) -> dict[str, dict[str, float | bool]]:
    """What is asked of the sampled supernet beside the plain largest network, and what it does."""
    modes, base = result["modes"], f"plain_{result['settings']['attention']}"
    speed = modes["sampled"]["ratio"][base]["median"]
    peak = modes["sampled"]["peak_mib"] / modes[base]["peak_mib"]
    return {
        "images_per_s_ratio": {"wanted": LEAST_SPEED, "got": speed, "met": speed >= LEAST_SPEED},
        "peak_memory_ratio": {"wanted": MOST_MEMORY, "got": peak, "met": peak <= MOST_MEMORY},
    }


def summary(result: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    settings, modes = result["settings"], result["modes"]
    count = settings["attention"]
    same = modes[f"sampled_as_plain_{count}"]["ratio"][f"plain_{count}"]
    free = modes["sampled"]["ratio"][f"plain_{count}"]
    soft = modes["soft"]["ratio"][f"plain_{count}"]
    peaks = ", ".join(
        f"{m} {modes[m]['peak_mib']:.0f}" for m in (f"plain_{count}", "sampled", "soft")
    )
    return (
        f"| {result['date']} | supernet_throughput | {result['device_name']}, "
        f"{settings['device']}, {settings['threads']} threads, torch {result['torch']} "
        f"| {settings['space']}, {settings['resolution']} px, batch {settings['batch']}, "
        f"{settings['rounds']} rounds of {settings['steps']} steps "
        f"| images/s over plain_{count}'s, median [quartiles]: same path {_spread(same, 2)}, "
        f"sampled {_spread(free, 2)}, soft {_spread(soft, 2)}; peak MiB: {peaks} ("
        f"sampled {result['sampled_beside_largest']['peak_memory_ratio']['got']:.2f} times plain) |"
    )


def parse() -> tuple[Settings, Path, str | None]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--space", default="efficientformer_tiny", help="name or .yaml file")
    parser.add_argument("--resolution", type=int, help="pixels; default: the space's proxy")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--attention", type=int, help="MB3D blocks of plain_N; default: all it can")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="per mode and round")
    parser.add_argument("--warmup", type=int, default=2, help="steps per mode")
    parser.add_argument("--memory-steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    output, mode = given.pop("output"), given.pop("memory_of")
    space = SearchSpace.load(given["space"])
    if given["resolution"] is None:
        given["resolution"] = space.supernet.resolution
    if given["attention"] is None:
        given["attention"] = space.attention_counts()[-1]
    return Settings(**given), output, mode


def main() -> None:
    """Measure, print and keep."""
    settings, output, memory_of = parse()
    if memory_of is not None:
        print(json.dumps(measure_memory(Bench(settings), memory_of)))
        return
    bench = Bench(settings)
    memory = {mode: memory_in_fresh_process(settings, mode) for mode in bench.modes()}
    result = report(bench, measure_speed(bench), memory)
    result["sampled_beside_largest"] = verdict(result)
    name = "supernet_throughput" + ("" if settings.device == "cpu" else f"_{settings.device}")
    atomic_write_text(output / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    results = output / "RESULTS.md"
    head = RESULTS_HEAD if not results.is_file() else results.read_text(encoding="utf-8")
    atomic_write_text(results, head + summary(result) + "\n")
    print("\n".join(table(result)))


RESULTS_HEAD = """# Results of the benchmarks

One line per run; the figures behind it, machine and settings in full, are in `results/*.json`
(of the latest run). Quartiles are over rounds in which the modes take turns.

| date | benchmark | machine | settings | result |
|---|---|---|---|---|
"""

if __name__ == "__main__":
    main()
