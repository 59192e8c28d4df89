"""The one walk over an architecture's components, in execution order.

The cost counter, the latency estimate and the builder all follow it, and component names are
the module names of the built network (`stages.2.blocks.0`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec
from slimnas.arch.shapes import Cost, FeatureShape

ComponentKind = Literal["stem", "downsample", "block", "head"]


@dataclass(frozen=True)
class Component:
    """One priced part of a network.

    Attributes:
        name: the module name in the built network.
        kind: stem, downsample, block or head.
        stage: index of the stage it belongs to; the stem has 0, the head the last.
        spec: its description.
        input: shape of the map it takes.
        output: shape of the map it gives; the head gives (classes, 1, 1).
    """

    name: str
    kind: ComponentKind
    stage: int
    spec: Spec
    input: FeatureShape
    output: FeatureShape


def walk(architecture: Architecture) -> Iterator[Component]:
    """Yield the components of `architecture` in execution order."""
    image = architecture.input.shape
    shape = architecture.stem.output_shape(image)
    yield Component("stem", "stem", 0, architecture.stem, image, shape)
    for i, stage in enumerate(architecture.stages):
        if stage.downsample is not None:
            after = stage.downsample.output_shape(shape, stage.width)
            yield Component(
                f"stages.{i}.downsample", "downsample", i, stage.downsample, shape, after
            )
            shape = after
        for j, block in enumerate(stage.blocks):
            yield Component(f"stages.{i}.blocks.{j}", "block", i, block, shape, shape)
    head = architecture.head
    logits = FeatureShape(head.classes, 1, 1)
    yield Component("head", "head", len(architecture.stages) - 1, head, shape, logits)


def component_cost(component: Component) -> Cost:
    """Closed-form cost of one component.

    Raises:
        TypeError: a spec without a cost rule.
    """
    spec: Any = component.spec
    if not hasattr(spec, "cost"):
        raise TypeError(f"{type(spec).__name__} has no cost rule; give its class a cost() method")
    widths = (component.output.channels,) if component.kind == "downsample" else ()
    cost: Cost = spec.cost(component.input, *widths)
    return cost
