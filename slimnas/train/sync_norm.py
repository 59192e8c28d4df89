"""BatchNorm over the images of all processes.

torch's own `SyncBatchNorm` needs a GPU; processes on CPUs get one made of all-reduces, to the same
definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm (B, C, ...) whose training statistics come from all processes.

    Args:
        norm: whose parameters, statistics and settings it shares.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        self.affine = norm.affine
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 axes, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training with the statistics of all processes' images."""
        if not self.training:
            fixed: Tensor = super().forward(input)
            return fixed
        axes = [0, *range(2, input.dim())]
        count = input.new_tensor([input.numel() // input.shape[1]])
        sums = torch.cat([input.sum(axes), count])
        sums = _summed(sums)
        total = sums[-1]
        mean = sums[:-1] / total
        shape = [1, -1] + [1] * (input.dim() - 2)
        centred = input - mean.view(shape)
        variance = _summed((centred * centred).sum(axes)) / total
        self._remember(mean.detach(), variance.detach() * total.detach() / (total.detach() - 1))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum
        if weight is None:  # a plain average over batches
            weight = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(unbiased, weight)


class _Sum(torch.autograd.Function):
    """The sum over all processes, which every process's value changes in all of them."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return _Sum._over_all(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _Sum._over_all(gradient)

    @staticmethod
    def _over_all(values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _summed(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


def synchronise_norms(model: nn.Module) -> nn.Module:
    """`model` with every BatchNorm over all processes; state-dict names stay.

    Parameters are shared with `model`, whose modules are replaced in place.
    """
    if next(model.parameters()).is_cuda:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, SyncedBatchNorm(child))
    return model
