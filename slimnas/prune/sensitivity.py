"""Sensitivity: what accuracy is left when one kind of unit of one block is pruned alone.

Each block and kind loses its least important units at several shares, by real surgery; every other
block stays whole. Images are evaluated from the pruned block on only: what comes before it is
computed once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas._files import atomic_write_bytes, atomic_write_text
from slimnas._jsonlines import json_line, parse_line, whole_lines
from slimnas.arch.walk import Component, walk
from slimnas.errors import PruneError, RunFolderError
from slimnas.nn.build import Network
from slimnas.nn.layout import run_module
from slimnas.prune.apply import apply_plan
from slimnas.prune.scores import BlockScores, FloatArray, Scores
from slimnas.prune.widths import BlockPlan, Indexes, WidthPlan, block_components

SCHEMA = "slimnas/sensitivity-journal/1"
SensitivityKind = Literal["qk", "v", "ffn"]
KINDS: tuple[SensitivityKind, ...] = get_args(SensitivityKind)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SensitivityPoint:
    """One block pruned alone in one kind of unit.

    Attributes:
        block: its name.
        kind: qk, v or ffn.
        share: share asked for, above 0 and below 1.
        units: units of that kind in the block.
        removed: how many of them went; one per head at least stays.
        loss: mean cross-entropy.
        top1: in percent.
    """

    block: str
    kind: SensitivityKind
    share: float
    units: int
    removed: int
    loss: float
    top1: float


@dataclass(frozen=True)
class Sensitivity:
    """Every point, and the unpruned network on the same images.

    Attributes:
        architecture: digest of the unpruned network.
        criterion: what ranked the units.
        images: images behind every figure.
        data: digest of images and labels.
        loss: mean cross-entropy, unpruned.
        top1: in percent, unpruned.
        points: block by block, kind by kind, share by share.
    """

    architecture: str
    criterion: str
    images: int
    data: str
    loss: float
    top1: float
    points: tuple[SensitivityPoint, ...]

    def of(self, block: str, kind: SensitivityKind) -> tuple[SensitivityPoint, ...]:
        """The points of one block and kind, by share; none where the block lacks the part."""
        return tuple(p for p in self.points if p.block == block and p.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def save_csv(self, path: str | Path) -> None:
        """Write CSV atomically, one row per point.

        Raises:
            RunFolderError: the place cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [field.name for field in fields(SensitivityPoint)]
        writer.writerow([*names, "loss_unpruned", "top1_unpruned"])
        for point in self.points:
            row = [getattr(point, name) for name in names]
            writer.writerow([*row, self.loss, self.top1])
        atomic_write_text(Path(path), text.getvalue())


def sensitivity(
    network: Network,
    scores: Scores,
    batches: Batches,
    *,
    shares: Sequence[float] = SHARES,
    kinds: Sequence[SensitivityKind] = KINDS,
    journal: Path | None = None,
    on_point: Callable[[int, int, SensitivityPoint], None] | None = None,
) -> Sensitivity:
    """Prune every block and kind alone at every share, and evaluate.

    Args:
        network: what the scores are for; left as it was.
        scores: which units are least important; heads of a block lose equally many dims.
        batches: images (B, c, H, W) and class numbers (B,), gone through more than once; one
            activation of all of them is held.
        shares: shares of a block's units to remove, ascending.
        kinds: which kinds of unit.
        journal: file that keeps every point, so that a killed run goes on; None for none.
        on_point: called with points done, points in all and the point.

    Raises:
        PruneError: scores of another network, no images, a share outside (0, 1), or a journal of
            something else.
        RunFolderError: the journal cannot be written.
    """
    scores.check(network.architecture)
    _check_shares(shares)
    digest, images = _digest(batches)
    wanted = list(_wanted(network, kinds, shares))
    header = {
        "schema": SCHEMA,
        "architecture": scores.architecture,
        "weights": scores.weights,
        "criterion": scores.criterion,
        "scored_on": scores.data,
        "seed": scores.seed,
        "data": digest,
    }
    kept = _Journal(journal, header)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    points: list[SensitivityPoint] = []
    try:
        with torch.inference_mode():
            run = _Run(network, batches)
            loss, top1 = run.evaluate()
            for place, (block, kind, share) in enumerate(wanted, start=1):
                point = kept.find(block, kind, share)
                if point is None:
                    plan = share_plan(network, scores, block, kind, share)
                    changed = apply_plan(plan, network).eval().get_submodule(block)
                    point = _point(
                        plan, network, (block, kind, share), run.evaluate(block, changed)
                    )
                    kept.append(point)
                points.append(point)
                if on_point is not None:
                    on_point(place, len(wanted), point)
    finally:
        for module, training in modes:
            module.training = training
    return Sensitivity(
        scores.architecture, scores.criterion, images, digest, loss, top1, tuple(points)
    )


def share_plan(
    network: Network, scores: Scores, block: str, kind: SensitivityKind, share: float
) -> WidthPlan:
    """The plan that removes the least important `share` of one block's units, one at least.

    Of queries and keys, and of values, every head loses equally many dims and keeps one at least.
    """
    full = WidthPlan.full(network.architecture)
    whole, known = full.blocks[block], scores.blocks[block]
    if kind == "ffn":
        (ffn,) = _most_important(known.ffn[None], share)
        kept = replace(whole, ffn=ffn)
    else:
        dims = _most_important(_of_heads(known, kind), share)
        kept = replace(whole, qk=dims) if kind == "qk" else replace(whole, v=dims)
    return replace(full, blocks={**full.blocks, block: kept})


