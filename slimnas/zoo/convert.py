"""State dicts of timm, the official codes and Hugging Face transformers, renamed to ours.

Each family's names are in its own `keys_*` module.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MB3D, MB4D
from slimnas.arch.efficientformerv2 import V2FFN, V2Attention
from slimnas.arch.efficientvit import EfficientViTBlock
from slimnas.arch.litv2 import ConvFFNBlock, HiLoBlock
from slimnas.arch.swin import SwinBlock
from slimnas.arch.vit import ViTBlock
from slimnas.errors import WeightsError
from slimnas.zoo import (
    keys_efficientformer,
    keys_efficientformerv2,
    keys_efficientvit,
    keys_litv2,
    keys_swin,
    keys_vit,
)
from slimnas.zoo.keymap import KeyLayout, KeyMap
from slimnas.zoo.state import check_state

KEY_MAPS: Mapping[type[Spec], KeyMap] = MappingProxyType(
    {
        MB4D: keys_efficientformer.KEYS,
        MB3D: keys_efficientformer.KEYS,
        ViTBlock: keys_vit.KEYS,
        SwinBlock: keys_swin.KEYS,
        ConvFFNBlock: keys_litv2.KEYS,
        HiLoBlock: keys_litv2.KEYS,
        EfficientViTBlock: keys_efficientvit.KEYS,
        V2FFN: keys_efficientformerv2.KEYS,
        V2Attention: keys_efficientformerv2.KEYS,
    }
)
"""First block -> names of its family; a new family adds its own lines here."""

NOBODYS = KeyMap("such", "slimnas", lambda state: "slimnas", lambda state, *_: dict(state))
"""Of networks that nobody else has."""


def detect_layout(
    state: Mapping[str, Tensor], architecture: Architecture, *, source: str = "weights"
) -> KeyLayout:
    """Tell whose names `state`, weights for `architecture`, uses.

    Raises:
        WeightsError: nobody's that the architecture's family knows.
    """
    keys = _key_map(architecture)
    layout = keys.detect(state)
    if layout is None:
        names = ", ".join(list(state)[:10]) or "none"
        raise WeightsError(
            f"{source}: in no known layout of {keys.family} weights ({keys.layouts}), which "
            f"{architecture.name} needs; their first tensors: {names}"
        )
    return layout


def convert_state_dict(
    state: Mapping[str, Tensor], architecture: Architecture, *, source: str = "weights"
) -> dict[str, Tensor]:
    """Rename `state`, of any layout its family knows, and check that it fits.

    Args:
        state: tensors by name; not changed.
        architecture: the network they are for.
        source: where they come from, for messages.

    Returns:
        The same tensors under the names of `build(architecture).state_dict()`; those that another
        layout splits are joined.

    Raises:
        WeightsError: unknown layout, or not the weights of `architecture`.
    """
    layout = detect_layout(state, architecture, source=source)
    if layout != "slimnas":
        state = _key_map(architecture).rename(state, architecture, layout)
    return check_state(state, architecture, source=source)


def _key_map(architecture: Architecture) -> KeyMap:
    return KEY_MAPS.get(type(architecture.stages[0].blocks[0]), NOBODYS)
