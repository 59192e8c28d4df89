"""The channel graph: which units a network has, and what removing each takes out of its tensors.

A directed networkx graph from units to tensor axes; an edge's `positions` are what the unit takes
out of that axis. It follows from `slimnas.nn.units`, as the surgery does, and `lint` checks the
declarations against the tensors of the real network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import networkx as nx
import numpy as np
import torch

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import Component, walk
from slimnas.errors import PruneError
from slimnas.nn.build import Network, build
from slimnas.nn.channels import HIDDEN, IN, OUT
from slimnas.nn.units import (
    HEADS,
    LAYERS,
    MERGED,
    QKV,
    STEM_HIDDEN,
    VALUES,
    unit_axes,
    unit_positions,
)
from slimnas.prune.supported import check_network
from slimnas.prune.widths import stream_stage

Kind = Literal["qk", "v", "ffn", "embedding", "head", "attention_layer", "ffn_layer"]
SINGLE: tuple[Kind, ...] = ("qk", "v", "ffn", "embedding")
"""Kinds that share the axes among them: each position belongs to one unit of one of them."""
LAYER_KINDS: tuple[Kind, ...] = ("attention_layer", "ffn_layer")
INNER = {QKV, VALUES, HEADS, HIDDEN}
"""Roles of axes inside a sub-layer."""


class Unit(NamedTuple):
    """Something that can be removed.

    Attributes:
        kind: what it is.
        part: block it is in, such as `stages.0.blocks.3`; for `embedding` the first stage of the
            residual stream, such as `stages.0`.
        head: of a `head`, and of a `qk` or `v` dim; -1 for the others.
        number: of the dim in the head, hidden unit or channel; -1 for heads and layers.
    """

    kind: Kind
    part: str
    head: int = -1
    number: int = -1

    def __str__(self) -> str:
        numbers = ".".join(str(n) for n in (self.head, self.number) if n >= 0)
        return f"{self.kind} {numbers} of {self.part}" if numbers else f"{self.kind} of {self.part}"


class Axis(NamedTuple):
    """One axis of a named tensor of a network."""

    tensor: str
    axis: int


Taken: TypeAlias = "dict[str, tuple[int, ...]]"
Edge: TypeAlias = "tuple[Unit, Axis, Taken]"


@dataclass(frozen=True)
class ChannelGraph:
    """Units of an architecture, and the slices each removes.

    Attributes:
        architecture: whose units.
        graph: `networkx.DiGraph` of `Unit` -> `Axis` with `positions` on every edge; axis nodes
            have `size` and `role` (None: never cut).
    """

    architecture: Architecture
    graph: nx.DiGraph

    def units(self, kind: Kind | None = None) -> Iterator[Unit]:
        """Every unit, or those of one kind, in execution order."""
        for node in self.graph:
            if isinstance(node, Unit) and kind in (None, node.kind):
                yield node

    def removes(self, unit: Unit) -> Mapping[Axis, tuple[int, ...]]:
        """What removing `unit` takes out: axis -> positions, ascending.

        Raises:
            PruneError: no such unit.
        """
        if unit not in self.graph:
            raise PruneError(f"{self.architecture.name}: has no unit {unit}")
        found = {axis: edge["positions"] for axis, edge in self.graph[unit].items()}
        return MappingProxyType(found)

    def lint(self) -> None:
        """Check that the units cover the tensors, every position of a cut axis exactly once.

        Units of the kinds qk, v, ffn and embedding share the axes among them; heads are unions of
        their qk and v dims (and their entries in bias tables), layers hold each tensor of theirs
        whole, once.

        Raises:
            PruneError: the first tensor and axis that is covered wrongly, and by what.
        """
        layers: dict[Unit, list[str]] = defaultdict(list)
        for axis, node in self.graph.nodes(data=True):
            if not isinstance(axis, Axis):
                continue
            taken: dict[Kind, list[int]] = defaultdict(list)
            by_head: dict[bool, dict[int, set[int]]] = {True: {}, False: {}}
            for unit, _, edge in self.graph.in_edges(axis, data=True):
                taken[unit.kind].extend(edge["positions"])
                if unit.head >= 0:
                    own = by_head[unit.kind == "head"].setdefault(unit.head, set())
                    own.update(edge["positions"])
                if unit.kind in LAYER_KINDS:
                    layers[unit].append(axis.tensor)
            _lint_axis(axis, node["size"], node["role"], taken)
            if node["role"] in (QKV, VALUES) and by_head[True] != by_head[False]:
                raise PruneError(f"{_named(axis)}: a head must be the union of its qk and v dims")
        self._lint_layers(layers)

    def _lint_layers(self, layers: Mapping[Unit, list[str]]) -> None:
        tensors: dict[str, set[str]] = defaultdict(set)
        for axis in self.graph:
            if isinstance(axis, Axis):
                tensors[".".join(axis.tensor.split(".")[:4])].add(axis.tensor)
        parts: dict[str, list[str]] = defaultdict(list)
        for unit, taken in layers.items():
            parts[unit.part] += taken
        for part, taken in parts.items():
            for name in tensors[part]:
                if taken.count(name) != 1:
                    raise PruneError(
                        f"{name}: is covered {taken.count(name)} times by the layers of {part}, "
                        "must be once; correct slimnas.nn.units"
                    )


def channel_graph(source: Network | Architecture) -> ChannelGraph:
    """The channel graph of a network, or of the network an architecture builds.

    Raises:
        PruneError: a module that cannot be pruned, or a tensor that no one declared: path and type.
    """
    if isinstance(source, Architecture):
        architecture = source
        with torch.device("meta"):  # shapes only
            network = build(architecture)
    else:
        check_network(source)
        network, architecture = source, source.architecture
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    graph = nx.DiGraph()
    for component in walk(architecture):
        prefix = f"{component.name}."
        own = {k: v for k, v in shapes.items() if k.startswith(prefix)}
        roles = _axis_roles(architecture, component, own)
        graph.add_nodes_from(
            (axis, {"size": own[axis.tensor][axis.axis], "role": role})
            for axis, role in roles.items()
        )
        for role in dict.fromkeys(role for role in roles.values() if role is not None):
            units = list(_units(architecture, component, role))
            for axis in [axis for axis, has in roles.items() if has == role]:
                graph.add_edges_from((unit, axis, taken) for unit, taken in units)
        graph.add_edges_from(_layer_edges(component, own, roles))
    return ChannelGraph(architecture, graph)


def _axis_roles(
    architecture: Architecture, component: Component, shapes: Mapping[str, tuple[int, ...]]
) -> dict[Axis, str | None]:
    """Every axis of the component's tensors, with its role; None for one that is never cut."""
    declared = unit_axes(component)
    sides = {IN: "in", MERGED: "in", OUT: "out"}
    fixed = {r for r, s in sides.items() if stream_stage(architecture, component, s) is None}
    roles: dict[Axis, str | None] = {}
    for tensor, shape in shapes.items():
        name = tensor.removeprefix(f"{component.name}.")
        if shape and name not in declared:
            raise PruneError(
                f"{tensor}: {type(component.spec).__name__} declares no such tensor of shape "
                f"{shape}; add it to slimnas.nn.units.UNIT_AXES"
            )
        given = declared.get(name, ())
        for axis in range(len(shape)):
            role = given[axis] if axis < len(given) else None
            roles[Axis(tensor, axis)] = None if role in fixed else role
    return roles


