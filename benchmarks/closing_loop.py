"""Do found networks run in their target time? Searches at shares of the largest network.

    taskset -c 1 python benchmarks/closing_loop.py --clock cpu

1. Builds the table of a space as `slimnas latency build` does (or takes --table).
2. Trains a supernet as `slimnas search` does (or takes --supernet).
3. Measures the network that slimming starts from, the largest; targets are shares of that.
4. One `slimnas search` per target in a fresh process, from that supernet: each ends by measuring
   what it found, corrects the table and goes on until the network is on target.
5. Measures the found networks and the largest again, side by side in this process: what
   somebody else would see who measures them later.

Every stage is kept under --cache; interrupted, even killed, the same command goes on where it
stopped. --quick shrinks table and training until the whole takes minutes; its figures say that
the command works and no more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import slimnas
from slimnas._files import atomic_write_text
from slimnas.arch.architecture import Architecture
from slimnas.latency.table import DEVICE_FILE, LatencyTable
from slimnas.measure.build import BuildJob, build_table
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.local import LocalDevice, open_local
from slimnas.measure.machine import load_average, this_machine
from slimnas.measure.schedule import Networks
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Protocol
from slimnas.measure.visits import time_networks
from slimnas.runtimes.registry import get_runtime
from slimnas.search.importance import ImportanceRecord
from slimnas.supernet.train import load_supernet

HERE = Path(__file__).resolve().parent
SHARES = (0.7, 0.5, 0.3)
WANTED = 0.97
WITHOUT_END_MS = 1e6
"""A target that every network meets: the search ends once the supernet is trained."""

QUICK_SEARCH = ("--epochs", "1", "--max-images", "400", "--search-images", "60")


@dataclass(frozen=True)
class Settings:
    """What is searched and how it is measured."""

    space: str
    data: str
    backend: str
    threads: int
    clock: str
    seed: int
    quick: bool
    table: str | None
    supernet: str | None


class Bench:
    """The stages; each is skipped where the cache holds its result."""

    def __init__(self, settings: Settings, cache: Path) -> None:
        self.settings = settings
        self.cache = cache
        self.space = slimnas.SearchSpace.load(settings.space)

    def table(self) -> Path:
        """The folder of the table."""
        if self.settings.table is not None:
            return Path(self.settings.table)
        folder = self.cache / "local"
        if (folder / DEVICE_FILE).is_file():
            return folder
        clock = "cpu" if self.settings.clock == "cpu" else "wall"
        quick = self.settings.quick
        protocol = Protocol(clock=clock, rounds=3, passes=1) if quick else Protocol(clock=clock)
        job = BuildJob(
            output=folder,
            scope=SpaceScope(self.space),
            protocol=protocol,
            networks=Networks(20, 5) if quick else Networks(),
        )
        runtime = get_runtime(self.settings.backend, threads=self.settings.threads)
        build_table(job, runtime, progress=note_progress)
        return folder

    def supernet(self, table: Path) -> Path:
        """The trained supernet."""
        if self.settings.supernet is not None:
            return Path(self.settings.supernet)
        folder = self.cache / "supernet"
        self._search(WITHOUT_END_MS, table, folder, "--no-measure")
        return folder / "supernet.safetensors"

    def largest(self, supernet: Path) -> Architecture:
        """The network that slimming starts from."""
        trained = load_supernet(supernet)
        space = trained.supernet.space
        start = ImportanceRecord(trained.supernet.alphas(), {}).start(space)
        return space.architecture(start, name="largest")

    def device(self, table: Path) -> LocalDevice:
        """This machine, as the table was measured on it."""
        return open_local(LatencyTable.load(table), self.space)

    def largest_timing(self, device: LocalDevice, largest: Architecture) -> NetworkTiming:
        """Its latency, measured once for all targets."""
        kept = self.cache / "largest.json"
        if kept.is_file():
            known = json.loads(kept.read_text(encoding="utf-8"))
            if known["architecture"] == largest.digest:
                return NetworkTiming(largest, known["latency_ms"], known["error_ms"])
        timing, _ = device.time(largest)
        body = {
            "architecture": largest.digest,
            "latency_ms": timing.latency_ms,
            "error_ms": timing.error_ms,
        }
        atomic_write_text(kept, json.dumps(body) + "\n")
        return timing

    def found(self, share: float, target_ms: float, table: Path, supernet: Path) -> dict[str, Any]:
        """One search; its JSON, and the seconds it took where it ran now."""
        folder = self.cache / f"search-{100 * share:g}"
        began = time.perf_counter()
        body = self._search(target_ms, table, folder, "--supernet", str(supernet))
        return {**body["found"][0], "share": share, "seconds": time.perf_counter() - began}

    def _search(self, target_ms: float, table: Path, folder: Path, *more: str) -> dict[str, Any]:
        settings = self.settings
        command = [
            *(sys.executable, "-m", "slimnas", "search", "--json"),
            *("--target-latency", f"{target_ms!r}ms", "--device", str(table)),
            *("--space", settings.space, "--data", settings.data, "--seed", str(settings.seed)),
            *("--train-on", "cpu", "--output", str(folder)),
            *(QUICK_SEARCH if settings.quick else ()),
            *more,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        body: dict[str, Any] = json.loads(done.stdout)
        return body


def note_progress(done: int, planned: int, what: str) -> None:
    """A line now and then."""
    if done % max(planned // 20, 1) == 0:
        print(f"table {done}/{planned}: {what}", file=sys.stderr)


def report(
    bench: Bench, table: Path, largest: NetworkTiming, found: list[dict[str, Any]]
) -> dict[str, Any]:
    """Measure everything again and put together what is worth keeping."""
    device = bench.device(table)
    architectures = [Architecture.load(one["architecture"]) for one in found]
    again, reference_ms = time_networks(
        [largest.architecture, *architectures],
        device.runtime,
        device.protocol,
        reference=device.reference,
        batch=device.batch,
    )
    info = LatencyTable.load(table).device
    rows = []
    for one, timing in zip(found, again[1:], strict=True):
        measured_ms = one["measured_ms"]
        rows.append(
            {
                **one,
                "of_target": measured_ms / one["target_ms"],
                "again_ms": timing.latency_ms,
                "again_error_ms": timing.error_ms,
                "again_of_target": timing.latency_ms / one["target_ms"],
                "is_on_target": WANTED <= measured_ms / one["target_ms"] <= 1,
            }
        )
    return {
        "benchmark": "closing_loop",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "slimnas": slimnas.__version__,
        "python": platform.python_version(),
        "machine": asdict(this_machine()),
        "load_average": load_average(),
        "settings": asdict(bench.settings),
        "table": {
            "runtime": info.runtime.model_dump(),
            "protocol": info.protocol,
            "date": info.date,
            "errors": [figure.model_dump() for figure in info.errors],
            "interval": None if info.interval is None else info.interval.model_dump(),
        },
        "largest": {
            "widths": list(largest.architecture.widths),
            "depths": list(largest.architecture.depths),
            "mb3d": largest.architecture.count("mb3d"),
            "measured_ms": largest.latency_ms,
            "measured_error_ms": largest.error_ms,
            "again_ms": again[0].latency_ms,
        },
        "reference_ms": reference_ms,
        "found": rows,
    }


def table_lines(result: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, one row per target."""
    lines = [
        "| of the largest | target ms | predicted ms | interval | measured ms | measured/target "
        "| rounds | again/target | widths | depths |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in result["found"]:
        low, high = one["interval_ms"]
        lines.append(
            f"| {100 * one['share']:.0f} % | {one['target_ms']:.3f} | {one['latency_ms']:.3f} "
            f"| {low:.2f}-{high:.2f} | {one['measured_ms']:.3f} ± {one['measured_error_ms']:.3f} "
            f"| {one['of_target']:.4f} | {len(one['rounds'])} | {one['again_of_target']:.4f} "
            f"| {'-'.join(map(str, one['widths']))} | {'-'.join(map(str, one['depths']))} |"
        )
    return lines


def summary(result: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    settings, info = result["settings"], result["table"]
    found = result["found"]
    shares = "/".join(f"{100 * one['share']:.0f}" for one in found)
    measured, again = (
        "/".join(f"{one[key]:.3f}" for one in found) for key in ("of_target", "again_of_target")
    )
    rounds = "/".join(str(len(one["rounds"])) for one in found)
    quick = ", --quick" if settings["quick"] else ""
    return (
        f"| {result['date']} | closing_loop | {result['machine']['cpu']}, {settings['threads']} "
        f"thread, {info['runtime']['name']} {info['runtime']['version']} | {settings['space']}, "
        f"{settings['data']}, {settings['clock']} clock{quick} | largest network "
        f"{result['largest']['measured_ms']:.2f} ms; targets of {shares} % of it: measured over "
        f"target {measured} after {rounds} measurements; measured again later {again} |"
    )


def parse() -> tuple[Settings, Path, Path]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--space", default="efficientformer_tiny", help="name or .yaml file")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime, openvino, ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="does it work? no figures to keep")
    parser.add_argument("--table", help="folder of a table of this machine, instead of building")
    parser.add_argument("--supernet", help="trained supernet, instead of training")
    parser.add_argument("--cache", type=Path, default=HERE / ".closing_loop_cache")
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    given = vars(parser.parse_args())
    output, cache = given.pop("output"), given.pop("cache")
    return Settings(**given), output, cache


def main() -> None:
    """Search, measure, print and keep."""
    settings, output, cache = parse()
    bench = Bench(settings, cache)
    table = bench.table()
    supernet = bench.supernet(table)
    largest = bench.largest_timing(bench.device(table), bench.largest(supernet))
    print(f"largest network {largest.latency_ms:.3f} ms", file=sys.stderr)
    found = []
    for share in SHARES:
        target_ms = round(share * largest.latency_ms, 3)
        found.append(bench.found(share, target_ms, table, supernet))
    result = report(bench, table, largest, found)
    name = "closing_loop_quick" if settings.quick else "closing_loop"
    atomic_write_text(output / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    results = output / "RESULTS.md"
    atomic_write_text(results, results.read_text(encoding="utf-8") + summary(result) + "\n")
    print("\n".join(table_lines(result)))
    missed = [f"{100 * one['share']:.0f} %" for one in result["found"] if not one["is_on_target"]]
    print(f"not within {WANTED} to 1 of the target: {', '.join(missed)}" if missed else "on target")


if __name__ == "__main__":
    main()
