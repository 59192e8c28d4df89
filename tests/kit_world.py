"""A small kit without files, the device that times it, and what its tools would write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import kit_protocol  # the runners stand beside the package; pytest has them on its path
from measure_fakes import FakeMachine, cost_ms

from slimnas.arch.space import SearchSpace
from slimnas.measure.kit_manifest import (
    InputInfo,
    KitManifest,
    NetworkFile,
    RuntimeFact,
    ScopeDocument,
    digest_of,
    entries_of,
)
from slimnas.measure.kit_networks import KitNetworks, in_words, macs_of
from slimnas.measure.plan import make_plan
from slimnas.measure.scope import Parts, SpaceScope
from slimnas.measure.timing import Protocol

RUNNERS = Path(__file__).parents[1] / "kit_runners"

MICRO = """\
schema: slimnas/search-space/1
name: micro
input: {channels: 3, resolution: 32}
stages:
- {width: {min: 16, max: 32, step: 16}, slots: 2, choices: [mb4d, identity]}
- width: {min: 32, max: 32, step: 16}
  slots: 2
  choices: [mb4d, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 2}
"""
QUICK = Protocol(rounds=2, passes=1, visit_ms=0.5, sample_ms=0.1, extra_passes=0)
DEVICE = {
    "device": "a phone",
    "soc": "a chip",
    "os": "an OS 1",
    "runtime": {"name": "onnxruntime", "version": "1.0"},
    "compute_unit": "cpu",
    "threads": 1,
}


def micro_scope() -> SpaceScope:
    return SpaceScope(SearchSpace.from_yaml(MICRO))


@dataclass
class FakeKit:
    """A kit of the micro space, and a simulated device that times it.

    Attributes:
        folder: where its manifest is.
        protocol: the manifest's.
        device: the name of its table.
    """

    folder: Path
    protocol: Protocol = QUICK
    device: str = "phone"
    machine: FakeMachine = field(default_factory=FakeMachine)

    @cached_property
    def networks(self) -> KitNetworks:
        plan = make_plan(micro_scope(), calibration=4, held_out=3)
        return KitNetworks.of(plan)

    @cached_property
    def manifest(self) -> KitManifest:
        networks = self.networks
        files = tuple(
            NetworkFile(
                name=f"{stem}.onnx",
                sha256="0" * 64,
                size=1,
                what=in_words(parts),
                macs=macs_of(parts),
                input=InputInfo(shape=(1, 3, 32, 32), dtype="float32"),
            )
            for stem, parts in networks.parts.items()
        )
        bare = KitManifest(
            tool_version="0",
            device=self.device,
            made="2026-01-01",
            title="space micro",
            scope=ScopeDocument.of(micro_scope()),
            runtime=RuntimeFact(name="onnxruntime", version="1.0"),
            format="onnx",
            dtype="fp32",
            batch=1,
            calibration=4,
            held_out=3,
            sample="random networks of the space",
            seed=0,
            protocol=self.protocol.to_dict(),
            reference=files[0].name,
            files=files,
            entries=entries_of(networks, ".onnx"),
            size=len(files),
            checked="not at all",
        )
        return bare.model_copy(update={"digest": digest_of(bare.to_dict())})

    @property
    def parts(self) -> Mapping[str, Parts]:
        """Every network by its file's name."""
        return {f"{stem}.onnx": parts for stem, parts in self.networks.parts.items()}

    def write(self) -> Path:
        """Write the manifest; returns the kit's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest.to_dict()))
        return self.folder

    def run(self, output: Path, *, shard: str = "1/1", device: Any = None) -> Path:
        """Let the simulated device time the kit by the runners' protocol."""
        kit = kit_protocol.Kit.load(self.write())
        protocol = self.protocol.to_dict()
        header = kit_protocol.header_of(kit, device or DEVICE, protocol, shard)
        results = kit_protocol.Results(output, header)
        results.append(kit_protocol.session())
        kit_protocol.time_all(kit, FakeBackend(self), results, protocol, shard=shard)
        return output

    def times(self, scale: Callable[[str], float] = lambda _: 1.0) -> dict[str, float]:
        """Milliseconds of every file on the simulated device."""
        return {name: cost_ms(parts) * scale(name) for name, parts in self.parts.items()}


@dataclass
class FakeBackend:
    """Runs files on a simulated machine."""

    kit: FakeKit
    loaded: int = 0
    fail_after: int | None = None

    def load(self, file: Mapping[str, Any]) -> kit_protocol.Visit:
        self.loaded += 1
        if self.fail_after is not None and self.loaded > self.fail_after:
            raise KeyboardInterrupt
        call = self.kit.machine.loader(self.kit.parts[file["name"]])

        def visit() -> list[float]:
            samples = []
            for _ in range(5):
                start = self.kit.machine.now
                call()
                samples.append(1e3 * (self.kit.machine.now - start))
            return samples

        return visit

    def unload(self, file: Mapping[str, Any]) -> None:
        assert file["name"] in self.kit.parts


def edited(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """Change the lines of a results file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def middle(lines: list[dict[str, Any]]) -> float:
    """The reference's median in a results file."""
    return median(
        ms for line in lines for one in line.get("rounds", ()) for ms in one["reference_ms"]
    )
