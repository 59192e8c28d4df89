"""How a MetaPath turns its architecture parameters into a choice or a mixture.

References:
    EfficientFormer (NeurIPS 2022), section 4.2: softmax((alpha + e) / tau), e ~ U(0, 1).
    Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (ICLR 2017).
    Dong and Yang, "Searching for a Robust Neural Architecture in Four GPU Hours" (CVPR 2019):
    run the sampled path only, straight-through gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Mixing = Literal["sampled", "soft"]
Noise = Literal["gumbel", "uniform"]
AlphaGradient = Literal["output", "change"]
TauSchedule = Literal["exponential", "linear", "cosine"]


@dataclass(frozen=True)
class Route:
    """What one MetaPath does in one forward pass.

    Attributes:
        index: the one choice that runs, or None when all run.
        weights: (choices,) mixing weights; with an index, the relaxed probabilities that carry
            the gradient, or None when no gradient is wanted.
        of_change: with an index, what a choice adds to its input carries the gradient, not its
            whole output.
    """

    index: int | None
    weights: Tensor | None
    of_change: bool = False

    def without_gradient(self) -> Route:
        """The same route, along which nothing is learnt about the choice."""
        if self.index is not None:
            return Route(self.index, None)
        return Route(None, None if self.weights is None else self.weights.detach())


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
    alpha: Tensor,
    tau: float,
    *,
    mixing: Mixing,
    noise: Noise,
    generator: torch.Generator,
    gradient: AlphaGradient = "output",
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
        gradient: of a sampled choice, what its probability is taken to scale: its `output`
            (GDAS), or the `change` it makes to its input. Every choice passes its input on, which
            in the mixture of all has no part in the gradient, since the weights sum to 1; sampled
            alone it has, as noise, and as a pull towards what is likely already.
    """
    drawn = draw_noise(alpha.numel(), noise, generator).to(alpha.device)
    if mixing == "soft":
        return Route(None, soft_weights(alpha, tau, drawn))
    if noise == "gumbel":
        logits = alpha / tau + drawn
        return Route(int(logits.argmax()), torch.softmax(logits, dim=0), gradient == "change")
    weights = soft_weights(alpha, tau, drawn)
    index = torch.multinomial(weights.detach().cpu(), 1, generator=generator)
    return Route(int(index), weights, gradient == "change")


def temperature(
    progress: float, start: float, end: float, schedule: TauSchedule = "exponential"
) -> float:
    """Temperature after a share `progress` (0 to 1) of training: by equal factors, by equal steps,
    or along half a cosine.
    """
    if schedule == "linear":
        return start + (end - start) * progress
    if schedule == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return float(start * (end / start) ** progress)


def mix(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of the choices' outputs, all of one shape."""
    total = outputs[0] * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + output * weight
    return total


def straight_through(output: Tensor, weight: Tensor, passed: Tensor | None = None) -> Tensor:
    """`output` itself, with the gradient it would have as `output * weight` at weight 1.

    The gradient of `weight` is <grad, output>; with `passed`, the part of the output that does
    not depend on the choice, <grad, output - passed>. Costs neither a copy nor memory: the
    neighbouring layers keep both for their own gradients anyway.
    """
    gated: Tensor = _StraightThrough.apply(output, weight, passed)  # type: ignore[no-untyped-call]
    return gated


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor, passed: Tensor | None) -> Tensor:
        ctx.save_for_backward(output, passed)
        ctx.weight_dtype = weight.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        output, passed = ctx.saved_tensors
        grad = grads[0]
        through = torch.sum(grad * output, dtype=ctx.weight_dtype)
        if passed is not None:
            through = through - torch.sum(grad * passed, dtype=ctx.weight_dtype)
        return grad, through, None
