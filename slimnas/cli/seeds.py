"""Seeds on the command line."""

from __future__ import annotations

from typing import Any

import typer

HIGHEST_SEED = 2**63 - 1
"""As far as the generators of torch and NumPy both go, with room for what is added to a seed."""


def seed_option(text: str, **more: Any) -> Any:
    """What `--seed` takes, for `Annotated`: a whole number from 0 to `HIGHEST_SEED`."""
    return typer.Option(min=0, max=HIGHEST_SEED, help=text, **more)
