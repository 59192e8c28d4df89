"""How well a latency table foretells whole networks, beside simpler ways and the noise.

    taskset -c 1 python benchmarks/latency_table.py --backend onnxruntime --clock cpu

Builds the table of a space as `slimnas latency build` does, then measures random networks that
the build has never seen (another seed, none that it timed), each twice: by the table's protocol,
and again by the whole protocol some minutes later in newly loaded sessions. All predictors are
judged on the first measurement of the same networks; what whole networks they learn from are the
ones that the build has timed for its calibration:

    calibrated    the table
    uncalibrated  isolated entries and the overhead of one call: the table before calibration
    plain sum     every block, stem, downsample and head timed alone as a network of its own, at
                  the table's widths, interpolated between them as the table is, summed
    MACs          a line fitted to the calibration networks' MACs
    forest        a random forest on one-hot features of the calibration networks
    repeat        the second measurement foretelling the first: the noise floor

Every stage (build, held-out networks, parts alone) is kept under --cache; interrupted, even
killed, the same command goes on where it stopped. Results of several backends go to one file.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from sklearn.ensemble import RandomForestRegressor

import slimnas
from slimnas._files import atomic_write_text
from slimnas._lock import folder_lock
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import Component
from slimnas.latency.estimate import estimate
from slimnas.latency.keys import price_key
from slimnas.latency.rows import PriceRow
from slimnas.latency.spaces import space_components
from slimnas.latency.table import DEVICE_FILE, LatencyTable
from slimnas.measure.build import SAMPLES_FILE, BuildJob, build_table
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.journal import Journal, read_journal
from slimnas.measure.machine import load_average, this_machine
from slimnas.measure.plan import Entry, Plan, Term
from slimnas.measure.results import (
    Check,
    error_figure,
    make_prior,
    network_timings,
    timings,
    usual_pace,
)
from slimnas.measure.schedule import Networks, timed_plan
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Protocol
from slimnas.measure.validate import (
    BuildRecord,
    ValidateJob,
    Validation,
    validate_table,
)
from slimnas.measure.visits import Progress, in_passes, open_bench
from slimnas.runtimes.base import Runtime
from slimnas.runtimes.registry import get_runtime

HERE = Path(__file__).resolve().parent
SECONDS_FILE = "build_seconds.json"
TREES = 500


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    backend: str
    space: str
    networks: int
    seed: int
    build_seed: int
    threads: int
    clock: Literal["wall", "cpu"]

    @property
    def scope(self) -> SpaceScope:
        """What the table covers."""
        return SpaceScope(SearchSpace.load(self.space))


@dataclass(frozen=True)
class Built:
    """The table and what its build leaves beside it."""

    table: LatencyTable
    record: BuildRecord
    prior: LatencyTable
    networks: tuple[NetworkTiming, ...]
    plan: Plan
    seconds: float


def build_stage(settings: Settings, runtime: Runtime, folder: Path) -> Built:
    """Build the table, unless it is there."""
    job = BuildJob(
        output=folder / f"table-{settings.backend}",
        scope=settings.scope,
        protocol=Protocol(clock=settings.clock, seed=settings.build_seed),
    )
    seconds = folder / SECONDS_FILE
    if not (job.output / DEVICE_FILE).is_file():
        show = _keeping_seconds(seconds, progress("build"))
        build_table(job, runtime, progress=show)
        show(1, 1, "written")
    header, visits = read_journal(job.output / SAMPLES_FILE)
    plan = timed_plan(job.scope, job.protocol, Networks(**header["networks"]), visits)
    found = timings(plan.entries, visits)
    return Built(
        table=LatencyTable.load(job.output),
        record=BuildRecord.load(job.output),
        prior=make_prior(plan, found),
        networks=network_timings(plan.calibration, found),
        plan=plan,
        seconds=sum(json.loads(seconds.read_text(encoding="utf-8"))),
    )


def _keeping_seconds(path: Path, show: Progress) -> Progress:
    """Add how long this run takes to a list in a file, after every visit, in case of a kill."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    began = time.perf_counter()

    def keep(done: int, planned: int, name: str) -> None:
        atomic_write_text(path, json.dumps([*earlier, round(time.perf_counter() - began, 3)]))
        show(done, planned, name)

    return keep


def held_out_stage(settings: Settings, runtime: Runtime, folder: Path, built: Built) -> Validation:
    """Measure the held-out networks, twice the passes of the table's protocol."""
    protocol = built.record.protocol
    job = ValidateJob(
        table=built.table,
        record=built.record,
        scope=settings.scope,
        output=folder / "held_out",
        protocol=replace(protocol, passes=2 * protocol.passes, seed=settings.seed),
        networks=settings.networks,
        seed=settings.seed,
    )
    return validate_table(job, runtime, progress=progress("held-out networks"))


