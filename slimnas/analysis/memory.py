"""Where the run time of a network goes: into arithmetic, or into moving data.

EfficientViT (Liu et al., CVPR 2023, section 2.1, Fig. 2) finds that reshapes, copies, elementwise
operators and normalisation, which are bound by memory, take a large part of the run time of vision
transformers on a GPU. `profile_network` measures it: by kind of operator, by operator and by layer,
with PyTorch's or ONNX Runtime's own profiler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from slimnas.analysis.operators import Kind, Operator, is_memory_bound
from slimnas.analysis.places import Place
from slimnas.analysis.profile_onnx import profile_onnx
from slimnas.analysis.profile_torch import profile_torch
from slimnas.analysis.recording import Cell, ProfileSettings, Recording
from slimnas.arch.walk import walk
from slimnas.errors import AnalysisError
from slimnas.nn.build import Network
from slimnas.nn.fold import fold

Group = TypeVar("Group")


@dataclass(frozen=True)
class Row:
    """Operators that have something in common.

    Attributes:
        calls: per run.
        ms: per run, mean over the faster half of the runs; rows of one grouping add up.
        share_percent: of the total; rows of one grouping add up to 100.
        median_percent: median of the share over all runs.
        spread_percent: how far apart the quartiles of that share are, over the runs.
        memory_bound_percent: of the row's own time, in operators bound by memory.
        macs: per run.
        bytes: per run.
    """

    calls: int
    ms: float
    share_percent: float
    median_percent: float
    spread_percent: float
    memory_bound_percent: float
    macs: int
    bytes: int

    @property
    def intensity(self) -> float | None:
        """Multiply-adds per byte; None where nothing is read or written."""
        return self.macs / self.bytes if self.bytes else None


@dataclass(frozen=True)
class Profile:
    """The run time of one network, taken apart.

    Attributes:
        model: its name.
        resolution: (height, width) of the images.
        components: names of its components in execution order.
        settings: how it was profiled.
        recording: what the profiler saw.
    """

    model: str
    resolution: tuple[int, int]
    components: tuple[str, ...]
    settings: ProfileSettings
    recording: Recording

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every operator in every place."""
        return self.recording.cells

    @cached_property
    def total_ms(self) -> float:
        """Time in operators per run, mean over the faster half of the runs."""
        return float(self._totals[self._faster].mean())

    @property
    def forward_ms(self) -> float:
        """Median time of a run without the profiler."""
        return float(np.median(self.recording.forward_ms))

    def rows(self, group: Callable[[Cell], Group]) -> dict[Group, Row]:
        """The cells, added up by what `group` says of each, in the order it is first said."""
        members: dict[Group, list[Cell]] = {}
        for cell in self.cells:
            members.setdefault(group(cell), []).append(cell)
        return {key: self._row(cells) for key, cells in members.items()}

    def by_kind(self) -> dict[Kind, Row]:
        """A row for every kind of operator that occurs, the longest first."""
        return _longest_first(self.rows(lambda cell: cell.operator.kind))

    def by_operator(self) -> dict[Operator, Row]:
        """A row for every operator, the longest first."""
        return _longest_first(self.rows(lambda cell: cell.operator))

    def by_layer(self) -> dict[str, Row]:
        """A row for every component in execution order, then what is between them under ``."""
        found = self.rows(lambda cell: cell.place.component)
        return {name: found[name] for name in (*self.components, "") if name in found}

    def by_part(self) -> dict[Place, Row]:
        """Like `by_layer`, with a row for every part of a component."""
        order = {name: i for i, name in enumerate((*self.components, ""))}
        found = self.rows(lambda cell: cell.place)
        return dict(sorted(found.items(), key=lambda item: order[item[0].component]))

    def memory_bound(self, *, nonlinear: bool) -> Row:
        """All operators bound by memory; with softmax and activations if `nonlinear`."""
        return self._row(
            [c for c in self.cells if is_memory_bound(c.operator.kind, nonlinear=nonlinear)]
        )

    @cached_property
    def _totals(self) -> NDArray[np.float64]:
        """Time in operators of every run, ms."""
        return self._times(self.cells)

    @cached_property
    def _faster(self) -> NDArray[np.int64]:
        """The runs that were disturbed least.

        Whole runs, so that shares add up; and not each operator's median, which a busy machine
        lengthens for long operators only: short ones are rarely interrupted.
        """
        order: NDArray[np.int64] = np.argsort(self._totals, kind="stable")
        return order[: (len(order) + 1) // 2]

    def _times(self, cells: Iterable[Cell]) -> NDArray[np.float64]:
        """Time of some cells in every run, ms."""
        total: NDArray[np.float64] = np.zeros(self.settings.iterations)
        for cell in cells:
            total += cell.times_ms
        return total

    def _row(self, cells: Sequence[Cell]) -> Row:
        times = self._times(cells)
        bound = self._times(cell for cell in cells if is_memory_bound(cell.operator.kind))
        ms, bound_ms = float(times[self._faster].mean()), float(bound[self._faster].mean())
        low, middle, high = np.quantile(times / self._totals, (0.25, 0.5, 0.75))
        return Row(
            calls=sum(cell.calls for cell in cells),
            ms=ms,
            share_percent=100 * ms / self.total_ms,
            median_percent=100 * float(middle),
            spread_percent=100 * float(high - low),
            memory_bound_percent=100 * bound_ms / ms if ms else 0.0,
            macs=sum(cell.macs for cell in cells),
            bytes=sum(cell.bytes for cell in cells),
        )


def profile_network(network: Network, settings: ProfileSettings, *, name: str = "") -> Profile:
    """Run `network` under a profiler.

    Args:
        network: any network; it is not changed.
        settings: how.
        name: what to call it; the architecture's name by default.

    Raises:
        AnalysisError: the profiler saw nothing.
        ExportError: ONNX has no form for one of its operators.
    """
    architecture = network.architecture
    shape = architecture.input.shape
    generator = torch.Generator().manual_seed(settings.seed)
    images = torch.randn(
        settings.batch, shape.channels, shape.height, shape.width, generator=generator
    )
    ready = cast("Network", fold(network) if settings.folded else copy.deepcopy(network).eval())
    profiler = profile_onnx if settings.runtime == "onnxruntime" else profile_torch
    recording = profiler(ready, images, settings)
    if not any(sum(cell.times_ms) for cell in recording.cells):
        raise AnalysisError(f"{architecture.name}: the {settings.runtime} profiler saw no operator")
    return Profile(
        model=name or architecture.name,
        resolution=(shape.height, shape.width),
        components=tuple(component.name for component in walk(architecture)),
        settings=settings,
        recording=recording,
    )


def _longest_first(rows: dict[Group, Row]) -> dict[Group, Row]:
    return dict(sorted(rows.items(), key=lambda item: -item[1].ms))
