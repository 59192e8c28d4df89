"""What importance costs: time and memory beside a plain forward and backward pass.

    python benchmarks/pruning_importance.py

Every arm sees the same images in the same minibatches, with the same model and threads, and goes
from images to the finished scores of all units. Time: all arms in one process, taking turns in
rounds, so that a machine that slows down slows all of them; ratios are formed within a round.
Memory: each arm alone in a fresh process, the most it ever held (VmHWM, or CUDA's own count).

Arms:

    plain                    forward and backward of the mean loss of each minibatch, nothing else
    taylor, fisher, ...      `slimnas.prune.taylor.score_all` of that criterion, digests included
    taylor+fisher, all       several criteria from one pass
    torch_pruning            Torch-Pruning's GroupTaylorImportance: the passes of `plain`, then the
                             scores of every group. Its dependency graph, built once before, is
                             timed apart. Only if `torch_pruning` is installed, only for ViTs of
                             equal query and value dims.
    torch_pruning_plain      `plain` with the attention that Torch-Pruning can trace
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from supernet_throughput import MIB, RESULTS_HEAD, peak_mib, quartiles
from torch import Tensor, nn

import slimnas
from slimnas._files import atomic_write_text
from slimnas.measure.machine import load_average, this_machine
from slimnas.nn.build import Network
from slimnas.nn.vit import Attention
from slimnas.prune.taylor import BY_GRADIENT, GATED, score_all

HERE = Path(__file__).resolve().parent
SINGLE = ("taylor", "fisher", "taylor_weight", "taylor_abs")
SEVERAL = {"taylor+fisher": ("taylor", "fisher"), "all": tuple(sorted(GATED | BY_GRADIENT))}
PEER, PEER_PLAIN = "torch_pruning", "torch_pruning_plain"


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: str
    resolution: int
    images: int
    batch: int
    device: str
    threads: int
    rounds: int
    warmup: int


class Bench:
    """Makes an arm: a function that does one whole pass."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        self.device = torch.device(settings.device)
        network = slimnas.create_model(settings.model, resolution=settings.resolution)
        self.network: Network = network.eval().to(self.device)
        generator = torch.Generator().manual_seed(0)
        side, classes = settings.resolution, network.architecture.head.classes
        shape = (settings.images, network.architecture.input.channels, side, side)
        images = torch.randn(shape, generator=generator)
        labels = torch.randint(0, classes, (settings.images,), generator=generator)
        size = settings.batch
        self.batches = list(zip(images.split(size), labels.split(size), strict=True))
        self.graph_seconds: float | None = None

    def arms(self) -> list[str]:
        """Names of the arms."""
        return ["plain", *SINGLE, *SEVERAL, *([PEER_PLAIN, PEER] if self._peer() else [])]

    def arm(self, name: str) -> Callable[[], object]:
        """What does one pass of an arm."""
        if name == "plain":
            return partial(self.plain, self.network)
        if name == PEER_PLAIN:
            return partial(self.plain, traceable(self.network))
        if name == PEER:
            return self._torch_pruning()
        criteria = SEVERAL.get(name, (name,))
        return lambda: score_all(self.network, self.batches, criteria)

    def plain(self, network: nn.Module, *, keep: bool = False) -> None:
        """Forward and backward of every minibatch; gradients go after each, or are summed."""
        for images, labels in self.batches:
            logits = network(images.to(self.device))
            F.cross_entropy(logits, labels.to(self.device)).backward()
            if not keep:
                network.zero_grad(set_to_none=True)

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def _peer(self) -> bool:
        attentions = [m for m in self.network.modules() if isinstance(m, Attention)]
        equal = all(attention.qk_dim == attention.v_dim for attention in attentions)
        return bool(attentions) and equal and importlib.util.find_spec(PEER) is not None

    def _torch_pruning(self) -> Callable[[], object]:
        import torch_pruning as tp

        network = traceable(self.network)
        importance = tp.importance.GroupTaylorImportance()
        attentions = [m for m in network.modules() if isinstance(m, Attention)]
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it names the class token and position embedding
            pruner = tp.pruner.BasePruner(
                network,
                self.batches[0][0][:1].to(self.device),
                importance=importance,
                global_pruning=True,
                num_heads={attention.qkv: attention.heads for attention in attentions},
                prune_head_dims=True,
                ignored_layers=[network.head],
            )
        self.graph_seconds = time.perf_counter() - began

        def run() -> list[Tensor]:
            self.plain(network, keep=True)
            groups = pruner.DG.get_all_groups(
                ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
            )
            scores = [importance(group).cpu() for group in groups]
            network.zero_grad(set_to_none=True)
            return scores

        return run


