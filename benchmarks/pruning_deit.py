"""How accurate DeiT-T stays when it is pruned, beside a plain prototype and Torch-Pruning.

    python benchmarks/pruning_deit.py --weights deit_tiny_patch16_224.safetensors \
        --data train1000.parquet --test-data val650.parquet

One shot, no training, embedding width kept (but for the arm that says otherwise). Every arm is cut
to the same true MACs from the same weights, calibrated on the same images, and judged on the same
test images. Calibration seeds draw 800 of the images of `--data`.

Arms:

    prototype             squared Taylor per minibatch of 20 over 400 images, one global ranking of
                          score per MAC, units QK, V and FFN, equal dims per head
    channels              squared per-sample gate gradients (`fisher`) in the network's own channels
    principal             the same in the principal basis of every head (`slimnas.prune.basis`);
                          still no weight is changed but by slicing
    principal+bias        and then biases that make up for the mean of what is missing
    principal+refit       and then proj and fc2 refitted in closed form (`least_squares`)
    tp: ...               Torch-Pruning's criteria and scopes, patched so that they run, bisected to
                          the MACs; only if `torch_pruning` is installed

The test images are looked at by this benchmark alone; choices between variants were made on images
split off `--data` (`--choose` repeats that). Finished figures are kept in the result file, so that
the same command goes on where it was stopped. `--speed` times the pruned networks besides.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import onnxruntime
import pruning_torch_pruning as peer
import torch
from supernet_throughput import RESULTS_HEAD, quartiles
from torch import Tensor, nn

import slimnas
from slimnas._files import atomic_write_text
from slimnas.data.splits import DataOptions
from slimnas.data.whole import Normalisation, open_whole
from slimnas.measure.machine import load_average, this_machine
from slimnas.nn.build import Network
from slimnas.nn.fold import fold
from slimnas.prune.apply import apply_plan
from slimnas.prune.basis import to_principal_basis
from slimnas.prune.correct import Correction, correct, position_importance
from slimnas.prune.costs import Budget
from slimnas.prune.scores import Scores
from slimnas.prune.select import select
from slimnas.prune.taylor import score
from slimnas.runtimes.onnx_graph import onnx_bytes
from slimnas.runtimes.onnxruntime_runtime import OnnxSession

HERE = Path(__file__).resolve().parent
NORMALISATION: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BUDGETS = (1.1e9, 1.0e9, 0.9e9, 0.75e9)
PROTOTYPE_IMAGES, CALIBRATION_IMAGES, BATCH = 400, 800, 20
OURS = ("prototype", "channels", "principal", "principal+bias", "principal+refit")
CHOOSE_IMAGES = 300
PEER_SEEDS = 1

Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Seed:
    """What one calibration seed shares between arms and budgets; computed once."""

    network: Network
    images: Tensor
    labels: Tensor
    number: int

    def batches(self, count: int) -> Batches:
        """Minibatches of `count` images drawn by the seed."""
        order = list(range(len(self.labels)))
        random.Random(self.number).shuffle(order)
        chosen = torch.tensor(order[:count])
        images, labels = self.images[chosen], self.labels[chosen]
        return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))

    @property
    def all_batches(self) -> Batches:
        """All images a seed may use."""
        return self.batches(min(CALIBRATION_IMAGES, len(self.labels)))

    @cached_property
    def turned(self) -> Network:
        """The network in its principal basis."""
        return to_principal_basis(self.network, self.all_batches)

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """Of the positions, for corrections."""
        return position_importance(self.network, self.all_batches)

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """Scores by arm, filled as they are asked for."""
        return {}

    def scored(self, arm: str) -> tuple[Network, Scores]:
        """The network an arm cuts, and the scores it cuts by."""
        kind = arm.partition("+")[0]
        network = self.turned if kind == "principal" else self.network
        if kind not in self.scores:
            criterion = "taylor" if kind == "prototype" else "fisher"
            images = self.batches(PROTOTYPE_IMAGES) if kind == "prototype" else self.all_batches
            self.scores[kind] = score(network, images, criterion)
        return network, self.scores[kind]

    def prune(self, arm: str, macs: float) -> tuple[nn.Module, float]:
        """The network of an arm at a budget, and its MACs."""
        if arm not in OURS:
            return peer.prune_to(arm, ARGUMENTS.weights, self.all_batches, macs, self.number)
        network, scores = self.scored(arm)
        chosen = select(self.network.architecture, scores, Budget("macs", macs))
        pruned = apply_plan(chosen.plan, network)
        if "+" in arm:
            method: Correction = "bias" if arm.endswith("+bias") else "least_squares"
            batches = self.all_batches
            pruned = correct(
                network, pruned, chosen.plan, batches, method, importance=self.importance
            )
        return pruned, slimnas.cost(pruned.architecture).macs


def open_images(spec: str) -> tuple[Tensor, Tensor]:
    """All images of a source, normalised: (N, 3, 224, 224) and labels (N,)."""
    options = DataOptions(resolution=(224, 224), channels=3, seed=0)
    images = open_whole(spec, options, normalisation=NORMALISATION, hold_out=False).images
    parts = list(images.eval_batches(100, device="cpu"))
    return torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])


@torch.inference_mode()
def right(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Images whose largest logit is the label's."""
    network.eval()
    return sum(
        int((network(part).argmax(1) == wanted).sum())
        for part, wanted in zip(images.split(50), labels.split(50), strict=True)
    )


