"""`build`: from an architecture to a plain torch module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec
from slimnas.arch.features import FeatureInfo, feature_info
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import Component, walk
from slimnas.errors import InputSizeError, SpecError
from slimnas.nn import efficientformer, efficientformerv2, efficientvit, litv2, mixers, swin, vit
from slimnas.nn.layout import as_layout, is_tracing, layout_of, run_module
from slimnas.nn.makers import Maker
from slimnas.nn.seeding import seeded

MAKERS: dict[type[Spec], Maker] = {
    **efficientformer.MAKERS,
    **vit.MAKERS,
    **swin.MAKERS,
    **litv2.MAKERS,
    **efficientvit.MAKERS,
    **efficientformerv2.MAKERS,
    **mixers.MAKERS,
}
"""How each type of component becomes a module; a new block family adds its own line here."""


class Stage(nn.Module):
    """Optional downsampling and blocks of one width; takes and gives a map or tokens."""

    downsample: nn.Module | None
    blocks: nn.ModuleList

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Iterable[nn.Module],
        *,
        shape_in: FeatureShape,
        shape: FeatureShape,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.shape_in, self.shape = shape_in, shape

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage on a map or tokens of `shape_in`; the layout follows the last block."""
        if self.downsample is not None:
            x = run_module(self.downsample, x, self.shape_in)
        for block in self.blocks:
            x = run_module(block, x, self.shape)
        return x


class Backbone(nn.Module):
    """Stem and stages of an architecture.

    Attributes:
        architecture: what it was built from.
        stem: image to first map.
        stages: one `Stage` each.
    """

    stem: nn.Module
    stages: nn.ModuleList

    def __init__(
        self, architecture: Architecture, *, stem: nn.Module, stages: Iterable[Stage]
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.fixed_size = any(_needs_its_size(stage) for stage in self._stages())

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Channels, stride and module of every map of `forward_features`."""
        return feature_info(self.architecture)

    def last_features(self, x: Tensor) -> Tensor:
        """Map images (B, c, H, W) to what the head takes: the last stage's map or tokens.

        Raises:
            InputSizeError: no such batch, or attention blocks and another image size.
        """
        for out in self._stage_outputs(x):
            x = out
        return x

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Map images (B, c, H, W) to each stage's map, which `feature_info` describes.

        Raises:
            InputSizeError: no such batch, or attention blocks and another image size.
        """
        if not self.fixed_size:
            return list(self._stage_outputs(x))
        return [
            as_layout(out, "map", stage.shape)
            for stage, out in zip(self._stages(), self._stage_outputs(x), strict=True)
        ]

    def _stage_outputs(self, x: Tensor) -> Iterator[Tensor]:
        self._check(x)
        x = self.stem(x)
        for stage in self._stages():
            x = stage(x)
            yield x

    def _stages(self) -> list[Stage]:
        return cast("list[Stage]", list(self.stages))

    def _check(self, x: Tensor) -> None:
        if is_tracing():  # sizes are tensors there
            return
        want = self.architecture.input.shape
        if x.dim() != 4 or x.shape[1] != want.channels:
            raise InputSizeError(
                f"{self.architecture.name}: takes images (batch, {want.channels}, height, width), "
                f"got {tuple(x.shape)}"
            )
        if self.fixed_size and x.shape[2:] != (want.height, want.width):
            raise InputSizeError(
                f"{self.architecture.name}: its attention blocks were built for "
                f"{want.height}x{want.width} images, got {x.shape[2]}x{x.shape[3]}; resize the "
                "images or build architecture.with_resolution(...)"
            )


class Network(Backbone):
    """A whole network: image to logits.

    Attributes:
        head: last map or tokens to logits.
    """

    head: nn.Module

    def __init__(
        self,
        architecture: Architecture,
        *,
        stem: nn.Module,
        stages: Iterable[Stage],
        head: nn.Module,
    ) -> None:
        super().__init__(architecture, stem=stem, stages=stages)
        self.head = head

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (B, c, H, W) to logits (B, K); a distilled head in training gives two.

        Raises:
            InputSizeError: no such batch, or attention blocks and another image size.
        """
        logits: Tensor | tuple[Tensor, Tensor] = self.head(self.last_features(x))
        return logits


class FeatureNetwork(Backbone):
    """A network without head, the backbone of a detector or segmenter.

    Its parameters carry the names they have in a `Network`.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        """See `forward_features`."""
        return self.forward_features(x)


def make_module(component: Component) -> nn.Module:
    """Make the module of one component, initialised from torch's CPU generator.

    Raises:
        SpecError: no family knows how to make it.
    """
    maker = MAKERS.get(type(component.spec))
    if maker is None:
        known = ", ".join(sorted(spec.__name__ for spec in MAKERS))
        raise SpecError(
            f"{component.name}: no module for {type(component.spec).__name__}; known: {known}; "
            "a new block type needs a maker in slimnas.nn.build.MAKERS"
        )
    return maker(component)


def build(architecture: Architecture, *, seed: int = 0) -> Network:
    """Build `architecture` with freshly initialised weights.

    The same seed gives the same weights always; the global random state is left alone.

    Raises:
        SpecError: a block type no family knows how to make.
    """
    modules = _make_modules(architecture, seed)
    return Network(
        architecture,
        stem=modules["stem"],
        stages=_make_stages(architecture, modules),
        head=modules["head"],
    )


def build_features(architecture: Architecture, *, seed: int = 0) -> FeatureNetwork:
    """Like `build`, without the head: images to one map per stage."""
    modules = _make_modules(architecture, seed)
    return FeatureNetwork(
        architecture, stem=modules["stem"], stages=_make_stages(architecture, modules)
    )


def _needs_its_size(stage: Stage) -> bool:
    """Whether a stage holds attention, which is built for one size of its map."""
    parts = (stage.downsample, *stage.blocks)
    return any(layout_of(block) == "tokens" for block in stage.blocks) or any(
        getattr(part, "fixed_size", False) for part in parts
    )


def _make_modules(architecture: Architecture, seed: int) -> dict[str, nn.Module]:
    with seeded(seed):
        return {component.name: make_module(component) for component in walk(architecture)}


def _make_stages(architecture: Architecture, modules: dict[str, nn.Module]) -> list[Stage]:
    components = list(walk(architecture))
    stages = []
    for index in range(len(architecture.stages)):
        mine = [part for part in components if part.name.startswith(f"stages.{index}.")]
        stages.append(
            Stage(
                modules.get(f"stages.{index}.downsample"),
                [modules[part.name] for part in mine if part.kind == "block"],
                shape_in=mine[0].input,
                shape=mine[-1].output,
            )
        )
    return stages