def traceable(network: Network) -> Network:
    """A copy whose attention separates q, k, v by `unbind`, the form Torch-Pruning follows."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, Attention):
            module.forward = partial(_unbound_attention, module)  # type: ignore[method-assign]
    return copied


def _unbound_attention(self: Attention, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.qk_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
    return out


def measure_speed(bench: Bench) -> dict[str, list[float]]:
    """Seconds of every arm in every round."""
    arms = bench.arms()
    runs = {name: bench.arm(name) for name in arms}
    for name in arms:
        for _ in range(bench.settings.warmup):
            runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(bench.settings.rounds):
        turn = number % len(arms)
        for name in arms[turn:] + arms[:turn]:
            bench.wait()
            began = time.perf_counter()
            runs[name]()
            bench.wait()
            seconds[name].append(time.perf_counter() - began)
        print(f"round {number + 1} of {bench.settings.rounds} done", file=sys.stderr)
    return seconds


def measure_memory(bench: Bench, name: str) -> dict[str, float]:
    """Peak memory of this process (or of its GPU) in one pass of an arm, in MiB."""
    run = bench.arm(name)
    cuda = bench.device.type == "cuda"
    before = torch.cuda.memory_allocated() / MIB if cuda else peak_mib()
    run()
    peak = torch.cuda.max_memory_allocated() / MIB if cuda else peak_mib()
    return {"peak_mib": peak, "before_mib": before}


def memory_in_fresh_process(settings: Settings, name: str) -> dict[str, float]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name]
    for key, value in asdict(settings).items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def base_of(name: str) -> str:
    """The plain pass an arm is compared with."""
    return PEER_PLAIN if name == PEER else "plain"


def report(
    bench: Bench, seconds: dict[str, list[float]], memory: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Everything worth keeping, as plain data."""
    rows: dict[str, Any] = {}
    for name, times in seconds.items():
        base = base_of(name)
        pairs = zip(times, seconds[base], strict=True)
        rows[name] = {
            "seconds": quartiles(times),
            "compared_with": base,
            "time_ratio": quartiles([mine / plain for mine, plain in pairs]),
            "memory_ratio": memory[name]["peak_mib"] / memory[base]["peak_mib"],
            **memory[name],
        }
    cuda = bench.device.type == "cuda"
    return {
        "benchmark": "pruning_importance",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "slimnas": slimnas.__version__,
        "torch": torch.__version__,
        "torch_pruning": _peer_version(),
        "python": platform.python_version(),
        "machine": asdict(this_machine()),
        "device_name": torch.cuda.get_device_name() if cuda else this_machine().cpu,
        "load_average": load_average(),
        "settings": asdict(bench.settings),
        "torch_pruning_graph_s": bench.graph_seconds,
        "arms": rows,
        "rounds_s": seconds,
    }


def _peer_version() -> str | None:
    if importlib.util.find_spec(PEER) is None:
        return None
    return importlib.metadata.version("torch-pruning")


def table(result: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, one row per arm."""
    lines = [
        "| arm | seconds, median [quartiles] | times its plain pass, median [quartiles] "
        "| peak memory, MiB | times its plain pass |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["arms"].items():
        lines.append(
            f"| {name} | {_spread(row['seconds'])} | {_spread(row['time_ratio'])} "
            f"| {row['peak_mib']:.0f} | {row['memory_ratio']:.3f} |"
        )
    return lines


def _spread(values: dict[str, float]) -> str:
    median, low, high = (f"{values[key]:.2f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def summary(result: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    settings, arms = result["settings"], result["arms"]
    shown = [name for name in ("taylor", "fisher", "taylor_weight", "all", PEER) if name in arms]
    times = ", ".join(f"{name} {_spread(arms[name]['time_ratio'])}" for name in shown)
    peaks = ", ".join(f"{name} {arms[name]['memory_ratio']:.2f}" for name in shown)
    return (
        f"| {result['date']} | pruning_importance | {result['device_name']}, "
        f"{settings['device']}, {settings['threads']} threads, torch {result['torch']}, "
        f"torch-pruning {result['torch_pruning'] or 'not installed'} "
        f"| {settings['model']}, {settings['resolution']} px, {settings['images']} images in "
        f"minibatches of {settings['batch']}, {settings['rounds']} rounds "
        f"| time over a plain forward and backward, median [quartiles]: {times}; "
        f"peak memory over its: {peaks} |"
    )


def parse() -> tuple[Settings, Path, str | None]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny", help="what create_model takes")
    parser.add_argument("--resolution", type=int, default=224, help="pixels")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1, help="passes per arm")
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    output, arm = given.pop("output"), given.pop("memory_of")
    return Settings(**given), output, arm


def main() -> None:
    """Measure, print and keep."""
    settings, output, memory_of = parse()
    if memory_of is not None:
        print(json.dumps(measure_memory(Bench(settings), memory_of)))
        return
    bench = Bench(settings)
    memory = {name: memory_in_fresh_process(settings, name) for name in bench.arms()}
    result = report(bench, measure_speed(bench), memory)
    name = "pruning_importance" + ("" if settings.device == "cpu" else f"_{settings.device}")
    atomic_write_text(output / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    results = output / "RESULTS.md"
    head = RESULTS_HEAD if not results.is_file() else results.read_text(encoding="utf-8")
    atomic_write_text(results, head + summary(result) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