class Results:
    """Finished figures, kept in a file after each."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            kept = json.loads(path.read_text())
            if {key: kept.get(key) for key in settings} == settings:
                self.rows = kept["rows"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of an arm, seed and budget."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.save({})

    def save(self, more: dict[str, Any]) -> None:
        """Write everything."""
        body = {**self.settings, **more, "rows": self.rows}
        atomic_write_text(self.path, json.dumps(body, indent=1) + "\n")


def arms() -> tuple[str, ...]:
    """Ours, and the peer's where it is installed."""
    return (*OURS, *(peer.ARMS if peer.available() else ()))


def measure(results: Results, arguments: argparse.Namespace) -> None:
    """Fill in what is missing."""
    images, labels = open_images(arguments.data)
    if arguments.choose:
        test, wanted = images[-CHOOSE_IMAGES:], labels[-CHOOSE_IMAGES:]
        images, labels = images[:-CHOOSE_IMAGES], labels[:-CHOOSE_IMAGES]
    else:
        test, wanted = open_images(arguments.test_data)
    network = slimnas.create_model("deit_tiny", pretrained=arguments.weights)
    if results.find(arm="unpruned") is None:
        macs = slimnas.cost(network.architecture).macs
        results.add(_row("unpruned", 0, macs, macs, right(network, test, wanted), len(wanted)))
    for number in range(arguments.seeds):
        seed = Seed(network, images, labels, number)
        for arm in arguments.arms or arms():
            if arm not in OURS and number >= PEER_SEEDS:
                continue
            for macs in BUDGETS:
                if results.find(arm=arm, seed=number, asked_macs=macs) is not None:
                    continue
                try:
                    pruned, cost = seed.prune(arm, macs)
                except peer.UnreachableError as error:
                    results.add(_row(arm, number, macs, None, None, len(wanted), str(error)))
                else:
                    hits = right(pruned, test, wanted)
                    results.add(_row(arm, number, macs, cost, hits, len(wanted)))
                print(json.dumps(results.rows[-1]), file=sys.stderr, flush=True)


def _row(
    arm: str,
    seed: int,
    asked: float,
    macs: float | None,
    hits: int | None,
    images: int,
    why: str | None = None,
) -> dict[str, Any]:
    top1 = None if hits is None else 100 * hits / images
    row = {"arm": arm, "seed": seed, "asked_macs": asked, "macs": macs, "top1_percent": top1}
    return row | ({} if why is None else {"unreachable": why})


