"""Rows that cost less than narrower ones: what a device may do, but noise more often does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import permutations

from slimnas.latency.keys import PriceKey
from slimnas.latency.prices import row_error_ms
from slimnas.latency.rows import PriceRow

SURE = 2.0
"""Standard errors by which a wider row must be cheaper to be named."""


def falling(rows: Iterable[PriceRow]) -> tuple[tuple[PriceKey, PriceKey], ...]:
    """Return pairs of a row and a wider one of its kind that costs less, beyond their errors.

    Wider is at least as wide everywhere; of the pairs of one row, that with the cheapest.
    """
    groups: defaultdict[object, list[PriceRow]] = defaultdict(list)
    for row in rows:
        groups[row.key.group, len(row.key.point)].append(row)
    found: dict[PriceKey, PriceRow] = {}
    for members in groups.values():
        for narrow, wide in permutations(members, 2):
            if all(a <= b for a, b in zip(narrow.key.point, wide.key.point, strict=True)):
                noise_ms = SURE * math.hypot(row_error_ms(narrow), row_error_ms(wide))
                known = found.get(narrow.key)
                if wide.latency_ms < narrow.latency_ms - noise_ms and (
                    known is None or wide.latency_ms < known.latency_ms
                ):
                    found[narrow.key] = wide
    return tuple((key, wide.key) for key, wide in found.items())
