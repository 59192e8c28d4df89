#!/usr/bin/env python3
"""Times a latency kit's networks with ExecuTorch on an Android phone that is connected by adb.

Needs Python 3.10 and adb here, and ExecuTorch's executor_runner built for Android:

    python run_kit_adb.py --runner path/to/executor_runner
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from kit_protocol import (
    Kit,
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

REMOTE = "/data/local/tmp/slimnas-kit"
ITERATION = re.compile(r"Iteration \d+ of \d+: ([0-9.]+) ms")
TOTAL = re.compile(r"Model executed successfully (\d+) time\(s\) in ([0-9.]+) ms")
PRIME = 9
"""Visits of the reference at the start: each is a start of the runner."""
MOST = 2000
"""Runs of a network in one start of the runner at most."""


class Phone:
    """A phone at the other end of adb.

    Args:
        adb: the adb program.
        serial: which phone, if there are several.
    """

    def __init__(self, adb: str, serial: str | None) -> None:
        self._adb = [adb, *(["-s", serial] if serial else [])]

    def run(self, *words: str) -> str:
        """What an adb command prints.

        Raises:
            KitError: it fails.
        """
        done = subprocess.run([*self._adb, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise KitError(f"adb {words[0]}: {lines[-1] if lines else 'failed'}")
        return done.stdout + done.stderr

    def shell(self, *words: str) -> str:
        """What a command prints on the phone."""
        return self.run("shell", " ".join(map(shlex.quote, words)))

    def facts(self) -> tuple[str, str, str]:
        """The phone in words, its chip, its system."""

        def said(name: str) -> str:
            return self.shell("getprop", name).strip()

        maker, model = said("ro.product.manufacturer"), said("ro.product.model")
        soc = said("ro.soc.model") or said("ro.board.platform") or "unknown"
        return f"{maker} {model}".strip(), soc, f"Android {said('ro.build.version.release')}"


class ExecuTorchBackend:
    """ExecuTorch's executor_runner on a phone: a visit is one start of it.

    Args:
        kit: what to time.
        phone: where.
        protocol: how.
        threads: CPU threads per call.
        core: the core to stay on, if any.
        pause_s: idle time before every start.
    """

    def __init__(
        self,
        kit: Kit,
        phone: Phone,
        protocol: Mapping[str, Any],
        *,
        threads: int,
        core: int | None,
        pause_s: float,
    ) -> None:
        self._kit, self._phone, self._protocol = kit, phone, protocol
        self._threads, self._core, self._pause_s = threads, core, pause_s

    def prepare(self, runner: Path) -> None:
        """Copy the runner to the phone."""
        self._phone.shell("mkdir", "-p", REMOTE)
        self._phone.run("push", str(runner), f"{REMOTE}/executor_runner")
        self._phone.shell("chmod", "755", f"{REMOTE}/executor_runner")

    def load(self, file: Mapping[str, Any]) -> Visit:
        """Copy a network to the phone and find out how often it runs in a visit."""
        name = Path(file["name"]).name
        self._phone.run("push", str(self._kit.folder / file["name"]), f"{REMOTE}/{name}")
        first = self._runs(name, 4)
        first = first[1:] or first
        wanted = self._protocol["visit_ms"] / max(median(first), 1e-3)
        count = min(max(3, round(wanted)), MOST)
        warm_up = max(1, count // 2)

        def visit() -> list[float]:
            times = self._runs(name, warm_up + count)
            return times[warm_up:] if len(times) > warm_up else times

        return visit

    def unload(self, file: Mapping[str, Any]) -> None:
        """Remove a network from the phone."""
        self._phone.shell("rm", "-f", f"{REMOTE}/{Path(file['name']).name}")

    def clean(self) -> None:
        """Remove everything from the phone."""
        self._phone.shell("rm", "-rf", REMOTE)

    def _runs(self, name: str, count: int) -> list[float]:
        time.sleep(self._pause_s)
        pinned = [] if self._core is None else ["taskset", f"{1 << self._core:x}"]
        printed = self._phone.shell(
            *pinned,
            f"{REMOTE}/executor_runner",
            f"--model_path={REMOTE}/{name}",
            f"--num_executions={count}",
            f"--cpu_threads={self._threads}",
            "--print_output=none",
        )
        times = times_in(printed, count)
        if not times:
            last = printed.strip().splitlines()[-1:] or ["nothing"]
            raise KitError(
                f"{name}: executor_runner printed no times but {last[0]!r}; build it with "
                "-DEXECUTORCH_ENABLE_LOGGING=ON and the XNNPACK backend"
            )
        return times


def times_in(printed: str, count: int) -> list[float]:
    """Milliseconds of every run, or the mean of all where single ones are not printed.

    A mean holds the first run too, which is slower; so many runs share it that it weighs little.
    """
    single = [float(ms) for ms in ITERATION.findall(printed)]
    if single:
        return single
    total = TOTAL.search(printed)
    if total is None or int(total.group(1)) != count:
        return []
    return [float(total.group(2)) / count]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    common_options(parser)
    add = parser.add_argument
    add("--runner", type=Path, help="executor_runner, built for the phone")
    add("--runtime-version", help="ExecuTorch's version (default: the one that made the kit)")
    add("--adb", default="adb", help="the adb program")
    add("--serial", help="which phone, as 'adb devices' lists it")
    add("--threads", type=int, default=1, help="CPU threads per call")
    add("--core", type=int, help="keep to this core")
    add("--pause", type=float, default=0.0, help="seconds of rest before every network")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Do what the command line asks."""
    kit = checked_kit(given, "executorch")
    if kit is None:
        return
    if given.runner is None or not given.runner.is_file():
        raise KitError("--runner must be ExecuTorch's executor_runner, built for the phone")
    if shutil.which(given.adb) is None:
        raise KitError(f"{given.adb}: no such program; install the Android platform tools")
    if given.threads < 1:
        raise KitError(f"--threads must be at least 1, got {given.threads}")
    phone = Phone(given.adb, given.serial)
    said, soc, system = phone.facts()
    made = kit.manifest["runtime"]
    device = {
        "device": given.device or said,
        "soc": given.soc or soc,
        "os": system,
        "runtime": {"name": made["name"], "version": given.runtime_version or made["version"]},
        "compute_unit": "cpu",
        "threads": given.threads,
        "core": given.core,
    }
    protocol = protocol_of(kit, given)
    output = given.output or given.kit / "results.jsonl"
    results = Results(output, header_of(kit, device, protocol, given.shard))
    results.append(session(pause_s=given.pause))
    backend = ExecuTorchBackend(
        kit, phone, protocol, threads=given.threads, core=given.core, pause_s=given.pause
    )
    backend.prepare(given.runner)
    time_all(kit, backend, results, protocol, shard=given.shard, prime=PRIME)
    backend.clean()
    results.append({"finished": session()["session"]})
    say(f"\ndone: send {output} back")


if __name__ == "__main__":
    raise SystemExit(main_of(lambda: run(parse())))
