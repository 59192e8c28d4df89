"""The supernet: every slot of a search space holds all its choices and learns which to take.

EfficientFormer (NeurIPS 2022), section 4.2. The module holds weights and architecture
parameters only; which paths run is an argument of `forward`, and no question changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import LinearHead
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.space import SearchSpace, Selection
from slimnas.arch.walk import Component, walk
from slimnas.errors import SpecError
from slimnas.nn.build import Network, make_module
from slimnas.nn.layout import run_module
from slimnas.nn.regularisation import set_layer_scale
from slimnas.nn.seeding import seeded
from slimnas.supernet.gumbel import AlphaGradient, Mixing, Noise, Route, draw_route
from slimnas.supernet.inherit import ChannelOrder, Inheritance
from slimnas.supernet.metapath import MetaPath, SuperStage

Pass = Callable[[Tensor], Tensor]
"""Images (B, c, R, R) -> logits (B, K)."""


class Supernet(nn.Module):
    """All networks of a space in one module, each stage at its largest width.

    Args:
        space: the search space; its head gives the number of classes.
        resolution: side of the square training images in pixels, the proxy for deployment.
        seed: of the initial weights.
        layer_scale: initial value of every layer scale, and of BatchNorms that would start at
            0. EfficientFormer starts at 1e-5 and trains for hundreds of epochs; a supernet trains
            for few.

    Raises:
        SpecError: a block cannot take its map at this resolution.
    """

    stem: nn.Module
    stages: nn.ModuleList
    head: nn.Module

    def __init__(
        self, space: SearchSpace, *, resolution: int, seed: int, layer_scale: float = 0.1
    ) -> None:
        super().__init__()
        self.space = space
        self.resolution = resolution
        parts = {part.name: part for part in _full_width_parts(space, resolution)}
        with seeded(seed):
            self.stem = make_module(parts["stem"])
            self.stages = nn.ModuleList(
                _make_stage(space, index, parts) for index in range(len(space.stages))
            )
            self.head = make_module(parts["head"])
        set_layer_scale(self, layer_scale)

    def forward(
        self, images: Tensor, routes: Sequence[Route], others: Sequence[Pass] = ()
    ) -> Tensor:
        """Map images (B, c, R, R) to logits (B, K) along `routes`, one per MetaPath in order.

        With `others`, networks that run on the same images and weights, to logits of all of them
        (1 + others, B, K): in one call, since processes that train together exchange gradients
        once per call.
        """
        logits = self.along(images, routes)
        if not others:
            return logits
        return torch.stack([logits, *(run(images) for run in others)])

    def along(self, images: Tensor, routes: Sequence[Route]) -> Tensor:
        """Logits (B, K) of images (B, c, R, R) along `routes`."""
        x = self.stem(images)
        remaining = iter(routes)
        for stage in self.super_stages():
            if stage.downsample is not None:
                x = run_module(stage.downsample, x, stage.shape_in)
            for slot in stage.slots:
                x = slot(x, next(remaining))
        return mean_logits(self.head(x))

    def draw_routes(
        self,
        tau: float,
        *,
        mixing: Mixing,
        noise: Noise,
        generator: torch.Generator,
        gradient: AlphaGradient = "output",
    ) -> list[Route]:
        """One random route per MetaPath, see `slimnas.supernet.gumbel.draw_route`."""
        return [
            draw_route(
                path.alpha,
                tau,
                mixing=mixing,
                noise=noise,
                generator=generator,
                gradient=gradient,
            )
            for path in self.meta_paths()
        ]

    def fixed_routes(self, selection: Selection) -> list[Route]:
        """The routes along which the supernet is the full-width network of `selection`.

        Only the selection's paths count; widths are the business of `extract`.
        """
        chosen = [choice for slots in selection.paths for choice in slots]
        return [
            Route(path.choices.index(choice), None)
            for path, choice in zip(self.meta_paths(), chosen, strict=True)
        ]

    def likeliest_routes(self) -> list[Route]:
        """Each MetaPath's most probable choice."""
        return [Route(int(path.alpha.argmax()), None) for path in self.meta_paths()]

    def extract(
        self,
        architecture: Architecture,
        *,
        selection: Selection | None = None,
        order: ChannelOrder | None = None,
    ) -> Network:
        """The stand-alone network of `architecture` with this supernet's weights, sliced to its
        widths; the supernet stays as it is.

        Args:
            architecture: of the space; its input size may differ, then attention biases are
                interpolated.
            selection: which slots its blocks come from; the likeliest if not given.
            order: which channels a narrower network keeps; by magnitude if not given.

        Raises:
            SpecError: outside the space, or another number of classes.
        """
        return Inheritance(self, order).extract(architecture, selection=selection)

    def meta_paths(self) -> Iterator[MetaPath]:
        """Every MetaPath in execution order."""
        for stage in self.super_stages():
            yield from cast("Sequence[MetaPath]", stage.slots)

    def super_stages(self) -> Iterator[SuperStage]:
        """Every stage in order."""
        yield from cast("Sequence[SuperStage]", self.stages)

    def alphas(self) -> tuple[tuple[dict[str, float], ...], ...]:
        """Per stage and slot, the architecture parameter of each choice."""
        return tuple(
            tuple(
                dict(zip(path.choices, path.alpha.tolist(), strict=True))
                for path in cast("Sequence[MetaPath]", stage.slots)
            )
            for stage in self.super_stages()
        )


def _full_width_parts(space: SearchSpace, resolution: int) -> Iterator[Component]:
    """Stem, downsamples, head and one block per slot of the widest network."""
    largest = space.architecture(space.largest(space.attention_counts()[0]))
    yield from walk(largest.with_resolution(resolution))


def _make_stage(space: SearchSpace, index: int, parts: dict[str, Component]) -> SuperStage:
    stage = space.stages[index]
    slots = []
    for slot in range(stage.slots):
        shape = parts[f"stages.{index}.blocks.{slot}"].input
        _require_fitting(space, index, shape)
        blocks = {
            choice: make_module(
                Component(
                    f"stages.{index}.slots.{slot}.blocks.{choice}",
                    "block",
                    index,
                    space.blocks.block(choice, stage.width.max),
                    shape,
                    shape,
                )
            )
            for choice in stage.blocks
        }
        slots.append(MetaPath(blocks, stage.choices, shape))
    downsample = parts.get(f"stages.{index}.downsample")
    return SuperStage(
        make_module(downsample) if downsample is not None else None,
        slots,
        downsample.input if downsample is not None else slots[0].shape,
    )


def _require_fitting(space: SearchSpace, index: int, shape: FeatureShape) -> None:
    for choice in space.stages[index].blocks:
        fault = space.blocks.fault(choice, shape)
        if fault is not None:
            raise SpecError(
                f"search space {space.name}: cannot train its supernet at this resolution: "
                f"{choice} of stages[{index}] gets a map of {shape.height}x{shape.width}; {fault}; "
                "give another --resolution"
            )


def mean_logits(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """A head's logits; of the two of a distilled head in training their mean, both learn alike."""
    return (out[0] + out[1]) / 2 if isinstance(out, tuple) else out


def head_classes(supernet: Supernet) -> int:
    """Number of classes the supernet was trained for."""
    head: LinearHead = supernet.space.head
    return head.classes
