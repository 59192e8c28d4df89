"""All units of a network as one vector, which makes accumulating and saving them arithmetic."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.prune.scores import EMBEDDING, BlockScores, FloatArray, blocks_of, unit_shapes


class UnitVector:
    """Where the units of an architecture lie in a vector.

    Attributes:
        size: number of entries U.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._blocks = {block.name: unit_shapes(block) for block in blocks_of(architecture)}
        self._stages = len(architecture.widths)
        self._slices: dict[tuple[str, str], slice] = {}
        self.size = 0
        for name, shapes in self._blocks.items():
            for kind, shape in shapes.items():
                self._add(name, kind, math.prod(shape))
        for stage, width in enumerate(architecture.widths):
            self._add(EMBEDDING, str(stage), width)

    def where(self, owner: str, kind: str) -> slice:
        """Entries of one kind of units of a block, or of `embedding` and a stage's number."""
        return self._slices[owner, kind]

    def split(self, vector: Tensor) -> tuple[dict[str, BlockScores], tuple[FloatArray, ...]]:
        """Turn a float64 vector (U,) into scores of blocks and of the embedding."""
        values = vector.numpy()
        blocks = {}
        for name, shapes in self._blocks.items():
            parts: dict[str, Any] = {}
            for kind, shape in shapes.items():
                part = values[self.where(name, kind)].reshape(shape)
                parts[kind] = part.copy() if shape else float(part)
            blocks[name] = BlockScores(**parts)
        stages = range(self._stages)
        return blocks, tuple(values[self.where(EMBEDDING, str(s))].copy() for s in stages)

    def _add(self, owner: str, kind: str, count: int) -> None:
        self._slices[owner, kind] = slice(self.size, self.size + count)
        self.size += count
