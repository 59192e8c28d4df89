"""`SearchSpace`: an architecture with choices left open, and `Selection`: one way to close them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimnas._resources import data_dir
from slimnas.arch.architecture import Architecture, DownsampleSpec, InputSpec, StageSpec
from slimnas.arch.documents import Spec, dump_yaml, load_document, parse_document, parse_spec
from slimnas.arch.efficientformer import MB3D, MB4D, ConvStem, Count, LinearHead
from slimnas.errors import SpecError, suggest

SCHEMA = "slimnas/search-space/1"
WHAT = "a search space"

IDENTITY = "identity"
ATTENTION = "mb3d"
CONVOLUTION = "mb4d"

BlockChoice = Literal["mb4d", "mb3d", "identity"]


class WidthRange(Spec):
    """Widths `min, min + step, ..., max`."""

    min: Count
    max: Count
    step: Count = 16

    @model_validator(mode="after")
    def _ordered(self) -> WidthRange:
        if self.min > self.max or (self.max - self.min) % self.step:
            raise ValueError(
                f"min must be at most max and max - min a multiple of step; "
                f"got min {self.min}, max {self.max}, step {self.step}"
            )
        return self

    @property
    def values(self) -> tuple[int, ...]:
        """Every width, ascending."""
        return tuple(range(self.min, self.max + 1, self.step))


class StageSpace(Spec):
    """One stage: its widths, and `slots` MetaPaths that each choose one of `choices`."""

    width: WidthRange
    slots: Count
    min_depth: Annotated[int, Field(strict=True, ge=1)] = 1
    choices: Annotated[tuple[BlockChoice, ...], Field(min_length=1)]
    downsample: DownsampleSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StageSpace:
        if len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices: each may be listed once, got {list(self.choices)}")
        if not self.blocks:
            raise ValueError("choices: at least one must be a block, not identity")
        if self.min_depth > self.slots:
            raise ValueError(
                f"min_depth: must be at most slots ({self.slots}), got {self.min_depth}"
            )
        if IDENTITY not in self.choices and self.min_depth != self.slots:
            raise ValueError(
                f"min_depth: must equal slots ({self.slots}) where no slot may be identity, "
                f"got {self.min_depth}"
            )
        return self

    @property
    def blocks(self) -> tuple[str, ...]:
        """The choices that are blocks."""
        return tuple(choice for choice in self.choices if choice != IDENTITY)


class ConvTemplate(Spec):
    """Fixed fields of every MB4D of a space."""

    ffn_ratio: Count = 4


class AttentionTemplate(Spec):
    """Fixed fields of every MB3D of a space."""

    ffn_ratio: Count = 4
    heads: Count = 8
    qk_dim: Count = 32
    v_dim: Count = 128


class BlockTemplates(Spec):
    """Fixed fields per block choice; only the stage's width is left open."""

    mb4d: ConvTemplate = ConvTemplate()
    mb3d: AttentionTemplate = AttentionTemplate()

    def block(self, choice: str, width: int) -> MB4D | MB3D:
        """The block spec of `choice` in a stage of `width` channels."""
        if choice == CONVOLUTION:
            return MB4D(ffn_dim=self.mb4d.ffn_ratio * width)
        if choice == ATTENTION:
            fields = self.mb3d
            return MB3D(
                heads=fields.heads,
                qk_dim=fields.qk_dim,
                v_dim=fields.v_dim,
                ffn_dim=fields.ffn_ratio * width,
            )
        raise ValueError(f"{choice!r} is not a block")


class StemTemplate(Spec):
    """The stem, whose width follows the first stage."""

    type: Literal["conv_stem"] = "conv_stem"
    act: Literal["relu", "gelu"] = "relu"


class Limits(Spec):
    """What a selection must respect beside its ranges.

    Attributes:
        attention_last: attention blocks are the last blocks of the network, contiguous.
        monotone_widths: no stage is narrower than the one before it.
    """

    attention_last: Annotated[bool, Field(strict=True)] = True
    monotone_widths: Annotated[bool, Field(strict=True)] = True


class SupernetProxy(Spec):
    """What stands in for deployment while the supernet trains."""

    resolution: Count = 224