def _units(
    architecture: Architecture, component: Component, role: str
) -> Iterator[tuple[Unit, Taken]]:
    """Every unit on an axis of this role, heads included, with what it takes of the axis."""
    name = component.name
    heads: dict[int, list[int]] = defaultdict(list)
    for family, positions in unit_positions(component, role).items():
        rows = positions.tolist()
        if family in ("in", "out"):
            stream = f"stages.{stream_stage(architecture, component, family)}"
            yield from ((Unit("embedding", stream, -1, i), _taken(p)) for i, p in enumerate(rows))
        elif family == "ffn":
            yield from ((Unit("ffn", name, -1, i), _taken(p)) for i, p in enumerate(rows))
        elif family == "head":
            yield from ((Unit("head", name, i), _taken(p)) for i, p in enumerate(rows))
        else:
            kind: Kind = "qk" if family == "qk" else "v"
            for head, dims in enumerate(rows):
                yield from ((Unit(kind, name, head, i), _taken(p)) for i, p in enumerate(dims))
                heads[head] += [position for dim in dims for position in dim]
    for head, own in heads.items():
        yield Unit("head", name, head), _taken(sorted(own))


def _layer_edges(
    component: Component,
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[Axis, str | None],
) -> Iterator[Edge]:
    """A layer takes each of its tensors whole: along the axis inside it, else along the first."""
    for kind, prefixes in LAYERS.get(type(component.spec), {}).items():
        layer: Kind = "attention_layer" if kind == "attention_layer" else "ffn_layer"
        for tensor, shape in shapes.items():
            if not tensor.removeprefix(f"{component.name}.").startswith(prefixes):
                continue
            inner = [a for a in range(len(shape)) if roles[Axis(tensor, a)] in INNER]
            axis = inner[0] if inner else 0
            yield Unit(layer, component.name), Axis(tensor, axis), _taken(range(shape[axis]))


def _taken(positions: Iterable[int]) -> Taken:
    return {"positions": tuple(positions)}


def _lint_axis(axis: Axis, size: int, role: str | None, taken: Mapping[Kind, list[int]]) -> None:
    single = [position for kind in SINGLE for position in taken.get(kind, ())]
    in_units = role not in (None, HEADS, STEM_HIDDEN)
    _lint_cover(axis, size if in_units else 0, single, "units")
    in_heads = role in (QKV, VALUES, HEADS)
    _lint_cover(axis, size if in_heads else 0, taken.get("head", []), "heads")
    for kind in LAYER_KINDS:
        if kind in taken:
            _lint_cover(axis, size, taken[kind], kind)


def _lint_cover(axis: Axis, size: int, positions: list[int], what: str) -> None:
    counts = np.bincount(positions, minlength=size) if positions else np.zeros(size, dtype=int)
    wrong = np.flatnonzero(counts != 1) if len(counts) == size else np.array([size])
    if wrong.size:
        first = int(wrong[0])
        times = int(counts[first]) if first < len(counts) else 0
        raise PruneError(
            f"{_named(axis)}: position {first} of {size} is covered {times} times by {what}, must "
            "be once; correct slimnas.nn.units"
        )


def _named(axis: Axis) -> str:
    return f"{axis.tensor}, axis {axis.axis}"
