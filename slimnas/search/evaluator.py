"""Accuracy of one selection after another, inherited from a trained supernet.

Candidates of a step differ from the current network in one place. Everything before that place
gives the same activations, so they are kept at every component boundary of the current network
and a candidate starts from the last one it shares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimnas.arch.space import Selection
from slimnas.arch.walk import Component
from slimnas.nn.layout import run_module
from slimnas.supernet.inherit import Inheritance

CHUNK = 256
"""Images per forward pass of an evaluation."""


@dataclass(frozen=True)
class _Stop:
    """A component of the current network, named by where its weights come from, and what
    comes out of it.
    """

    part: Component
    calibration: Tensor
    chunks: tuple[Tensor, ...]


class SelectionEvaluator:
    """Top-1 on the SEARCH split of networks that inherit a supernet's weights.

    BatchNorm statistics are measured anew on the calibration images from the first component
    that differs, since a narrower or shorter network has others. The same images serve every
    candidate.

    Args:
        inheritance: makes the modules.
        calibration: (B, c, R, R) TRAIN images for BatchNorm statistics.
        images: (N, c, R, R) SEARCH images.
        labels: (N,) their labels.
    """

    def __init__(
        self, inheritance: Inheritance, calibration: Tensor, images: Tensor, labels: Tensor
    ) -> None:
        self.inheritance = inheritance
        self._calibration = calibration
        self._images = torch.split(images, CHUNK)
        self._labels = labels
        self._current: list[_Stop] = []
        self._modules: dict[Component, nn.Module] = {}

    def top1(self, selection: Selection) -> float:
        """Top-1 of `selection` in percent."""
        return self._accuracy(self._run(selection)[-1])

    def move_to(self, selection: Selection) -> None:
        """Make `selection` the current network, whose activations are kept."""
        self._current = self._run(selection)
        wanted = {stop.part for stop in self._current}
        self._modules = {part: module for part, module in self._modules.items() if part in wanted}

    def calibrated_buffers(self, selection: Selection) -> dict[str, Tensor]:
        """BatchNorm statistics of `selection`, by their names in the built network."""
        self._current = []  # statistics of shared modules may be a candidate's
        self.move_to(selection)
        names = [component.name for component, _ in self.inheritance.components(selection)]
        return {
            f"{name}.{buffer_name}": buffer.clone()
            for name, stop in zip(names, self._current, strict=True)
            for buffer_name, buffer in self._modules[stop.part].named_buffers()
            if buffer_name.rpartition(".")[2].startswith("running_")
        }

    @torch.no_grad()
    def _run(self, selection: Selection) -> list[_Stop]:
        parts = [
            replace(component, name=source)
            for component, source in self.inheritance.components(selection)
        ]
        stops = []
        for stop, part in zip(self._current, parts, strict=False):
            if stop.part != part:
                break
            stops.append(stop)
        calibration = stops[-1].calibration if stops else self._calibration
        chunks = stops[-1].chunks if stops else self._images
        for part in parts[len(stops) :]:
            module = self._module(part)
            with _measuring(module):
                calibration = run_module(module, calibration, part.input)
            chunks = tuple(run_module(module, chunk, part.input) for chunk in chunks)
            stops.append(_Stop(part, calibration, chunks))
        return stops

    def _module(self, part: Component) -> nn.Module:
        if part not in self._modules:
            self._modules[part] = self.inheritance.module(part, part.name).eval()
        return self._modules[part]

    def _accuracy(self, head: _Stop) -> float:
        right = int((torch.cat(head.chunks).argmax(dim=1) == self._labels).sum())
        return 100.0 * right / len(self._labels)


@contextlib.contextmanager
def _measuring(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers take the statistics of the one batch that passes."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches, here over one
        norm.train()
    yield
    for norm in norms:
        norm.eval()
