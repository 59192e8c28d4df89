"""timm's model objects as networks of slimnas, without importing timm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from slimnas.arch.architecture import SCHEMA, Architecture
from slimnas.errors import UnsupportedModuleError
from slimnas.nn.build import Network, build
from slimnas.zoo.convert import convert_state_dict
from slimnas.zoo.timm_efficientformer import describe_efficientformer
from slimnas.zoo.timm_efficientformerv2 import describe_efficientformerv2
from slimnas.zoo.timm_efficientvit import describe_efficientvit
from slimnas.zoo.timm_swin import describe_swin
from slimnas.zoo.timm_vit import describe_vit

Describe = Callable[[nn.Module], dict[str, Any]]

FAMILIES: Mapping[str, Describe] = MappingProxyType(
    {
        "VisionTransformer": describe_vit,
        "VisionTransformerDistilled": describe_vit,
        "SwinTransformer": describe_swin,
        "EfficientFormer": describe_efficientformer,
        "EfficientFormerV2": describe_efficientformerv2,
        "EfficientVitMsra": describe_efficientvit,
    }
)
"""Class of timm -> what reads its architecture; a new family adds its own line here."""


def from_timm(model: nn.Module, *, name: str | None = None) -> Network:
    """Turn a model of one of `FAMILIES`, made by timm, into a network of slimnas.

    It computes what `model` computes in evaluation mode. Two things differ in training: dropout
    and stochastic depth are left out, and a distilled head always gives the pair of logits.

    Args:
        model: the model object of timm; not changed.
        name: the network's name; by default the one timm made it by.

    Returns:
        A network with a copy of the weights, in their dtype, on their device, in the mode
        (training or evaluation) of `model`.

    Raises:
        UnsupportedModuleError: not one of these, or with a module that slimnas's has not; by path
            and type.
        WeightsError: its weights are not those its modules should have, or not finite.
    """
    kind = type(model).__name__
    describe = FAMILIES.get(kind)
    if describe is None:
        known = ", ".join(FAMILIES)
        raise UnsupportedModuleError(f"from_timm takes timm's {known}; got a {kind}")
    origin = _origin(model)
    body = {
        "schema": SCHEMA,
        "name": name or re.sub(r"[^A-Za-z0-9._-]", "_", origin),
        **describe(model),
        "provenance": {"source": f"timm: {origin}"},
    }
    architecture = Architecture.from_dict(body, source=f"timm's {origin}")
    state = convert_state_dict(model.state_dict(), architecture, source=f"timm's {origin}")
    network = build(architecture).train(model.training)
    parameter = next(model.parameters())
    network.to(device=parameter.device, dtype=parameter.dtype).load_state_dict(state)
    return network


def _origin(model: nn.Module) -> str:
    """The name timm made the model by, with its tag if it has one; else its class."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("architecture"):
        return type(model).__name__
    return ".".join(filter(None, [config["architecture"], config.get("tag")]))
