"""Swin's state dicts of timm, the official code and Hugging Face transformers, renamed to ours.

The three hold the same tensors but for these: Hugging Face has query, key and value apart; timm
counts patch merging to the stage after it, the other two to the stage before; and what follows
from the windows (`relative_position_index`, `attn_mask`) is stored by some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.zoo.keymap import KeyLayout, KeyMap

_DERIVED = ("relative_position_index", "attn_mask")
_FIRST_MERGING = "layers.0.downsample."
_OURS = ("stem.", "stages.")
_TIMM = ("patch_embed.", "layers.")
_HUGGING_FACE = ("swin.embeddings.", "swin.encoder.")
_WHOLE = (
    (r"patch_embed\.(proj|norm)\.", r"stem.\1."),
    (r"norm\.", "head.norm."),
    (r"head\.(fc\.)?", "head.head."),
    (r"swin\.embeddings\.patch_embeddings\.projection\.", "stem.proj."),
    (r"swin\.embeddings\.norm\.", "stem.norm."),
    (r"swin\.layernorm\.", "head.norm."),
    (r"classifier\.", "head.head."),
)
_PARTS = (
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.(?:self\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
    (r"attention\.(?:self|relative_position_bias)\.relative", "attn.relative"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
"""Hugging Face's names inside a block, of transformers 4 (and the files on the hub) and of 5."""


def _detect(state: Mapping[str, Tensor]) -> KeyLayout | None:
    if any(name.startswith(_OURS) for name in state):
        return "slimnas"
    if any(name.startswith(_HUGGING_FACE) for name in state):
        return "huggingface"
    if any(name.startswith(_TIMM) for name in state):
        return "official" if any(name.startswith(_FIRST_MERGING) for name in state) else "timm"
    return None


def _rename(
    state: Mapping[str, Tensor], architecture: Architecture, layout: KeyLayout
) -> dict[str, Tensor]:
    del architecture  # the names tell everything
    renamed = {
        _our_name(name.removeprefix("swin.encoder."), late=layout != "timm"): tensor
        for name, tensor in state.items()
        if not name.endswith(_DERIVED)
    }
    return _with_joined_qkv(renamed)


def _our_name(name: str, *, late: bool) -> str:
    inside = re.fullmatch(r"layers\.(\d+)\.(blocks\.\d+|downsample)\.(.+)", name)
    if not inside:
        for theirs, ours in _WHOLE:
            if re.match(theirs, name):
                return re.sub(rf"^{theirs}", ours, name)
        return name
    stage, part, rest = int(inside[1]), inside[2], inside[3]
    if part == "downsample":
        return f"stages.{stage + late}.downsample.{rest}"
    for theirs, ours in _PARTS:
        if re.match(theirs, rest):
            rest = re.sub(rf"^{theirs}", ours, rest)
            break
    return f"stages.{stage}.{part}.{rest}"


def _with_joined_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put query, key and value below each other; those that do not fit together stay apart."""
    joined = dict(state)
    for name in state:
        query = re.fullmatch(r"(.+\.attn)\.q\.(weight|bias)", name)
        three = [f"{query[1]}.{part}.{query[2]}" for part in "qkv"] if query else []
        if query and all(part in state for part in three):
            tensors = [state[part] for part in three]
            if len({tensor.shape[1:] for tensor in tensors}) == 1:
                joined[f"{query[1]}.qkv.{query[2]}"] = torch.cat(tensors)
                for part in three:
                    del joined[part]
    return joined


KEYS = KeyMap(
    "Swin", "slimnas, timm, the official code or Hugging Face transformers", _detect, _rename
)
"""The conversion of this family; `slimnas.zoo.convert` joins the families."""
