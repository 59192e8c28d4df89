"""The zoo's models in timm: `register()`, then `timm.create_model("slimnas_efficientvit_m4")`.

They are slimnas's networks with the interface of timm's models, see
`slimnas.integrations.timm_models`. timm is imported when `register` is called.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from slimnas.errors import RuntimeUnavailableError, ZooError
from slimnas.zoo.registry import list_entries, zoo_folder

PREFIX = "slimnas_"
"""What the names begin with in timm, where some of the models have others of their name."""


def register(*, zoo: str | Path | None = None, prefix: str = PREFIX) -> tuple[str, ...]:
    """Make the models of the zoo available to `timm.create_model` and `timm.list_models`.

    Called again, it registers what the zoo holds by then. Entries that cannot be read are left
    out with a warning.

    Args:
        zoo: the user's zoo; see `slimnas.zoo.registry.zoo_folder`.
        prefix: what their names begin with; a dot in a name, which timm reads as the beginning of
            a tag, becomes an underscore.

    Returns:
        Their names in timm.

    Raises:
        RuntimeUnavailableError: timm is not installed.
        ZooError: two models would have one name in timm.
    """
    try:
        from slimnas.integrations import timm_models
    except (ImportError, RuntimeError) as error:  # what torchvision, which it imports, raises
        raise RuntimeUnavailableError(
            f"timm cannot be imported ({error}); pip install 'timm>=1.0.15'"
        ) from error
    folder = zoo_folder(zoo).resolve()
    listing = list_entries(folder)
    for place, reason in listing.damaged:
        warnings.warn(f"{place}: not registered with timm: {reason}", stacklevel=2)
    entries = {entry.name: entry for entry in listing.entries}  # the user's come last and win
    named: dict[str, str] = {}
    for name in entries:
        registered = prefix + name.replace(".", "_")
        if registered in named:
            raise ZooError(
                f"{name} and {named[registered]} would both be {registered} in timm; rename one"
            )
        named[registered] = name
    for registered, name in named.items():
        timm_models.register_entry(registered, entries[name], folder)
    return tuple(named)
