#!/usr/bin/env python3
"""Times a latency kit's networks with ONNX Runtime on this machine.

Needs Python 3.10, numpy and onnxruntime (or a build of it for your accelerator):

    python -m pip install numpy onnxruntime
    python run_kit.py
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from kit_protocol import (
    KitError,
    Results,
    Visit,
    checked_kit,
    common_options,
    header_of,
    main_of,
    protocol_of,
    say,
    session,
    time_all,
)

CPU = "CPUExecutionProvider"
LEVEL = 3  # windows in a row that are no faster: the warm-up is over


class OnnxBackend:
    """ONNX Runtime on this machine.

    Args:
        folder: the kit's.
        protocol: how to time.
        providers: execution providers, the preferred one first.
        threads: threads per call.
    """

    def __init__(
        self, folder: Path, protocol: Mapping[str, Any], providers: list[str], threads: int
    ) -> None:
        self._folder, self._protocol = folder, protocol
        self._providers, self._threads = providers, threads

    def load(self, file: Mapping[str, Any]) -> Visit:
        """Open a network and run it until its time no longer falls."""
        session, feed = self.open(file)
        clock = time.perf_counter if self._protocol["clock"] == "wall" else time.thread_time
        return Timed(lambda: session.run(None, feed), self._protocol, clock)

    def unload(self, file: Mapping[str, Any]) -> None:
        """Nothing is held."""

    def open(self, file: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A session of a network, and an input for it.

        Raises:
            KitError: the provider is not there, or the network cannot be opened.
        """
        import numpy as np
        import onnxruntime

        missing = [
            one for one in self._providers if one not in onnxruntime.get_available_providers()
        ]
        if missing:
            raise KitError(
                f"{missing[0]} is not in this onnxruntime; it has: "
                + ", ".join(onnxruntime.get_available_providers())
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            opened = onnxruntime.InferenceSession(
                str(self._folder / file["name"]), options, providers=self._providers
            )
        except Exception as error:  # each provider has errors of its own
            reason = str(error).strip().splitlines()[0]
            raise KitError(f"{file['name']}: onnxruntime cannot open it: {reason}") from None
        if opened.get_providers()[0] != self._providers[0]:
            raise KitError(
                f"{file['name']}: ran on {opened.get_providers()[0]} instead of "
                f"{self._providers[0]}; install what that provider needs"
            )
        x = np.random.default_rng(0).standard_normal(file["input"]["shape"])
        return opened, {opened.get_inputs()[0].name: x.astype(file["input"]["dtype"])}


class Timed:
    """A network that was warmed up; called, it is timed for a while.

    Args:
        call: runs the network once.
        protocol: how long.
        clock: seconds.
    """

    def __init__(
        self, call: Callable[[], object], protocol: Mapping[str, Any], clock: Callable[[], float]
    ) -> None:
        self._call, self._protocol, self._clock = call, protocol, clock
        self._repeat = self._warm_up()

    def __call__(self) -> list[float]:
        """Milliseconds per call, one value per sample."""
        self._call()  # brings the network back into the caches
        samples: list[float] = []
        start = self._clock()
        while len(samples) < 3 or 1e3 * (self._clock() - start) < self._protocol["visit_ms"]:
            samples.append(self._sample_ms(self._repeat))
        return samples

    def _sample_ms(self, repeat: int) -> float:
        start = self._clock()
        for _ in range(repeat):
            self._call()
        return 1e3 * (self._clock() - start) / repeat

    def _warm_up(self) -> int:
        """Run until window medians no longer fall; returns how many calls fill a sample."""
        start = self._clock()
        repeat, level, fastest = 1, 0, float("inf")
        while level < LEVEL and 1e3 * (self._clock() - start) < self._protocol["warm_up_ms"]:
            window = median(self._sample_ms(repeat) for _ in range(3))
            repeat = max(1, round(self._protocol["sample_ms"] / max(window, 1e-6)))
            level = 0 if window < (1 - self._protocol["settled"]) * fastest else level + 1
            fastest = min(fastest, window)
        return repeat


def this_machine(given: argparse.Namespace, providers: list[str]) -> dict[str, Any]:
    """The device's fields of a table."""
    import onnxruntime

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    unit = "cpu" if providers[0] == CPU else providers[0].removesuffix("ExecutionProvider").lower()
    return {
        "device": given.device or f"{platform.machine()} machine with {cores} cores",
        "soc": given.soc or _processor(),
        "os": f"{platform.system()} {platform.release()}",
        "runtime": {"name": "onnxruntime", "version": str(onnxruntime.__version__)},
        "compute_unit": unit,
        "threads": given.threads,
        "providers": providers,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Hardware"):
                return value.strip()
    return platform.processor() or "unknown"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    common_options(parser)
    parser.add_argument("--providers", default=CPU, help="execution providers, separated by commas")
    parser.add_argument("--threads", type=int, default=1, help="threads per call")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        help="cpu: for one thread of the CPU on a machine that is never idle",
    )
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Do what the command line asks."""
    kit = checked_kit(given, "onnx")
    if kit is None:
        return
    providers = [one.strip() for one in given.providers.split(",") if one.strip()]
    if given.threads < 1 or not providers:
        raise KitError("--threads must be at least 1 and --providers name one")
    if given.clock == "cpu" and (given.threads > 1 or providers != [CPU]):
        raise KitError(
            "--clock cpu times one thread of the CPU; use --threads 1 without --providers"
        )
    try:
        device = this_machine(given, providers)
    except ImportError as error:
        raise KitError(f"{error}; python -m pip install numpy onnxruntime") from None
    protocol = protocol_of(kit, given, clock=given.clock)
    output = given.output or given.kit / "results.jsonl"
    results = Results(output, header_of(kit, device, protocol, given.shard))
    results.append(session(python=platform.python_version()))
    backend = OnnxBackend(given.kit, protocol, providers, given.threads)
    time_all(kit, backend, results, protocol, shard=given.shard)
    results.append({"finished": session()["session"]})
    say(f"\ndone: send {output} back")


if __name__ == "__main__":
    raise SystemExit(main_of(lambda: run(parse())))
