"""`Architecture`: what a network is, as frozen plain data.

An architecture is canonical in memory (every `repeat` expanded, every default width filled in)
and compact in YAML (equal neighbours folded into `repeat`). Equality, hash and digest are by
structure: name and provenance do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from slimnas.arch.documents import (
    Spec,
    check_schema,
    dump_yaml,
    load_document,
    parse_document,
    parse_spec,
    save_document,
)
from slimnas.arch.efficientformer import MB3D, MB4D, MOST, Conv3x3, ConvStem, Count, LinearHead
from slimnas.arch.efficientformerv2 import V2FFN, V2Attention, V2AttentionDownsample, V2Head
from slimnas.arch.efficientvit import (
    BatchNormHead,
    EfficientViTBlock,
    EfficientViTStem,
    EfficientViTSubsample,
)
from slimnas.arch.litv2 import ConvFFNBlock, ConvMerging, HiLoBlock
from slimnas.arch.mixers import AnyMixer
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.swin import PatchMerging, SwinBlock, SwinStem
from slimnas.arch.vit import TokenHead, ViTBlock, ViTStem

SCHEMA = "slimnas/architecture/1"
WHAT = "an architecture"


def _else_type(default: str) -> BeforeValidator:
    """Fill in the type that files of one family may leave out."""

    def fill(value: Any) -> Any:
        missing = isinstance(value, Mapping) and "type" not in value
        return {"type": default, **value} if missing else value

    return BeforeValidator(fill)


AnyStem = ConvStem | ViTStem | SwinStem | EfficientViTStem
AnyDownsample = Conv3x3 | PatchMerging | ConvMerging | EfficientViTSubsample | V2AttentionDownsample
AnyBlock = (
    MB4D
    | MB3D
    | ViTBlock
    | SwinBlock
    | ConvFFNBlock
    | HiLoBlock
    | EfficientViTBlock
    | V2FFN
    | V2Attention
    | AnyMixer
)
AnyHead = LinearHead | TokenHead | BatchNormHead | V2Head
_TAGGED = Field(discriminator="type")
StemSpec = Annotated[Annotated[AnyStem, _TAGGED], _else_type("conv_stem")]
DownsampleSpec = Annotated[Annotated[AnyDownsample, _TAGGED], _else_type("conv3x3")]
BlockSpec = Annotated[AnyBlock, _TAGGED]
HeadSpec = Annotated[Annotated[AnyHead, _TAGGED], _else_type("linear")]


class InputSpec(Spec):
    """The image a network takes; `resolution` is a side in pixels or `[height, width]`."""

    channels: Count = 3
    resolution: Count | tuple[Count, Count] = 224

    @property
    def shape(self) -> FeatureShape:
        """The image's shape."""
        side = self.resolution
        height, width = (side, side) if isinstance(side, int) else side
        return FeatureShape(self.channels, height, width)

    @field_validator("resolution", mode="before")
    @classmethod
    def _known_form(cls, value: Any) -> Any:
        sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        # Checked here, so that a fault is one line, not one per form. `type`: a bool is an int.
        if not all(type(side) is int and 1 <= side <= MOST for side in sides):
            raise ValueError(f"must be a side in pixels or [height, width]; got {value!r}")
        return value

    @field_validator("resolution")
    @classmethod
    def _square_as_side(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        return value[0] if isinstance(value, tuple) and value[0] == value[1] else value


class StageSpec(Spec):
    """One stage: an optional downsampling layer, then blocks of one width."""

    width: Count
    downsample: DownsampleSpec | None = None
    blocks: Annotated[tuple[BlockSpec, ...], Field(min_length=1)]

    @field_validator("blocks")
    @classmethod
    def _expand(cls, blocks: tuple[AnyBlock, ...], info: ValidationInfo) -> tuple[AnyBlock, ...]:
        width = info.data.get("width")
        if width is None:
            return blocks
        return tuple(block.filled(width) for block in blocks for _ in range(block.repeat))


class Architecture(Spec):
    """A network as plain data; an illegal one cannot be constructed.

    Raises:
        pydantic.ValidationError: on construction with illegal values; `load`, `from_yaml` and
            `from_dict` raise `SpecError` with file and key instead.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    input: InputSpec = InputSpec()
    stem: StemSpec
    stages: Annotated[tuple[StageSpec, ...], Field(min_length=1)]
    head: HeadSpec
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("provenance")
    @classmethod
    def _plain(cls, provenance: dict[str, Any]) -> dict[str, Any]:
        """Keep what JSON can hold; YAML's dates become text."""
        try:
            text = json.dumps(provenance, default=_date_text, allow_nan=False)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"must hold plain values ({error})") from error
        plain: dict[str, Any] = json.loads(text)
        return plain

    @model_validator(mode="after")
    def _widths_connect(self) -> Architecture:
        width = self.stem.width
        for index, stage in enumerate(self.stages):
            if stage.width != width and stage.downsample is None:
                raise ValueError(
                    f"stages[{index}].width: must be {width}, the width before it, or the stage "
                    f"needs a downsample; got {stage.width}"
                )
            width = stage.width
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Architecture:
        """Class tokens need a stem that makes them, blocks that keep them and a head."""
        tokens = isinstance(self.stem, ViTStem)
        head = isinstance(self.head, TokenHead)
        if tokens != head:
            raise ValueError(
                f"head.type: must be {'token' if tokens else 'linear'} after a {self.stem.type}, "
                f"got {self.head.type}"
            )
        if isinstance(self.stem, ViTStem):
            self.stem.output_shape(self.input.shape)  # refuses images smaller than a patch
            if self.head.distilled and not self.stem.distilled:
                raise ValueError(
                    "head.distilled: needs the stem's distillation token (stem.distilled: true)"
                )
        for index, stage in enumerate(self.stages):
            for number, block in enumerate(stage.blocks):
                if tokens and not isinstance(block, ViTBlock):
                    raise ValueError(
                        f"stages[{index}].blocks[{number}].type: must be vit after a vit_stem, "
                        f"whose class token other blocks would not keep; got {block.type}"
                    )
            if tokens and stage.downsample is not None:
                raise ValueError(
                    f"stages[{index}].downsample: must be left out after a vit_stem, whose class "
                    "token would be lost"
                )
        return self

    @model_validator(mode="after")
    def _blocks_take_their_maps(self) -> Architecture:
        shape = self.stem.output_shape(self.input.shape)
        for index, stage in enumerate(self.stages):
            if stage.downsample is not None:
                shape = stage.downsample.output_shape(shape, stage.width)
            for number, block in enumerate(stage.blocks):
                try:
                    block.check(shape)
                except ValueError as error:
                    raise ValueError(f"stages[{index}].blocks[{number}]: {error}") from error
        return self

    @classmethod
    def load(cls, path: str | Path) -> Architecture:
        """Read an architecture file.

        Raises:
            SpecError: one line per fault, with file and key.
        """
        data = load_document(Path(path), SCHEMA, WHAT)
        return parse_spec(cls, data, source=str(path))

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "<text>") -> Architecture:
        """Parse YAML text; see `load`."""
        return parse_spec(cls, parse_document(text, SCHEMA, WHAT, source=source), source=source)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "<dict>") -> Architecture:
        """Parse a mapping that has a `schema` key; see `load`."""
        return parse_spec(cls, check_schema(data, SCHEMA, WHAT, source=source), source=source)

    def save(self, path: str | Path) -> None:
        """Write the compact YAML form atomically."""
        save_document(Path(path), SCHEMA, self._body())

    def to_yaml(self) -> str:
        """Return the compact YAML form."""
        return dump_yaml(SCHEMA, self._body())

    def to_dict(self) -> dict[str, Any]:
        """Return the compact form as plain data, `schema` included."""
        return {"schema": SCHEMA, **self._body()}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical structure (hex); name and provenance do not count."""
        structure = self.model_dump(mode="json", exclude={"name", "provenance"})
        text = json.dumps(structure, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(stage.width for stage in self.stages)

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(len(stage.blocks) for stage in self.stages)

    def count(self, block_type: str) -> int:
        """Number of blocks of one type, such as `mb3d`."""
        return sum(block.type == block_type for stage in self.stages for block in stage.blocks)

    def with_resolution(self, resolution: int | tuple[int, int]) -> Architecture:
        """The same network for another input size.

        Raises:
            SpecError: no network of this family takes images of that size.
        """
        given = {"channels": self.input.channels, "resolution": resolution}
        data = {**self.model_dump(), "input": given}
        return parse_spec(Architecture, data, source=f"{self.name} for {_size_text(resolution)}")

    def with_head(
        self, *, classes: int | None = None, distilled: bool | None = None
    ) -> Architecture:
        """The same network with another classifier."""
        given = {"classes": classes, "distilled": distilled}
        fields = self.head.model_dump() | {k: v for k, v in given.items() if v is not None}
        return Architecture.model_validate({**self.model_dump(), "head": fields})

    def renamed(self, name: str, provenance: Mapping[str, Any] | None = None) -> Architecture:
        """The same network under another name, with other provenance if given."""
        kept = self.provenance if provenance is None else dict(provenance)
        data = {**self.model_dump(), "name": name, "provenance": kept}
        return Architecture.model_validate(data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "name": self.name,
            "input": self.input.model_dump(mode="json"),
            "stem": self.stem.model_dump(mode="json"),
            "stages": [_compact_stage(stage) for stage in self.stages],
            "head": self.head.model_dump(mode="json"),
        }
        if self.provenance:
            body["provenance"] = self.provenance
        return body


def _size_text(resolution: int | tuple[int, int]) -> str:
    sides = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    return f"images of {'x'.join(map(str, sides))}"


def _date_text(value: object) -> str:
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"got a {type(value).__name__}")


def _compact_stage(stage: StageSpec) -> dict[str, Any]:
    compact: dict[str, Any] = {"width": stage.width}
    if stage.downsample is not None:
        compact["downsample"] = stage.downsample.model_dump(mode="json")
    compact["blocks"] = []
    for block, run in groupby(stage.blocks):
        fields = block.model_dump(mode="json", exclude={"repeat"})
        length = len(list(run))
        compact["blocks"].append(fields | ({"repeat": length} if length > 1 else {}))
    return compact
