"""EfficientFormer's weights under the names of timm and of the official code.

timm names parameters as we do but for the head. The official code (snap-research/EfficientFormer)
numbers its layers. Both put a parameterless `Flat` module before the first attention block of the
last stage, which shifts the numbers of the blocks after it, and store the derived index
`attention_bias_idxs`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.zoo.keymap import DERIVED, HEAD_PARTS, KeyLayout, KeyMap

_OFFICIAL_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
_OFFICIAL_PARTS = {"layer_scale_1": "ls1.gamma", "layer_scale_2": "ls2.gamma"}


def _detect(state: Mapping[str, Tensor]) -> KeyLayout | None:
    if "patch_embed.0.weight" in state:
        return "official"
    if "stem.conv1.weight" in state:
        return "slimnas" if "head.norm.weight" in state else "timm"
    return None


def _rename(
    state: Mapping[str, Tensor], architecture: Architecture, layout: KeyLayout
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(DERIVED):
            continue
        if layout == "official":
            name = _official_to_timm(name)
        renamed[_timm_to_ours(name, architecture)] = tensor
    return renamed


def _official_to_timm(name: str) -> str:
    stem = re.fullmatch(r"patch_embed\.([0134])\.(.+)", name)
    if stem:
        return f"stem.{_OFFICIAL_STEM[stem[1]]}.{stem[2]}"
    layer = re.fullmatch(r"network\.(\d+)\.(.+)", name)
    if not layer:
        return name
    index, rest = int(layer[1]), layer[2]
    if index % 2:  # downsampling stands between two stages
        return f"stages.{index // 2 + 1}.downsample.{re.sub(r'^proj', 'conv', rest)}"
    for part, ours in _OFFICIAL_PARTS.items():
        rest = rest.replace(part, ours)
    return f"stages.{index // 2}.blocks.{rest}"


def _timm_to_ours(name: str, architecture: Architecture) -> str:
    block = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name)
    if block:
        stage, index = int(block[1]), int(block[2])
        return f"stages.{stage}.blocks.{_without_flat(architecture, stage, index)}.{block[3]}"
    first, _, rest = name.partition(".")
    return f"{HEAD_PARTS.get(first, first)}.{rest}"


def _without_flat(architecture: Architecture, stage: int, index: int) -> int:
    """The number of a block where `Flat` is not counted."""
    if stage >= len(architecture.stages):
        return index
    kinds = [block.type for block in architecture.stages[stage].blocks]
    return index - 1 if "mb3d" in kinds and index > kinds.index("mb3d") else index


KEYS = KeyMap("EfficientFormer", "slimnas, timm or the official code", _detect, _rename)
"""The conversion of this family; `slimnas.zoo.convert` joins the families."""
