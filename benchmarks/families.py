"""Every published network of the zoo beside timm's: same weights, same runtime, same threads.

    python benchmarks/families.py --threads 1

Each network is made by timm with random weights and statistics, and turned into
ours by `slimnas.convert.from_timm`. Ours runs folded, as it is deployed; timm's as timm has it, in
evaluation mode. Both are loaded by the same runtime of slimnas, which exports both the same way
where it runs files. Their outputs are compared, then they are timed in turns, in shuffled order
within each round; a ratio is formed within a round, so that a machine that slows down slows both.
A ratio above 1 means that ours is faster.

Eager PyTorch runs both in both memory layouts. Ours counts in its better one; the ratio is against
timm's network as timm gives it, and `ratio_best` against timm's in its better layout too.

LITv2 is left out: timm does not have it. Every case (network, runtime, batch) is kept under
--cache; interrupted, even killed, the same command goes on where it stopped. Runtimes are those of
`slimnas.runtimes`, options in brackets: torch, torch[compile], onnxruntime.
On a GPU: --unit cuda --dtype fp16 --runtimes torch.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from scipy.stats import spearmanr
from timm_import import let_timm_import
from torch import nn

import slimnas
from slimnas._files import atomic_write_text
from slimnas.arch.cost import cost
from slimnas.errors import ExportError
from slimnas.measure.machine import load_average, pinned, this_machine
from slimnas.nn.fold import fold
from slimnas.runtimes.base import Runtime, bound, clock_of
from slimnas.runtimes.registry import get_runtime
from slimnas.zoo.registry import builtin_names, get

HERE = Path(__file__).resolve().parent
FAMILIES = ("efficientvit_*", "efficientformer_*", "efficientformerv2_*", "deit_*", "swin_*")
FEWEST_ROUNDS = 3
SLOW_MS = 100.0
"""Calls that take longer bring their weights into the caches by themselves."""

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference of the outputs, as a share of the largest output."""

LAYOUTS = {"torch": ("torch", "torch[channels-last]")}
"""The runtimes that a case is timed in where a user has the choice; the first is the default."""

PUBLISHED = "v100_images_per_s"
"""The metric whose order EfficientViT's throughputs are held against."""


Arm = tuple[str, str]
"""Whose network, in which layout."""


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    threads: int
    dtype: str
    unit: str
    rounds: int
    budget_s: float
    visit_ms: float
    seed: int


@dataclass(frozen=True)
class Case:
    """One network in one runtime at one batch size."""

    model: str
    runtime: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model} {self.runtime} batch {self.batch}"


def timm_name(model: str) -> str | None:
    """What timm calls a network of the zoo; none if timm does not have it."""
    weights = get(model).architecture.provenance.get("weights") or {}
    owner, _, name = weights.get("repository", "").partition("/")
    return name.partition(".")[0] if owner == "timm" else None


def made_by_timm(name: str, seed: int) -> nn.Module:
    """A network of timm in evaluation mode, everything in it random.

    What starts at a constant would hide parts of the network from the comparison of outputs: layer
    scale at nearly zero, attention biases at zero, BatchNorm at the identity.
    """
    let_timm_import()
    import timm

    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
    for path, parameter in model.named_parameters():
        if path.endswith("gamma"):
            nn.init.uniform_(parameter, 0.1, 0.5)
        elif path.endswith("attention_biases"):
            nn.init.normal_(parameter, std=0.5)
    model.eval()
    return model


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """Compare and time one case."""
    runtimes = {
        layout: get_runtime(
            layout, threads=settings.threads, dtype=settings.dtype, unit=settings.unit
        )
        for layout in LAYOUTS.get(case.runtime, (case.runtime,))
    }
    default = next(iter(runtimes))
    name = timm_name(case.model)
    assert name is not None
    theirs = made_by_timm(name, settings.seed)
    networks = {"ours": fold(slimnas.convert.from_timm(theirs)), "timm": theirs}
    shape = get(case.model).architecture.input.shape
    generator = torch.Generator().manual_seed(settings.seed)
    size = (case.batch, shape.channels, shape.height, shape.width)
    images = torch.randn(size, generator=generator)
    try:
        sessions = {
            (who, layout): runtime.load(copy.deepcopy(network), images)
            for layout, runtime in runtimes.items()
            for who, network in networks.items()
        }
    except ExportError as error:
        return {**asdict(case), "timm_name": name, "failed": str(error).splitlines()[0]}
    outputs = {key: session.run(images.numpy()) for key, session in sessions.items()}
    expected = outputs["timm", default]
    difference = max(float(np.abs(one - expected).max()) for one in outputs.values())
    largest = float(np.abs(expected).max())
    calls = {key: bound(session, images.numpy()) for key, session in sessions.items()}
    times = in_turns(calls, runtimes[default], settings)

    def better(who: str) -> Arm:
        return min(
            ((who, layout) for layout in runtimes), key=lambda key: statistics.median(times[key])
        )

    def ratio(theirs: Arm) -> dict[str, float]:
        pairs = zip(times[better("ours")], times[theirs], strict=True)
        return quartiles([theirs_ms / ours_ms for ours_ms, theirs_ms in pairs])

    ours_ms = statistics.median(times[better("ours")])
    return {
        **asdict(case),
        "timm_name": name,
        "max_abs_difference": difference,
        "largest_output": largest,
        "equal": difference <= TOLERANCE[settings.dtype] * largest,
        "layout": better("ours")[1],
        "timm_layout": better("timm")[1],
        "ours_ms": ours_ms,
        "timm_ms": statistics.median(times["timm", default]),
        "images_per_s": 1e3 * case.batch / ours_ms,
        "ratio": ratio(("timm", default)),
        "ratio_best": ratio(better("timm")),
        "rounds": len(times["ours", default]),
        "rounds_ms": {
            f"{who} {layout}": [round(ms, 5) for ms in each]
            for (who, layout), each in times.items()
        },
        "compute_unit": runtimes[default].compute_unit,
    }


