"""What machine this is, for the provenance of a table, and which of its cores do the timing."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOOK_S = 0.2
"""How long to look at the cores before the calmest are chosen."""


@dataclass(frozen=True)
class Machine:
    """This machine.

    Attributes:
        cpu: the processor's name.
        architecture: `x86_64`, `aarch64`, ...
        cores: logical cores this process may use.
        system: operating system and version.
        governor: frequency governor of the first core, or none where it cannot be read.
    """

    cpu: str
    architecture: str
    cores: int
    system: str
    governor: str | None


def this_machine() -> Machine:
    """Describe this machine from what the operating system tells everybody."""
    return Machine(
        cpu=_cpu_model() or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=len(usable_cores()),
        system=f"{platform.system()} {platform.release()}",
        governor=_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
    )


def load_average() -> float | None:
    """Return the load average of the last minute, or none where there is no such thing."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # not on every system
        return None


def temperature_celsius() -> float | None:
    """Return the temperature of the hottest sensor, or none where none can be read."""
    found = []
    for sensor in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        text = _first_line(sensor)
        if text is not None and text.lstrip("-").isdigit():
            found.append(int(text) / 1000)
    return max(found, default=None)


def usable_cores() -> tuple[int, ...]:
    """Return the logical cores that this thread may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def use_cores(cores: Iterable[int]) -> None:
    """Keep this thread, and those it starts, on `cores`, where the system has such a thing."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this thread, and those it starts, on the `threads` cores that are least busy now.

    Where the system has no such thing, or there are fewer cores, nothing is changed.
    """
    usable = usable_cores()
    if threads < len(usable):
        idle = _idle_ticks()
        time.sleep(LOOK_S)
        now = _idle_ticks()
        calm = sorted(usable, key=lambda core: (now.get(core, 0) - idle.get(core, 0), core))
        use_cores(calm[-threads:])
    try:
        yield
    finally:
        use_cores(usable)


def _idle_ticks() -> dict[int, int]:
    """Clock ticks that every core has been idle; none where they cannot be read."""
    try:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    cores = (line.split() for line in lines if line.startswith("cpu"))
    return {int(core[0][3:]): int(core[4]) for core in cores if core[0] != "cpu"}


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
