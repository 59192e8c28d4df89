"""Does a supernet rank networks as training them alone does?

EfficientFormer (NeurIPS 2022), section 4.2, and its kin choose networks by what a shared-weight
supernet says and never publish how that ranks them. Here networks of a space are drawn, judged
with inherited weights, and trained alone from scratch on one small budget.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any, Protocol

from slimnas.analysis.budget import EVAL_BATCH, TrainingBudget
from slimnas.analysis.finished import Finished
from slimnas.analysis.ranking_stats import (
    FEWEST,
    Agreement,
    agreement,
    mean_agreement,
    partial_tau,
)
from slimnas.analysis.share_run import Step
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.errors import AnalysisError, RunFolderError
from slimnas.train.evaluate import top1_percent

POOL = 256
"""Networks drawn to choose from; a study of more networks goes on with those of a smaller one."""

DRAWS_PER_NETWORK = 8
"""Draws for each network of the pool, before a space counts as exhausted."""


@dataclass(frozen=True)
class Inherited:
    """What the supernet says of a network.

    Attributes:
        search_top1: with inherited weights, on SEARCH, in percent.
        importance: sum of the importances of its active MetaPaths.
    """

    search_top1: float
    importance: float


@dataclass(frozen=True)
class OwnAccuracy:
    """A network trained alone: top-1 on SEARCH and on TEST, in percent."""

    search_top1: float
    test_top1: float


class TrainAlone(Protocol):
    """Trains a network from scratch; see `trained_alone`."""

    def __call__(self, architecture: Architecture, *, seed: int) -> OwnAccuracy:
        """Return its accuracies."""
        ...


@dataclass(frozen=True)
class RankedNetwork:
    """One network of a study.

    Attributes:
        architecture: the network, at the deployment resolution.
        params: trainable parameters.
        macs: multiply-adds for one image at that resolution.
        inherited: what the supernet says of it.
        own: what training it alone gave, one per seed.
    """

    architecture: Architecture
    params: int
    macs: int
    inherited: Inherited
    own: tuple[OwnAccuracy, ...]

    @property
    def search_top1(self) -> float:
        """Own top-1 on SEARCH, the mean over the seeds."""
        return sum(one.search_top1 for one in self.own) / len(self.own)

    @property
    def test_top1(self) -> float:
        """Own top-1 on TEST, the mean over the seeds."""
        return sum(one.test_top1 for one in self.own) / len(self.own)


PREDICTORS: Mapping[str, Callable[[RankedNetwork], float]] = MappingProxyType(
    {
        "inherited": lambda one: one.inherited.search_top1,
        "importance": lambda one: one.inherited.importance,
        "params": lambda one: float(one.params),
        "macs": lambda one: float(one.macs),
    }
)
"""What may rank networks without training them; the last two need no supernet at all."""


@dataclass(frozen=True)
class Correlation:
    """How well one predictor ranks networks.

    Attributes:
        predictor: a key of `PREDICTORS`.
        search: agreement with own top-1 on SEARCH.
        test: agreement with own top-1 on TEST, which neither the supernet nor a search saw.
        tau_beyond_macs: partial tau with own top-1 on SEARCH, MACs held; None for MACs themselves.
    """

    predictor: str
    search: Agreement
    test: Agreement
    tau_beyond_macs: float | None


@dataclass(frozen=True)
class Ranking:
    """A finished study.

    Attributes:
        networks: by MACs.
        seeds: of the trainings.
        correlations: one per predictor, in the order of `PREDICTORS`.
        splits: agreement of own top-1 on SEARCH and on TEST: what judging on few images costs.
        ceiling: agreement of one training with another of another seed, the mean over pairs; no
            predictor can be expected to agree better with one training. None with one seed.
    """

    networks: tuple[RankedNetwork, ...]
    seeds: tuple[int, ...]
    correlations: tuple[Correlation, ...]
    splits: Agreement
    ceiling: Agreement | None

    def of(self, predictor: str) -> Correlation:
        """The correlation of one predictor."""
        return next(one for one in self.correlations if one.predictor == predictor)


def draw_networks(space: SearchSpace, count: int, *, seed: int) -> tuple[Architecture, ...]:
    """Draw `count` different networks, spread evenly over the logarithm of their MACs.

    Of a pool of random networks the smallest comes first, then always the one that is farthest
    from those taken, at first the largest. So the first networks of a larger count are those of a
    smaller one.

    Args:
        space: where they are from.
        count: how many.
        seed: of the draws.

    Raises:
        AnalysisError: fewer than three are asked for, or the space has too few.
    """
    if count < FEWEST:
        raise AnalysisError(
            f"networks: must be at least {FEWEST}, fewer have no ranking; got {count}"
        )
    rng, wanted = random.Random(seed), max(POOL, 4 * count)
    forms: dict[object, Selection] = {}
    draws = 0
    while len(forms) < wanted and draws < DRAWS_PER_NETWORK * wanted:
        selection = space.random(rng)
        forms.setdefault(_form(selection), selection)
        draws += 1
    if len(forms) < count:
        raise AnalysisError(
            f"search space {space.name}: {draws} draws gave {len(forms)} different networks, "
            f"{count} are asked for; ask for fewer, at least {FEWEST}, or widen the space"
        )
    pool = {one.digest: one for one in map(space.architecture, forms.values())}
    sizes = {digest: math.log(cost(one).macs) for digest, one in pool.items()}
    taken = [min(sizes, key=sizes.__getitem__)]
    gaps = {digest: size - sizes[taken[0]] for digest, size in sizes.items()}
    while len(taken) < count:
        del gaps[taken[-1]]
        taken.append(max(gaps, key=gaps.__getitem__))
        newest = sizes[taken[-1]]
        gaps = {digest: min(gap, abs(sizes[digest] - newest)) for digest, gap in gaps.items()}
    return tuple(pool[digest].renamed(f"{space.name}_{digest[:8]}") for digest in taken)


def _form(selection: Selection) -> object:
    """What a selection says of its architecture: not which slots its blocks are in."""
    blocks = tuple(tuple(c for c in slots if c != IDENTITY) for slots in selection.paths)
    return selection.widths, blocks


def trained_alone(budget: TrainingBudget) -> TrainAlone:
    """What trains networks from scratch on `budget`, judges them and leaves no file behind."""

    def train(architecture: Architecture, *, seed: int) -> OwnAccuracy:
        network = budget.train(architecture, seed=seed)
        device = budget.accelerator.device
        found = [
            top1_percent(network.to(device), images.eval_batches(EVAL_BATCH, device=device))
            for images in (budget.data.search, budget.data.test)
        ]
        budget.clean_up()
        return OwnAccuracy(*found)

    return train


def run_ranking(
    networks: Sequence[Architecture],
    inherit: Callable[[Architecture], Inherited],
    train: TrainAlone,
    finished: Finished,
    *,
    seeds: Sequence[int],
    on_step: Callable[[Step], None] = lambda step: None,
) -> Ranking:
    """Judge and train every network; what `finished` has is not done again.

    Args:
        networks: what to rank.
        inherit: what the supernet says of a network.
        train: trains one alone.
        finished: results so far.
        seeds: of the trainings of each network.
        on_step: told what comes next.

    Raises:
        AnalysisError: fewer than three networks.
        RunFolderError: a damaged result in `finished`.
    """
    total = len(networks) * (1 + len(seeds))
    heard = []
    for place, network in enumerate(networks):
        on_step(Step(place, total, f"{network.name} with inherited weights"))
        heard.append(_kept_inherited(network, inherit, finished))
    own: list[list[OwnAccuracy]] = [[] for _ in networks]
    done = len(networks)
    for seed in seeds:  # a stopped study has few seeds of all networks, not all seeds of few
        for network, accuracies in zip(networks, own, strict=True):
            on_step(Step(done, total, f"{network.name} alone, seed {seed}"))
            accuracies.append(_kept_own(network, seed, train, finished))
            done += 1
    on_step(Step(total, total, "done"))
    ranked = []
    for network, inherited, accuracies in zip(networks, heard, own, strict=True):
        counted = cost(network)
        ranked.append(
            RankedNetwork(network, counted.params, counted.macs, inherited, tuple(accuracies))
        )
    ranked.sort(key=lambda one: (one.macs, one.architecture.digest))
    return ranking_of(ranked, seeds)


def ranking_of(networks: Sequence[RankedNetwork], seeds: Sequence[int]) -> Ranking:
    """Correlate every predictor with the accuracy of networks trained alone.

    Raises:
        AnalysisError: fewer than three networks.
    """
    search = [one.search_top1 for one in networks]
    test = [one.test_top1 for one in networks]
    macs = [PREDICTORS["macs"](one) for one in networks]
    by_macs = agreement(macs, search, seed=0).tau
    found = []
    for name, predict in PREDICTORS.items():
        values = [predict(one) for one in networks]
        on_search = agreement(values, search, seed=0)
        beyond = None
        if name != "macs":
            beyond = partial_tau(on_search.tau, agreement(values, macs, seed=0).tau, by_macs)
        found.append(Correlation(name, on_search, agreement(values, test, seed=0), beyond))
    by_seed = [[one.own[place].search_top1 for one in networks] for place in range(len(seeds))]
    ceiling = mean_agreement(list(combinations(by_seed, 2)), seed=0) if len(seeds) > 1 else None
    return Ranking(
        tuple(networks), tuple(seeds), tuple(found), agreement(search, test, seed=0), ceiling
    )


def row(network: RankedNetwork) -> dict[str, Any]:
    """One network as plain data: what the CSV and the JSON have of it."""
    return {
        "name": network.architecture.name,
        "widths": list(network.architecture.widths),
        "depths": list(network.architecture.depths),
        "params": network.params,
        "macs": network.macs,
        "importance": network.inherited.importance,
        "inherited_search_top1": network.inherited.search_top1,
        "own_search_top1": network.search_top1,
        "own_test_top1": network.test_top1,
        "own_search_top1_by_seed": [one.search_top1 for one in network.own],
        "own_test_top1_by_seed": [one.test_top1 for one in network.own],
        "digest": network.architecture.digest,
    }


def _kept_inherited(
    network: Architecture, inherit: Callable[[Architecture], Inherited], finished: Finished
) -> Inherited:
    key = f"inherited {network.digest}"
    stored = finished.get(key)
    if stored is None:
        found = inherit(network)
        stored = finished.add(key, [found.search_top1, found.importance])
    return Inherited(*_two_numbers(stored, finished, key))


def _kept_own(
    network: Architecture, seed: int, train: TrainAlone, finished: Finished
) -> OwnAccuracy:
    key = f"own {network.digest} {seed}"
    stored = finished.get(key)
    if stored is None:
        found = train(network, seed=seed)
        stored = finished.add(key, [found.search_top1, found.test_top1])
    return OwnAccuracy(*_two_numbers(stored, finished, key))


def _two_numbers(stored: Any, finished: Finished, key: str) -> tuple[float, float]:
    try:
        first, second = (float(one) for one in stored)
    except (TypeError, ValueError) as error:
        raise RunFolderError(
            f"{finished.path}: {key}: damaged ({error}); remove the file to start anew"
        ) from error
    return first, second
