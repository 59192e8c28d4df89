"""The contract between the builder and a block family."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from slimnas.arch.walk import Component

Maker = Callable[[Component], nn.Module]
"""Makes the module of one component, initialised from torch's CPU generator."""
