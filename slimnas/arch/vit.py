"""The components of ViT and DeiT, with their closed-form costs.

Structure: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), section 3.1; Touvron
et al., "Training data-efficient image transformers" (ICML 2021), section 4 for the distillation
token. Widths are fields of the block, so that a pruned network is a network like any other.

The modules of the same names are in `slimnas.nn.vit`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimnas.arch.block import Block, ffn_cost
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MLP_RATIO, MOST, Count
from slimnas.arch.shapes import NO_COST, Cost, FeatureShape, operator_cost

Width = Annotated[int, Field(strict=True, ge=0, le=MOST)]
"""Like `Count`, but zero is allowed and means that the part is not there."""


class TransformerBlock(Block):
    """Attention and FFN sub-layers, both pre-norm and residual; base of ViT's and Swin's.

    `heads: 0` leaves the attention sub-layer out (its `qk_dim` and `v_dim` are 0 then),
    `ffn_dim: 0` the FFN; a block has at least one of the two. `ffn_dim` is filled in as 4 x the
    width where a file leaves it out. Logits are scaled by qk_dim**-0.5.
    """

    type: str
    heads: Width
    qk_dim: Width
    v_dim: Width
    ffn_dim: Width | None = None
    repeat: Count = 1

    @model_validator(mode="after")
    def _whole(self) -> TransformerBlock:
        present = (self.heads > 0, self.qk_dim > 0, self.v_dim > 0)
        if any(present) != all(present):
            raise ValueError(
                "heads, qk_dim and v_dim must be all above 0, or all 0 for a block without "
                f"attention; got heads {self.heads}, qk_dim {self.qk_dim}, v_dim {self.v_dim}"
            )
        if not self.heads and self.ffn_dim == 0:
            raise ValueError("must have attention or an FFN; leave the block out instead")
        return self

    def hidden(self, width: int) -> int:
        """Hidden width of the FFN; 0 for none."""
        return MLP_RATIO * width if self.ffn_dim is None else self.ffn_dim

    @property
    def qkv_width(self) -> int:
        """Outputs of the joint query, key and value projection."""
        return self.heads * (2 * self.qk_dim + self.v_dim)

    def ffn_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the FFN sub-layer, its LayerNorm included."""
        hidden = self.hidden(shape.channels)
        return ffn_cost(shape, hidden) if hidden else NO_COST


class ViTBlock(TransformerBlock):
    """Transformer encoder block on tokens (B, N, C), as in ViT and DeiT."""

    type: Literal["vit"] = "vit"

    def attention_cost(self, shape: FeatureShape) -> Cost:
        """Cost of the attention sub-layer, its LayerNorm included."""
        if not self.heads:
            return NO_COST
        width, tokens, values = shape.channels, shape.positions, self.heads * self.v_dim
        params = 2 * width + (width + 1) * self.qkv_width + (values + 1) * width
        linear = width * (self.qkv_width + values)
        products = self.heads * (self.qk_dim + self.v_dim)
        outputs = self.qkv_width + values + width + self.heads * tokens
        return operator_cost(params, tokens * linear + tokens**2 * products, tokens * outputs)

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on tokens of `shape`."""
        return self.attention_cost(shape) + self.ffn_cost(shape)


class ViTStem(Spec):
    """Patch embedding, class token (and distillation token), learned position embedding.

    A convolution with stride and kernel `patch` makes the patch tokens; pixels at the right and
    lower edge that fill no patch are not seen. The extra tokens come first.
    """

    type: Literal["vit_stem"] = "vit_stem"
    width: Count
    patch: Count = 16
    distilled: Annotated[bool, Field(strict=True)] = False

    @property
    def extra_tokens(self) -> int:
        """Class token, and distillation token if there is one."""
        return 2 if self.distilled else 1

    def output_shape(self, shape: FeatureShape) -> FeatureShape:
        """Shape of the tokens.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        if min(shape.height, shape.width) < self.patch:
            raise ValueError(
                f"the image must hold a patch of {self.patch}x{self.patch}, got "
                f"{shape.height}x{shape.width}"
            )
        rows, columns = shape.height // self.patch, shape.width // self.patch
        return FeatureShape(self.width, rows, columns, self.extra_tokens)

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost for an input image of `shape`."""
        out = self.output_shape(shape)
        weights = shape.channels * self.patch**2 * self.width
        patches = out.positions - out.extra_tokens
        learned = self.width * (out.extra_tokens + out.positions)
        params = weights + self.width + learned
        return operator_cost(params, weights * patches, self.width * patches)


class TokenHead(Spec):
    """LayerNorm, then a linear classifier on the class token; a second one if `distilled`.

    The second classifier reads the distillation token.
    """

    type: Literal["token"] = "token"
    classes: Count
    distilled: Annotated[bool, Field(strict=True)] = False

    def cost(self, shape: FeatureShape) -> Cost:
        """Cost on the last tokens of `shape`."""
        heads = 2 if self.distilled else 1
        macs = heads * shape.channels * self.classes
        params = 2 * shape.channels + macs + heads * self.classes
        return operator_cost(params, macs, heads * self.classes)
