"""Every architecture of the zoo in every runtime: does it compute what PyTorch computes?

    python benchmarks/runtime_parity.py

Each network is built with random weights, what starts at a constant (layer scale, norms, attention
biases) too, and runs one random image in PyTorch, in evaluation mode and not folded. Folded, as it
is deployed, it goes through each runtime by the runtime's own `export` and `open`; the largest
absolute difference of the logits is stated, also as a share of the largest logit. Single precision.

What is expected of rounding is told by PyTorch itself: the row `torch` has the folded network's
difference, and `rounding`, that of single from double precision. Core ML runs on macOS only;
elsewhere its programs are computed operation by operation with PyTorch (`tests/mil.py`), in
single precision with the weights they hold.

Each case (network, runtime) runs in a process of its own, small networks first, and is kept under
--cache; interrupted, even killed, the same command goes on where it stopped. What failed is tried
again. Runtimes that are not installed are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor, nn

import slimnas
from slimnas._files import atomic_write_text
from slimnas.arch.cost import cost
from slimnas.errors import RuntimeUnavailableError, SlimnasError
from slimnas.measure.machine import this_machine
from slimnas.nn.build import Network
from slimnas.nn.fold import fold
from slimnas.runtimes.agreement import output_of
from slimnas.runtimes.base import Array, FileRuntime, Runtime
from slimnas.runtimes.registry import RUNTIMES, get_runtime
from slimnas.zoo.create import create_model
from slimnas.zoo.registry import builtin_names, get

HERE = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context("forkserver")
ORDER = ("torch", "onnxruntime", "openvino", "executorch", "coreml")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
DTYPE = "fp32"
TOLERANCE = 2e-5
"""Largest difference of the logits, as a share of the largest, as in the runtimes' contract."""


@dataclass(frozen=True)
class Case:
    """One network in one runtime."""

    model: str
    runtime: str

    def __str__(self) -> str:
        return f"{self.model} {self.runtime}"


