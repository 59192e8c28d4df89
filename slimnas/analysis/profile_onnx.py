"""A network under ONNX Runtime's profiler: time of every node of the optimised graph, by place."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from slimnas.analysis.operators import Operator, of_onnx
from slimnas.analysis.places import OUTSIDE, Place, places
from slimnas.analysis.recording import Cell, ProfileSettings, Recording
from slimnas.nn.build import Network
from slimnas.runtimes.base import Array
from slimnas.runtimes.onnx_graph import onnx_bytes
from slimnas.runtimes.onnxruntime_runtime import OnnxSession

KERNEL = "_kernel_time"
_ONLY_ERRORS = 3


@dataclass(frozen=True)
class _Node:
    """One run of one node."""

    name: str
    operator: Operator
    ms: float
    macs: int
    bytes: int


def profile_onnx(network: Network, images: Tensor, settings: ProfileSettings) -> Recording:
    """Export `network` and run it under the profiler, all graph optimisations on.

    A node belongs to the place its name tells, and one without such a name (a change of layout
    that the optimiser adds) to that of the node before it.

    Args:
        network: what to export, in evaluation mode.
        images: a batch in fp32.
        settings: batch, threads, iterations and warm_up count.

    Raises:
        ExportError: an operator ONNX has no form for.
    """
    model = onnx_bytes(network, images)
    x: Array = images.numpy()
    plain = OnnxSession(model, threads=settings.threads)
    for _ in range(settings.warm_up):
        plain.run(x)
    forward_ms = []
    for _ in range(settings.iterations):
        start = time.perf_counter()
        plain.run(x)
        forward_ms.append(1e3 * (time.perf_counter() - start))
    runs = settings.warm_up + settings.iterations
    with tempfile.TemporaryDirectory() as folder:
        events = _profiled(model, x, settings.threads, runs, Path(folder))
    cells = _cells(_nodes(events), places(network), runs, settings.iterations)
    return Recording(cells, tuple(forward_ms), str(onnxruntime.__version__), "cpu")


def _profiled(
    model: bytes, x: Array, threads: int, runs: int, folder: Path
) -> list[Mapping[str, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ONLY_ERRORS
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for _ in range(runs):
        session.run(None, {name: x})
    found: list[Mapping[str, Any]] = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return found


def _nodes(events: Iterable[Mapping[str, Any]]) -> Iterator[_Node]:
    """Runs of nodes in order."""
    mine = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(KERNEL)]
    for event in sorted(mine, key=lambda e: e["ts"]):
        details = event["args"]
        operator = of_onnx(details["op_name"])
        moved = 0
        if operator.name != "view":  # those share their input's memory
            sizes = ("activation_size", "parameter_size", "output_size")
            moved = sum(int(details.get(size) or 0) for size in sizes)
        yield _Node(
            name=event["name"].removesuffix(KERNEL),
            operator=operator,
            ms=event["dur"] / 1e3,
            macs=_macs(
                operator,
                _shapes(details, "input_type_shape"),
                _shapes(details, "output_type_shape"),
            ),
            bytes=moved,
        )


def _shapes(details: Mapping[str, Any], key: str) -> list[list[int]]:
    return [shape for typed in details.get(key, ()) for shape in typed.values()]


def _macs(operator: Operator, inputs: list[list[int]], outputs: list[list[int]]) -> int:
    """Multiply-adds by the shapes that the profiler lists; it leaves packed weights out."""
    if operator.kind not in ("product", "attention"):
        return 0
    left, made = inputs[0], outputs[0]
    if operator.name == "attention":  # tokens (B, N, C), weights (C, Q + K + V) -> (B, N, V)
        (batch, tokens, width), joint, values = left, inputs[1][-1], made[-1]
        mixed = (joint - values) // 2 + values
        return batch * tokens * (width * joint + tokens * mixed)
    if operator.name == "convolution":
        return math.prod(made) * math.prod(inputs[1][1:])
    # Whichever of its last two axes is summed over, what is not is a row of the product.
    return math.prod(made) * (left[-1] * left[-2] // made[-2])


def _cells(
    nodes: Iterable[_Node], where: Iterable[Place], runs: int, iterations: int
) -> tuple[Cell, ...]:
    by_node: dict[str, list[_Node]] = defaultdict(list)
    for node in nodes:
        by_node[node.name].append(node)
    finder = _Finder(where)
    found: dict[tuple[Place, Operator], list[list[_Node]]] = defaultdict(list)
    for name, mine in by_node.items():  # in the order of their first run
        found[finder.place(name), mine[0].operator].append(mine)
    return tuple(
        Cell(
            place=place,
            operator=operator,
            calls=sum(len(mine) for mine in members) // runs,
            times_ms=_times_ms(members, runs)[-iterations:],
            macs=sum(node.macs for mine in members for node in mine) // runs,
            bytes=sum(node.bytes for mine in members for node in mine) // runs,
        )
        for (place, operator), members in found.items()
    )


def _times_ms(members: Iterable[list[_Node]], runs: int) -> tuple[float, ...]:
    """Time per run of nodes of which each is run equally often in every run."""
    times = [np.array([node.ms for node in mine]).reshape(runs, -1).sum(axis=1) for mine in members]
    return tuple(np.sum(times, axis=0).tolist())


class _Finder:
    """Finds the place of a node by its name, `/stages.0/blocks.2/attn/qkv/MatMul`."""

    def __init__(self, where: Iterable[Place]) -> None:
        self._places = sorted(where, key=lambda place: -len(place.name))
        self._last = OUTSIDE

    def place(self, node: str) -> Place:
        """The place of `node`; that of the one asked for before, where its name says none."""
        path = f".{node.replace('/', '.')}."
        for place in self._places:
            if f".{place.name}." in path:
                self._last = place
                return place
        if path.startswith("..") and path.count(".") > 3:  # named, but outside of all components
            return OUTSIDE
        return Place(self._last.component)
