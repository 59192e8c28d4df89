"""Which parameters weight decay leaves alone."""

from __future__ import annotations

from torch import nn

UNDECAYED = (
    *("attention_biases", "relative_position_bias_table"),
    *("pos_embed", "cls_token", "dist_token"),
)
"""Last parts of the names of such parameters, beside vectors: as in DeiT, Swin and LeViT, and in
timm's `no_weight_decay`."""


def is_undecayed(name: str) -> bool:
    """Whether a parameter of this name is a table of biases, a position or a token."""
    return name.rpartition(".")[2] in UNDECAYED


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls on a parameter: matrices and kernels alone."""
    return parameter.dim() > 1 and not is_undecayed(name)