@dataclass(frozen=True)
class Selection:
    """One choice per MetaPath and one width per stage: a point of a search space.

    Attributes:
        widths: width of each stage.
        paths: per stage, the choice of each slot (`mb4d`, `mb3d` or `identity`).
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
    blocks: BlockTemplates = BlockTemplates()
    limits: Limits = Limits()
    supernet: SupernetProxy = SupernetProxy()

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
        if not self.attention_counts():
            raise ValueError(
                "limits.attention_last: cannot hold, a stage that only offers mb3d is followed by "
                "a stage without it; change choices, or set attention_last to false"
            )
        return self

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
            is_attention = [choice == ATTENTION for *_, choice in selection.active()]
            if is_attention != sorted(is_attention):
                return "mb3d blocks must be the last blocks, contiguous"
        return None

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

    def largest(self, attention: int = 0) -> Selection:
        """Every slot active at full width, the last `attention` slots MB3D and no others.

        Raises:
            SpecError: the stages' choices do not allow that number of attention blocks.
        """
        selection = Selection(
            tuple(stage.width.max for stage in self.stages),
            tuple((_first_block(stage),) * stage.slots for stage in self.stages),
        )
        tail = selection.active()[len(selection.active()) - attention :]
        if attention > len(selection.active()):
            raise SpecError(
                f"search space {self.name}: cannot have {attention} MB3D blocks: it has "
                f"{len(selection.active())} slots"
            )
        for stage, slot, _ in tail:
            selection = selection.with_path(stage, slot, ATTENTION)
        fault = self.fault(selection)
        fewest = sum(choice == ATTENTION for *_, choice in selection.active())
        if fault is None and fewest > attention:
            fault = f"stages that offer nothing else have {fewest}"
        if fault is not None:
            raise SpecError(
                f"search space {self.name}: cannot have {attention} MB3D blocks: {fault}"
            )
        return selection

    def smallest(self) -> tuple[Selection, ...]:
        """The selections of least widths and depths, one for each number of MB3D blocks."""
        found: list[Selection] = []
        for attention in range(sum(stage.min_depth for stage in self.stages) + 1):
            left = attention
            paths: list[tuple[str, ...]] = []
            for stage in reversed(self.stages):
                tail = min(left, stage.min_depth)
                left -= tail
                idle = (IDENTITY,) * (stage.slots - stage.min_depth)
                convolutions = (_first_block(stage),) * (stage.min_depth - tail)
                paths.append(idle + convolutions + (ATTENTION,) * tail)
            widths = tuple(stage.width.min for stage in self.stages)
            selection = Selection(widths, tuple(reversed(paths)))
            if selection not in found and self.fault(selection) is None:
                found.append(selection)
        return tuple(found)

    def attention_counts(self) -> tuple[int, ...]:
        """Every number of MB3D blocks the largest selection may end with."""
        counts = []
        for count in range(sum(stage.slots for stage in self.stages) + 1):
            try:
                self.largest(count)
            except SpecError:
                continue
            counts.append(count)
        return tuple(counts)

    def random(self, rng: random.Random) -> Selection:
        """A legal selection: depths, attention count and widths drawn uniformly in turn."""
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
                    slots[slot] = ATTENTION if is_tail else _first_block(stage)
                paths.append(tuple(slots))
            widths = tuple(rng.choice(stage.width.values) for stage in self.stages)
            if self.limits.monotone_widths:
                widths = tuple(sorted(widths))
            selection = Selection(widths, tuple(reversed(paths)))
            if self.fault(selection) is None:
                return selection

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
            for j, block in enumerate(stage.blocks):
                fits = block.type in space.blocks and block == self.blocks.block(
                    block.type, stage.width
                )
                if not fits:
                    raise SpecError(f"{where}: stages[{i}].blocks[{j}] is {block!r}")
            if stage.downsample != space.downsample:
                raise SpecError(f"{where}: stages[{i}].downsample is {stage.downsample!r}")
            unused = (IDENTITY,) * (space.slots - len(stage.blocks))
            paths.append(tuple(block.type for block in stage.blocks) + unused)
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
    return CONVOLUTION if CONVOLUTION in stage.blocks else stage.blocks[0]
