"""A search space of a few hundred architectures, and latencies and accuracies that add up."""

from __future__ import annotations

import random
from dataclasses import dataclass

from made_up_device import made_up_device

from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.arch.walk import component_cost
from slimnas.latency.keys import price_key
from slimnas.latency.rows import PriceRow
from slimnas.latency.spaces import space_components
from slimnas.latency.table import LatencyTable
from slimnas.search.importance import ImportanceRecord
from slimnas.search.slimming import Slimmer

MICRO = """schema: slimnas/search-space/1
name: micro
input: {channels: 1, resolution: 32}
stem: {type: conv_stem}
stages:
- {width: {min: 16, max: 48, step: 16}, slots: 2, choices: [mb4d, identity]}
- width: {min: 16, max: 48, step: 16}
  slots: 3
  choices: [mb4d, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 10}
blocks:
  mb4d: {ffn_ratio: 2}
  mb3d: {ffn_ratio: 2, heads: 2, qk_dim: 4, v_dim: 8}
supernet: {resolution: 16}
"""
ARCHITECTURES = 342
"""Widths that do not fall (6) x stage 1 of one or two blocks (3) x stage 2 (6 + 9 + 4)."""


def micro_space() -> SearchSpace:
    return SearchSpace.from_yaml(MICRO)


@dataclass(frozen=True)
class Additive:
    """Latency and accuracy as sums over slots and stages, drawn from a seed.

    Slots of a stage cost the same, attention more than convolution, as in every real table.
    What a slot's blocks are worth is also what the supernet's importance says.
    """

    space: SearchSpace
    slot_ms: dict[tuple[int, int, str], float]
    slot_points: dict[tuple[int, int, str], float]
    width_ms: dict[tuple[int, int], float]
    width_points: dict[tuple[int, int], float]

    @classmethod
    def draw(cls, seed: int, space: SearchSpace | None = None) -> Additive:
        space = space or micro_space()
        rng = random.Random(seed)
        slot_ms, slot_points, width_ms, width_points = {}, {}, {}, {}
        for i, stage in enumerate(space.stages):
            conv_ms = rng.uniform(0.05, 0.3)
            block_ms = {"mb4d": conv_ms, "mb3d": conv_ms * rng.uniform(1.1, 2.0)}
            others = [choice for choice in stage.blocks if choice not in block_ms]
            block_ms |= {choice: conv_ms * rng.uniform(0.7, 2.2) for choice in others}
            for j in range(stage.slots):
                for choice in stage.blocks:
                    scale = 1.5 if choice == "mb3d" else 1.0
                    slot_ms[i, j, choice] = block_ms[choice]
                    slot_points[i, j, choice] = scale * rng.uniform(0.2, 6.0)
            ms = points = 0.0
            for width in stage.width.values:
                ms += rng.uniform(0.05, 0.3)
                points += rng.uniform(0.2, 6.0)
                width_ms[i, width], width_points[i, width] = ms, points
        return cls(space, slot_ms, slot_points, width_ms, width_points)

    def price(self, selection: Selection) -> float:
        return 0.1 + self._sum(selection, self.slot_ms, self.width_ms)

    def top1(self, selection: Selection) -> float:
        return 20 + self._sum(selection, self.slot_points, self.width_points)

    def importance(self) -> ImportanceRecord:
        return ImportanceRecord(
            tuple(
                tuple(
                    {c: self.slot_points.get((i, j, c), 0.0) / 3 for c in stage.choices}
                    for j in range(stage.slots)
                )
                for i, stage in enumerate(self.space.stages)
            ),
            {"seed": 0},
        )

    def slimmer(self, frontier: str = "per_stage") -> Slimmer:
        return Slimmer(self.space, self.importance(), self.price, self.top1, frontier)

    @staticmethod
    def _sum(
        selection: Selection,
        slots: dict[tuple[int, int, str], float],
        widths: dict[tuple[int, int], float],
    ) -> float:
        total = sum(widths[i, width] for i, width in enumerate(selection.widths))
        for i, path in enumerate(selection.paths):
            for j, choice in enumerate(path):
                if choice != IDENTITY:
                    total += slots[i, j, choice]
        return total


def made_up_table(space: SearchSpace) -> LatencyTable:
    """Every component of `space` at 3 us and 1 us per 20,000 MACs."""
    rows = {}
    for component in space_components(space):
        key = price_key(component)
        ms = 0.003 + component_cost(component).macs / 20e6
        rows[key] = PriceRow(key, ms, 0.01 * ms, 9, "measured")
    device = made_up_device("made-up", protocol="closed form")
    return LatencyTable(device, tuple(rows.values()))
