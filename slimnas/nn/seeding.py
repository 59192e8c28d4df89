"""Reproducible construction of modules that leaves the global random state alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU generator seeded with `seed` inside, from where it was before after.

    Modules initialise themselves from torch's CPU generator. `torch.manual_seed` would reseed
    the generators of accelerators too, and those are not restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