def measure_speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time pruned networks in ONNX Runtime, one thread, batch 1, in turns with the unpruned one."""
    images, labels = open_images(arguments.data)
    network = slimnas.create_model("deit_tiny", pretrained=arguments.weights)
    seed = Seed(network, images, labels, 0)
    _, scores = seed.scored("principal")
    image = images[:1].contiguous()
    sessions = {"unpruned": _session(network, image)}
    found = {}
    for macs in BUDGETS:
        for multiple in (1, 8):
            chosen = select(network.architecture, scores, Budget("macs", macs), round_to=multiple)
            name = f"{macs / 1e9:g}G, multiples of {multiple}"
            sessions[name] = _session(apply_plan(chosen.plan, seed.turned), image)
            found[name] = chosen.after
    times: dict[str, list[float]] = {name: [] for name in sessions}
    order, rng = list(sessions), random.Random(0)
    for _ in range(arguments.rounds):
        rng.shuffle(order)
        for name in order:
            sessions[name].run(image.numpy())
            began = time.perf_counter()
            for _ in range(3):
                sessions[name].run(image.numpy())
            times[name].append((time.perf_counter() - began) / 3 * 1e3)
    rows = []
    for name, macs in found.items():
        ratios = [a / b for a, b in zip(times["unpruned"], times[name], strict=True)]
        spread = quartiles(ratios)
        rows.append(
            {
                "network": name,
                "macs": macs,
                "latency_ms": statistics.median(times[name]),
                "unpruned_latency_ms": statistics.median(times["unpruned"]),
                "speed_up": spread["median"],
                "speed_up_quartiles": [spread["q1"], spread["q3"]],
                "rounds": arguments.rounds,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _session(network: Network, image: Tensor) -> OnnxSession:
    return OnnxSession(onnx_bytes(fold(network), image), threads=1)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Mean and range over seeds per arm and budget, as lines of text."""
    yield f"{'arm':34}" + "".join(f"{macs / 1e9:>20g} G" for macs in BUDGETS)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for macs in BUDGETS:
            mine = [r for r in rows if r["arm"] == arm and r["asked_macs"] == macs]
            top1 = [r["top1_percent"] for r in mine if r["top1_percent"] is not None]
            spread = f" ({min(top1):.1f}-{max(top1):.1f})" if len(top1) > 1 else ""
            cells.append(f"{statistics.mean(top1):.1f}{spread}" if top1 else "-")
        if arm == "unpruned":
            cells = [f"{rows[0]['top1_percent']:.1f}"] * len(BUDGETS)
        yield f"{arm:34}" + "".join(f"{cell:>22}" for cell in cells)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--weights", required=True, type=Path, help="DeiT-T, timm's layout")
    parser.add_argument("--data", required=True, help="ImageNet images to calibrate on")
    parser.add_argument("--test-data", help="other ImageNet images, to judge on")
    parser.add_argument("--choose", action="store_true", help="judge on images split off --data")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--speed", action="store_true", help="time the pruned networks only")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "pruning_deit.json")
    arguments = parser.parse_args()
    if not arguments.choose and not arguments.speed and not arguments.test_data:
        parser.error("--test-data is needed, unless --choose or --speed is given")
    return arguments


def main() -> None:
    """Run what is missing, print the table, add a line to RESULTS.md."""
    torch.set_num_threads(ARGUMENTS.threads)
    settings = {
        "benchmark": "pruning_deit",
        "judged_on": "images split off --data" if ARGUMENTS.choose else "--test-data",
        "calibration_images": CALIBRATION_IMAGES,
        "machine": f"{this_machine().cpu}, {ARGUMENTS.threads} threads, torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}",
    }
    results = Results(ARGUMENTS.output, settings)
    made = {"date": datetime.date.today().isoformat(), "load_average": load_average()}
    if ARGUMENTS.speed:
        speed = measure_speed(ARGUMENTS)
        path = ARGUMENTS.output.with_name("pruning_deit_speed.json")
        body = {**settings, **made, "rows": speed}
        atomic_write_text(path, json.dumps(body, indent=1) + "\n")
        line = ", ".join(
            f"{row['network']}: {row['speed_up']:.2f} [{row['speed_up_quartiles'][0]:.2f}, "
            f"{row['speed_up_quartiles'][1]:.2f}]"
            for row in speed
        )
        _append("pruning_deit --speed", settings, made, f"times faster than unpruned: {line}")
        return
    measure(results, ARGUMENTS)
    results.save(made)
    lines = list(table(results.rows))
    print("\n".join(lines))
    if not ARGUMENTS.choose:
        best = "; ".join(" ".join(line.split()) for line in lines[1:] if not line.startswith("tp"))
        _append("pruning_deit", settings, made, f"top-1 at 1.1/1.0/0.9/0.75 GMACs: {best}")


def _append(name: str, settings: dict[str, Any], made: dict[str, Any], result: str) -> None:
    path = HERE / "RESULTS.md"
    text = path.read_text() if path.is_file() else RESULTS_HEAD
    note = f"{ARGUMENTS.seeds} calibration seeds" if "speed" not in name else "batch 1, 1 thread"
    out = io.StringIO()
    out.write(text.rstrip("\n") + "\n")
    out.write(f"| {made['date']} | {name} | {settings['machine']} | {note} | {result} |\n")
    atomic_write_text(path, out.getvalue())


ARGUMENTS = argparse.Namespace()

if __name__ == "__main__":
    ARGUMENTS = parse_arguments()
    main()
