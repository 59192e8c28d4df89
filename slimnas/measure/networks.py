"""Makes the networks of a plan and loads them into a runtime."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

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
    with seeded(seed):
        if not parts:
            return nn.ReLU(), torch.randn(batch, 1, 1, 1)
        chain = Chain(parts)
        shape = parts[0].input
        takes_tokens = layout_of(chain.modules_in_order[0]) == "tokens"
        if takes_tokens and parts[0].kind != "stem":
            x = torch.randn(batch, shape.positions, shape.channels)
        else:
            x = torch.randn(batch, shape.channels, shape.height, shape.width)
    return fold(chain), x


def runtime_loader(runtime: Runtime, *, batch: int = 1, exports: Path | None = None) -> Loader:
    """Return the loader of `runtime` for batches of `batch` images.

    Args:
        runtime: what runs the networks.
        batch: images per call.
        exports: a folder where files are kept, so that a network that is loaded again is not
            exported again; only for runtimes of files.
    """

    def load(parts: Parts) -> Call:
        network, x = network_and_input(parts, batch)
        if exports is None or not isinstance(runtime, FileRuntime):
            session = runtime.load(network, x)
        else:
            file = exports / f"{_digest(parts, batch)}{runtime.suffix}"
            if not file.exists():
                file.write_bytes(runtime.export(network, x))
            session = runtime.open(file.read_bytes())
        return bound(session, x.numpy())

    return load


def identity(parts: Parts) -> tuple[object, ...]:
    """What a network computes, wherever in an architecture its components stand."""
    return tuple((part.kind, part.spec, part.input, part.output) for part in parts)


def _digest(parts: Parts, batch: int) -> str:
    return sha256(f"{identity(parts)} {batch}".encode()).hexdigest()
