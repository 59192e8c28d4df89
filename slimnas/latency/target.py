"""Target latencies as users write them: `1.6ms`, `1600us`, `0.0016s`."""

from __future__ import annotations

import math
import re
from decimal import Decimal, DecimalException

from slimnas.errors import SpecError

_MS_PER_UNIT = {"ms": "1", "us": "1e-3", "\u00b5s": "1e-3", "\u03bcs": "1e-3", "s": "1e3"}
_FORM = re.compile(r"^\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z\u00b5\u03bc]*)\s*$")
_SPELLINGS = "write 1.6ms, 1600us or 0.0016s"


def parse_latency_ms(text: str) -> float:
    """Return the latency in milliseconds; every spelling of one latency gives the same number.

    Raises:
        SpecError: no unit, an unknown one, or a latency that is not positive.
    """
    match = _FORM.match(text)
    if match is None:
        raise SpecError(f"target latency must be a number with a unit, got {text!r}; {_SPELLINGS}")
    number, unit = match.groups()
    if not unit:
        raise SpecError(f"target latency needs a unit, got {text!r}; {_SPELLINGS}")
    if unit not in _MS_PER_UNIT:
        raise SpecError(f"target latency has unknown unit {unit!r} in {text!r}; {_SPELLINGS}")
    try:
        latency_ms = float(Decimal(number) * Decimal(_MS_PER_UNIT[unit]))
    except DecimalException:
        raise SpecError(
            f"target latency must be a number with a unit, got {text!r}; {_SPELLINGS}"
        ) from None
    if not (latency_ms > 0 and math.isfinite(latency_ms)):
        raise SpecError(f"target latency must be positive, got {text!r}; {_SPELLINGS}")
    return latency_ms


def latency_label(latency_ms: float) -> str:
    """Name a target in folders and networks: `1.6ms`. Different targets have different names."""
    return f"{latency_ms!r}ms".replace(".0ms", "ms").replace("+", "")
