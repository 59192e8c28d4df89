"""What a search space leaves open in each of its stages, and what holds for all of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from slimnas.arch.architecture import DownsampleSpec
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import Count
from slimnas.arch.templates import IDENTITY, BlockChoice, is_attention


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

    def alike(self, choice: str) -> tuple[str, ...]:
        """The blocks that have attention, if `choice` does, else those that have none."""
        return tuple(each for each in self.blocks if is_attention(each) == is_attention(choice))


class Limits(Spec):
    """What a selection must respect beside its ranges.

    Attributes:
        attention_last: attention blocks are the last blocks of the network, contiguous.
        monotone_widths: no stage is narrower than the one before it.
    """

    attention_last: Annotated[bool, Field(strict=True)] = True
    monotone_widths: Annotated[bool, Field(strict=True)] = True


class SupernetProxy(Spec):
    """What stands in for deployment while the supernet trains, and how it is trained.

    Attributes:
        resolution: side of the training images, pixels.
        recipe: settings of the training by name, checked where a supernet is trained; None for
            the defaults.
    """

    resolution: Count = 224
    recipe: dict[str, Any] | None = None
