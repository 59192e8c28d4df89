"""Bounds on gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimnas.train.recipe import TrainRecipe

_LEAST_WEIGHT_NORM = 1e-3
_LEAST_GRADIENT_NORM = 1e-6
HEAD = "head."
"""Where a network's classifiers are, which adaptive clipping leaves alone."""


def clip_gradients(model: nn.Module, recipe: TrainRecipe) -> float:
    """Bound the gradients of `model` in place, as the recipe says.

    Returns:
        The norm of all gradients before that.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    parameters = [parameter for _, parameter in named]
    if recipe.clip == "norm":
        return float(nn.utils.clip_grad_norm_(parameters, recipe.clip_norm))
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if recipe.clip == "agc":
        clip_adaptively((p for name, p in named if not name.startswith(HEAD)), recipe.clip_norm)
    return norm


@torch.no_grad()
def clip_adaptively(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Bound each unit's gradient norm by `factor` times the norm of its weights, in place.

    Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (2021),
    section 4.1, equation 3. A unit is one output of a matrix or kernel; a vector is one unit.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        bound = _unit_norm(parameter).clamp(min=_LEAST_WEIGHT_NORM) * factor
        norm = _unit_norm(gradient)
        gradient.mul_(torch.where(norm < bound, 1.0, bound / norm.clamp(min=_LEAST_GRADIENT_NORM)))


def _unit_norm(x: Tensor) -> Tensor:
    axes = tuple(range(1, x.dim())) or None
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=axes is not None)
    return norm
