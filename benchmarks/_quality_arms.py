"""The networks that found ones are compared with at a latency: scaled, random and evolved."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import device as torch_device

from slimnas.arch.architecture import Architecture, StageSpec
from slimnas.arch.efficientformer import ConvStem
from slimnas.arch.space import ATTENTION, CONVOLUTION, SearchSpace, Selection
from slimnas.data.splits import SearchData
from slimnas.errors import SpecError, UnreachableTargetError
from slimnas.latency.table import LatencyTable
from slimnas.search.checks import pricer, require_fitting
from slimnas.search.config import SearchConfig
from slimnas.search.evolution import Evolution, Record, Scored, evolve
from slimnas.search.importance import ImportanceRecord
from slimnas.search.run import open_evaluator
from slimnas.supernet.train import load_supernet
from slimnas.zoo.registry import get

BASE = "efficientformer_l1"
WIDTH_MULTIPLE = 8
FACTORS = tuple(round(0.05 + 0.005 * i, 3) for i in range(600))
"""Scaling factors that are tried, ascending."""

DRAWS = 20_000
"""Random architectures of which those at a latency are taken."""

PriceOf = Callable[[Architecture], float]
"""Latency of an architecture, in milliseconds."""


Shape = tuple[tuple[int, ...], tuple[int, ...]]
"""Widths and depths of a network's stages."""


@cache
def base_network() -> Architecture:
    """EfficientFormer-L1."""
    return get(BASE).architecture


def shape_of(space: SearchSpace, depth_factor: float, width_factor: float) -> Shape:
    """Widths and depths of EfficientFormer-L1 times a factor each.

    Widths are rounded to multiples of 8; both stay within the space's ranges, which is what its
    table prices.

    Raises:
        SpecError: the space has another number of stages.
    """
    base = base_network()
    if len(space.stages) != len(base.stages):
        raise SpecError(
            f"search space {space.name}: must have {len(base.stages)} stages to scale {BASE}, has "
            f"{len(space.stages)}"
        )
    widths, depths = [], []
    for width, depth, part in zip(base.widths, base.depths, space.stages, strict=True):
        wanted = WIDTH_MULTIPLE * round(width_factor * width / WIDTH_MULTIPLE)
        widths.append(min(max(wanted, part.width.min), part.width.max))
        depths.append(min(max(round(depth_factor * depth), part.min_depth), part.slots))
    return tuple(widths), tuple(depths)


def scaled(space: SearchSpace, shape: Shape) -> Architecture:
    """EfficientFormer-L1 with these widths and depths; its own give L1.

    The share of MB3D in a stage stays, one of them at least.
    """
    stages = []
    base = base_network().stages
    for stage, part, width, depth in zip(base, space.stages, *shape, strict=True):
        mb3d = sum(block.type == ATTENTION for block in stage.blocks)
        last = max(1, round(mb3d / len(stage.blocks) * depth)) if mb3d else 0
        kinds = [CONVOLUTION] * (depth - last) + [ATTENTION] * last
        blocks = tuple(space.blocks.block(kind, width) for kind in kinds)
        stages.append(StageSpec(width=width, downsample=part.downsample, blocks=blocks))
    return Architecture(
        name=f"{BASE}_scaled",
        input=space.input,
        stem=ConvStem(width=stages[0].width, act=space.stem.act),
        stages=tuple(stages),
        head=space.head,
    )


def uniform_scaling(space: SearchSpace, price: PriceOf, target_ms: float) -> Architecture:
    """The largest uniform scaling of EfficientFormer-L1 that meets a latency.

    One factor for depths and widths; then, since whole blocks overshoot, the widths alone grow
    into what is left of the target.

    Raises:
        UnreachableTargetError: no scaling within the space's ranges is as fast.
    """

    @cache  # neighbouring factors give the same shape
    def meets(shape: Shape) -> bool:
        return price(scaled(space, shape)) <= target_ms

    fitting = [f for f in FACTORS if meets(shape_of(space, f, f))]
    if not fitting:
        raise UnreachableTargetError(
            f"no scaling of {BASE} within the ranges of {space.name} meets {target_ms:g} ms; "
            "choose a higher target"
        )
    depth = fitting[-1]
    wider = [f for f in FACTORS if f >= depth and meets(shape_of(space, depth, f))]
    return scaled(space, shape_of(space, depth, wider[-1]))


def random_at(
    space: SearchSpace,
    price: PriceOf,
    target_ms: float,
    count: int,
    seed: int,
    draws: int = DRAWS,
) -> list[Architecture]:
    """Of `draws` random architectures that meet a latency, the `count` that use most of it."""
    rng = random.Random(f"{seed} {target_ms}")
    found: dict[str, tuple[float, Architecture]] = {}
    for _ in range(draws):
        architecture = space.architecture(space.random(rng), name="random")
        latency_ms = price(architecture)
        if latency_ms <= target_ms:
            found.setdefault(architecture.digest, (latency_ms, architecture))
    slowest = sorted(found.values(), key=lambda pair: -pair[0])
    return [architecture for _, architecture in slowest[:count]]


def evolved(
    run: Path,
    supernet: Path,
    space: SearchSpace,
    table: LatencyTable,
    data: SearchData,
    *,
    evaluations: int,
    device: torch_device,
    note: Callable[[int, Scored], None],
) -> Evolution:
    """NSGA-II with a search's supernet, images, table and number of evaluations.

    What is evaluated is kept beside the run, so that a run that was stopped goes on.

    Args:
        run: folder of the search.
        supernet: that it used.
        space: with the data's classes.
        table: prices, as corrected by what the search measured.
        data: TRAIN and SEARCH.
        evaluations: how many.
        device: where the supernet runs.
        note: called with their number after each evaluation.
    """
    evaluate, identity = judge(run, supernet, space, data, device)
    return evolve(
        space,
        pricer(space, table),
        evaluate,
        evaluations=evaluations,
        seed=SearchConfig.load(run / "config.yaml").seed,
        record=Record(run / "nsga2.jsonl", identity),
        on_scored=note,
    )


def judge(
    run: Path, supernet: Path, space: SearchSpace, data: SearchData, device: torch_device
) -> tuple[Callable[[Selection], float], str]:
    """What a search judged its candidates by, top-1 in percent on SEARCH, and what names it.

    Args:
        run: folder of the search.
        supernet: that it used.
        space: with the data's classes.
        data: TRAIN and SEARCH.
        device: where the supernet runs.
    """
    config = SearchConfig.load(run / "config.yaml")
    trained = load_supernet(supernet)
    require_fitting(trained, space, data, config.resolution)
    trained.supernet.to(device)
    importance = ImportanceRecord.load(run / "importance.json")
    evaluator = open_evaluator(
        config, trained.supernet, importance, data, order=trained.channel_order()
    )

    def evaluate(selection: Selection) -> float:
        evaluator.move_to(selection)  # which forgets the modules of the one before
        return evaluator.top1(selection)

    return evaluate, f"{trained.digest} {data.digest} {config.search_images} {config.seed}"
