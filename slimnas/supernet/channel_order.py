"""Which channels of a trained supernet matter most, by first-order Taylor importance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimnas.supernet.gumbel import Route
from slimnas.supernet.inherit import (
    ChannelOrder,
    group_chunks,
    magnitude_order,
    order_of,
    sum_by_group,
)
from slimnas.supernet.supernet import Supernet


def taylor_order(
    supernet: Supernet,
    routings: Sequence[Sequence[Route]],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> ChannelOrder:
    """Order every group of channels by what the loss would change were they removed.

    The importance of a channel is (sum of g * w over the weights that read or write it), squared
    per minibatch and averaged: Molchanov et al., "Importance Estimation for Neural Network
    Pruning" (CVPR 2019). The supernet is not changed, its gradients included.

    Args:
        supernet: trained, in evaluation mode.
        routings: routes to measure along; channels on none of them are ordered by magnitude.
        batches: images and labels to measure on.
    """
    # The averaged weights are frozen; gradients are asked of aliases that share their memory.
    live = {
        name: parameter.detach().requires_grad_(True)
        for name, parameter in supernet.named_parameters()
    }
    # In training mode BatchNorm would write to its statistics; it writes to these copies.
    buffers = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    scores: dict[str, Tensor] = {}
    for images, labels in batches:
        for routes in routings:
            logits = torch.func.functional_call(supernet, {**live, **buffers}, (images, routes))
            loss = cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
            products = {
                name: gradient * parameter.detach()
                for (name, parameter), gradient in zip(live.items(), gradients, strict=True)
                if gradient is not None
            }
            for group, first_order in sum_by_group(supernet, products).items():
                scores[group] = scores.get(group, 0.0) + first_order.square()
    measured = order_of(scores, group_chunks(supernet))
    fallback = magnitude_order(supernet)
    return {
        group: measured[group] if bool(scores[group].any()) else fallback[group]
        for group in fallback
    }
