"""Which blocks a slot of a search space may choose, and what a space fixes about each of them.

A choice is a type of block. `shifted_window` is the window block with its windows moved by half
their side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
)

from slimnas.arch.architecture import AnyBlock
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MLP_RATIO, Count
from slimnas.arch.mixers import HeadedBlock
from slimnas.arch.shapes import FeatureShape
from slimnas.errors import suggest

IDENTITY = "identity"
ATTENTION = "mb3d"
CONVOLUTION = "mb4d"
SHIFTED = "shifted_window"

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "mb4d": "MB4D",
        "mb3d": "MB3D",
        "mhsa": "MHSA",
        "window": "window",
        SHIFTED: "shifted window",
        "sra": "SRA",
        "linear_sra": "linear SRA",
        "tmsa": "T-MSA",
        "hilo": "HiLo",
        "cga": "CGA",
        "strided": "strided",
        "lka": "LKA",
        "conv_ffn": "ConvFFN",
        "pool": "pooling",
        IDENTITY: IDENTITY,
    }
)
"""Every choice, with the name that tables and figures show."""

WITHOUT_ATTENTION = frozenset({"mb4d", "lka", "conv_ffn", "pool"})
"""Blocks that mix tokens by convolution or pooling alone, or not at all."""

CHUNKED = frozenset({"hilo", "cga"})
"""Blocks whose heads share the stage's channels, so that each head keeps as many of them."""

_BY_TYPE: Mapping[str, type[AnyBlock]] = MappingProxyType(
    {spec.model_fields["type"].default: spec for spec in get_args(AnyBlock)}
)
_LEFT_OPEN = frozenset({"type", "ffn_dim", "repeat"})


def _known(choice: str) -> str:
    if choice not in TITLES:
        named = ", ".join(TITLES)
        raise ValueError(f"must be one of {named}; got {choice!r}{suggest(choice, TITLES)}")
    return choice


BlockChoice = Annotated[str, AfterValidator(_known)]
"""Name of a choice: a type of block, `shifted_window` or `identity`."""


def spec_type(choice: str) -> type[AnyBlock]:
    """The class of the blocks that `choice` gives."""
    return _BY_TYPE["window" if choice == SHIFTED else choice]


BLOCK_TYPES = frozenset(
    spec_type(choice).model_fields["type"].default for choice in TITLES if choice != IDENTITY
)
"""Types of all blocks that a space can hold, as in architectures and latency tables."""


def is_attention(choice: str) -> bool:
    """Whether the choice is a block with attention."""
    return choice != IDENTITY and choice not in WITHOUT_ATTENTION


class Template(Spec):
    """Fixed fields of every block of one choice; only the stage's width is left open.

    A choice's own template has the fields of its block too, with the same rules and defaults.
    """

    ffn_ratio: Count = MLP_RATIO


def _template(choice: str) -> type[Template]:
    """The template of `choice`, made from the fields of its block.

    Dimensions of heads that a file may leave to the stage's width are asked for here: a space
    fixes them, so that narrowing a stage leaves every head whole.
    """
    spec = spec_type(choice)
    left_out = _LEFT_OPEN | ({"shift"} if spec is _BY_TYPE["window"] else set())
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in spec.model_fields.items()
        if name not in left_out
    }
    if issubclass(spec, HeadedBlock):
        fields |= {"qk_dim": (Count, ...), "v_dim": (Count, ...)}
    return create_model(f"{choice.title().replace('_', '')}Template", __base__=Template, **fields)


TEMPLATES: Mapping[str, type[Template]] = MappingProxyType(
    {choice: _template(choice) for choice in TITLES if choice != IDENTITY}
)


class _BlockTemplates(Spec):
    """Fixed fields per block choice; only the stage's width is left open.

    Its fields are the choices, their values templates, made from `TEMPLATES` below.
    """

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def block(self, choice: str, width: int) -> AnyBlock:
        """The block spec of `choice` in a stage of `width` channels.

        Raises:
            ValueError: not a block, without a template, or fields that the block refuses.
        """
        if choice not in TEMPLATES:
            raise ValueError(f"{choice!r} is not a block")
        template: Template | None = getattr(self, choice)
        if template is None:
            raise ValueError(f"{choice}: missing; a slot may choose it")
        fields = {name: value for name, value in template if name != "ffn_ratio"}
        if choice == SHIFTED:
            fields["shift"] = fields["window"] // 2
        try:
            return spec_type(choice)(ffn_dim=template.ffn_ratio * width, **fields)
        except ValidationError as error:
            raise ValueError(_first_fault(error)) from error

    def completed(self, choices: Iterable[str]) -> _BlockTemplates:
        """The same with the defaults of those `choices` that no template is given for.

        Raises:
            ValueError: one that has fields without default; says which.
        """
        absent = [choice for choice in choices if getattr(self, choice) is None]
        made = {}
        for choice in absent:
            needed = [n for n, f in TEMPLATES[choice].model_fields.items() if f.is_required()]
            if needed:
                raise ValueError(
                    f"{choice}: missing; a slot may choose it, and it needs {', '.join(needed)}"
                )
            made[choice] = TEMPLATES[choice]()
        return self.model_copy(update=made)

    def chunks(self, choices: Iterable[str]) -> int:
        """Number of equal runs of a stage's channels that must keep equally many.

        A stage that may choose HiLo or cascaded group attention gives every head as many
        channels, whichever it chooses: the least common multiple of their numbers of heads.
        """
        return math.lcm(*(getattr(self, choice).heads for choice in choices if choice in CHUNKED))

    def fault(self, choice: str, shape: FeatureShape) -> str | None:
        """Why `choice` cannot stand on a map of `shape`, or None when it can."""
        try:
            self.block(choice, shape.channels).check(shape)
        except ValueError as error:
            return str(error)
        return None


_FIELDS: dict[str, Any] = {
    choice: (template, template())
    if choice in (CONVOLUTION, ATTENTION)
    else (template | None, None)
    for choice, template in TEMPLATES.items()
}

if TYPE_CHECKING:
    BlockTemplates = _BlockTemplates
else:
    BlockTemplates = create_model(
        "BlockTemplates", __base__=_BlockTemplates, __doc__=_BlockTemplates.__doc__, **_FIELDS
    )


class StemTemplate(Spec):
    """The stem, whose width follows the first stage."""

    type: Literal["conv_stem"] = "conv_stem"
    act: Literal["relu", "gelu"] = "relu"


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
