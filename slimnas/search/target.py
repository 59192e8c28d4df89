"""Target latencies as users write them: `1.6ms`, `1600us`, `0.0016s`."""

from __future__ import annotations

import math
import re

from slimnas.errors import SpecError

_MS_PER_UNIT = {"ms": 1.0, "us": 1e-3, "µs": 1e-3, "s": 1e3}
_FORM = re.compile(r"^\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Zµ]*)\s*$")
_SPELLINGS = "write 1.6ms, 1600us or 0.0016s"


def parse_latency_ms(text: str) -> float:
    """Return the latency in milliseconds.

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
        latency_ms = float(number) * _MS_PER_UNIT[unit]
    except ValueError:
        raise SpecError(
            f"target latency must be a number with a unit, got {text!r}; {_SPELLINGS}"
        ) from None
    if not (latency_ms > 0 and math.isfinite(latency_ms)):
        raise SpecError(f"target latency must be positive, got {text!r}; {_SPELLINGS}")
    return latency_ms
