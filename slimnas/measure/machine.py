"""What machine this is, for the provenance of a table."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


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
        cores=_cores(),
        system=f"{platform.system()} {platform.release()}",
        governor=_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
    )


def load_average() -> float | None:
    """Return the load average of the last minute, or none where there is no such thing."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # not on every system
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
