"""Accuracy of selections nobody measured, from those that were: what a search record answers by.

A Gaussian process over selections: a mean, plus what each slot's block is worth, plus trends and a
smooth surface in what slimming changes (width, depth and kinds of blocks of each stage). What it
predicts is a weighted sum over the measured selections, so that drops add up where nothing else
was seen, and follow the measurements where some are near. Its scales are those that make the
measured accuracies likeliest (Rasmussen and Williams, "Gaussian Processes for Machine Learning",
2006, chapters 2 and 5), with a weak pull towards `START`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import spearmanr

from slimnas.arch.documents import Spec
from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.errors import SpecError

Array: TypeAlias = NDArray[np.float64]
Scale = Annotated[float, Field(gt=0)]

START = {"constant": 10.0, "slots": 3.0, "linear": 5.0, "smooth": 5.0, "noise": 1.0}
"""Points: where the search for scales begins, and what it is pulled to."""
START_LENGTH = 1.0
"""As `START`, for lengths: shares of a stage's range."""
PULL = 1.5
"""Standard deviation of the pull, in natural logarithms."""
BOUND = 4.0
"""How far a scale may go from where it began, in natural logarithms."""
NAMES = tuple(START)
DIGITS = 4
"""Significant digits that scales are kept with."""


class Scales(Spec):
    """How accuracies vary over a space: standard deviations in percentage points.

    Attributes:
        constant: of the mean.
        slots: of what one slot's block is worth, times the square root of the number of slots.
        linear: of trends.
        smooth: of the smooth surface.
        noise: of what none of them explains.
        lengths: distance over which the surface forgets, one per column of a profile.
    """

    constant: Scale
    slots: Scale
    linear: Scale
    smooth: Scale
    noise: Scale
    lengths: Annotated[tuple[Scale, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Features:
    """What the model sees of some selections.

    Attributes:
        slots: (n, slots and blocks) 0.5 where a slot chooses a block, else -0.5.
        profile: (n, columns) per stage its width, depth and the number of each further kind of
            block, as shares of their ranges, from -0.5 to 0.5.
    """

    slots: Array
    profile: Array

    def of(self, rows: Sequence[int]) -> Features:
        """Some of the selections."""
        return Features(self.slots[list(rows)], self.profile[list(rows)])


def features(space: SearchSpace, selections: Sequence[Selection]) -> Features:
    """What the model sees of `selections`."""
    slots = [list(_slots(space, selection)) for selection in selections]
    profile = [list(_profile(space, selection)) for selection in selections]
    return Features(np.array(slots, dtype=float) - 0.5, np.array(profile, dtype=float) - 0.5)


def profile_columns(space: SearchSpace) -> int:
    """How many columns a profile has."""
    return sum(1 for _ in _profile(space, space.smallest()[0]))


def _slots(space: SearchSpace, selection: Selection) -> Iterator[bool]:
    for stage, path in zip(space.stages, selection.paths, strict=True):
        for choice in path:
            yield from (choice == block for block in stage.blocks)


def _profile(space: SearchSpace, selection: Selection) -> Iterator[float]:
    stages = zip(space.stages, selection.widths, selection.paths, strict=True)
    for stage, width, path in stages:
        yield (width - stage.width.min) / max(stage.width.max - stage.width.min, 1)
        yield 1 - path.count(IDENTITY) / stage.slots
        yield from (path.count(block) / stage.slots for block in stage.blocks[1:])


class AccuracyModel:
    """Top-1 of any selection of a space, from measured ones.

    Args:
        space: the space.
        scales: how accuracies vary over it.
        measured: selection -> top-1 in percent; at least one.

    Raises:
        SpecError: scales of another space, or so far off that nothing can be computed.
    """

    def __init__(
        self, space: SearchSpace, scales: Scales, measured: Mapping[Selection, float]
    ) -> None:
        columns = profile_columns(space)
        if len(scales.lengths) != columns:
            raise SpecError(
                f"scales.lengths: must be {columns} for search space {space.name}, got "
                f"{len(scales.lengths)}"
            )
        self.space = space
        self.scales = scales
        top1 = np.array(list(measured.values()))
        self._mean = float(top1.mean())
        self._known = features(space, list(measured))
        self._weights = _solved(scales, self._known, top1 - self._mean)

    def top1(self, selection: Selection) -> float:
        """Top-1 of `selection` in percent."""
        seen = features(self.space, [selection])
        return float(_predicted(self.scales, self._known, self._weights, self._mean, seen)[0])


def fit_scales(known: Features, top1: Array) -> Scales:
    """The scales that make the measured accuracies likeliest.

    Args:
        known: of n selections.
        top1: (n,) their top-1 in percent.
    """
    objective = _Objective(known, top1 - top1.mean())
    start = objective.start
    bounds = [(at - BOUND, at + BOUND) for at in start]
    found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return _scales(found.x)


@dataclass(frozen=True)
class HeldOutError:
    """How well a model does on selections it was not fitted to.

    Attributes:
        networks: how many.
        spearman: rank correlation of predicted and measured top-1.
        mean_error_points: mean absolute difference, in percentage points.
    """

    networks: int
    spearman: float
    mean_error_points: float


def held_out_errors(
    known: Features, top1: Array, groups: Sequence[str], kinds: Sequence[str], folds: int = 5
) -> dict[str, HeldOutError]:
    """Cross-validated errors, the scales fitted anew without each fold.

    Args:
        known: of n selections.
        top1: (n,) their top-1 in percent.
        groups: of n: what is held out together, such as the networks along one walk; those with
            an empty one are never held out.
        kinds: of n: errors are stated for each kind.
        folds: in how many parts the groups are held out.

    Returns:
        Kind -> error, of the kinds with three networks or more that were held out.
    """
    names = [group for group in dict.fromkeys(groups) if group]
    fold_of = {group: number % folds for number, group in enumerate(names)}
    predicted = np.full(len(top1), np.nan)
    for fold in range(min(folds, len(names))):
        out = [i for i, group in enumerate(groups) if fold_of.get(group) == fold]
        rest = sorted(set(range(len(groups))) - set(out))
        part, mean = known.of(rest), float(top1[rest].mean())
        scales = fit_scales(part, top1[rest])
        weights = _solved(scales, part, top1[rest] - mean)
        predicted[out] = _predicted(scales, part, weights, mean, known.of(out))
    errors = {}
    for kind in dict.fromkeys(kinds):
        chosen = [i for i, each in enumerate(kinds) if each == kind and groups[i]]
        if len(chosen) > 2:
            off = float(np.abs(predicted[chosen] - top1[chosen]).mean())
            errors[kind] = HeldOutError(len(chosen), _rank(predicted[chosen], top1[chosen]), off)
    return errors


def _rank(one: Array, other: Array) -> float:
    """Spearman's rank correlation; 0 where one side does not vary."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(one, other).statistic)


def _predicted(
    scales: Scales, known: Features, weights: Array, mean: float, wanted: Features
) -> Array:
    values = mean + covariance(scales, wanted, known) @ weights
    return np.asarray(np.clip(values, 0.0, 100.0), dtype=float)


def covariance(scales: Scales, one: Features, other: Features) -> Array:
    """(n, m) prior covariance of the top-1 of n and m selections, in squared points."""
    lengths = np.array(scales.lengths)
    squares = ((one.profile[:, None] - other.profile[None]) / lengths) ** 2
    return np.asarray(
        scales.constant**2
        + scales.slots**2 * _gram(one.slots, other.slots)
        + scales.linear**2 * _gram(one.profile, other.profile)
        + scales.smooth**2 * np.exp(-0.5 * squares.sum(axis=2)),
        dtype=float,
    )


def _gram(one: Array, other: Array) -> Array:
    return np.asarray(one @ other.T / one.shape[1], dtype=float)


def _solved(scales: Scales, known: Features, centred: Array) -> Array:
    whole = covariance(scales, known, known) + scales.noise**2 * np.eye(len(centred))
    try:
        return np.asarray(cho_solve(cho_factor(whole, lower=True), centred), dtype=float)
    except LinAlgError as error:
        raise SpecError(
            f"scales: no accuracies vary as {scales.model_dump()} says ({error})"
        ) from error


def _scales(logs: Array) -> Scales:
    values = [float(f"{value:.{DIGITS}g}") for value in np.exp(logs)]
    named = dict(zip(NAMES, values, strict=False))
    return Scales(**named, lengths=tuple(values[len(NAMES) :]))


class _Objective:
    """Negative log posterior of the scales' logarithms, and its gradient."""

    def __init__(self, known: Features, centred: Array) -> None:
        columns = known.profile.shape[1]
        self.start = np.log([*START.values(), *[START_LENGTH] * columns])
        self._centred = centred
        self._slots = _gram(known.slots, known.slots)
        self._linear = _gram(known.profile, known.profile)
        self._squares = (known.profile.T[:, :, None] - known.profile.T[:, None, :]) ** 2
        self._unit = np.eye(len(centred))

    def __call__(self, logs: Array) -> tuple[float, Array]:
        constant, slots, linear, smooth, noise = np.exp(2 * logs[: len(NAMES)])
        lengths = np.exp(-2 * logs[len(NAMES) :])
        surface = smooth * np.exp(-0.5 * np.tensordot(lengths, self._squares, axes=1))
        by_scale = [
            np.full_like(surface, constant),
            slots * self._slots,
            linear * self._linear,
            surface,
            noise * self._unit,
        ]
        factor, lower = cho_factor(np.sum(by_scale, axis=0), lower=True)
        weights = cho_solve((factor, lower), self._centred)
        value = 0.5 * self._centred @ weights + np.log(np.diag(factor)).sum()
        # of the value to every entry of the covariance
        slope = 0.5 * (cho_solve((factor, lower), self._unit) - np.outer(weights, weights))
        bent = slope * surface
        gradient = [2 * np.vdot(slope, part) for part in by_scale]
        gradient += list(lengths * np.tensordot(self._squares, bent, axes=2))
        off = (logs - self.start) / PULL
        return float(value + 0.5 * off @ off), np.array(gradient) + off / PULL