def alone_stage(settings: Settings, runtime: Runtime, folder: Path, built: Built) -> LatencyTable:
    """Time every part that the table has a row for as a network of its own."""
    entries = [
        Entry(f"alone {price_key(part)}", (Term((part,), 1.0),), price_key(part))
        for part in parts_of(settings.scope, built.table)
    ]
    protocol = replace(built.record.protocol, seed=settings.seed)
    header = {"parts": "alone", **settings.scope.identity, "protocol": protocol.to_dict()}
    with (
        folder_lock(folder / "alone"),
        open_bench(runtime, protocol, built.plan.reference) as bench,
    ):
        journal = Journal(folder / "alone" / "journal.jsonl", header)
        wanted = in_passes(entries, protocol, journal.visits)
        bench.make(wanted, journal.visits, journal.append, progress("parts alone"))
    found = timings(entries, journal.visits)
    now_ms = usual_pace(one for visit in journal.visits for one in visit.rounds)
    scale = built.record.reference_ms / now_ms
    rows = []
    for entry in entries:
        assert entry.key is not None
        timing = found[entry.name]
        ms, spread_ms = timing.latency_ms * scale, timing.spread_ms * scale
        rows.append(PriceRow(entry.key, ms, spread_ms, timing.n, "measured"))
    return LatencyTable(built.table.device, tuple(rows))


def parts_of(scope: SpaceScope, table: LatencyTable) -> list[Component]:
    """One part for every row of the table that a network of the space may need."""
    limits = scope.space.limits.model_copy(update={"monotone_widths": False})
    wide = scope.space.model_copy(update={"limits": limits})
    found: dict[object, Component] = {}
    for part in space_components(wide):
        if price_key(part) in table.by_key:
            found.setdefault(price_key(part), part)
    return list(found.values())


def features(architecture: Architecture, space: SearchSpace) -> list[float]:
    """Per stage: width, depth and MB3D blocks, as numbers and one-hot."""
    values: list[float] = []
    for stage, choices in zip(architecture.stages, space.stages, strict=True):
        attention = sum(block.type == "mb3d" for block in stage.blocks)
        values += [stage.width, len(stage.blocks), attention]
        values += [float(stage.width == width) for width in choices.width.values]
        values += [float(len(stage.blocks) == depth) for depth in range(choices.slots + 1)]
        values += [float(attention == count) for count in range(choices.slots + 1)]
    return values


Predict = Callable[[Architecture], float]


def macs_line(networks: Sequence[NetworkTiming]) -> Predict:
    """A line through the networks' MACs and latencies by least squares."""
    macs = [cost(one.architecture).macs / 1e9 for one in networks]
    slope, start = np.polyfit(macs, [one.latency_ms for one in networks], 1)
    return lambda architecture: float(start + slope * cost(architecture).macs / 1e9)


def forest(networks: Sequence[NetworkTiming], space: SearchSpace) -> Predict:
    """A random forest on `features`."""
    model = RandomForestRegressor(n_estimators=TREES, random_state=0)
    rows = [features(one.architecture, space) for one in networks]
    model.fit(rows, [one.latency_ms for one in networks])
    return lambda architecture: float(model.predict([features(architecture, space)])[0])


def compare(
    space: SearchSpace, built: Built, alone: LatencyTable, seen: Validation
) -> dict[str, Any]:
    """The figures of every predictor on the first measurement of the held-out networks."""
    networks = [check.architecture for check in seen.checks]
    by_table: dict[str, LatencyTable] = {
        "calibrated": built.table,
        "uncalibrated": built.prior,
        "plain sum": alone,
    }
    predicted = {
        name: [estimate(one, table).latency_ms for one in networks]
        for name, table in by_table.items()
    }
    for name, predict in (
        ("MACs", macs_line(built.networks)),
        ("forest", forest(built.networks, space)),
    ):
        predicted[name] = [predict(one) for one in networks]
    predicted["repeat"] = [second for _, second in seen.halves_ms]
    truth = [first for first, _ in seen.halves_ms]
    found: dict[str, Any] = {}
    for name, values in predicted.items():
        checks = [Check(*each) for each in zip(networks, values, truth, strict=True)]
        if name == "calibrated":
            checks = [
                replace(check, interval_ms=estimate(check.architecture, built.table).interval_ms)
                for check in checks
            ]
        figure = error_figure(checks, name).model_dump(exclude={"what"}, exclude_none=True)
        found[name] = {**figure, "predicted_ms": [round(ms, 6) for ms in values]}
    return {"predictors": found, "measured_ms": [round(ms, 6) for ms in truth]}


