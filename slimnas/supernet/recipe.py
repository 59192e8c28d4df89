"""How a supernet is trained, as plain data: in a space's file, overridden on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from slimnas.arch.documents import Spec, parse_spec
from slimnas.arch.space import SearchSpace
from slimnas.supernet.gumbel import AlphaGradient, Mixing, Noise, TauSchedule, temperature
from slimnas.train.recipe import Positive, Share, TrainRecipe

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class SupernetRecipe(TrainRecipe):
    """`TrainRecipe` and what only a supernet has.

    Attributes:
        mixing: `sampled` runs one path per MetaPath and step, `soft` mixes all (the paper).
        noise: `gumbel`, or the paper's literal `uniform`.
        tau_start: temperature at the beginning, and as long as `alpha_warmup` lasts.
        tau_end: temperature at the end.
        tau_schedule: how it falls in between.
        alpha_lr: peak learning rate of the architecture parameters.
        alpha_betas: AdamW's decays of their gradients and squared gradients.
        alpha_weight_decay: their weight decay.
        alpha_warmup: share of the steps, from the first on, in which they stay as they are: the
            weights learn along paths drawn uniformly.
        alpha_gradient: see `slimnas.supernet.gumbel.draw_route`.
        sandwich: networks of the space that learn in each step beside the sampled path: the
            largest, then the smallest, then random ones, each at its own widths (Yu and Huang,
            "Universally Slimmable Networks", ICCV 2019). Their losses are averaged; time and
            memory of a step grow with them.
        sandwich_distillation: all but the largest learn from its probabilities, not from labels.
        layer_scale: initial value of every layer scale.
    """

    mixing: Mixing = "sampled"
    noise: Noise = "gumbel"
    tau_start: Positive = 4.0
    tau_end: Positive = 1.0
    tau_schedule: TauSchedule = "exponential"
    alpha_lr: Positive = 1e-2
    # As DARTS: architecture gradients are noisy and change early.
    alpha_betas: tuple[Beta, Beta] = (0.5, 0.999)
    alpha_weight_decay: float = 0.0
    alpha_warmup: Share = 0.0
    alpha_gradient: AlphaGradient = "output"
    sandwich: Annotated[int, Field(strict=True, ge=0, le=8)] = 0
    sandwich_distillation: Annotated[bool, Field(strict=True)] = False
    layer_scale: Positive = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> SupernetRecipe:
        if self.sandwich_distillation and not self.sandwich:
            raise ValueError(
                "sandwich_distillation: needs the largest network as a teacher; set sandwich to 1 "
                "or more"
            )
        if self.compile:
            raise ValueError(
                "compile: must be false, every step of a supernet runs another path, which would "
                "be compiled anew"
            )
        return self

    def waiting_steps(self, steps: int) -> int:
        """How many steps, of `steps` in all, the architecture parameters stay as they are."""
        return round(self.alpha_warmup * steps)

    def tau(self, step: int, steps: int) -> float:
        """Temperature of `step` (from 0) of `steps`."""
        first = self.waiting_steps(steps)
        progress = max(0, step - first) / max(1, steps - 1 - first)
        return temperature(progress, self.tau_start, self.tau_end, self.tau_schedule)


class _SupernetSection(Spec):
    recipe: SupernetRecipe


class _RecipeOfSpace(Spec):
    """The part of a space's file that holds the recipe, so that faults are named by their place."""

    supernet: _SupernetSection


def space_recipe(space: SearchSpace, *, source: str) -> SupernetRecipe:
    """The recipe in a space's `supernet.recipe`; all defaults where there is none.

    Args:
        space: the space.
        source: its file or name, for messages.

    Raises:
        SpecError: one line per fault, with file and key.
    """
    given = space.supernet.recipe or {}
    document = {"supernet": {"recipe": given}}
    return parse_spec(_RecipeOfSpace, document, source=source).supernet.recipe


def recipe_for(space: SearchSpace, overrides: Mapping[str, Any], *, source: str) -> SupernetRecipe:
    """The recipe of a space with some settings given on the command line instead.

    Args:
        space: the space.
        overrides: settings by name.
        source: the space's file or name, for messages.

    Raises:
        SpecError: one line per fault, with where it was given.
    """
    space_recipe(space, source=source)
    together = {**(space.supernet.recipe or {}), **overrides}
    return parse_spec(SupernetRecipe, together, source="command line")
