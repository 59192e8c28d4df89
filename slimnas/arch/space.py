"""`SearchSpace`: an architecture with choices left open, and `Selection`: one way to close them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator, model_validator

from slimnas._resources import data_dir
from slimnas.arch.architecture import Architecture, InputSpec, StageSpec
from slimnas.arch.documents import Spec, dump_yaml, load_document, parse_document, parse_spec
from slimnas.arch.efficientformer import ConvStem, LinearHead
from slimnas.arch.ranges import Limits, StageSpace, SupernetProxy
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.templates import (
    ATTENTION,
    CONVOLUTION,
    IDENTITY,
    BlockTemplates,
    StemTemplate,
    is_attention,
)
from slimnas.errors import SpecError, suggest

__all__ = [
    "ATTENTION",
    "CONVOLUTION",
    "IDENTITY",
    "SearchSpace",
    "Selection",
    "shipped_spaces",
]

SCHEMA = "slimnas/search-space/1"
WHAT = "a search space"

EFFICIENTFORMER = frozenset({CONVOLUTION, ATTENTION, IDENTITY})
"""What EfficientFormer's MetaPaths choose from."""


@dataclass(frozen=True)
class Selection:
    """One choice per MetaPath and one width per stage: a point of a search space.

    Attributes:
        widths: width of each stage.
        paths: per stage, the choice of each slot: a block such as `mb4d`, or `identity`.
    """

    widths: tuple[int, ...]
    paths: tuple[tuple[str, ...], ...]

    def with_path(self, stage: int, slot: int, choice: str) -> Selection:
        """The same selection with one slot changed."""
        slots = list(self.paths[stage])
        slots[slot] = choice
        return replace(self, paths=(*self.paths[:stage], tuple(slots), *self.paths[stage + 1 :]))

    def with_width(self, stage: int, width: int) -> Selection:
        """The same selection with one stage's width changed."""
        return replace(self, widths=(*self.widths[:stage], width, *self.widths[stage + 1 :]))

    def active(self) -> tuple[tuple[int, int, str], ...]:
        """(stage, slot, choice) of every slot that is not identity, in execution order."""
        return tuple(
            (i, j, choice)
            for i, slots in enumerate(self.paths)
            for j, choice in enumerate(slots)
            if choice != IDENTITY
        )


