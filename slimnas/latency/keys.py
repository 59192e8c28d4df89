"""`PriceKey`: what makes two components cost the same, and so share one row of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimnas.arch.efficientformer import MB3D, MB4D, LinearHead
from slimnas.arch.walk import Component
from slimnas.errors import LatencyTableError

FieldValue = int | str
Fields = tuple[tuple[str, FieldValue], ...]

INTERPOLATED_FIELDS = frozenset({"ffn_dim"})
"""Fields a price may be interpolated over; the others separate groups of rows."""

_IN_WIDTHS = {"type", "repeat", "width", "classes"}
_FREE = {"distilled"}  # the two classifiers fold into one at export: (a + b) / 2


@dataclass(frozen=True)
class PriceKey:
    """What a component's latency depends on.

    Attributes:
        component: stem, block, downsample, head or overhead.
        type: the spec's type, such as `mb4d`; `network` for the overhead.
        fields: the spec's other fields in alphabetical order.
        resolution: `HEIGHTxWIDTH` of the component's input; empty for the overhead.
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


def price_key(component: Component) -> PriceKey:
    """Return the key that prices `component`.

    A head is priced by width and classes, whether distilled or not: its two classifiers are
    averaged at inference and fold into one when the network is exported.
    """
    spec = component.spec
    values: dict[str, Any] = {
        name: getattr(spec, name)
        for name in type(spec).model_fields
        if name not in _IN_WIDTHS and not (isinstance(spec, LinearHead) and name in _FREE)
    }
    if isinstance(spec, (MB4D, MB3D)):
        values["ffn_dim"] = spec.hidden(component.input.channels)
    return PriceKey(
        component=component.kind,
        type=getattr(spec, "type"),  # noqa: B009  every spec has one, the base class does not
        fields=tuple(sorted(values.items())),
        resolution=f"{component.input.height}x{component.input.width}",
        width_in=component.input.channels,
        width_out=component.output.channels,
    )


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
