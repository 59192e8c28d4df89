"""ViT's and DeiT's weights under the names of timm and of Hugging Face transformers.

The official DeiT code (facebookresearch/deit) uses timm's names. Transformers keeps queries, keys
and values apart, prefixes everything but the classifiers with the model's kind, and may carry a
pooler and a mask token, which classification does not use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.zoo.keymap import KeyLayout, KeyMap

_OURS = ("stem.", "stages.")
_TIMM = ("patch_embed.", "blocks.", "cls_token", "pos_embed")
_HUGGING_FACE = ("embeddings.", "encoder.layer.")
_HF_MODEL = re.compile(r"^(?:vit|deit)\.")
_HF_UNUSED = ("pooler.", "embeddings.mask_token")
_TIMM_TO_OURS = {
    "cls_token": "stem.cls_token",
    "dist_token": "stem.dist_token",
    "pos_embed": "stem.pos_embed",
    "patch_embed.proj": "stem.proj",
    "norm": "head.norm",
    "head": "head.head",
    "head_dist": "head.head_dist",
}
_HF_TO_TIMM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_QKV = re.compile(
    r"(encoder\.layer\.\d+)\.attention\.attention\.(?:query|key|value)\.(weight|bias)"
)


def _detect(state: Mapping[str, Tensor]) -> KeyLayout | None:
    if any(name.startswith(_OURS) for name in state):
        return "slimnas"
    if any(name.startswith(_TIMM) for name in state):
        return "timm"
    if any(_HF_MODEL.sub("", name).startswith(_HUGGING_FACE) for name in state):
        return "huggingface"
    return None


def _rename(
    state: Mapping[str, Tensor], architecture: Architecture, layout: KeyLayout
) -> dict[str, Tensor]:
    named = _hugging_face_to_timm(state) if layout == "huggingface" else state
    places = [
        f"stages.{i}.blocks.{j}"
        for i, depth in enumerate(architecture.depths)
        for j in range(depth)
    ]
    return {_timm_to_ours(name, places): tensor for name, tensor in named.items()}


def _timm_to_ours(name: str, places: list[str]) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block:
        return f"{places[int(block[1])]}.{block[2]}" if int(block[1]) < len(places) else name
    return _translated(name, _TIMM_TO_OURS)


def _hugging_face_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bare = {_HF_MODEL.sub("", name): tensor for name, tensor in state.items()}
    bare = {name: value for name, value in bare.items() if not name.startswith(_HF_UNUSED)}
    renamed = {}
    for name, tensor in bare.items():
        qkv = _HF_QKV.fullmatch(name)
        joined = None if qkv is None else _joined(bare, qkv[1], qkv[2])
        if qkv is None or joined is None:
            renamed[_hugging_face_name(name)] = tensor
        else:
            renamed[f"{qkv[1].replace('encoder.layer', 'blocks')}.attn.qkv.{qkv[2]}"] = joined
    return renamed


def _joined(state: Mapping[str, Tensor], layer: str, kind: str) -> Tensor | None:
    """Queries', keys' and values' weight or bias as one; None if they cannot be joined."""
    names = [f"{layer}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
    parts = [state[name] for name in names if name in state]
    if len(parts) < 3 or min(part.dim() for part in parts) == 0:
        return None
    return torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else None


def _hugging_face_name(name: str) -> str:
    block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
    if block:
        return f"blocks.{block[1]}.{_translated(block[2], _HF_BLOCK)}"
    return _translated(name, _HF_TO_TIMM)


def _translated(name: str, table: Mapping[str, str]) -> str:
    """`name` with the table's entry for all of it, or for all but its last part, put in."""
    if name in table:
        return table[name]
    first, _, last = name.rpartition(".")
    return f"{table[first]}.{last}" if first in table else name


KEYS = KeyMap(
    "ViT", "slimnas, timm, the official code or Hugging Face transformers", _detect, _rename
)
"""The conversion of this family; `slimnas.zoo.convert` joins the families."""
