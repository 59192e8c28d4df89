"""The MHSA-share study: sub-networks of every share at every speed-up, each part kept once done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from slimnas.analysis.finished import Finished
from slimnas.analysis.mhsa_share import (
    Goal,
    Layers,
    Measure,
    Solved,
    Trial,
    count_layers,
    distinct_shares,
    solve_width,
    with_layers,
)
from slimnas.analysis.speed import Speed
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.errors import RunFolderError

SOURCE = "EfficientViT, CVPR 2023, section 2.1"


class Train(Protocol):
    """Trains a network and gives its top-1; see `budget.TrainingBudget.trained_top1`."""

    def __call__(self, architecture: Architecture, *, seed: int) -> float:
        """Return top-1 in percent."""
        ...


@dataclass(frozen=True)
class ShareStudy:
    """What to build.

    Attributes:
        base: what is scaled down.
        speedups: over the base's throughput.
        shares: of attention in all sub-layers, 0 to 1.
        goal: tolerance, steps and trials; its speed-up is not looked at.
        seeds: of the trainings of each network.
    """

    base: Architecture
    speedups: tuple[float, ...]
    shares: tuple[float, ...]
    goal: Goal
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Instruments:
    """What is done to each network.

    Attributes:
        measure: its speed-up over the base.
        memory: memory-bound share of its run time, 0 to 1; None leaves it out.
        train: its top-1 after the budget; None leaves it out.
        train_key: tells budgets apart, so that a study may be trained again with another.
    """

    measure: Measure
    memory: Callable[[Architecture], float] | None = None
    train: Train | None = None
    train_key: str = ""


@dataclass(frozen=True)
class SubNetwork:
    """One sub-network, or the base (`asked_speedup` 1, `asked_share` its own).

    Attributes:
        asked_speedup: what was asked for.
        asked_share: likewise.
        layers: what it has.
        architecture: the network.
        scale: factor on the base's widths.
        speed: throughput over the base's; None for the base.
        met: whether the speed-up is inside the tolerance.
        looks: measurements that were taken for it.
        memory_share: memory-bound share of its run time, if known.
        top1: in percent, one per seed.
    """

    asked_speedup: float
    asked_share: float
    layers: Layers
    architecture: Architecture
    scale: float
    speed: Speed | None
    met: bool
    looks: int
    memory_share: float | None = None
    top1: tuple[float, ...] = ()

    @property
    def mean_top1(self) -> float | None:
        """Mean over the seeds."""
        return sum(self.top1) / len(self.top1) if self.top1 else None


@dataclass(frozen=True)
class ShareResult:
    """A finished study: the base, then the sub-networks by speed-up and share."""

    base: SubNetwork
    networks: tuple[SubNetwork, ...]


@dataclass(frozen=True)
class Step:
    """Where a study is: parts done, parts in all, and what comes next or was just found."""

    done: int
    total: int
    what: str


def run_share_study(
    study: ShareStudy,
    instruments: Instruments,
    finished: Finished,
    on_step: Callable[[Step], None] = lambda step: None,
) -> ShareResult:
    """Solve every width, look at the memory, train; what `finished` has is not done again.

    Raises:
        AnalysisError: the base lacks attention or FFN layers, or a share cannot be made.
        LatencyTableError: the machine is too busy to measure.
        RunFolderError: a damaged result in `finished`.
    """
    asked = [
        (speedup, share, layers)
        for speedup in sorted(set(study.speedups))
        for share, layers in distinct_shares(study.base, study.shares)
    ]
    parts = (
        1 + (instruments.memory is not None) + len(study.seeds) * (instruments.train is not None)
    )
    steps = _Steps(parts * (len(asked) + 1) - 1, on_step)
    base = _base(study.base)
    networks = []
    for speedup, share, layers in asked:
        steps.next(f"{speedup:g} x, {_percent(layers.share)}: width")
        networks.append(_solved(study, speedup, (share, layers), instruments, finished, steps))
    # All timing first: training in between would heat the machine up and change torch's threads.
    everything = [base, *networks]
    if instruments.memory is not None:
        everything = [_with_memory(one, instruments.memory, finished, steps) for one in everything]
    if instruments.train is not None:
        everything = [
            _with_top1(one, instruments, study.seeds, finished, steps) for one in everything
        ]
    steps.next("done")
    return ShareResult(everything[0], tuple(everything[1:]))


def row(network: SubNetwork) -> dict[str, Any]:
    """One network as plain data: what the CSV and the JSON have of it."""
    found = cost(network.architecture)
    speed = None if network.speed is None else asdict(network.speed)
    return {
        "name": network.architecture.name,
        "asked_speedup": network.asked_speedup,
        "asked_share": round(network.asked_share, 6),
        "share": round(network.layers.share, 6),
        "attention_layers": network.layers.attention,
        "ffn_layers": network.layers.ffn,
        "scale": network.scale,
        "widths": list(network.architecture.widths),
        "speedup": 1.0 if speed is None else speed["speedup"],
        "speedup_low": None if speed is None else speed["low"],
        "speedup_high": None if speed is None else speed["high"],
        "within_tolerance": network.met,
        "images_per_s": None if speed is None else speed["images_per_s"],
        "base_images_per_s": None if speed is None else speed["base_images_per_s"],
        "rounds": None if speed is None else speed["rounds"],
        "looks": network.looks,
        "params": found.params,
        "macs": found.macs,
        "memory_bound_share": network.memory_share,
        "top1": network.mean_top1,
        "top1_by_seed": list(network.top1),
        "digest": network.architecture.digest,
    }


class _Steps:
    """Counts the parts of a study for its listener."""

    def __init__(self, total: int, on_step: Callable[[Step], None]) -> None:
        self._total, self._on_step = total, on_step
        self._done = -1

    def next(self, what: str) -> None:
        self._done += 1
        self.say(what)

    def say(self, what: str) -> None:
        self._on_step(Step(self._done, self._total, what))


def _base(architecture: Architecture) -> SubNetwork:
    layers = count_layers(architecture)
    return SubNetwork(1.0, layers.share, layers, architecture, 1.0, None, True, 0)


def _solved(
    study: ShareStudy,
    speedup: float,
    wanted: tuple[float, Layers],
    instruments: Instruments,
    finished: Finished,
    steps: _Steps,
) -> SubNetwork:
    share, layers = wanted
    key = f"width {speedup:g} {layers.attention}:{layers.ffn}"
    found = finished.get(key)
    if found is None:
        name = f"{study.base.name}-{speedup:g}x-{100 * layers.share:.0f}mhsa"
        start = with_layers(study.base, layers).renamed(
            name,
            {
                "source": f"slimnas analyze mhsa-share of {study.base.name}, after {SOURCE}",
                "base_digest": study.base.digest,
            },
        )

        def on_trial(trial: Trial) -> None:
            widths = ", ".join(map(str, trial.architecture.widths))
            steps.say(
                f"{speedup:g} x, {_percent(layers.share)}: width {widths} gives "
                f"{trial.speed.speedup:.3f} x"
            )

        solved = solve_width(
            start,
            replace(study.goal, speedup=speedup),
            instruments.measure,
            macs=cost(study.base).macs / speedup,
            on_trial=on_trial,
        )
        found = finished.add(key, _solved_data(solved))
    try:
        trial = found["trial"]
        return SubNetwork(
            asked_speedup=speedup,
            asked_share=share,
            layers=layers,
            architecture=Architecture.from_dict(found["architecture"], source=str(finished.path)),
            scale=float(trial["scale"]),
            speed=Speed(**trial["speed"]),
            met=bool(found["met"]),
            looks=int(found["looks"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{finished.path}: {key}: damaged ({error}); remove the file to start anew"
        ) from error


def _solved_data(solved: Solved) -> Mapping[str, Any]:
    trial = solved.trial
    return {
        "trial": {"scale": trial.scale, "speed": asdict(trial.speed)},
        "architecture": trial.architecture.to_dict(),
        "met": solved.met,
        "looks": solved.looks,
    }


def _with_memory(
    network: SubNetwork,
    memory: Callable[[Architecture], float],
    finished: Finished,
    steps: _Steps,
) -> SubNetwork:
    key = f"memory {network.architecture.digest}"
    steps.next(f"{network.architecture.name}: memory-bound share")
    share = finished.number(key)
    if share is None:
        share = float(finished.add(key, memory(network.architecture)))
    return replace(network, memory_share=share)


def _with_top1(
    network: SubNetwork,
    instruments: Instruments,
    seeds: Sequence[int],
    finished: Finished,
    steps: _Steps,
) -> SubNetwork:
    found = []
    for seed in seeds:
        key = f"top1 {network.architecture.digest} {seed} {instruments.train_key}"
        steps.next(f"{network.architecture.name}: training, seed {seed}")
        top1 = finished.number(key)
        if top1 is None:
            assert instruments.train is not None
            top1 = float(finished.add(key, instruments.train(network.architecture, seed=seed)))
        found.append(top1)
    return replace(network, top1=tuple(found))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} % MHSA"
