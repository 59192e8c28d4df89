"""`Scores`: how important every prunable unit of one network is, by one criterion.

Estimating takes minutes, planning from the file seconds, so scores are saved once and many budgets
are planned from them. A file says by digest what network, weights and images it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import Component, walk
from slimnas.errors import PruneError
from slimnas.nn.tensorfiles import load_tensors, save_tensors
from slimnas.nn.units import attention_of

FloatArray: TypeAlias = npt.NDArray[np.float64]

SCHEMA = "slimnas/scores/1"
WHAT = "importance scores (scores.safetensors in the run folder of slimnas prune)"
EMBEDDING = "embedding"


@dataclass(frozen=True, eq=False)
class BlockScores:
    """Importance of the units of one block, float64; arrays of size 0 where it lacks the part.

    Attributes:
        qk: query-and-key dimensions, (heads, qk_dim).
        v: value dimensions, (heads, v_dim).
        ffn: hidden units, (ffn_dim,).
        head: attention heads, (heads,).
        attention_layer: the attention sub-layer; 0 where there is none.
        ffn_layer: the FFN sub-layer; 0 where there is none.
    """

    qk: FloatArray
    v: FloatArray
    ffn: FloatArray
    head: FloatArray
    attention_layer: float
    ffn_layer: float


@dataclass(frozen=True)
class ScoresHeader:
    """What scores are for, and how they came about.

    Attributes:
        criterion: one of `slimnas.prune.taylor.CRITERIA`.
        architecture: digest of the architecture.
        weights: digest of the weights.
        data: digest of images and labels in their order; empty if none were needed.
        images: number of images.
        batch_size: images in the first minibatch.
        seed: of the `random` criterion; others do not use it.
    """

    criterion: str
    architecture: str
    weights: str
    data: str
    images: int
    batch_size: int
    seed: int


@dataclass(frozen=True, eq=False)
class Scores(ScoresHeader):
    """Importance of every unit of a network; larger is more important, never negative.

    Attributes:
        blocks: by component name, such as "stages.0.blocks.3".
        embedding: channels of the residual stream, (C,) per stage.
    """

    blocks: Mapping[str, BlockScores]
    embedding: tuple[FloatArray, ...]

    @property
    def header(self) -> ScoresHeader:
        """Everything but the figures."""
        return ScoresHeader(**{f.name: getattr(self, f.name) for f in fields(ScoresHeader)})

    def check(self, architecture: Architecture, source: str = "scores") -> None:
        """Make sure that they are for `architecture`.

        Raises:
            PruneError: they are for another one.
        """
        if self.architecture != architecture.digest:
            raise PruneError(
                f"{source}: must be for {architecture.name} ({architecture.digest[:12]}), got "
                f"scores of architecture {self.architecture[:12]}; score this model again"
            )
        if self._shapes() != _expected_shapes(architecture):
            raise PruneError(
                f"{source}: its units must be those of {architecture.name}, they are not; the "
                "file is damaged, score the model again"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; the same scores always give the same bytes.

        Raises:
            RunFolderError: the place cannot be written.
        """
        save_tensors(path, _to_tensors(self), {"schema": SCHEMA, **asdict(self.header)})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            WeightsError: the file is missing or damaged.
            PruneError: it holds something else.
        """
        tensors, metadata = load_tensors(path, WHAT)
        given = metadata.pop("schema", None)
        if given != SCHEMA:
            raise PruneError(f"{path}: schema: must be {SCHEMA!r}, got {given!r}; expected {WHAT}")
        return cls(**_header(metadata, path), **_from_tensors(tensors, path))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in _to_tensors(self).items()}


def unit_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a block's `BlockScores`; () is a number."""
    spec = component.spec
    attention = attention_of(spec)
    heads, qk, v = (attention.heads, attention.qk_dim, attention.v_dim) if attention else (0, 0, 0)
    hidden: int = spec.hidden(component.input.channels)  # type: ignore[attr-defined]
    return {
        "qk": (heads, qk),
        "v": (heads, v),
        "ffn": (hidden,),
        "head": (heads,),
        "attention_layer": (),
        "ffn_layer": (),
    }


def blocks_of(architecture: Architecture) -> list[Component]:
    """The blocks, in execution order."""
    return [component for component in walk(architecture) if component.kind == "block"]


def _expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    shapes = {
        f"{block.name}.{kind}": shape
        for block in blocks_of(architecture)
        for kind, shape in unit_shapes(block).items()
    }
    widths = enumerate(architecture.widths)
    return shapes | {f"{EMBEDDING}.{stage}": (width,) for stage, width in widths}


def _to_tensors(scores: Scores) -> dict[str, Tensor]:
    values: dict[str, Any] = {
        f"{name}.{kind.name}": getattr(block, kind.name)
        for name, block in scores.blocks.items()
        for kind in fields(BlockScores)
    }
    values |= {f"{EMBEDDING}.{stage}": array for stage, array in enumerate(scores.embedding)}
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}


def _from_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    blocks: dict[str, dict[str, Any]] = {}
    embedding: dict[int, FloatArray] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float64 or not bool(torch.isfinite(tensor).all()):
            raise PruneError(
                f"{path}: {name}: must be finite float64 values; score the model again"
            )
        owner, _, kind = name.rpartition(".")
        if owner == EMBEDDING and kind.isdecimal():
            embedding[int(kind)] = tensor.numpy()
        else:
            value = tensor.numpy() if tensor.dim() else float(tensor)
            blocks.setdefault(owner, {})[kind] = value
    wanted = {kind.name for kind in fields(BlockScores)}
    odd = [name for name, kinds in blocks.items() if set(kinds) != wanted]
    if odd or not blocks or sorted(embedding) != list(range(len(embedding))):
        raise PruneError(
            f"{path}: {odd[0] if odd else 'tensors'}: every block must have "
            f"{', '.join(sorted(wanted))}, every stage an embedding; score the model again"
        )
    ordered = sorted(blocks, key=lambda name: [int(p) for p in name.split(".") if p.isdecimal()])
    return {
        "blocks": {name: BlockScores(**blocks[name]) for name in ordered},
        "embedding": tuple(embedding[stage] for stage in sorted(embedding)),
    }


def _header(metadata: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    wanted = {f.name: int if f.type == "int" else str for f in fields(ScoresHeader)}
    for key, kind in wanted.items():
        if type(metadata.get(key)) is not kind:
            raise PruneError(
                f"{path}: {key}: must be {'a whole number' if kind is int else 'text'}, got "
                f"{metadata.get(key)!r}; score the model again"
            )
    return {key: metadata[key] for key in wanted}