class SearchSpace(Spec):
    """A family of architectures: fixed parts, ranges and choices."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    input: InputSpec = InputSpec()
    stem: StemTemplate = StemTemplate()
    stages: Annotated[tuple[StageSpace, ...], Field(min_length=1)]
    head: LinearHead = LinearHead(classes=1000)
    blocks: Annotated[BlockTemplates, Field(validate_default=True)] = BlockTemplates()
    limits: Limits = Limits()
    supernet: SupernetProxy = SupernetProxy()

    @field_validator("blocks")
    @classmethod
    def _complete(cls, blocks: BlockTemplates, info: ValidationInfo) -> BlockTemplates:
        stages: tuple[StageSpace, ...] = info.data.get("stages", ())
        return blocks.completed({choice: None for stage in stages for choice in stage.blocks})

    @model_validator(mode="after")
    def _stages_connect(self) -> SearchSpace:
        for index, stage in enumerate(self.stages):
            if index and stage.downsample is None:
                raise ValueError(
                    f"stages[{index}].downsample: missing; every stage but the first changes width"
                )
            widths = [value for value in stage.width.values if value % 2]
            if index == 0 and widths:
                raise ValueError(
                    f"stages[0].width: must be even, the stem halves it; got {widths[0]}"
                )
        if self.limits.monotone_widths:
            self._check_monotone_possible()
        self._check_blocks()
        if not self.attention_counts():
            raise ValueError(
                f"limits.attention_last: cannot hold, a stage that only offers {self._attention} "
                "is followed by a stage without it; change choices, or set attention_last to false"
            )
        return self

    def _check_blocks(self) -> None:
        """Every block at every width, on the maps of deployment and of supernet training."""
        sides = dict.fromkeys((self.input.resolution, self.supernet.resolution))
        for resolution in sides:
            image = InputSpec(channels=self.input.channels, resolution=resolution).shape
            shape = ConvStem(width=self.stages[0].width.max).output_shape(image)
            for index, stage in enumerate(self.stages):
                if stage.downsample is not None:
                    shape = stage.downsample.output_shape(shape, stage.width.max)
                self._check_stage(index, shape)

    def _check_stage(self, index: int, shape: FeatureShape) -> None:
        stage = self.stages[index]
        chunks = self.chunks(index)
        for width in stage.width.values:
            if width % chunks:
                raise ValueError(
                    f"stages[{index}].width: must be a multiple of {chunks}, so that every head of "
                    f"hilo and cga keeps as many channels; got {width}"
                )
            for choice in stage.blocks:
                fault = self.blocks.fault(choice, shape.with_channels(width))
                if fault is not None:
                    raise ValueError(
                        f"blocks.{choice}: in stages[{index}] at width {width}, on a map of "
                        f"{shape.height}x{shape.width}: {fault}"
                    )

    def _check_monotone_possible(self) -> None:
        for ends in ("min", "max"):
            widths = [getattr(stage.width, ends) for stage in self.stages]
            if widths != sorted(widths):
                raise ValueError(
                    f"limits.monotone_widths: the stages' width.{ends} must not fall, got {widths}"
                )

    @classmethod
    def load(cls, name_or_path: str | Path) -> SearchSpace:
        """Read a space by file path, or by the name of a shipped one.

        Raises:
            SpecError: no such space (closest name given), or a fault with file and key.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml") and not path.is_file():
            path = _shipped(str(name_or_path))
        return parse_spec(cls, load_document(path, SCHEMA, WHAT), source=str(path))

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "<text>") -> SearchSpace:
        """Parse YAML text; see `load`."""
        return parse_spec(cls, parse_document(text, SCHEMA, WHAT, source=source), source=source)

    def to_yaml(self) -> str:
        """Return the YAML form, every default written out."""
        return dump_yaml(SCHEMA, self.model_dump(mode="json", exclude_none=True))

    def with_classes(self, classes: int) -> SearchSpace:
        """The same space with a classifier for `classes` classes."""
        head = self.head.model_copy(update={"classes": classes})
        return self.model_copy(update={"head": head})

    def without_recipe(self) -> SearchSpace:
        """The same space, with nothing said about how its supernet is trained."""
        supernet = self.supernet.model_copy(update={"recipe": None})
        return self.model_copy(update={"supernet": supernet})

    def fault(self, selection: Selection) -> str | None:
        """Say why `selection` is not in the space, or None when it is."""
        if not len(selection.widths) == len(selection.paths) == len(self.stages):
            return (
                f"{len(selection.widths)} widths and {len(selection.paths)} stages of paths, "
                f"the space has {len(self.stages)} stages"
            )
        for i, (stage, width, slots) in enumerate(
            zip(self.stages, selection.widths, selection.paths, strict=True)
        ):
            if width not in stage.width.values:
                return f"stage {i}: width {width} is not one of {list(stage.width.values)}"
            if len(slots) != stage.slots or not set(slots) <= set(stage.choices):
                return f"stage {i}: {list(slots)} must be {stage.slots} of {list(stage.choices)}"
            depth = sum(choice != IDENTITY for choice in slots)
            if depth < stage.min_depth:
                return f"stage {i}: depth {depth} is below min_depth {stage.min_depth}"
        if self.limits.monotone_widths and list(selection.widths) != sorted(selection.widths):
            return f"widths {list(selection.widths)} must not fall from stage to stage"
        if self.limits.attention_last:
            kinds = [is_attention(choice) for *_, choice in selection.active()]
            if kinds != sorted(kinds):
                return f"{self._attention} blocks must be the last blocks, contiguous"
        return None

    @property
    def counts_attention(self) -> bool:
        """Whether a number of MB3D says which blocks there are, as in EfficientFormer's spaces:
        slots choose MB4D or MB3D, and MB3D comes last.
        """
        offered = {choice for stage in self.stages for choice in stage.choices}
        return self.limits.attention_last and offered <= EFFICIENTFORMER

    def chunks(self, stage: int) -> int:
        """Number of equal runs of the stage's channels that every width keeps as many of."""
        return self.blocks.chunks(self.stages[stage].blocks)

    @property
    def _attention(self) -> str:
        """The choices with attention, in words."""
        offered = dict.fromkeys(c for stage in self.stages for c in stage.blocks if is_attention(c))
        return "/".join(offered) or ATTENTION

    def architecture(self, selection: Selection, *, name: str | None = None) -> Architecture:
        """The architecture that `selection` describes.

        Raises:
            SpecError: the selection is not in the space.
        """
        fault = self.fault(selection)
        if fault is not None:
            raise SpecError(f"search space {self.name}: {fault}")
        stages = tuple(
            StageSpec(
                width=width,
                downsample=stage.downsample,
                blocks=tuple(
                    self.blocks.block(choice, width) for choice in slots if choice != IDENTITY
                ),
            )
            for stage, width, slots in zip(
                self.stages, selection.widths, selection.paths, strict=True
            )
        )
        return Architecture(
            name=name or self.name,
            input=self.input,
            stem=ConvStem(width=selection.widths[0], act=self.stem.act),
            stages=stages,
            head=self.head,
        )

    def full(self, paths: Iterable[Sequence[str]]) -> Selection:
        """Every stage at its greatest width, with these choices."""
        return Selection(
            tuple(stage.width.max for stage in self.stages), tuple(tuple(slots) for slots in paths)
        )

    def largest(self, attention: int = 0) -> Selection:
        """Every slot active at full width, the last `attention` slots with attention, no others.

        Of several blocks with attention, or without, each stage takes the first it offers; MB4D
        before others.

        Raises:
            SpecError: the stages' choices do not allow that number of attention blocks.
        """
        selection = self.full((_first_block(stage),) * stage.slots for stage in self.stages)
        slots = [
            (stage, slot)
            for stage, slot, _ in selection.active()
            if self.limits.attention_last or _attention_of(self.stages[stage])
        ]
        kind = "MB3D" if self.counts_attention else "attention"
        if attention > len(slots):
            raise SpecError(
                f"search space {self.name}: cannot have {attention} {kind} blocks: it has "
                f"{len(slots)} slots"
            )
        for stage, slot in slots[len(slots) - attention :]:
            first = (*_attention_of(self.stages[stage]), ATTENTION)[0]
            selection = selection.with_path(stage, slot, first)
        fault = self.fault(selection)
        fewest = sum(is_attention(choice) for *_, choice in selection.active())
        if fault is None and fewest > attention:
            fault = f"stages that offer nothing else have {fewest}"
        if fault is not None:
            raise SpecError(
                f"search space {self.name}: cannot have {attention} {kind} blocks: {fault}"
            )
        return selection

    def every_block(self) -> tuple[Selection, ...]:
        """Full-width paths that together run every block of every slot; limits do not hold."""
        most = max(len(stage.blocks) for stage in self.stages)
        return tuple(
            self.full((s.blocks[i % len(s.blocks)],) * s.slots for s in self.stages)
            for i in range(most)
        )

    def smallest(self) -> tuple[Selection, ...]:
        """The selections of least widths and depths, one for each number of attention blocks.

        Of several blocks with attention, or without, each stage takes the first it offers; see
        `variants`.
        """
        found: list[Selection] = []
        for attention in range(sum(stage.min_depth for stage in self.stages) + 1):
            left = attention
            paths: list[tuple[str, ...]] = []
            for stage in reversed(self.stages):
                tail = min(left, stage.min_depth)
                left -= tail
                idle = (IDENTITY,) * (stage.slots - stage.min_depth)
                convolutions = (_first_block(stage),) * (stage.min_depth - tail)
                last = (*_attention_of(stage), ATTENTION)[0]
                paths.append(idle + convolutions + (last,) * tail)
            widths = tuple(stage.width.min for stage in self.stages)
            selection = Selection(widths, tuple(reversed(paths)))
            if selection not in found and self.fault(selection) is None:
                found.append(selection)
        return tuple(found)

    def variants(self, selection: Selection, stage: int) -> Iterator[Selection]:
        """`selection`, with the blocks of one stage swapped for others alike in every legal way.

        Blocks that choose the same change alike. Where attention comes last, blocks with
        attention stay such blocks, and so do the others; elsewhere any may become any.
        """
        part, slots = self.stages[stage], selection.paths[stage]
        used = [choice for choice in dict.fromkeys(slots) if choice != IDENTITY]
        last = self.limits.attention_last
        for picked in itertools.product(*(part.alike(c) if last else part.blocks for c in used)):
            swap = {IDENTITY: IDENTITY, **dict(zip(used, picked, strict=True))}
            paths = (*selection.paths[:stage], tuple(swap[c] for c in slots))
            yield replace(selection, paths=(*paths, *selection.paths[stage + 1 :]))

    def attention_counts(self) -> tuple[int, ...]:
        """Every number of attention blocks the largest selection may end with."""
        counts = []
        for count in range(sum(stage.slots for stage in self.stages) + 1):
            try:
                self.largest(count)
            except SpecError:
                continue
            counts.append(count)
        return tuple(counts)

    def random(self, rng: random.Random) -> Selection:
        """A legal selection: depths, attention count, blocks and widths drawn uniformly in turn.

        Where attention need not come last, every block is drawn by itself.
        """
        while True:
            depths = [rng.randint(stage.min_depth, stage.slots) for stage in self.stages]
            attention = rng.randint(0, sum(depths))
            paths = []
            for stage, depth in zip(reversed(self.stages), reversed(depths), strict=True):
                kept = sorted(rng.sample(range(stage.slots), depth))
                tail = min(attention, depth)
                attention -= tail
                slots = [IDENTITY] * stage.slots
                for position, slot in enumerate(kept):
                    is_tail = position >= depth - tail
                    slots[slot] = _draw(rng, self._open_to(stage, is_tail=is_tail))
                paths.append(tuple(slots))
            widths = tuple(rng.choice(stage.width.values) for stage in self.stages)
            if self.limits.monotone_widths:
                widths = tuple(sorted(widths))
            selection = Selection(widths, tuple(reversed(paths)))
            if self.fault(selection) is None:
                return selection

    def _open_to(self, stage: StageSpace, *, is_tail: bool) -> tuple[str, ...]:
        """What a slot may be drawn from, among the last blocks or before them."""
        if not self.limits.attention_last:
            return stage.blocks
        if is_tail:
            return _attention_of(stage) or (ATTENTION,)  # which `fault` refuses then
        return stage.alike(_first_block(stage))

    def selections(self) -> Iterator[Selection]:
        """Every legal selection, in a fixed order. Only for small spaces."""
        ranges = [stage.width.values for stage in self.stages]
        choices = [
            list(itertools.product(stage.choices, repeat=stage.slots)) for stage in self.stages
        ]
        for widths in itertools.product(*ranges):
            for paths in itertools.product(*choices):
                selection = Selection(widths, paths)
                if self.fault(selection) is None:
                    yield selection

    def select(self, architecture: Architecture) -> Selection:
        """The selection that gives `architecture`, its blocks in the first slots of each stage.

        Head and input size may differ; stem, widths and blocks must fit.

        Raises:
            SpecError: the architecture is outside the space; says where.
        """
        where = f"{architecture.name} is outside search space {self.name}"
        if len(architecture.stages) != len(self.stages):
            raise SpecError(
                f"{where}: it has {len(architecture.stages)} stages, not {len(self.stages)}"
            )
        if architecture.stem != ConvStem(width=architecture.widths[0], act=self.stem.act):
            raise SpecError(f"{where}: its stem is {architecture.stem!r}")
        paths = []
        for i, (stage, space) in enumerate(zip(architecture.stages, self.stages, strict=True)):
            fitting = {
                self.blocks.block(choice, stage.width).filled(stage.width): choice
                for choice in space.blocks
            }
            for j, block in enumerate(stage.blocks):
                if block not in fitting:
                    raise SpecError(f"{where}: stages[{i}].blocks[{j}] is {block!r}")
            if stage.downsample != space.downsample:
                raise SpecError(f"{where}: stages[{i}].downsample is {stage.downsample!r}")
            unused = (IDENTITY,) * (space.slots - len(stage.blocks))
            paths.append(tuple(fitting[block] for block in stage.blocks) + unused)
        selection = Selection(architecture.widths, tuple(paths))
        fault = self.fault(selection)
        if fault is not None:
            raise SpecError(f"{where}: {fault}")
        return selection


def shipped_spaces() -> tuple[str, ...]:
    """Names of the search spaces that come with slimnas."""
    return tuple(sorted(path.stem for path in data_dir("search_spaces").glob("*.yaml")))


def _shipped(name: str) -> Path:
    known = shipped_spaces()
    if name not in known:
        raise SpecError(
            f"search space {name!r} does not exist{suggest(name, known)}; "
            f"give a .yaml file or one of: {', '.join(known)}"
        )
    return data_dir("search_spaces") / f"{name}.yaml"


def _first_block(stage: StageSpace) -> str:
    """MB4D if the stage offers it, else its first block without attention, else its first."""
    others = [choice for choice in stage.blocks if not is_attention(choice)]
    return CONVOLUTION if CONVOLUTION in others else [*others, *stage.blocks][0]


def _attention_of(stage: StageSpace) -> tuple[str, ...]:
    return tuple(choice for choice in stage.blocks if is_attention(choice))


def _draw(rng: random.Random, options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else rng.choice(options)
