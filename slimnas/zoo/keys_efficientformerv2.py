"""EfficientFormerV2's weights under the names of timm and of the official code.

timm names parameters as we do but for stem, convolutional downsampling and head. The official
code (snap-research/EfficientFormer) numbers its layers, keeps layer scales as (C, 1, 1) and
stores the derived index `attention_bias_idxs`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import Conv3x3
from slimnas.zoo.keymap import DERIVED, HEAD_PARTS, KeyLayout, KeyMap

_CONV = ".conv."
_OFFICIAL_STEM = {"0": "conv1.conv", "1": "conv1.bn", "3": "conv2.conv", "4": "conv2.bn"}
_OFFICIAL_PARTS = (
    # The activation before it counts in `proj` of an attention, not in that of a query.
    (r"(token_mixer|attn)\.proj\.1\.", r"\1.proj.conv."),
    (r"(token_mixer|attn)\.proj\.2\.", r"\1.proj.bn."),
    (r"attn\.q\.local\.0\.", "attn.q.local."),
    (r"\.(q|k|v|v_local|stride_conv|q\.proj)\.0\.", r".\1.conv."),
    (r"\.(q|k|v|v_local|stride_conv|q\.proj)\.1\.", r".\1.bn."),
    (r"mlp\.(fc1|fc2|mid)\.", r"mlp.\1.conv."),
    (r"mlp\.norm([12])\.", r"mlp.fc\1.bn."),
    (r"mlp\.mid_norm\.", "mlp.mid.bn."),
    (r"layer_scale_([12])$", r"ls\1.gamma"),
)


def _detect(state: Mapping[str, Tensor]) -> KeyLayout | None:
    if "patch_embed.0.weight" in state:
        return "official"
    if "stem.conv1.conv.weight" in state:
        return "timm"
    return "slimnas" if "stem.conv1.weight" in state else None


def _rename(
    state: Mapping[str, Tensor], architecture: Architecture, layout: KeyLayout
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(DERIVED):
            continue
        if layout == "official":
            name = _official_to_timm(name)
            tensor = tensor.flatten() if name.endswith(".gamma") else tensor
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
    for theirs, timms in _OFFICIAL_PARTS:
        rest = re.sub(theirs, timms, rest)
    if index % 2:  # downsampling stands between two stages
        rest = re.sub(r"^(proj|conv)\.", "conv.conv.", rest)
        rest = re.sub(r"^(norm|bn)\.", "conv.bn.", rest)
        return f"stages.{index // 2 + 1}.downsample.{rest}"
    return f"stages.{index // 2}.blocks.{rest}"


def _timm_to_ours(name: str, architecture: Architecture) -> str:
    if name.startswith("stem."):
        return re.sub(r"conv([12])\.bn\.", r"norm\1.", name.replace(_CONV, "."))
    downsample = re.fullmatch(r"stages\.(\d+)\.downsample\.conv\.(conv|bn)\.(.+)", name)
    if downsample:
        if not _plain_downsample(architecture, int(downsample[1])):
            return name
        part = "conv" if downsample[2] == "conv" else "norm"
        return f"stages.{downsample[1]}.downsample.{part}.{downsample[3]}"
    first, _, rest = name.partition(".")
    return f"{HEAD_PARTS.get(first, first)}.{rest}"


def _plain_downsample(architecture: Architecture, stage: int) -> bool:
    stages = architecture.stages
    return stage < len(stages) and isinstance(stages[stage].downsample, Conv3x3)


KEYS = KeyMap("EfficientFormerV2", "slimnas, timm or the official code", _detect, _rename)
"""The conversion of this family; `slimnas.zoo.convert` joins the families."""
