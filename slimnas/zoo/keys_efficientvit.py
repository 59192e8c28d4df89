"""EfficientViT's weights under the names of timm and of the official code.

The official code (microsoft/Cream) numbers a stage's subsampling and blocks in one list, stores
the derived `attention_bias_idxs`, and some of its files hold 1x1 kernels as matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.zoo.keymap import DERIVED, KeyLayout, KeyMap

_KERNEL = re.compile(r".+\.(conv|fc1|fc2)\.weight")
_OFFICIAL_LAYERS = {"c": "conv", "l": "linear"}
_SUBSAMPLE_PARTS = ("res1", "patchmerge", "res2")
"""timm's names of the first three entries of an official stage that begins by subsampling."""

_TIMM_TO_OURS = (
    (r"patch_embed\.", "stem."),
    (r"(head|head_dist)\.", r"head.\1."),
    (r"(stages\.\d+\.downsample)\.patchmerge\.", r"\1."),
    (r"(stages\.\d+\.downsample)\.res1\.0\.m\.", r"\1.before.dw."),
    (r"(stages\.\d+\.downsample)\.res1\.1\.m\.", r"\1.before."),
    (r"(stages\.\d+\.downsample)\.res2\.0\.m\.", r"\1.after.dw."),
    (r"(stages\.\d+\.downsample)\.res2\.1\.m\.", r"\1.after."),
    (r"(stages\.\d+\.blocks\.\d+)\.dw0\.m\.", r"\1.before.0.dw."),
    (r"(stages\.\d+\.blocks\.\d+)\.ffn0\.m\.", r"\1.before.0."),
    (r"(stages\.\d+\.blocks\.\d+)\.dw1\.m\.", r"\1.after.0.dw."),
    (r"(stages\.\d+\.blocks\.\d+)\.ffn1\.m\.", r"\1.after.0."),
    (r"(stages\.\d+\.blocks\.\d+)\.mixer\.m\.attn\.proj\.1\.", r"\1.mixer.proj."),
    (r"(stages\.\d+\.blocks\.\d+)\.mixer\.m\.attn\.", r"\1.mixer."),
)


def _detect(state: Mapping[str, Tensor]) -> KeyLayout | None:
    if "patch_embed.0.c.weight" in state:
        return "official"
    if "patch_embed.conv1.conv.weight" in state:
        return "timm"
    return "slimnas" if "stem.conv1.conv.weight" in state else None


def _rename(
    state: Mapping[str, Tensor], architecture: Architecture, layout: KeyLayout
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(DERIVED):
            continue
        if layout == "official":
            name = _official_to_timm(name, architecture)
        if _KERNEL.fullmatch(name) and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        renamed[_timm_to_ours(name)] = tensor
    return renamed


def _official_to_timm(name: str, architecture: Architecture) -> str:
    name = re.sub(r"\.([cl])\.", lambda found: f".{_OFFICIAL_LAYERS[found[1]]}.", name)
    stem = re.fullmatch(r"patch_embed\.([0246])\.(.+)", name)
    if stem:
        return f"patch_embed.conv{int(stem[1]) // 2 + 1}.{stem[2]}"
    layer = re.fullmatch(r"blocks(\d+)\.(\d+)\.(.+)", name)
    if not layer:
        return name
    stage, index, rest = int(layer[1]) - 1, int(layer[2]), layer[3]
    if not _subsamples(architecture, stage):
        return f"stages.{stage}.blocks.{index}.{rest}"
    if index < len(_SUBSAMPLE_PARTS):
        return f"stages.{stage}.downsample.{_SUBSAMPLE_PARTS[index]}.{rest}"
    return f"stages.{stage}.blocks.{index - len(_SUBSAMPLE_PARTS)}.{rest}"


def _subsamples(architecture: Architecture, stage: int) -> bool:
    stages = architecture.stages
    return stage < len(stages) and stages[stage].downsample is not None


def _timm_to_ours(name: str) -> str:
    for theirs, ours in _TIMM_TO_OURS:
        renamed, count = re.subn(rf"^{theirs}", ours, name)
        if count:
            return renamed
    return name


KEYS = KeyMap("EfficientViT", "slimnas, timm or the official code", _detect, _rename)
"""The conversion of this family; `slimnas.zoo.convert` joins the families."""