def in_turns(
    calls: dict[Arm, Callable[[], object]], runtime: Runtime, settings: Settings
) -> dict[Arm, list[float]]:
    """Milliseconds per call of everyone in every round, their order shuffled within it."""
    clock, rng = clock_of(runtime), random.Random(settings.seed)

    def visit(call: Callable[[], object], repeat: int) -> float:
        began = clock()
        for _ in range(repeat):
            call()
        return 1e3 * (clock() - began) / repeat

    with pinned(settings.threads):
        alone = {who: min(visit(call, 1) for _ in range(2)) for who, call in calls.items()}
        # As many calls of each, so that both see the machine for about as long.
        repeat = max(1, round(settings.visit_ms / max(alone.values())))
        times: dict[Arm, list[float]] = {who: [] for who in calls}
        order, began = list(calls), time.perf_counter()
        for number in range(settings.rounds):
            spent = time.perf_counter() - began
            if number >= FEWEST_ROUNDS and spent > settings.budget_s:
                break
            rng.shuffle(order)
            for who in order:
                if alone[who] < SLOW_MS:
                    calls[who]()
                times[who].append(visit(calls[who], repeat))
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def kept(case: Case, settings: Settings, cache: Path, *, fresh: bool) -> dict[str, Any]:
    """The result of a case, from the cache if it was measured there with these settings."""
    made_with = {**asdict(settings), "versions": versions()}
    name = f"{case.model}-{case.runtime}-{case.batch}-{settings.unit}-{settings.dtype}"
    path = cache / f"{name}-{settings.threads}.json"
    if path.is_file() and not fresh:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["settings"] == made_with:
            row: dict[str, Any] = known["row"]
            return row
    row = measure(case, settings)
    cache.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps({"settings": made_with, "row": row}, indent=1) + "\n")
    return row


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    names = ("torch", "timm", "onnxruntime")
    return {"slimnas": slimnas.__version__, **{name: version(name) for name in names}}


