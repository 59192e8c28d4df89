"""What ViT's and Swin's blocks share: two pre-norm, residual sub-layers, either of which may go."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from slimnas.nn.efficientformer import FFN
from slimnas.nn.layers import ResidualBlock
from slimnas.nn.layout import Layout


class TransformerBlock(ResidualBlock):
    """Attention and FFN, both pre-norm and residual, on tokens (B, N, C).

    A sub-layer that is not there has no LayerNorm and no parameters.

    Args:
        width: channels C.
        attn: maps tokens to tokens; None leaves the attention sub-layer out.
        ffn_dim: hidden width of the FFN; 0 leaves it out.
        eps: of both LayerNorms.
    """

    layout: ClassVar[Layout] = "tokens"
    norm1: nn.LayerNorm | None
    attn: nn.Module | None
    norm2: nn.LayerNorm | None
    mlp: FFN | None

    def __init__(self, *, width: int, attn: nn.Module | None, ffn_dim: int, eps: float) -> None:
        super().__init__()
        self.norm1 = None if attn is None else nn.LayerNorm(width, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=eps) if ffn_dim else None
        self.mlp = FFN(width=width, ffn_dim=ffn_dim) if ffn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape."""
        if self.norm1 is not None and self.attn is not None:
            x = x + self.kept(self.attn(self.norm1(x)))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.kept(self.mlp(self.norm2(x)))
        return x
