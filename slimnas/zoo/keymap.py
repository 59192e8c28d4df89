"""The contract between weight conversion and a family's names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from slimnas.arch.architecture import Architecture

DERIVED = "attention_bias_idxs"
"""An index that the released codes store although it follows from the size of the map."""

HEAD_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "norm": "head.norm",
        "head": "head.head",
        "head_dist": "head.head_dist",
        "dist_head": "head.head_dist",
    }
)
"""EfficientFormer's and EfficientFormerV2's classifier, in either code -> ours."""

KeyLayout = Literal["slimnas", "timm", "official", "huggingface"]


@dataclass(frozen=True)
class KeyMap:
    """How one family's published weights name their tensors.

    Attributes:
        family: what the networks are called, for messages.
        layouts: whose names are known, for messages.
        detect: tells whose names a state dict uses; None for nobody's.
        rename: gives a state dict of one layout, never slimnas's, slimnas's names.
    """

    family: str
    layouts: str
    detect: Callable[[Mapping[str, Tensor]], KeyLayout | None]
    rename: Callable[[Mapping[str, Tensor], Architecture, KeyLayout], dict[str, Tensor]]