def report(
    settings: Settings, runtime: Runtime, built: Built, seen: Validation, found: dict[str, Any]
) -> dict[str, Any]:
    """Everything worth keeping, as plain data."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "slimnas": slimnas.__version__,
        "runtime": {"name": runtime.name, "version": runtime.version, "dtype": runtime.dtype},
        "python": platform.python_version(),
        "machine": asdict(this_machine()),
        "load_average": load_average(),
        "settings": asdict(settings),
        "protocol": built.record.protocol.describe(),
        "build": {
            "seconds": round(built.seconds, 1),
            "rows": len(built.table.rows),
            "calibration_networks": len(built.networks),
            "stated": [
                figure.model_dump(exclude_none=True) for figure in built.table.device.errors
            ],
        },
        "held_out": {
            "networks": len(seen.checks),
            "pace": round(seen.pace, 5),
            "mape_percent_both_measurements": seen.figure.mape_percent,
            "mape_percent_as_clocked": seen.unscaled.mape_percent,
        },
        **found,
    }


def table(result: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, one row per predictor."""
    lines = [
        "| predictor | MAPE % | within 5 % | within 10 % | bias % | worst % | Spearman "
        "| 90 % interval holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["predictors"].items():
        holds = row.get("coverage_percent")
        lines.append(
            f"| {name} | {row['mape_percent']:.2f} | {row['within_5_percent']:.0f} "
            f"| {row['within_10_percent']:.0f} | {row['bias_percent']:+.2f} "
            f"| {row['max_percent']:.2f} | {row['spearman']:.4f} "
            f"| {'-' if holds is None else f'{holds:.0f} %'} |"
        )
    build, held_out = result["build"], result["held_out"]
    return [
        *lines,
        "",
        f"built in {build['seconds'] / 60:.1f} min: {build['rows']} rows, "
        f"{build['calibration_networks']} calibration networks; {held_out['networks']} held-out "
        f"networks, pace {held_out['pace']:.3f} of the build's",
    ]


def summary(result: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    settings, build = result["settings"], result["build"]
    rows = result["predictors"]
    ours = rows["calibrated"]
    others = ", ".join(
        f"{name} {row['mape_percent']:.2f}" for name, row in rows.items() if name != "calibrated"
    )
    return (
        f"| {result['date']} | latency_table {settings['backend']} | {result['machine']['cpu']}, "
        f"{settings['threads']} thread, {result['runtime']['name']} "
        f"{result['runtime']['version']}, {settings['clock']} clock "
        f"| {settings['space']}, {result['held_out']['networks']} held-out networks, built in "
        f"{build['seconds'] / 60:.1f} min: {build['rows']} rows, {build['calibration_networks']} "
        f"calibration networks | MAPE % of our table {ours['mape_percent']:.2f} (within 5 %: "
        f"{ours['within_5_percent']:.0f} %, within 10 %: {ours['within_10_percent']:.0f} %, "
        f"worst {ours['max_percent']:.2f} %, Spearman {ours['spearman']:.4f}, 90 % interval holds "
        f"{ours['coverage_percent']:.0f} %); {others} |"
    )


def progress(what: str) -> Progress:
    """Says every hundredth of a stage on stderr, with the time it still takes."""
    began = time.perf_counter()
    first: list[int] = []

    def show(done: int, planned: int, name: str) -> None:
        first.extend([done] if not first else [])
        if done % max(planned // 100, 1) and done != planned:
            return
        new = done - first[0]
        left = (time.perf_counter() - began) / new * (planned - done) / 60 if new else float("nan")
        print(f"{what} {done}/{planned}, {left:.1f} min left: {name}", file=sys.stderr)

    return show


def parse() -> tuple[Settings, Path, Path]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime, openvino, ...")
    parser.add_argument("--space", default="efficientformer_small", help="name or .yaml file")
    parser.add_argument("--networks", type=int, default=40, help="held-out networks")
    parser.add_argument("--seed", type=int, default=1, help="of the held-out networks")
    parser.add_argument("--build-seed", type=int, default=0, help="of the build")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument(
        "--cache", type=Path, default=HERE / ".latency_cache", help="where stages are kept"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    given = vars(parser.parse_args())
    output, cache = given.pop("output"), given.pop("cache")
    settings = Settings(**given)
    if settings.seed == settings.build_seed:
        parser.error("--seed and --build-seed must differ: held-out networks are fresh")
    return settings, output, cache / settings.backend


def main() -> None:
    """Measure, print and keep."""
    settings, output, folder = parse()
    runtime = get_runtime(settings.backend, threads=settings.threads)
    space = settings.scope.space
    built = build_stage(settings, runtime, folder)
    seen = held_out_stage(settings, runtime, folder, built)
    alone = alone_stage(settings, runtime, folder, built)
    result = report(settings, runtime, built, seen, compare(space, built, alone, seen))
    path = output / "results" / "latency_table.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"backends": {}}
    known = {
        "benchmark": "latency_table",
        "backends": {**known["backends"], settings.backend: result},
    }
    atomic_write_text(path, json.dumps(known, indent=1) + "\n")
    results = output / "RESULTS.md"
    atomic_write_text(results, results.read_text(encoding="utf-8") + summary(result) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
