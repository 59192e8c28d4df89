#!/usr/bin/env python3
"""Times a latency kit's networks with Core ML on this Mac or on an iPhone connected to it.

Needs macOS 14, Python 3.10 and coremltools 8.3. For an iPhone or iPad it also needs Xcode 16, an
Apple developer team, and the device connected, paired, unlocked and in Developer Mode:

    python -m pip install "coremltools>=8.3"
    python run_kit_mac.py
    python run_kit_mac.py --target iphone --team ABCDE12345
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import subprocess
import tempfile
import time
import zipfile
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

UNITS = {
    "cpu-and-ne": "CPU_AND_NE",
    "all": "ALL",
    "cpu-and-gpu": "CPU_AND_GPU",
    "cpu": "CPU_ONLY",
}
"""Names of compute units here and in coremltools."""
REMOTE_SAMPLES = 5
"""Predictions per visit on a connected device, where each is a message over the cable."""
REMOTE_PROTOCOL = {"rounds": 3, "passes": 1, "extra_passes": 0, "patience_s": 1800.0}
"""What replaces the protocol's numbers there, unless options say otherwise."""
PRIME = 9
"""Visits of the reference at the start."""
MOST = 2000
"""Predictions per visit at most."""


class CoreMLBackend:
    """Core ML through coremltools' benchmarker.

    Args:
        kit: what to time.
        protocol: how.
        unit: a key of `UNITS`.
        device: a prepared device of coremltools' remote_device; none is this Mac.
        tools: coremltools and its experimental modules; see `import_tools`.
        folder: where packages are unpacked.
        pause_s: idle time before every visit.
    """

    def __init__(
        self,
        kit: Kit,
        protocol: Mapping[str, Any],
        *,
        unit: str,
        device: Any,
        tools: Any,
        folder: Path,
        pause_s: float = 0.0,
    ) -> None:
        self._kit, self._protocol, self._unit = kit, protocol, unit
        self._device, self._tools, self._folder = device, tools, folder
        self._pause_s = pause_s
        self._loop = asyncio.new_event_loop()

    def load(self, file: Mapping[str, Any]) -> Visit:
        """Load a network and predict until its time is known."""
        import numpy as np

        package = self._unpacked(file["name"])
        # On a connected device the Mac itself need not load it.
        model = self._tools.MLModel(
            str(package),
            compute_units=getattr(self._tools.ComputeUnit, UNITS[self._unit]),
            skip_model_load=self._device is not None,
        )
        benchmarker = self._tools.MLModelBenchmarker(model, device=self._device)
        (given,) = model.get_spec().description.input
        x = np.random.default_rng(0).standard_normal(file["input"]["shape"])
        feed = {given.name: x.astype(np.float32)}
        first = self._predict(benchmarker, feed, 3)
        count = self._count(median(first))

        def visit() -> list[float]:
            time.sleep(self._pause_s)
            return self._predict(benchmarker, feed, count)

        return visit

    def unload(self, file: Mapping[str, Any]) -> None:
        """Nothing is held: Core ML lets go of a network that nobody refers to."""

    def close(self) -> None:
        """Let go of the event loop."""
        self._loop.close()

    def _count(self, first_ms: float) -> int:
        if self._device is not None:
            return REMOTE_SAMPLES
        wanted = round(float(self._protocol["visit_ms"]) / max(first_ms, 1e-3))
        return min(max(3, wanted), MOST)

    def _predict(self, benchmarker: Any, feed: Mapping[str, Any], count: int) -> list[float]:
        """Milliseconds of single predictions, after one that warms up."""
        try:
            measured = self._loop.run_until_complete(
                benchmarker.benchmark_predict(inputs=feed, iterations=count, warmup=True)
            )
        except Exception as error:  # devicectl, signing, Core ML: each has errors of its own
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise KitError(
                f"Core ML: {reason[0]}; is the device connected, unlocked and trusted? start the "
                "same command again, it goes on here"
            ) from None
        return [float(ms) for ms in measured.samples]

    def _unpacked(self, name: str) -> Path:
        target = self._folder / Path(name).name.partition(".")[0]
        if not target.is_dir():
            with zipfile.ZipFile(self._kit.folder / name) as archive:
                archive.extractall(target)
        (package,) = target.glob("*.mlpackage")
        return package


class Tools:
    """The names of coremltools that are used here, in one place."""

    def __init__(self) -> None:
        import coremltools
        from coremltools.models.ml_program.experimental import perf_utils, remote_device

        self.version = str(coremltools.__version__)
        self.MLModel = coremltools.models.MLModel
        self.ComputeUnit = coremltools.ComputeUnit
        self.MLModelBenchmarker = perf_utils.MLModelBenchmarker
        self.Device = remote_device.Device
        self.DeviceType = remote_device.DeviceType
        self.AppSigningCredentials = remote_device.AppSigningCredentials


