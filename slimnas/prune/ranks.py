"""How far two rankings of the same units or blocks agree."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import spearmanr

FEWEST = 3
"""A rank correlation of fewer says nothing."""


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rho of two lists about the same things; None of too few, or of all alike."""
    if len(one) < FEWEST or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(spearmanr(one, other).statistic)