def summaries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Per runtime and batch: the ratios over all networks."""
    timed = [row for row in rows if "ratio" in row]
    for runtime, batch in dict.fromkeys((row["runtime"], row["batch"]) for row in timed):
        mine = [row for row in timed if (row["runtime"], row["batch"]) == (runtime, batch)]
        ratios = {row["model"]: row["ratio"]["median"] for row in mine}
        slowest = min(ratios, key=lambda model: ratios[model])
        yield {
            "runtime": runtime,
            "batch": batch,
            "networks": len(mine),
            "median": statistics.median(ratios.values()),
            "median_best": statistics.median(row["ratio_best"]["median"] for row in mine),
            "least": {"model": slowest, "ratio": ratios[slowest]},
            "slower": sorted(model for model, ratio in ratios.items() if ratio < 1),
            "order_of_published": order_of_published(mine),
        }


def order_of_published(rows: Sequence[dict[str, Any]]) -> float | None:
    """Rank correlation of our throughputs with those published for a V100, EfficientViT's."""
    pairs = [
        (row["images_per_s"], get(row["model"]).metrics[PUBLISHED].value)
        for row in rows
        if PUBLISHED in get(row["model"]).metrics
    ]
    if len(pairs) < 3:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table, one row per case."""
    yield (
        "| network | runtime | batch | ours ms | timm ms | times faster | than its better layout "
        "| difference |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        begin = f"| {row['model']} | {row.get('layout', row['runtime'])} | {row['batch']} "
        if "failed" in row:
            yield f"{begin}| - | - | - | - | {row['failed']} |"
            continue
        ratio = row["ratio"]
        unequal = "" if row["equal"] else " NOT EQUAL"
        yield (
            f"{begin}| {row['ours_ms']:.3f} | {row['timm_ms']:.3f} | {ratio['median']:.3f} "
            f"[{ratio['q1']:.3f}, {ratio['q3']:.3f}] | {row['ratio_best']['median']:.3f} | "
            f"{row['max_abs_difference']:.1e}{unequal} |"
        )


def summary(result: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    settings, made_with = result["settings"], result["versions"]
    parts = [
        f"{one['runtime']} batch {one['batch']}: median {one['median']:.2f} "
        f"({one['median_best']:.2f} of timm's better layout) of {one['networks']} "
        f"networks, least {one['least']['ratio']:.2f} ({one['least']['model']})"
        for one in result["summaries"]
    ]
    unequal = sum(not row.get("equal", True) for row in result["rows"])
    libraries = ", ".join(f"{name} {made_with[name]}" for name in ("torch", "timm", "onnxruntime"))
    return (
        f"| {result['date']} | families | {result['device_name']}, {settings['threads']} threads, "
        f"{settings['dtype']}, {libraries} | {len(result['models'])} networks of timm's, at most "
        f"{settings['rounds']} rounds | times faster than timm: {'; '.join(parts)}; outputs "
        f"unequal in {unequal} cases; timm has no LITv2 |"
    )


def report(settings: Settings, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything worth keeping, as plain data."""
    units = {row["compute_unit"] for row in rows if "compute_unit" in row} - {"cpu"}
    return {
        "benchmark": "families",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": asdict(this_machine()),
        "device_name": ", ".join(sorted(units)) or this_machine().cpu,
        "load_average": load_average(),
        "settings": asdict(settings),
        "models": list(dict.fromkeys(row["model"] for row in rows)),
        "summaries": list(summaries(rows)),
        "rows": list(rows),
    }


def gmacs(case: Case) -> float:
    """Billions of multiply-adds of one call."""
    return case.batch * cost(get(case.model).architecture).macs / 1e9


def parse() -> tuple[Settings, list[Case], argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=FAMILIES, help="names or patterns")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=list(TOLERANCE))
    parser.add_argument("--unit", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--rounds", type=int, default=15, help="of each case")
    parser.add_argument(
        "--budget-s", type=float, default=90.0, help="no further round of a case after so long"
    )
    parser.add_argument("--visit-ms", type=float, default=150.0, help="least time of one turn")
    parser.add_argument(
        "--most-gmacs",
        type=float,
        default=math.inf,
        help="leave out cases whose batch takes more billions of multiply-adds than this",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument(
        "--cache", type=Path, default=HERE / ".families_cache", help="where cases are kept"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    given = parser.parse_args()
    if given.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}")
    names = [
        name for name in builtin_names() if any(fnmatchcase(name, one) for one in given.models)
    ]
    models = [name for name in names if timm_name(name) is not None]
    for name in sorted(set(names) - set(models)):
        print(f"{name}: not in timm, left out", file=sys.stderr)
    if not models:
        parser.error(f"no network that timm has matches {' '.join(given.models)}")
    cases = [
        Case(model, runtime, batch)
        for batch in given.batches
        for runtime in given.runtimes
        for model in models
    ]
    fields = Settings.__dataclass_fields__
    return Settings(**{name: getattr(given, name) for name in fields}), cases, given


def main() -> None:
    """Measure what is missing, print and keep."""
    settings, asked, given = parse()
    cases = [case for case in asked if gmacs(case) <= given.most_gmacs]
    left_out = [str(case) for case in asked if case not in cases]
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # timm's, when exported
    rows = []
    for number, case in enumerate(cases, 1):
        rows.append(kept(case, settings, given.cache, fresh=given.fresh))
        ratio = rows[-1].get("ratio", {}).get("median")
        shown = "failed" if ratio is None else f"{ratio:.3f}"
        print(f"{number}/{len(cases)} {case}: {shown}", file=sys.stderr, flush=True)
    result = {**report(settings, rows), "left_out": left_out}
    suffix = "" if settings.unit == "cpu" else f"_{settings.unit}_{settings.dtype}"
    path = given.output / "results" / f"families{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    results = given.output / "RESULTS.md"
    before = results.read_text(encoding="utf-8") if results.is_file() else ""
    atomic_write_text(results, before + summary(result) + "\n")
    print("\n".join(table(rows)))
    print(json.dumps(result["summaries"], indent=1))
    if left_out:
        print(f"left out as too large: {', '.join(left_out)}")
    if not all(row.get("equal", False) for row in rows):
        sys.exit("some outputs differ, or a case failed: see the table")


if __name__ == "__main__":
    main()
