"""What a trained supernet says about its MetaPaths, as a frozen record.

The paper's importance of a MetaPath is a ratio of raw architecture parameters; those may be
zero or negative, so slimnas uses the ratio of probabilities, p(block) / p(identity) =
exp(alpha_block - alpha_identity), summed over the kinds of block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_text, read_text
from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.errors import WeightsError

SCHEMA = "slimnas/importance/1"

NEUTRAL = 1.0
"""Importance of a MetaPath that may not become identity: as probable as its absence."""


@dataclass(frozen=True)
class ImportanceRecord:
    """Architecture parameters of a trained supernet.

    Attributes:
        alphas: per stage, per slot, the architecture parameter of each choice.
        provenance: supernet digest, seed and the like.
    """

    alphas: tuple[tuple[Mapping[str, float], ...], ...]
    provenance: Mapping[str, Any]

    def probabilities(self, stage: int, slot: int) -> dict[str, float]:
        """softmax of the slot's alphas."""
        alphas = self.alphas[stage][slot]
        top = max(alphas.values())
        weights = {choice: math.exp(alpha - top) for choice, alpha in alphas.items()}
        total = sum(weights.values())
        return {choice: weight / total for choice, weight in weights.items()}

    def path_importance(self, stage: int, slot: int) -> float:
        """Sum over block kinds of p(block) / p(identity)."""
        alphas = self.alphas[stage][slot]
        if IDENTITY not in alphas:
            return NEUTRAL
        identity = alphas[IDENTITY]
        return sum(math.exp(a - identity) for choice, a in alphas.items() if choice != IDENTITY)

    def stage_importance(self, stage: int) -> float:
        """Sum of the importances of the stage's MetaPaths."""
        return sum(self.path_importance(stage, slot) for slot in range(len(self.alphas[stage])))

    def log_odds(self, stage: int, slot: int, choice: str, other: str) -> float:
        """log p(choice) - log p(other)."""
        alphas = self.alphas[stage][slot]
        return alphas[choice] - alphas[other]

    def start(self, space: SearchSpace) -> Selection:
        """The largest network: every slot active, with the block that the alphas find likeliest.

        Where blocks with attention come last, their number maximises the summed log-probability
        over cut points.
        """
        if not space.limits.attention_last:
            return space.full(
                tuple(self._likeliest(i, j, stage.blocks) for j in range(stage.slots))
                for i, stage in enumerate(space.stages)
            )
        starts = [self._likeliest_alike(space, space.largest(n)) for n in space.attention_counts()]
        return max(starts, key=self._log_likelihood)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the derived figures beside the alphas."""
        stages = []
        for stage, slots in enumerate(self.alphas):
            rows = [
                {
                    "alpha": dict(alphas),
                    "probability": self.probabilities(stage, slot),
                    "importance": self.path_importance(stage, slot),
                }
                for slot, alphas in enumerate(slots)
            ]
            stages.append({"importance": self.stage_importance(stage), "slots": rows})
        return {"schema": SCHEMA, "provenance": dict(self.provenance), "stages": stages}

    def save(self, path: Path) -> None:
        """Write JSON atomically."""
        atomic_write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> ImportanceRecord:
        """Read what `save` wrote.

        Raises:
            WeightsError: the file is missing, damaged or of another schema.
        """
        text = read_text(path, WeightsError, "an importance record")
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise WeightsError(f"{path}: schema: must be {SCHEMA!r}, got {data['schema']!r}")
            alphas = tuple(
                tuple({k: float(a) for k, a in row["alpha"].items()} for row in stage["slots"])
                for stage in data["stages"]
            )
            return cls(alphas, data["provenance"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path}: not an importance record ({error}); delete it") from error

    def _likeliest(self, stage: int, slot: int, blocks: Sequence[str]) -> str:
        alphas = self.alphas[stage][slot]
        return max(blocks, key=lambda block: alphas[block])

    def _likeliest_alike(self, space: SearchSpace, selection: Selection) -> Selection:
        """The same cut between blocks without attention and with it, each slot's likeliest."""
        return space.full(
            tuple(
                self._likeliest(i, j, space.stages[i].alike(choice))
                for j, choice in enumerate(slots)
            )
            for i, slots in enumerate(selection.paths)
        )

    def _log_likelihood(self, selection: Selection) -> float:
        total = 0.0
        for stage, slot, choice in selection.active():
            total += math.log(max(self.probabilities(stage, slot)[choice], 1e-300))
        return total
