"""Accuracy predicted from measured selections, beside what it should be by other means."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from micro import Additive, micro_space
from record_cases import bent_top1

from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.errors import SpecError
from slimnas.search.drops import (
    AccuracyModel,
    Features,
    Scales,
    _Objective,
    features,
    fit_scales,
    held_out_errors,
    profile_columns,
)

SPACE = micro_space()
SCALES = Scales(
    constant=8.0, slots=3.0, linear=4.0, smooth=5.0, noise=0.5, lengths=(0.5, 0.8, 1.1, 0.7, 0.9)
)


def drawn(count: int, seed: int = 0, space: SearchSpace = SPACE) -> list[Selection]:
    rng = random.Random(seed)
    found: dict[Selection, None] = {}
    while len(found) < count:
        found[space.random(rng)] = None
    return list(found)


def covariance_by_hand(scales: Scales, one: Selection, other: Selection) -> float:
    """The prior covariance of two selections of the micro space, from its definition."""
    same = [
        1 if (a == block) == (b == block) else -1
        for stage, path, paths in zip(SPACE.stages, one.paths, other.paths, strict=True)
        for a, b in zip(path, paths, strict=True)
        for block in stage.blocks
    ]

    def profile(selection: Selection) -> list[float]:
        first, second = selection.paths
        return [
            (selection.widths[0] - 16) / 32,
            sum(c != IDENTITY for c in first) / 2,
            (selection.widths[1] - 16) / 32,
            sum(c != IDENTITY for c in second) / 3,
            second.count("mb3d") / 3,
        ]

    pairs = list(zip(profile(one), profile(other), strict=True))
    linear = sum((a - 0.5) * (b - 0.5) for a, b in pairs) / len(pairs)
    far = sum(((a - b) / n) ** 2 for (a, b), n in zip(pairs, scales.lengths, strict=True))
    return (
        scales.constant**2
        + scales.slots**2 * sum(same) / 4 / len(same)
        + scales.linear**2 * linear
        + scales.smooth**2 * math.exp(-far / 2)
    )


def test_it_is_the_conditional_mean_of_a_normal_distribution() -> None:
    model = Additive.draw(1)
    known, asked = drawn(25), drawn(40, seed=1)
    top1 = [model.top1(selection) for selection in known]
    mean = sum(top1) / len(top1)
    prior = np.array([[covariance_by_hand(SCALES, a, b) for b in known] for a in known])
    weights = np.linalg.solve(prior + 0.25 * np.eye(25), np.array(top1) - mean)
    predicted = AccuracyModel(SPACE, SCALES, dict(zip(known, top1, strict=True)))
    for selection in asked:
        to_known = np.array([covariance_by_hand(SCALES, selection, each) for each in known])
        expected = min(max(mean + float(to_known @ weights), 0.0), 100.0)
        assert predicted.top1(selection) == pytest.approx(expected, abs=1e-8)


def test_without_noise_it_gives_back_what_was_measured() -> None:
    model = Additive.draw(2)
    known = {selection: model.top1(selection) for selection in drawn(30)}
    predicted = AccuracyModel(SPACE, SCALES.model_copy(update={"noise": 1e-3}), known)
    for selection, top1 in known.items():
        assert predicted.top1(selection) == pytest.approx(top1, abs=1e-3)


def test_gradient_of_the_fit() -> None:
    selections = drawn(30)
    model = Additive.draw(3)
    top1 = np.array([bent_top1(model, selection) for selection in selections])
    objective = _Objective(features(SPACE, selections), top1 - top1.mean())
    rng = np.random.default_rng(0)
    looked_at = 0
    for _ in range(3):
        at = objective.start + rng.normal(0, 0.5, len(objective.start))
        _, gradient = objective(at)
        for i in range(len(at)):
            step = np.zeros_like(at)
            step[i] = 1e-5
            slope = (objective(at + step)[0] - objective(at - step)[0]) / 2e-5
            assert gradient[i] == pytest.approx(slope, rel=1e-4, abs=1e-4)
            looked_at += 1
    assert looked_at == 3 * (5 + profile_columns(SPACE))


@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_networks_tell_of_all_others(seed: int) -> None:
    model = Additive.draw(seed)
    known = drawn(100, seed)
    top1 = {selection: bent_top1(model, selection) for selection in known}
    scales = fit_scales(features(SPACE, known), np.array(list(top1.values())))
    predicted = AccuracyModel(SPACE, scales, top1)
    others = [s for s in SPACE.selections() if s not in top1]
    assert len(others) > 200
    true = np.array([bent_top1(model, s) for s in others])
    off = np.abs(np.array([predicted.top1(s) for s in others]) - true).mean()
    assert off < 0.12 * np.abs(true - true.mean()).mean()


def test_errors_are_of_networks_that_were_held_out() -> None:
    """Recomputed fold by fold; those without a group are always fitted to."""
    model = Additive.draw(4)
    selections = drawn(60)
    top1 = np.array([bent_top1(model, selection) for selection in selections])
    groups = ["" if i < 10 else f"r{i}" if i < 40 else f"w{i // 10}" for i in range(60)]
    kinds = ["single" if i < 10 else "random" if i < 40 else "walk" for i in range(60)]
    known = features(SPACE, selections)
    errors = held_out_errors(known, top1, groups, kinds, folds=3)
    assert {kind: error.networks for kind, error in errors.items()} == {"random": 30, "walk": 20}
    names = [group for group in dict.fromkeys(groups) if group]
    off: dict[str, list[float]] = {"random": [], "walk": []}
    for fold in range(3):
        out = {group for number, group in enumerate(names) if number % 3 == fold}
        rest = [i for i, group in enumerate(groups) if group not in out]
        fitted = AccuracyModel(
            SPACE,
            fit_scales(known.of(rest), top1[rest]),
            {selections[i]: top1[i] for i in rest},
        )
        for i, group in enumerate(groups):
            if group in out:
                off[kinds[i]].append(abs(fitted.top1(selections[i]) - top1[i]))
    for kind, error in errors.items():
        assert error.mean_error_points == pytest.approx(np.mean(off[kind]), rel=1e-6)
        assert 0.8 < error.spearman <= 1


def test_scales_of_another_space() -> None:
    known = dict.fromkeys(drawn(3), 50.0)
    with pytest.raises(SpecError, match=r"scales\.lengths: must be 5 for search space micro, got"):
        AccuracyModel(SPACE, SCALES.model_copy(update={"lengths": (1.0,)}), known)


def test_features_are_centred_and_rows_can_be_taken() -> None:
    selections = drawn(9)
    seen = features(SPACE, selections)
    assert isinstance(seen, Features)
    assert seen.slots.shape == (9, 2 + 3 * 2)
    assert set(np.unique(seen.slots)) == {-0.5, 0.5}
    assert seen.profile.min() >= -0.5
    assert seen.profile.max() <= 0.5
    assert np.array_equal(seen.of([4, 2]).profile, seen.profile[[4, 2]])
