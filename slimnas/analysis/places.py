"""Where in a network something happens: which component, and which part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from slimnas.arch.walk import walk
from slimnas.nn.build import Network

Entered = Callable[["Place"], None]
"""Called when the run of a network enters a place, or leaves it."""


@dataclass(frozen=True)
class Place:
    """A part of a network.

    Attributes:
        component: name of the component, such as `stages.0.blocks.2`; `` outside of all.
        part: a module right inside it, such as `attn`; `` for its own operators.
    """

    component: str = ""
    part: str = ""

    @property
    def name(self) -> str:
        """Name of the module."""
        return f"{self.component}.{self.part}" if self.part else self.component


OUTSIDE = Place()
"""Between components: changes of layout."""


def places(network: Network) -> dict[Place, nn.Module]:
    """Every component of `network` and the modules right inside it, in execution order."""
    found: dict[Place, nn.Module] = {}
    for component in walk(network.architecture):
        module = network.get_submodule(component.name)
        found[Place(component.name)] = module
        for part, child in _children(module):
            found[Place(component.name, part)] = child
    return found


@contextlib.contextmanager
def entering(network: Network, enter: Entered, leave: Entered) -> Iterator[None]:
    """Call `enter` and `leave` whenever the network's run enters and leaves one of its places."""
    with contextlib.ExitStack() as hooks:
        for place, module in places(network).items():
            before = module.register_forward_pre_hook(lambda *_, place=place: enter(place))
            after = module.register_forward_hook(lambda *_, place=place: leave(place))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules right inside; lists of modules are never called themselves."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
