"""How much importance stays when Q/K dimension or V ratio shrink: of one network, trained once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from slimnas.analysis.ablate import Axis
from slimnas.analysis.budget import TrainingBudget
from slimnas.analysis.finished import Finished
from slimnas.analysis.gates import ChannelImportance, Kept, channel_importance, kept_importance
from slimnas.analysis.share_run import Step
from slimnas.arch.architecture import Architecture
from slimnas.errors import AnalysisError, RunFolderError
from slimnas.nn.build import Network
from slimnas.nn.tensorfiles import tensors_digest

BATCH = 32
BATCHES = 32
"""Batches of TRAIN that importance is weighed on, at most."""


@dataclass(frozen=True)
class ImportanceStudy:
    """What to weigh.

    Attributes:
        base: the model.
        budget: data, and how it is trained.
        network: trained already, built for the budget's resolution; None trains it.
        axes: the values to cut each axis to.
        seeds: of the trainings; results are their means.
    """

    base: Architecture
    budget: TrainingBudget
    network: Network | None
    axes: Mapping[Axis, Sequence[float]]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        """Refuse a network of other classes than the data's.

        Raises:
            AnalysisError: says both numbers.
        """
        if self.network is None:
            return
        architecture, wanted = self.network.architecture, self.budget.data.classes
        if architecture.head.classes != wanted:
            raise AnalysisError(
                f"weights: {architecture.name} has {architecture.head.classes} classes, the data "
                f"have {wanted}; give --data with images of its classes, or leave --weights out"
            )

    def settings(self) -> dict[str, Any]:
        """Everything a result depends on but the seed, as plain data."""
        given = None if self.network is None else tensors_digest(self.network.state_dict())
        return {
            "model": self.base.name,
            "model_digest": self.base.digest,
            "weights_digest": given,
            "weighed_images": BATCH * BATCHES,
            **self.budget.settings(),
        }


def run_importance(
    study: ImportanceStudy,
    finished: Finished,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
) -> tuple[tuple[Kept, ...], tuple[str, ...]]:
    """Train (once per seed, unless `finished` has it), weigh, and cut.

    Returns:
        What stays at every value of every axis, and the names of the blocks.

    Raises:
        AnalysisError: no attention whose channels can be told apart.
    """
    found = []
    for place, seed in enumerate(study.seeds):
        on_step(Step(place, len(study.seeds), f"seed {seed}"))
        key = f"importance {seed}"
        stored = finished.get(key)
        if stored is None:
            stored = finished.add(key, [_stored(one) for one in _weighed(study, seed)])
            study.budget.clean_up()
        found.append(_read(stored, finished, key))
    on_step(Step(len(study.seeds), len(study.seeds), "done"))
    kept: list[Kept] = []
    for axis, values in study.axes.items():
        if values:
            kept += _mean([kept_importance(one, axis, values) for one in found])
    return tuple(kept), tuple(one.block for one in found[0])


def _weighed(study: ImportanceStudy, seed: int) -> tuple[ChannelImportance, ...]:
    budget = study.budget
    network = study.network
    if network is None:
        network = budget.train(study.base, seed=seed)
    device = budget.accelerator.device
    images: Iterator[tuple[Tensor, Tensor]] = budget.data.train.eval_batches(BATCH, device=device)
    return channel_importance(network.to(device), islice(images, BATCHES))


def _mean(per_seed: Sequence[Sequence[Kept]]) -> list[Kept]:
    means = []
    for same in zip(*per_seed, strict=True):
        by_block = tuple(map(_mean_of, zip(*(one.by_block for one in same), strict=True)))
        share = float(np.mean([one.share for one in same]))
        means.append(Kept(same[0].axis, same[0].value, share, by_block))
    return means


def _mean_of(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _stored(one: ChannelImportance) -> dict[str, Any]:
    return {"block": one.block, "width": one.width, "qk": one.qk.tolist(), "v": one.v.tolist()}


def _read(stored: Any, finished: Finished, key: str) -> tuple[ChannelImportance, ...]:
    try:
        return tuple(
            ChannelImportance(
                str(one["block"]), int(one["width"]), np.array(one["qk"]), np.array(one["v"])
            )
            for one in stored
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{finished.path}: {key}: damaged ({error}); remove the file to start anew"
        ) from error
