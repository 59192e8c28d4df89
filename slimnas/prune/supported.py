"""Which networks can be pruned: those whose every module is what their architecture builds."""

from __future__ import annotations

import torch
from torch import nn

from slimnas.errors import PruneError
from slimnas.nn.build import Network, build


def check_network(network: nn.Module) -> None:
    """Refuse a network with other modules or tensors than its architecture has.

    A foreign module would be lost or cut wrongly, since surgery knows the declared ones only.

    Raises:
        PruneError: not a network of slimnas, or the path and type of the first module that differs.
    """
    if not isinstance(network, Network):
        raise PruneError(
            f"{type(network).__name__}: must be a network that slimnas built, which pruning knows "
            "the units of; convert a timm model with slimnas.convert.from_timm first"
        )
    architecture = network.architecture
    with torch.device("meta"):  # structure only
        reference = build(architecture)
    expected = dict(reference.named_modules())
    given = dict(network.named_modules())
    for path, module in given.items():
        if path not in expected or type(module) is not type(expected[path]):
            has = type(expected[path]).__name__ if path in expected else "nothing"
            raise PruneError(
                f"{path}: {type(module).__name__} cannot be pruned, {architecture.name} has "
                f"{has} there; prune a network as built, before it is folded or changed"
            )
    shapes = {name: str(tuple(value.shape)) for name, value in reference.state_dict().items()}
    found = {name: str(tuple(value.shape)) for name, value in network.state_dict().items()}
    for name in [*found, *shapes]:
        has, wanted = found.get(name, "not there"), shapes.get(name, "not there")
        if has != wanted:
            raise PruneError(
                f"{name}: must be {wanted} as in {architecture.name}, is {has}; prune a network as "
                "built, before it is folded or changed"
            )
