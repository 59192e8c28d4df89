"""Makes the networks of a plan and loads them into a runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimnas.measure.scope import Parts
from slimnas.measure.timing import Call
from slimnas.nn.build import make_module
from slimnas.nn.fold import fold
from slimnas.nn.layout import layout_of, run_module
from slimnas.nn.seeding import seeded
from slimnas.runtimes.base import FileRuntime, Runtime, bound

Loader = Callable[[Parts], Call]
"""Makes a network of these components ready to run."""


class Chain(nn.Module):
    """Components in a row; takes a map or tokens of the first one's input shape.

    Converts between maps and tokens where a whole network does, so that the components of an
    architecture in a row compute what the built architecture computes.
    """

    modules_in_order: nn.ModuleList

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.modules_in_order = nn.ModuleList(make_module(part) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """Map the first component's input to the last one's output."""
        for module, part in zip(self.modules_in_order, self.parts, strict=True):
            # A stem takes images whatever it gives. A head takes maps and tokens: its own
            # conversion is part of what it costs.
            itself = part.kind in ("stem", "head")
            x = module(x) if itself else run_module(module, x, part.input)
        return x


def network_and_input(parts: Parts, batch: int, *, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Make the network of `parts`, folded as it is deployed, and an input for it.

    No parts give a network that does next to nothing.
    """
    x = network_input(parts, batch, seed=seed)
    if not parts:
        return nn.ReLU(), x
    with seeded(seed):
        return fold(Chain(parts)), x


def network_input(parts: Parts, batch: int, *, seed: int = 0) -> Tensor:
    """Make an input for the network of `parts`, without making all of the network."""
    with seeded(seed):
        if not parts:
            return torch.randn(batch, 1, 1, 1)
        first, shape = parts[0], parts[0].input
        if first.kind != "stem" and layout_of(make_module(first)) == "tokens":
            return torch.randn(batch, shape.positions, shape.channels)
        return torch.randn(batch, shape.channels, shape.height, shape.width)


def runtime_loader(
    runtime: Runtime, *, batch: int = 1, model: Callable[[Parts], bytes] | None = None
) -> Loader:
    """Return the loader of `runtime` for batches of `batch` images.

    Args:
        runtime: what runs the networks.
        batch: images per call.
        model: gives the file of a network, for a runtime of files; by default it is exported.
    """

    def load(parts: Parts) -> Call:
        if model is not None and isinstance(runtime, FileRuntime):
            x = network_input(parts, batch)
            return bound(runtime.open(model(parts)), x.numpy())
        network, x = network_and_input(parts, batch)
        return bound(runtime.load(network, x), x.numpy())

    return load


def identity(parts: Parts) -> tuple[object, ...]:
    """What a network computes, wherever in an architecture its components stand."""
    return tuple((part.kind, part.spec, part.input, part.output) for part in parts)
