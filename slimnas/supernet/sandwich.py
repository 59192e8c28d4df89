"""Networks of a space that learn beside the sampled path: the largest, the smallest, random ones.

The sampled path runs at full width and, early on, with half of its blocks. A search asks for
others: the largest network first, then ever narrower and shorter ones. Those trained in every step
have weights that answer for them.

Reference: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques"
(ICCV 2019): the sandwich rule, and distillation from the largest network in place.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.arch.walk import Component
from slimnas.nn.build import make_module
from slimnas.nn.layout import as_layout, layout_of
from slimnas.supernet.inherit import Inheritance, own_order
from slimnas.supernet.supernet import Pass, Supernet, mean_logits
from slimnas.train.sync_norm import synchronise_norms

_NETWORKS = 5  # keeps this random stream apart from those of data, routes and modules


class Slices:
    """Runs networks of any width on slices of a supernet's weights, through which they learn.

    The channels kept are the first ones (`slimnas.supernet.inherit.own_order`). BatchNorm
    normalises by the batch; the supernet's statistics stay those of full width.

    Args:
        supernet: whose weights are used, as they are at each call.
        sync_bn: of several processes, BatchNorm normalises by the images of all.
    """

    def __init__(self, supernet: Supernet, *, sync_bn: bool = False) -> None:
        self._inheritance = Inheritance(supernet, own_order(supernet))
        self._sync_bn = sync_bn
        self._templates: dict[Component, nn.Module] = {}

    def logits(self, selection: Selection, images: Tensor) -> Tensor:
        """Logits (B, K) of the network of `selection`, in training mode, for (B, c, R, R)."""
        x = images
        for component, source in self._inheritance.components(selection):
            template = self._template(component)
            tensors = self._inheritance.tensors(component, source)
            for name, _ in template.named_buffers():
                tensors[name] = tensors[name].clone()  # statistics are written to
            x = as_layout(x, layout_of(template), component.input)
            x = functional_call(template, tensors, (x,))
        return mean_logits(x)

    def _template(self, component: Component) -> nn.Module:
        if component not in self._templates:
            with torch.device("meta"):  # has no weights of its own
                template = make_module(component).train()
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            if self._sync_bn and several:
                template = synchronise_norms(template)
            self._templates[component] = template
        return self._templates[component]


class Sandwich:
    """Draws the networks of each step.

    Args:
        supernet: which they belong to.
        count: how many per step: the largest, the smallest, then random ones.
        seed: networks follow from it and the step alone.
        sync_bn: see `Slices`.
    """

    def __init__(self, supernet: Supernet, count: int, *, seed: int, sync_bn: bool = False) -> None:
        self._supernet, self._count, self._seed = supernet, count, seed
        self._slices = Slices(supernet, sync_bn=sync_bn)

    def selections(self, step: int) -> list[Selection]:
        """The networks of one step, the largest first."""
        space = self._supernet.space
        state = np.random.SeedSequence((self._seed, _NETWORKS, step)).generate_state(1, np.uint64)
        rng = random.Random(int(state[0]))
        drawn = [draw_largest, draw_smallest][: self._count]
        selections = [draw(space, rng) for draw in drawn]
        selections += [space.random(rng) for _ in range(self._count - len(drawn))]
        return selections

    def passes(self, step: int) -> list[Pass]:
        """What runs them, each for one forward pass."""
        return [self._pass(selection) for selection in self.selections(step)]

    def _pass(self, selection: Selection) -> Pass:
        if selection.widths == self._supernet.space.full(()).widths:
            routes = self._supernet.fixed_routes(selection)
            return lambda images: self._supernet.along(images, routes)
        return lambda images: self._slices.logits(selection, images)


def draw_largest(space: SearchSpace, rng: random.Random) -> Selection:
    """Every slot active at full width; its block drawn, and where attention comes last its number.

    A search begins at one of these.
    """
    if not space.limits.attention_last:
        return space.full(
            tuple(rng.choice(stage.blocks) for _ in range(stage.slots)) for stage in space.stages
        )
    return _swapped(space, space.largest(rng.choice(space.attention_counts())), rng)


def draw_smallest(space: SearchSpace, rng: random.Random) -> Selection:
    """Least widths and depths; which slots are active and their blocks are drawn."""
    smallest = rng.choice(space.smallest())
    paths = []
    for stage, slots in zip(space.stages, smallest.paths, strict=True):
        blocks = [choice for choice in slots if choice != IDENTITY]
        places = sorted(rng.sample(range(stage.slots), len(blocks)))
        at = dict(zip(places, blocks, strict=True))
        paths.append(tuple(at.get(slot, IDENTITY) for slot in range(stage.slots)))
    return _swapped(space, Selection(smallest.widths, tuple(paths)), rng)


def sandwich_loss(
    logits: Tensor, targets: Tensor, *, label_smoothing: float, distil: bool
) -> Tensor:
    """Mean loss of the sampled path and the networks beside it.

    The mean, not the sum: AdamW takes no notice of the factor, and it can be compared with the
    loss of a run without a sandwich.

    Args:
        logits: (1 + networks, B, K): of the sampled path, the largest network, others.
        targets: (B,) labels or (B, K) probabilities.
        label_smoothing: of the targets.
        distil: all but the largest network learn from its probabilities instead.
    """
    teacher = logits[1].detach().softmax(dim=-1)
    losses = [
        cross_entropy(own, teacher)
        if distil and number != 1
        else cross_entropy(own, targets, label_smoothing=label_smoothing)
        for number, own in enumerate(logits)
    ]
    return torch.stack(losses).mean()


def _swapped(space: SearchSpace, selection: Selection, rng: random.Random) -> Selection:
    """The same selection, each block one of those that may stand in its place."""
    paths = tuple(
        tuple(_drawn(choice, space, index, rng) for choice in slots)
        for index, slots in enumerate(selection.paths)
    )
    return Selection(selection.widths, paths)


def _drawn(choice: str, space: SearchSpace, index: int, rng: random.Random) -> str:
    if choice == IDENTITY:
        return choice
    stage = space.stages[index]
    return rng.choice(stage.alike(choice) if space.limits.attention_last else stage.blocks)
