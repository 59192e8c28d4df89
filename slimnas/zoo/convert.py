"""State dicts of the official EfficientFormer code and of timm, renamed to ours.

timm names parameters as we do but for the head. The official code (snap-research/EfficientFormer)
numbers its layers. Both put a parameterless `Flat` module before the first attention block of the
last stage, which shifts the numbers of the blocks after it, and store the derived index
`attention_bias_idxs`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.errors import WeightsError
from slimnas.zoo.state import check_state

KeyLayout = Literal["slimnas", "timm", "official"]

_DERIVED = "attention_bias_idxs"
_OFFICIAL_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
_OFFICIAL_PARTS = {"layer_scale_1": "ls1.gamma", "layer_scale_2": "ls2.gamma"}
_HEAD_PARTS = {
    "norm": "head.norm",
    "head": "head.head",
    "head_dist": "head.head_dist",
    "dist_head": "head.head_dist",
}


def detect_layout(state: Mapping[str, Tensor]) -> KeyLayout:
    """Tell whose names `state` uses.

    Raises:
        WeightsError: nobody's known here.
    """
    if "patch_embed.0.weight" in state:
        return "official"
    if "stem.conv1.weight" in state:
        return "slimnas" if "head.norm.weight" in state else "timm"
    names = ", ".join(list(state)[:3]) or "none"
    raise WeightsError(
        "weights are in no known layout (slimnas, timm or official EfficientFormer); "
        f"their first tensors: {names}"
    )


def convert_state_dict(
    state: Mapping[str, Tensor], architecture: Architecture, *, source: str = "weights"
) -> dict[str, Tensor]:
    """Rename `state`, of slimnas, timm or the official code, and check that it fits.

    Args:
        state: tensors by name; not changed.
        architecture: the network they are for.
        source: where they come from, for messages.

    Returns:
        The same tensors under the names of `build(architecture).state_dict()`.

    Raises:
        WeightsError: unknown layout, or not the weights of `architecture`.
    """
    layout = detect_layout(state)
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(_DERIVED):
            continue
        if layout == "official":
            name = _official_to_timm(name)
        renamed[name if layout == "slimnas" else _timm_to_ours(name, architecture)] = tensor
    return check_state(renamed, architecture, source=source)


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
    return f"{_HEAD_PARTS.get(first, first)}.{rest}"


def _without_flat(architecture: Architecture, stage: int, index: int) -> int:
    """The number of a block where `Flat` is not counted."""
    if stage >= len(architecture.stages):
        return index
    kinds = [block.type for block in architecture.stages[stage].blocks]
    return index - 1 if "mb3d" in kinds and index > kinds.index("mb3d") else index
