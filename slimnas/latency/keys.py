"""`PriceKey`: what makes two components cost the same, and so share one row of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from slimnas.arch.block import Block
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import LinearHead
from slimnas.arch.efficientformerv2 import V2Head
from slimnas.arch.efficientvit import BatchNormHead
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.swin import SwinBlock
from slimnas.arch.vit import TransformerBlock
from slimnas.arch.walk import Component
from slimnas.errors import LatencyTableError

FieldValue = int | str
Fields = tuple[tuple[str, FieldValue], ...]

INTERPOLATED_FIELDS = frozenset({"ffn_dim", "heads", "qk_dim", "v_dim"})
"""Fields a price may be interpolated over; the others separate groups of rows."""

WITHOUT_ATTENTION = {"heads": 0, "qk_dim": 0, "v_dim": 0}
WITHOUT_FFN = {"ffn_dim": 0}
"""What turns a ViT or Swin block into one of its two sub-layers."""

_IN_WIDTHS = {"type", "repeat", "width", "classes"}
_FREE = {"distilled"}  # such a head's two classifiers fold into one at export: (a + b) / 2
_OF_ATTENTION = {"shift", "window"}


@dataclass(frozen=True)
class PriceKey:
    """What a component's latency depends on.

    Attributes:
        component: stem, block, downsample, head or overhead.
        type: the spec's type, such as `mb4d`; `network` for the overhead.
        fields: the spec's other fields in alphabetical order.
        resolution: `HEIGHTxWIDTH` of the component's input, `+N` behind it for N extra tokens;
            empty for the overhead.
        width_in: channels of its input.
        width_out: channels of its output; the number of classes for a head.
    """

    component: str
    type: str
    fields: Fields
    resolution: str
    width_in: int
    width_out: int

    @property
    def group(self) -> tuple[str, str, str, Fields]:
        """What must agree between rows that are interpolated together."""
        fixed = tuple(item for item in self.fields if item[0] not in INTERPOLATED_FIELDS)
        return self.component, self.type, self.resolution, fixed

    @property
    def point(self) -> tuple[float, ...]:
        """Coordinates of the interpolation within the group."""
        varied = (float(value) for name, value in self.fields if name in INTERPOLATED_FIELDS)
        return (float(self.width_in), float(self.width_out), *varied)

    def __str__(self) -> str:
        if self.component == "overhead":
            return "overhead"
        fields = f" {format_fields(self.fields)}" if self.fields else ""
        widths = f"{self.width_in}->{self.width_out}"
        return f"{self.component} {self.type}{fields} {widths} @ {self.resolution}"


OVERHEAD = PriceKey("overhead", "network", (), "", 0, 0)
"""What a network costs once, however small it is."""


def price_parts(component: Component) -> tuple[Component, ...]:
    """Return the parts of `component` that have a row each.

    A ViT or Swin block costs what its attention sub-layer and its FFN sub-layer cost: two blocks
    of one sub-layer, `NAME.attn` and `NAME.mlp` after their modules. Anything else has one row.
    """
    spec = component.spec
    if not isinstance(spec, TransformerBlock):
        return (component,)
    parts = []
    if spec.heads:
        attention = spec.model_copy(update=WITHOUT_FFN)
        parts.append(replace(component, name=f"{component.name}.attn", spec=attention))
    if spec.hidden(component.input.channels):
        ffn = spec.model_copy(update=WITHOUT_ATTENTION)
        parts.append(replace(component, name=f"{component.name}.mlp", spec=ffn))
    return tuple(parts)


def price_keys(component: Component) -> tuple[PriceKey, ...]:
    """Return the keys whose prices add up to that of `component`."""
    return tuple(price_key(part) for part in price_parts(component))


def price_key(component: Component) -> PriceKey:
    """Return the key that prices `component`, one of the parts that `price_parts` gives.

    A linear head is priced by width and classes, whether distilled or not: its two classifiers
    are averaged at inference and fold into one when the network is exported.

    Raises:
        ValueError: a block of two sub-layers, which has two.
    """
    spec = component.spec
    return PriceKey(
        component=component.kind,
        type=getattr(spec, "type"),  # noqa: B009  every spec has one, the base class does not
        fields=tuple(sorted(_fields(spec, component.input).items())),
        resolution=_resolution(component.input),
        width_in=component.input.channels,
        width_out=component.output.channels,
    )


def _fields(spec: Spec, shape: FeatureShape) -> dict[str, FieldValue]:
    folds = isinstance(spec, (BatchNormHead, LinearHead, V2Head))
    left_out = _IN_WIDTHS | (_FREE if folds else set())
    values: dict[str, Any] = {
        name: _plain(value) for name, value in spec if name not in left_out and value is not None
    }
    if isinstance(spec, Block):
        values["ffn_dim"] = spec.hidden(shape.channels)
    if not isinstance(spec, TransformerBlock):
        return values
    if spec.heads and values["ffn_dim"]:
        raise ValueError("a block of two sub-layers has two prices; ask for its price_keys")
    if isinstance(spec, SwinBlock):
        values["shift"] = max(spec.shifts(shape))  # none where the window is the whole map
    absent = WITHOUT_FFN.keys() if spec.heads else {*WITHOUT_ATTENTION, *_OF_ATTENTION}
    return {name: value for name, value in values.items() if name not in absent}


def _plain(value: Any) -> FieldValue:
    """A table knows numbers and words: true is written as 1, a list as 7-5-3."""
    if isinstance(value, tuple) and len(value) == 1:
        return _plain(value[0])  # a file would give it back as a number
    if isinstance(value, tuple):
        return "-".join(str(_plain(each)) for each in value)
    return value if isinstance(value, str) else int(value)


def _resolution(shape: FeatureShape) -> str:
    extra = f"+{shape.extra_tokens}" if shape.extra_tokens else ""
    return f"{shape.height}x{shape.width}{extra}"


def format_fields(fields: Fields) -> str:
    """Return fields as a table writes them: `ffn_dim=192;heads=8`."""
    return ";".join(f"{name}={value}" for name, value in fields)


def parse_fields(text: str) -> Fields:
    """Read what `format_fields` wrote, in any order.

    Raises:
        LatencyTableError: a part that is not `name=value`, or a name given twice.
    """
    fields: dict[str, FieldValue] = {}
    for part in filter(None, text.split(";")):
        name, equals, value = part.partition("=")
        if not (equals and name and value) or name in fields:
            raise LatencyTableError(
                f"fields: must be name=value pairs joined by ';', each name once, got {text!r}"
            )
        fields[name] = int(value) if value.isdigit() else value
    return tuple(sorted(fields.items()))