def _of_heads(scores: BlockScores, kind: SensitivityKind) -> FloatArray:
    return scores.qk if kind == "qk" else scores.v


def _most_important(scores: FloatArray, share: float) -> tuple[Indexes, ...]:
    """For each row (unit scores) the indexes that stay, ascending."""
    size = scores.shape[1]
    left = max(1, size - max(1, round(share * size)))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :left]
    return tuple(tuple(sorted(row)) for row in order.tolist())


def _units(plan: BlockPlan, kind: SensitivityKind) -> int:
    return len(plan.ffn) if kind == "ffn" else sum(len(dims) for dims in getattr(plan, kind))


Task = tuple[str, SensitivityKind, float]


def _wanted(
    network: Network, kinds: Sequence[SensitivityKind], shares: Sequence[float]
) -> Iterator[Task]:
    """Block by block, as the pass goes; parts of one unit cannot be pruned without going whole."""
    for part, block in block_components(network.architecture):
        plan = BlockPlan.full(block, part.input.channels)
        sizes = {"qk": plan.qk_dim, "v": plan.v_dim, "ffn": len(plan.ffn)}
        for kind in kinds:
            if sizes[kind] > 1:
                yield from ((part.name, kind, share) for share in shares)


def _point(
    plan: WidthPlan, network: Network, task: Task, found: tuple[float, float]
) -> SensitivityPoint:
    block, kind, share = task
    units = _units(WidthPlan.full(network.architecture).blocks[block], kind)
    left = _units(plan.blocks[block], kind)
    return SensitivityPoint(block, kind, share, units, units - left, *found)


class _Run:
    """Evaluates a network again and again, from a block that moves forward only."""

    def __init__(self, network: Network, batches: Batches) -> None:
        first = next(network.parameters())
        self.network = network
        self.parts = list(walk(network.architecture))
        self.labels = [labels.to(first.device) for _, labels in batches]
        self.inputs = [images.to(first.device, first.dtype) for images, _ in batches]
        network(self.inputs[0][:1])  # refuses images of another size in one line
        self.next = 0

    def evaluate(self, block: str = "", changed: nn.Module | None = None) -> tuple[float, float]:
        """Mean loss and top-1 with `changed` in the place of `block`."""
        if block:
            while self.parts[self.next].name != block:
                part = self.parts[self.next]
                self.inputs = [self._step(part, x) for x in self.inputs]
                self.next += 1
        loss = right = 0.0
        for x, labels in zip(self.inputs, self.labels, strict=True):
            logits = x
            for part in self.parts[self.next :]:
                logits = self._step(part, logits, changed if part.name == block else None)
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
        images = sum(len(labels) for labels in self.labels)
        return loss / images, 100 * right / images

    def _step(self, part: Component, x: Tensor, instead: nn.Module | None = None) -> Tensor:
        module = instead or self.network.get_submodule(part.name)
        # A stem takes an image; its layout is that of what it gives.
        out: Tensor = module(x) if part.kind == "stem" else run_module(module, x, part.input)
        return out


class _Journal:
    """Points on disk, one JSON line each behind a header; safe against being killed."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[Task, SensitivityPoint] = {}
        if path is None:
            return
        lines = whole_lines(path, PruneError)
        if lines:
            self._check(parse_line(lines[0]), header)
            for number, line in enumerate(lines[1:], start=2):
                self._add(parse_line(line), number)
        # What stands behind the last whole line is the start of one that was never finished.
        atomic_write_bytes(path, b"".join(lines) or json_line(header))

    def find(self, block: str, kind: SensitivityKind, share: float) -> SensitivityPoint | None:
        return self.known.get((block, kind, share))

    def append(self, point: SensitivityPoint) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("ab") as file:
                file.write(json_line(asdict(point)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot be written ({error.strerror or error}); free space and "
                "start the same command again, or choose another place with --output"
            ) from error

    def _check(self, found: Any, wanted: Mapping[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise PruneError(
                f"{self.path}:1: must begin with a {SCHEMA} header; remove the file to start anew"
            )
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise PruneError(
                    f"{self.path}: belongs to another run: its {key} is {found.get(key)!r}, not "
                    f"{wanted[key]!r}; choose another --output, or remove the file"
                )

    def _add(self, data: Any, number: int) -> None:
        try:
            point = SensitivityPoint(**data)
        except TypeError:
            raise PruneError(
                f"{self.path}:{number}: damaged line; remove the file to start anew"
            ) from None
        self.known[point.block, point.kind, point.share] = point


def _digest(batches: Batches) -> tuple[str, int]:
    """SHA-256 of images and labels in their order, and the number of images."""
    images = sum(len(labels) for _, labels in batches)
    if not images:
        raise PruneError("sensitivity: must have at least one image, got none")
    found = hashlib.sha256()
    for pixels, labels in batches:
        found.update(pixels.detach().cpu().contiguous().numpy().tobytes())
        found.update(labels.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest(), images


def _check_shares(shares: Sequence[float]) -> None:
    if not shares or not all(0 < share < 1 for share in shares):
        raise PruneError(f"sensitivity: shares must lie between 0 and 1, got {list(shares)}")
