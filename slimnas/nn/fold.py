"""`fold`: the network as it is deployed, with everything removable at inference removed.

BatchNorm goes into the convolution before it, layer scale into the last linear map before it, and
the two classifiers of a distilled head become one, unless they read two different tokens (ViT).
The outputs stay those of evaluation mode up to rounding. MB4D's first layer scale stays: nothing
but the pooling stands before it.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from slimnas.nn.efficientformer import (
    MB3D,
    MB4D,
    Conv3x3,
    ConvFFN,
    ConvStem,
    LayerScale,
    LinearHead,
)


def fold(module: nn.Module) -> nn.Module:
    """Return a folded copy of a network, block or stem, in evaluation mode.

    The copy is for export and timing; none of its parameters takes a gradient. `module` is not
    changed, and modules of unknown families are copied as they are.
    """
    folded = copy.deepcopy(module).eval()
    folded.requires_grad_(False)
    for part in list(folded.modules()):
        _fold_part(part)
    return folded


def _fold_part(part: nn.Module) -> None:
    if isinstance(part, ConvStem):
        part.conv1, part.norm1 = _with_norm(part.conv1, part.norm1)
        part.conv2, part.norm2 = _with_norm(part.conv2, part.norm2)
    elif isinstance(part, Conv3x3):
        part.conv, part.norm = _with_norm(part.conv, part.norm)
    elif isinstance(part, MB4D):
        _fold_ffn(part.mlp)
        part.ls2 = _into_layer(part.ls2, part.mlp.fc2)
    elif isinstance(part, MB3D):
        part.ls1 = _into_layer(part.ls1, part.token_mixer.proj)
        part.ls2 = _into_layer(part.ls2, part.mlp.fc2)
    elif isinstance(part, LinearHead):
        _merge_classifiers(part)


def _fold_ffn(ffn: ConvFFN) -> None:
    ffn.fc1, ffn.norm1 = _with_norm(ffn.fc1, ffn.norm1)
    ffn.fc2, ffn.norm2 = _with_norm(ffn.fc2, ffn.norm2)


def _with_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """The convolution with `norm` folded in, and what stands in the norm's place."""
    if not isinstance(norm, nn.BatchNorm2d):  # folded already
        return conv, norm
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


def _into_layer(scale: nn.Module, layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Scale the outputs of `layer` by `scale`; returns what stands in the scale's place."""
    if not isinstance(scale, LayerScale):  # folded already
        return scale
    weight_shape = (-1,) + (1,) * (layer.weight.dim() - 1)
    layer.weight = _frozen(layer.weight * scale.gamma.view(weight_shape))
    assert layer.bias is not None
    layer.bias = _frozen(layer.bias * scale.gamma)
    return nn.Identity()


def _merge_classifiers(head: LinearHead) -> None:
    if head.head_dist is None:
        return
    assert head.head.bias is not None
    assert head.head_dist.bias is not None
    head.head.weight = _frozen((head.head.weight + head.head_dist.weight) / 2)
    head.head.bias = _frozen((head.head.bias + head.head_dist.bias) / 2)
    head.head_dist = None


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)