def import_tools() -> Tools:
    """Import coremltools.

    Raises:
        KitError: it is missing or too old.
    """
    try:
        return Tools()
    except ImportError as error:
        raise KitError(f'{error}; python -m pip install "coremltools>=8.3"') from None


def connected(tools: Any, given: argparse.Namespace) -> Any:
    """The one connected device of the wanted kind, with coremltools' app built and started on it.

    Raises:
        KitError: none or several, or the app cannot be built, signed or started.
    """
    kind = tools.DeviceType(given.target)
    try:
        devices = tools.Device.get_connected_devices(device_type=kind)
    except Exception as error:  # devicectl's own errors
        raise KitError(f"looking for devices: {error}; install Xcode 16 and open it once") from None
    if given.udid is not None:
        devices = [one for one in devices if one.udid == given.udid]
    if len(devices) != 1:
        raise KitError(
            f"{len(devices)} connected devices of kind {given.target}; connect one, unlock it and "
            "trust this Mac ('xcrun devicectl list devices' lists them), or choose with --udid"
        )
    if not given.team:
        raise KitError(
            "--team must be your Apple developer team's identifier; the app that runs the "
            "networks on the device is signed with it"
        )
    credentials = tools.AppSigningCredentials(
        development_team=given.team, bundle_identifier=given.bundle
    )
    try:
        return asyncio.run(devices[0].prepare_for_model_debugging(credentials=credentials))
    except Exception as error:  # xcodebuild, signing, devicectl
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise KitError(f"preparing the {given.target}: {reason[0]}") from None


def facts(given: argparse.Namespace, device: Any, tools: Any) -> dict[str, Any]:
    """The device's fields of a table; no names, no serial numbers."""
    if device is None:
        said, soc = "Mac", _sysctl("machdep.cpu.brand_string")
        said = _sysctl("hw.model") or said
        system = f"macOS {platform.mac_ver()[0]}"
    else:
        said, soc = given.target, ""
        name = "iPadOS" if given.target == "ipad" else "iOS"
        system = f"{name} {device.os_version} ({device.os_build_number})"
    return {
        "device": given.device or said,
        "soc": given.soc or soc or "unknown",
        "os": system,
        "runtime": {"name": "coreml", "version": system},
        "compute_unit": given.compute_unit,
        "threads": None,
        "coremltools": tools.version,
    }


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    common_options(parser)
    add = parser.add_argument
    add("--target", choices=("mac", "iphone", "ipad"), default="mac", help="where to time")
    add("--team", help="Apple developer team's identifier, for iphone and ipad")
    add("--bundle", help="identifier of the app, if your team wants a certain one")
    add("--udid", help="which device, if several are connected")
    add("--compute-unit", choices=tuple(UNITS), default="cpu-and-ne", help="what may be used")
    add("--pause", type=float, default=0.0, help="seconds of rest before every visit")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Do what the command line asks."""
    kit = checked_kit(given, "coreml")
    if kit is None:
        return
    if platform.system() != "Darwin":
        raise KitError("Core ML runs on a Mac, or on a device connected to one; copy the kit there")
    time_on(kit, given, import_tools())


def time_on(kit: Kit, given: argparse.Namespace, tools: Any) -> None:
    """Time the kit with `tools` on this Mac or a connected device."""
    remote = given.target != "mac"
    device = connected(tools, given) if remote else None
    protocol = protocol_of(kit, given)
    if remote:
        asked = {"rounds": given.rounds, "passes": given.passes, "extra_passes": given.extra_passes}
        said = {name: value for name, value in asked.items() if value is not None}
        protocol = {**protocol, **REMOTE_PROTOCOL, **said}
        terms = sum(2 + len(entry["terms"]) for entry in kit.manifest["entries"])
        count = terms * protocol["rounds"] * protocol["passes"] * (REMOTE_SAMPLES + 1)
        say(f"about {count} predictions, each of them a message to the device (about a second)")
    output = given.output or given.kit / "results.jsonl"
    results = Results(output, header_of(kit, facts(given, device, tools), protocol, given.shard))
    results.append(session(python=platform.python_version()))
    with tempfile.TemporaryDirectory() as folder:
        backend = CoreMLBackend(
            kit,
            protocol,
            unit=given.compute_unit,
            device=device,
            tools=tools,
            folder=Path(folder),
            pause_s=given.pause,
        )
        try:
            time_all(kit, backend, results, protocol, shard=given.shard, prime=PRIME)
        finally:
            backend.close()
    results.append({"finished": session()["session"]})
    say(f"\ndone: send {output} back")


if __name__ == "__main__":
    raise SystemExit(main_of(lambda: run(parse())))
