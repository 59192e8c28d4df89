"""Networks of other libraries as networks of slimnas."""

from __future__ import annotations

from slimnas.zoo.from_timm import from_timm

__all__ = ["from_timm"]
