"""LITv2's weights under the names of the official code (ziplab/LITv2).

It counts token merging to the stage before it, we to the stage after. Its checkpoints hold the
offsets of deformable merging, so they fit architectures with `deformable: true` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.arch.litv2 import ConvMerging
from slimnas.errors import WeightsError
from slimnas.zoo.keymap import KeyLayout, KeyMap

_OURS = ("stem.", "stages.")
_OFFICIAL = ("patch_embed.", "layers.")
_OFFSET = re.compile(r"layers\.(\d+)\.downsample\.dconv\.conv_offset\.")
_NAMES = (
    (r"patch_embed\.(proj|norm)\.", r"stem.\1."),
    (r"norm\.", "head.norm."),
    (r"head\.", "head.head."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.dwconv\.dwconv\.", r"stages.\1.blocks.\2.mlp.dwconv."),
    (r"layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
)
_MERGING = (("dconv.conv_offset.", "offset."), ("dconv.", "conv."), ("norm_layer.", "bn."))


def _detect(state: Mapping[str, Tensor]) -> KeyLayout | None:
    if any(name.startswith(_OURS) for name in state):
        return "slimnas"
    if any(name.startswith(_OFFICIAL) for name in state):
        return "official"
    return None


def _rename(
    state: Mapping[str, Tensor], architecture: Architecture, layout: KeyLayout
) -> dict[str, Tensor]:
    del layout  # there is one besides ours
    for name in state:
        _check_offset(name, architecture)
    return {_our_name(name): tensor for name, tensor in state.items()}


def _check_offset(name: str, architecture: Architecture) -> None:
    """Refuse offsets that the architecture would leave out."""
    offset = _OFFSET.match(name)
    after = int(offset[1]) + 1 if offset else len(architecture.stages)
    if after >= len(architecture.stages):
        return
    merging = architecture.stages[after].downsample
    if isinstance(merging, ConvMerging) and not merging.deformable:
        raise WeightsError(
            f"official LITv2 weights hold offsets of deformable token merging ({name}), which "
            f"{architecture.name} would leave out: its stages[{after}].downsample must have "
            "`deformable: true` to take them"
        )


def _our_name(name: str) -> str:
    merging = re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name)
    if merging:
        rest = merging[2]
        for theirs, ours in _MERGING:
            if rest.startswith(theirs):
                rest = ours + rest.removeprefix(theirs)
                break
        return f"stages.{int(merging[1]) + 1}.downsample.{rest}"
    for theirs, ours in _NAMES:
        renamed, found = re.subn(rf"^{theirs}", ours, name)
        if found:
            return renamed
    return name


KEYS = KeyMap("LITv2", "slimnas or the official code", _detect, _rename)
"""The conversion of this family; `slimnas.zoo.convert` joins the families."""
