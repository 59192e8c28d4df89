"""What every operator computes, moves and where: multiply-adds and bytes, counted by torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas.analysis.operators import Operator, of_aten
from slimnas.analysis.places import OUTSIDE, Place, entering
from slimnas.nn.build import Network


@dataclass(frozen=True)
class Traffic:
    """Work of some operators.

    Attributes:
        macs: multiply-adds of convolutions, linear layers and attention products.
        bytes: read and written: every input and output once, nothing for a view.
    """

    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.macs + other.macs, self.bytes + other.bytes)


Key = tuple[Place, Operator]


def count_traffic(network: Network, images: Tensor) -> Mapping[Key, Traffic]:
    """Run `network` once on `images` and count the work of every operator in every place."""
    counter = _Counter()
    with torch.no_grad(), entering(network, counter.enter, counter.leave), counter:
        network(images)
    return dict(counter.found)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Sees every operator that reaches a kernel, composite ones already taken apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[Key, Traffic] = defaultdict(Traffic)
        self._places = [OUTSIDE]

    def enter(self, place: Place) -> None:
        self._places.append(place)

    def leave(self, _: Place) -> None:
        self._places.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = of_aten(func._schema.name)
        if operator is not None:
            inputs = [*_tensors(args), *_tensors(kwargs)]
            outputs = list(_tensors(out))
            moved = Traffic(_macs(operator, inputs, outputs), _moved(operator, inputs, outputs))
            self.found[self._places[-1], operator] += moved
        return out


def _macs(operator: Operator, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    if operator.kind not in ("product", "attention"):
        return 0
    made = outputs[0].numel()
    if operator.name == "attention":
        q, k, v = inputs[:3]
        return math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if operator.name == "convolution":
        kernel = inputs[1]
        return made * (kernel.numel() // kernel.shape[0])
    # Sums of products come with the summand first: addmm(bias, a, b).
    left = inputs[-2]
    return made * left.shape[-1]


def _moved(operator: Operator, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    if operator.name == "view":
        return 0
    if operator.name in ("copy", "fill"):  # in place: what was there before is not read
        inputs = inputs[-1:] if operator.name == "copy" else []
    return sum(map(_bytes, [*inputs, *outputs]))


def _bytes(x: Tensor) -> int:
    """Bytes that `x` takes up; elements that an expansion repeats are there once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
