"""The modules of ViT and DeiT: stem, block and head.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), section 3.1; Touvron et al.,
"Training data-efficient image transformers" (ICML 2021), section 4. Equal in every output to timm's
networks; names inside a block are timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from slimnas.arch import vit as specs
from slimnas.arch.documents import Spec
from slimnas.arch.walk import Component
from slimnas.errors import InputSizeError
from slimnas.nn.layers import LINEAR_INIT_STD, initialised
from slimnas.nn.layout import Layout, is_tracing, to_tokens
from slimnas.nn.makers import Maker
from slimnas.nn.transformer import TransformerBlock

CLASS_TOKEN_INIT_STD = 1e-6
NORM_EPS = 1e-6


class ViTStem(nn.Module):
    """Patch embedding with class token (and distillation token) and position embedding.

    (B, c, H, W) -> tokens (B, extra + N, C), N = (H // patch) * (W // patch), extra tokens first.

    Args:
        channels: image channels c.
        width: channels C of the tokens.
        patch: side of a patch in pixels.
        patches: number of patches N.
        distilled: whether there is a distillation token.
    """

    layout: ClassVar[Layout] = "map"
    proj: nn.Conv2d
    cls_token: nn.Parameter
    dist_token: nn.Parameter | None
    pos_embed: nn.Parameter

    def __init__(
        self, *, channels: int, width: int, patch: int, patches: int, distilled: bool
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.cls_token = _learned(1, width, std=CLASS_TOKEN_INIT_STD)
        self.dist_token = _learned(1, width) if distilled else None
        self.pos_embed = _learned((2 if distilled else 1) + patches, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to tokens."""
        patches = to_tokens(self.proj(x))
        learned = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        # expand_as: with the batch size as a number, exporters would read it from a tensor.
        extra = [token.expand_as(patches[:, :1]) for token in learned]
        return torch.cat([*extra, patches], dim=1) + self.pos_embed


class Attention(nn.Module):
    """Multi-head attention over all tokens (B, N, C); logits are scaled by qk_dim**-0.5.

    `qkv` gives [queries of all heads | keys of all heads | values of all heads].

    Args:
        width: channels C.
        tokens: number of tokens N.
        heads: number of heads.
        qk_dim: dimension of queries and keys per head.
        v_dim: dimension of values per head.
    """

    qkv: nn.Linear
    proj: nn.Linear

    def __init__(self, *, width: int, tokens: int, heads: int, qk_dim: int, v_dim: int) -> None:
        super().__init__()
        self.tokens, self.heads, self.qk_dim, self.v_dim = tokens, heads, qk_dim, v_dim
        self.scale = qk_dim**-0.5
        self.qkv = initialised(nn.Linear(width, heads * (2 * qk_dim + v_dim)))
        self.proj = initialised(nn.Linear(heads * v_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to the same shape.

        Raises:
            InputSizeError: another number of tokens.
        """
        if not is_tracing() and x.shape[1] != self.tokens:
            raise InputSizeError(
                f"attention was built for {self.tokens} tokens, got {x.shape[1]}; build the "
                "architecture for this input resolution"
            )
        outer, inner = self.heads * self.qk_dim, self.heads * self.v_dim
        q, k, v = self.qkv(x).split([outer, outer, inner], dim=2)
        mixed = F.scaled_dot_product_attention(
            self._by_head(q, self.qk_dim),
            self._by_head(k, self.qk_dim),
            self._by_head(v, self.v_dim),
            scale=self.scale,
        )
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, self.tokens, inner))
        return out

    def _by_head(self, x: Tensor, dim: int) -> Tensor:
        """(B, N, heads * dim) -> (B, heads, N, dim)."""
        return x.reshape(-1, self.tokens, self.heads, dim).transpose(1, 2)


class ViTBlock(TransformerBlock):
    """Attention and FFN, both pre-norm and residual, on tokens (B, N, C).

    Args:
        width: channels C.
        tokens: number of tokens N.
        heads: attention heads; 0 leaves the attention sub-layer out.
        qk_dim: query and key dimension per head.
        v_dim: value dimension per head.
        ffn_dim: hidden width of the FFN; 0 leaves it out.
    """

    def __init__(
        self, *, width: int, tokens: int, heads: int, qk_dim: int, v_dim: int, ffn_dim: int
    ) -> None:
        attn = None
        if heads:
            attn = Attention(width=width, tokens=tokens, heads=heads, qk_dim=qk_dim, v_dim=v_dim)
        super().__init__(width=width, attn=attn, ffn_dim=ffn_dim, eps=NORM_EPS)


class TokenHead(nn.Module):
    """LayerNorm, linear classifier of the class token; one of the distillation token if distilled.

    Takes tokens (B, N, C). A distilled head gives the pair (logits, distillation logits) in
    training and their mean in evaluation.

    Args:
        width: channels C.
        classes: number of classes K.
        distilled: whether there is a second classifier, which learns from a teacher.
    """

    layout: ClassVar[Layout] = "tokens"
    norm: nn.LayerNorm
    head: nn.Linear
    head_dist: nn.Linear | None

    def __init__(self, *, width: int, classes: int, distilled: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = initialised(nn.Linear(width, classes))
        self.head_dist = initialised(nn.Linear(width, classes)) if distilled else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, K), or a pair of them from a distilled head in training."""
        logits: Tensor = self.head(self.norm(x[:, 0]))
        if self.head_dist is None:
            return logits
        distilled: Tensor = self.head_dist(self.norm(x[:, 1]))
        return (logits, distilled) if self.training else (logits + distilled) / 2


def _make_stem(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.ViTStem)
    return ViTStem(
        channels=component.input.channels,
        width=spec.width,
        patch=spec.patch,
        patches=component.output.height * component.output.width,
        distilled=spec.distilled,
    )


def _make_block(component: Component) -> nn.Module:
    spec, shape = component.spec, component.input
    assert isinstance(spec, specs.ViTBlock)
    return ViTBlock(
        width=shape.channels,
        tokens=shape.positions,
        heads=spec.heads,
        qk_dim=spec.qk_dim,
        v_dim=spec.v_dim,
        ffn_dim=spec.hidden(shape.channels),
    )


def _make_head(component: Component) -> nn.Module:
    spec = component.spec
    assert isinstance(spec, specs.TokenHead)
    return TokenHead(width=component.input.channels, classes=spec.classes, distilled=spec.distilled)


MAKERS: Mapping[type[Spec], Maker] = MappingProxyType(
    {specs.ViTStem: _make_stem, specs.ViTBlock: _make_block, specs.TokenHead: _make_head}
)
"""How a component of this family becomes a module; `slimnas.nn.build` joins the families."""


def _learned(tokens: int, width: int, std: float = LINEAR_INIT_STD) -> nn.Parameter:
    """Learned tokens (1, tokens, width), truncated normal."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=std))
