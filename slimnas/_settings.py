"""Settings of a run, compared and shown key by key."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from slimnas.errors import RunFolderError


def flat_settings(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shown_setting(key: str, settings: Mapping[str, Any]) -> str:
    """One setting for a message; of a digest its beginning."""
    value = settings.get(key)
    return f"{value[:12]}..." if key.endswith("_digest") and value else repr(value)


def require_same_settings(
    folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, besides: Container[str] = ()
) -> None:
    """Refuse to go on with a run in `folder` under other settings than it was begun with.

    Args:
        folder: the run folder.
        old: its settings, as `flat_settings` gives them.
        new: those asked for now.
        besides: keys that may differ.

    Raises:
        RunFolderError: names the settings that differ.
    """
    keys = [key for key in {**old, **new} if key not in besides]
    changed = [key for key in keys if old.get(key) != new.get(key)]
    if changed:
        named = ", ".join(
            f"{key} was {shown_setting(key, old)}, now {shown_setting(key, new)}"
            for key in changed[:3]
        )
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise RunFolderError(
            f"{folder}: holds a run with other settings ({named}{more}); give the same ones to go "
            "on with it, or another --output"
        )