def network_of(model: str, seed: int) -> Network:
    """The network in evaluation mode, everything in it random.

    What starts at a constant would hide parts of the network: layer scale at nearly zero,
    attention biases at zero, BatchNorm at the identity.
    """
    network = create_model(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, NORMS):
                part.weight.uniform_(0.5, 1.5, generator=generator)
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_(std=0.1, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
        for parameter in network.parameters():
            low, high = parameter.aminmax()
            if low == high == 0:
                parameter.normal_(std=0.1, generator=generator)
            elif low == high:
                parameter.uniform_(0.1, 0.5, generator=generator)
    return network.eval()


def compared(case: Case, seed: int) -> dict[str, Any]:
    """Run one case in this process.

    Raises:
        SlimnasError: the runtime has no form for the network, or cannot load it.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    network = network_of(case.model, seed)
    shape = network.architecture.input.shape
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, shape.channels, shape.height, shape.width, generator=generator)
    expected = output_of(network, image)
    largest = float(np.abs(expected).max())
    runtime = get_runtime(case.runtime, dtype=DTYPE)
    got, more = answer(runtime, fold(network), image)
    if got.shape != expected.shape:
        raise SlimnasError(f"shape must be {expected.shape}, got {got.shape}")
    difference = float(np.abs(got - expected).max())
    if case.runtime == "torch":
        exact = output_of(network.double(), image.double())
        more["rounding"] = float(np.abs(expected - exact).max()) / largest
    return {
        "largest_output": largest,
        "max_abs_difference": difference,
        "share": difference / largest,
        "equal": bool(difference <= TOLERANCE * largest),  # also false where it is no number
        **more,
        "seconds": round(time.perf_counter() - began, 1),
    }


def answer(runtime: Runtime, module: nn.Module, image: Tensor) -> tuple[Array, dict[str, Any]]:
    """The logits of a folded network in a runtime, and the size of its file."""
    if not isinstance(runtime, FileRuntime):
        return runtime.load(module, image).run(image.numpy()), {}
    model = runtime.export(module, image)
    more: dict[str, Any] = {"file_bytes": len(model)}
    if runtime.name == "coreml" and sys.platform != "darwin":
        return read_back(model, image), {**more, "read_back": True}
    return runtime.open(model).run(image.numpy()), more


def read_back(model: bytes, image: Tensor) -> Array:
    """What a Core ML package computes, operation by operation."""
    sys.path.append(str(HERE.parent / "tests"))
    from mil import evaluate, program_of

    from slimnas.runtimes.coreml_runtime import unpacked

    package = unpacked(model)
    try:
        with torch.inference_mode():
            logits: Array = evaluate(program_of(package), image).numpy()
    except KeyError as error:
        raise SlimnasError(f"tests/mil.py does not know the operation {error}") from error
    finally:
        shutil.rmtree(package.parent)
    return logits


def work(case: Case, seed: int, pipe: Connection) -> None:
    """A process's one case; its result goes into the pipe."""
    try:
        pipe.send(compared(case, seed))
    except SlimnasError as error:
        pipe.send({"failed": str(error).splitlines()[0]})


def measure(case: Case, seed: int, limit_s: float) -> dict[str, Any]:
    """Run one case in a process of its own, for so long at most."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(case, seed, theirs))
    process.start()
    theirs.close()
    result: dict[str, Any] = {"failed": f"not done after {limit_s:g} s"}
    answered = False
    try:
        if answered := ours.poll(limit_s):
            result = ours.recv()
    except EOFError:
        process.join()
        result = {"failed": f"its process ended with code {process.exitcode}"}
    finally:
        if not answered:  # else let it clean up behind itself
            process.kill()
        process.join()
    return {**asdict(case), **result}


def kept(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """The result of a case, from the cache if it succeeded there, same seed and versions."""
    made_with = {"seed": given.seed, "versions": versions(case.runtime)}
    path: Path = given.cache / f"{case.model}-{case.runtime}.json"
    if path.is_file() and not given.fresh:
        known = json.loads(path.read_text(encoding="utf-8"))
        row: dict[str, Any] = known["row"]
        if known["made_with"] == made_with and (given.kept_only or "failed" not in row):
            return row
    if given.kept_only:
        return {**asdict(case), "failed": "not run"}
    row = measure(case, given.seed, given.limit_s)
    given.cache.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps({"made_with": made_with, "row": row}, indent=1) + "\n")
    return row


def versions(*runtimes: str) -> dict[str, str]:
    """Of what the figures depend on."""
    names = dict.fromkeys(("torch", *runtimes))
    return {"slimnas": slimnas.__version__, **{name: get_runtime(name).version for name in names}}


def summaries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Per runtime: how many networks it computes, and where it differs most."""
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        mine = [row for row in rows if row["runtime"] == runtime]
        done = [row for row in mine if "failed" not in row]
        worst = max(done, key=lambda row: row["share"], default=None)
        yield {
            "runtime": runtime,
            "networks": len(mine),
            "compared": len(done),
            "equal": sum(row["equal"] for row in done),
            "largest": worst and {key: worst[key] for key in ("model", "share")},
            "largest_rounding": max((row.get("rounding", 0.0) for row in done), default=0.0),
            "failed": {row["model"]: row["failed"] for row in mine if "failed" in row},
        }


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table: one network per row, one runtime per column."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    cells = {(row["model"], row["runtime"]): row for row in rows}
    rounding = ["rounding"] if "torch" in runtimes else []
    yield "| " + " | ".join(["network", *rounding, *runtimes]) + " |"
    yield "|" + "---|" * (1 + len(rounding) + len(runtimes))
    notes = []
    for model in sorted({row["model"] for row in rows}):
        words = [model, *(shown(cells[model, "torch"], "rounding") for _ in rounding)]
        words += [shown(cells[model, runtime], "share") for runtime in runtimes]
        yield f"| {' | '.join(words)} |"
        notes += [
            f"{model} {runtime}: {cells[model, runtime]['failed']}"
            for runtime in runtimes
            if "failed" in cells[model, runtime]
        ]
    if notes:
        yield ""
        yield from notes


def shown(row: dict[str, Any], key: str) -> str:
    """A cell of the table."""
    if key not in row:
        return "-"
    return f"{row[key]:.1e}" + ("" if row["equal"] else " NOT EQUAL")


def summary(result: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    made_with = result["versions"]
    parts = []
    for one in result["summaries"]:
        least = f"{one['equal']} of {one['networks']}"
        most = one["largest"]
        parts.append(
            f"{one['runtime']} {least}"
            + (f", at most {most['share']:.1e} ({most['model']})" if most else "")
            + (f", not compared: {', '.join(one['failed'])}" if one["failed"] else "")
        )
    libraries = ", ".join(f"{name} {made_with[name]}" for name in made_with if name != "slimnas")
    return (
        f"| {result['date']} | runtime_parity | {result['machine']['cpu']}, 1 thread, fp32, "
        f"{libraries} | {len(result['models'])} networks of the zoo, random weights, batch 1, "
        f"differences as a share of the largest logit | networks equal to PyTorch within "
        f"{TOLERANCE:g}: {'; '.join(parts)} |"
    )


def report(seed: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything worth keeping, as plain data."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    return {
        "benchmark": "runtime_parity",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions(*runtimes),
        "python": platform.python_version(),
        "machine": asdict(this_machine()),
        "settings": {"seed": seed, "batch": 1, "dtype": DTYPE, "tolerance": TOLERANCE},
        "models": list(dict.fromkeys(row["model"] for row in rows)),
        "summaries": list(summaries(rows)),
        "rows": list(rows),
    }


def here(runtime: str) -> bool:
    """Whether a runtime's library is installed; says so if not."""
    try:
        get_runtime(runtime)
    except RuntimeUnavailableError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def parse() -> tuple[list[Case], argparse.Namespace]:
    """The command line; small networks come first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--runtimes", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=180.0, help="longest time of a case")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fresh", action="store_true", help="compare again what is kept")
    how.add_argument("--kept-only", action="store_true", help="report what is kept, run nothing")
    parser.add_argument(
        "--cache", type=Path, default=HERE / ".runtime_parity_cache", help="where cases are kept"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    given = parser.parse_args()

    def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
        return [name for name in names if any(fnmatchcase(name, one) for one in patterns)]

    models = chosen(builtin_names(), given.models)
    models.sort(key=lambda name: cost(get(name).architecture).macs)
    runtimes = [name for name in chosen(ORDER, given.runtimes) if here(name)]
    if not models or not runtimes:
        parser.error("nothing to compare: no such network, or no such runtime is installed")
    cases = [Case(model, runtime) for runtime in runtimes for model in models]
    return cases, given


def main() -> None:
    """Compare what is missing, print and keep."""
    cases, given = parse()
    # Each case's process is forked from one that has imported what takes seconds.
    imported = {RUNTIMES[case.runtime][0]: None for case in cases}
    CONTEXT.set_forkserver_preload(["slimnas.measure.machine", "slimnas.zoo.create", *imported])
    rows = []
    for number, case in enumerate(cases, 1):
        rows.append(kept(case, given))
        told = rows[-1].get("failed") or shown(rows[-1], "share")
        print(f"{number}/{len(cases)} {case}: {told}", file=sys.stderr, flush=True)
    result = report(given.seed, rows)
    results = given.output / "results"
    results.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(table(rows)) + "\n"
    atomic_write_text(results / "runtime_parity.json", json.dumps(result, indent=1) + "\n")
    atomic_write_text(results / "runtime_parity.md", lines)
    page = given.output / "RESULTS.md"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    atomic_write_text(page, before + summary(result) + "\n")
    print(lines)
    print(json.dumps(result["summaries"], indent=1))
    if not all(row.get("equal", False) for row in rows):
        sys.exit("some outputs differ, or a case failed: see the table")


if __name__ == "__main__":
    main()
