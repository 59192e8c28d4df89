"""Modules in 8-bit integers, as XNNPACK computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimnas.runtimes.quiet import quiet

with quiet():
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


def int8_module(module: nn.Module, example: Tensor) -> nn.Module:
    """Return `module` with products of 8-bit integers, symmetric, weights by channel.

    Args:
        module: a module in evaluation mode; it is not changed.
        example: an input, which the ranges of the maps are taken from.
    """
    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True)
    )
    observed = prepare_pt2e(torch.export.export(module, (example,)).module(), quantizer)
    with torch.no_grad():
        observed(example)
    quantised: nn.Module = convert_pt2e(observed)
    return quantised
