"""How a MetaPath turns its architecture parameters into a choice or a mixture.

References:
    EfficientFormer (NeurIPS 2022), section 4.2: softmax((alpha + e) / tau), e ~ U(0, 1).
    Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (ICLR 2017).
    Dong and Yang, "Searching for a Robust Neural Architecture in Four GPU Hours" (CVPR 2019):
    run the sampled path only, straight-through gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Mixing = Literal["sampled", "soft"]
Noise = Literal["gumbel", "uniform"]


@dataclass(frozen=True)
class Route:
    """What one MetaPath does in one forward pass.

    Attributes:
        index: the one choice that runs, or None when all run.
        weights: (choices,) mixing weights; with an index, the relaxed probabilities that carry
            the gradient, or None when no gradient is wanted.
    """

    index: int | None
    weights: Tensor | None


def soft_weights(alpha: Tensor, tau: float, noise: Tensor) -> Tensor:
    """softmax((alpha + noise) / tau): the paper's mixture over the choices (choices,)."""
    return torch.softmax((alpha + noise) / tau, dim=0)


def draw_noise(size: int, noise: Noise, generator: torch.Generator) -> Tensor:
    """Noise of `size` values: standard Gumbel, or the paper's literal U(0, 1).

    Always drawn on the CPU, so that every device sees the same choices.
    """
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    if noise == "gumbel":
        # -log(-log(u)) with u in [0, 1): the clamp keeps u = 0 finite.
        uniform = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    return uniform.float()


def draw_route(
    alpha: Tensor, tau: float, *, mixing: Mixing, noise: Noise, generator: torch.Generator
) -> Route:
    """Draw one MetaPath's route.

    `soft` gives the mixture. `sampled` gives one choice whose frequency is softmax(alpha / tau):
    by the Gumbel-max trick on alpha / tau; with uniform noise, which has no such property, by a
    draw from the noisy mixture, so there the frequency is that only on average over the noise.

    Args:
        alpha: (choices,) architecture parameters.
        tau: temperature, above 0.
        mixing: see above.
        noise: see `draw_noise`.
        generator: source of all randomness, on the CPU.
    """
    drawn = draw_noise(alpha.numel(), noise, generator).to(alpha.device)
    if mixing == "soft":
        return Route(None, soft_weights(alpha, tau, drawn))
    if noise == "gumbel":
        logits = alpha / tau + drawn
        return Route(int(logits.argmax()), torch.softmax(logits, dim=0))
    weights = soft_weights(alpha, tau, drawn)
    index = torch.multinomial(weights.detach().cpu(), 1, generator=generator)
    return Route(int(index), weights)


def temperature(progress: float, start: float, end: float) -> float:
    """Temperature after a share `progress` (0 to 1) of training, annealed exponentially."""
    return float(start * (end / start) ** progress)


def mix(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of the choices' outputs, all of one shape."""
    total = outputs[0] * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + output * weight
    return total


def straight_through(output: Tensor, weight: Tensor) -> Tensor:
    """`output` itself, with the gradient it would have as `output * weight` at weight 1.

    The gradient of `weight` is <grad, output>. Costs neither a copy nor memory: the next layer
    keeps `output` for its own gradient anyway.
    """
    gated: Tensor = _StraightThrough.apply(output, weight)  # type: ignore[no-untyped-call]
    return gated


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        ctx.weight_dtype = weight.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        grad = grads[0]
        return grad, torch.sum(grad * output, dtype=ctx.weight_dtype)
