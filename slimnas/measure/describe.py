"""What a journal's header says about a build, and the device description made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimnas import __version__
from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.errors import LatencyTableError
from slimnas.latency.table import DeviceInfo, RuntimeInfo
from slimnas.measure.journal import Visit
from slimnas.measure.machine import this_machine
from slimnas.measure.model_scope import ModelScope
from slimnas.measure.plan import Plan
from slimnas.measure.results import usual_pace
from slimnas.measure.schedule import Networks, Shard
from slimnas.measure.scope import Scope, SpaceScope
from slimnas.measure.timing import Protocol
from slimnas.runtimes.base import Runtime


def header(
    scope: Scope,
    runtime: Runtime,
    protocol: Protocol,
    networks: Networks,
    *,
    batch: int,
    shard: Shard | None,
) -> dict[str, Any]:
    """Return everything that must agree before visits may be mixed, as plain data."""
    machine = this_machine()
    found: dict[str, Any] = {
        "tool_version": __version__,
        "covers": scope.title,
        **scope.identity,
        "runtime": {
            "name": runtime.name,
            "version": runtime.version,
            "compute_unit": runtime.compute_unit,
            "dtype": runtime.dtype,
            "threads": runtime.threads,
        },
        "machine": {
            "cpu": machine.cpu,
            "architecture": machine.architecture,
            "cores": machine.cores,
            "system": machine.system,
            "governor": machine.governor,
        },
        "batch": batch,
        "networks": {"calibration": networks.calibration, "held_out": networks.held_out},
        "protocol": protocol.to_dict(),
    }
    return found if shard is None else {**found, "shard": {"number": shard.number, "of": shard.of}}


def scope_of(found: Mapping[str, Any], source: str) -> Scope:
    """Return the scope that a header is about.

    Raises:
        LatencyTableError: it names none.
        SpecError: a damaged space or architecture.
    """
    document = found.get("scope")
    if isinstance(document, Mapping):
        if "space" in document:
            return SpaceScope(SearchSpace.from_yaml(str(document["space"]), source=source))
        if "model" in document:
            return ModelScope(Architecture.from_yaml(str(document["model"]), source=source))
    raise LatencyTableError(
        f"{source}: scope: must be a space or a model; measure the table anew with this version"
    )


def device_info(
    name: str, found: Mapping[str, Any], plan: Plan, visits: Sequence[Visit], *, date: str
) -> DeviceInfo:
    """Describe the device of a finished build, from its journal alone.

    Args:
        name: the device's name.
        found: the journal's header.
        plan: what was timed.
        visits: all of them.
        date: when it ended.
    """
    machine, runtime = found["machine"], found["runtime"]
    protocol = Protocol.from_dict(found["protocol"])
    return DeviceInfo(
        name=name,
        device=f"{machine['architecture']} machine, {machine['cores']} core(s) in use",
        soc=machine["cpu"],
        os=machine["system"],
        runtime=RuntimeInfo(name=runtime["name"], version=runtime["version"]),
        compute_unit=runtime["compute_unit"],
        dtype=runtime["dtype"],
        batch=found["batch"],
        threads=runtime["threads"],
        protocol=protocol.describe(),
        date=date,
        tool_version=found["tool_version"],
        kind="measured",
        reference_ms=round(usual_pace(one for v in visits for one in v.rounds), 6),
        notes=tuple(_notes(found, plan, visits)),
    )


def _notes(found: Mapping[str, Any], plan: Plan, visits: Sequence[Visit]) -> list[str]:
    rounds = [one for visit in visits for one in visit.rounds]
    rejected = sum(not one.accepted for one in rounds)
    notes = [
        f"{found['covers']}: {len(plan.components)} components timed, widths between them "
        "are interpolated",
        f"{rejected} of {len(rounds)} rounds rejected",
        f"frequency governor: {found['machine']['governor'] or 'cannot be read'}",
    ]
    loads = [visit.load for visit in visits if visit.load is not None]
    if loads:
        notes.append(f"load average of a minute: {min(loads):.2f} to {max(loads):.2f}")
    heat = [visit.celsius for visit in visits if visit.celsius is not None]
    notes.append(
        f"temperature: {min(heat):.0f} to {max(heat):.0f} degrees Celsius"
        if heat
        else "temperature: cannot be read"
    )
    return notes
