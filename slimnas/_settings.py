"""Settings of a run, compared and shown key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
