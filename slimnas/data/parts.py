"""Which images a process gets, and in which order they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimnas.data.sources import LongArray
from slimnas.errors import DataError


@dataclass(frozen=True)
class Part:
    """Which images of every batch one process gets: the `index`-th of `count` contiguous slices.

    Of a batch of `size` images these are [index * size // count, (index + 1) * size // count).
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a slice that does not exist.

        Raises:
            DataError: `index` does not lie in 0..count - 1.
        """
        if not 0 <= self.index < self.count:
            raise DataError(f"a part must be one of 0..{self.count - 1}, got {self.index}")

    def of(self, size: int) -> slice:
        """Return the slice of a batch of `size` images."""
        return slice(self.index * size // self.count, (self.index + 1) * size // self.count)


WHOLE = Part()


def permutation(count: int, *key: int) -> LongArray:
    """Return a permutation of range(count) that depends on the key's non-negative numbers only.

    Sorts uniform draws, whose stream NumPy keeps from release to release (its shuffles may
    change).
    """
    draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).random(count)
    return np.argsort(draws, kind="stable").astype(np.int64)
