"""Ranking of networks: correlations against other ways to get them, draws, stop and go."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import SPACE
from scipy.stats import kendalltau, spearmanr

from slimnas.analysis.finished import Finished
from slimnas.analysis.ranking import (
    POOL,
    PREDICTORS,
    Inherited,
    OwnAccuracy,
    Ranking,
    draw_networks,
    run_ranking,
    trained_alone,
)
from slimnas.analysis.ranking_stats import (
    agreement,
    mean_agreement,
    partial_tau,
    spearman_rows,
    tau_rows,
)
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace
from slimnas.data.splits import open_data
from slimnas.errors import AnalysisError, RunFolderError
from slimnas.nn.build import build
from slimnas.report.analysis_ranking import ranking_figure

LISTS = {
    "few": ([1, 2, 3], [1, 3, 2]),
    "no ties": ([3, 4, 1, 2, 5], [1, 2, 3, 4, 5]),
    "ties in one": ([1, 2, 2, 3], [1, 4, 3, 2]),
    "ties in both": ([1, 2, 2, 3, 3, 3, 7], [1, 3, 2, 2, 5, 5, 4]),
    "one differs": ([0, 0, 0, 1], [5, 1, 2, 3]),
    "reversed": ([1.5, 2.5, 4.0, 9.0], [4, 3, 2, 1]),
}


def brute_tau(x: list[float], y: list[float]) -> float:
    """Tau-b by its definition, pair by pair."""
    concordant = discordant = in_x = in_y = 0
    for (a, b), (c, d) in combinations(list(zip(x, y, strict=True)), 2):
        product = (a - c) * (b - d)
        concordant += product > 0
        discordant += product < 0
        in_x += a != c
        in_y += b != d
    return (concordant - discordant) / math.sqrt(in_x * in_y)


def drawn_lists(n: int, levels: int, seed: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    return rng.integers(levels, size=n).tolist(), rng.integers(levels, size=n).tolist()


@pytest.mark.parametrize("name", LISTS)
def test_correlations_are_scipys_and_the_definitions(name: str) -> None:
    x, y = LISTS[name]
    found = agreement(x, y, seed=0)
    assert found.n == len(x)
    assert found.tau == pytest.approx(brute_tau(x, y))
    assert found.tau == pytest.approx(kendalltau(x, y).statistic)
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic)


def test_known_values() -> None:
    found = agreement(*LISTS["no ties"], seed=0)
    assert found.tau == pytest.approx(0.2)  # 6 pairs agree, 4 do not
    assert found.spearman == pytest.approx(0.2)  # 1 - 6 * 16 / (5 * 24)


def test_rows_are_what_one_list_after_the_other_gives() -> None:
    looked_at = 0
    for n, levels in ((3, 3), (12, 4), (12, 100), (25, 7)):
        pairs = [drawn_lists(n, levels, seed) for seed in range(40)]
        x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
        tau, rho = tau_rows(x, y), spearman_rows(x, y)
        for place_, (a, b) in enumerate(pairs):
            if len(set(a)) == 1 or len(set(b)) == 1:
                assert math.isnan(tau[place_])
                assert math.isnan(rho[place_])
                continue
            looked_at += 1
            assert tau[place_] == pytest.approx(brute_tau(a, b))
            assert rho[place_] == pytest.approx(spearmanr(a, b).statistic)
    assert looked_at > 140


def test_many_rows_are_taken_in_parts() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 1300, 60))  # 1770 pairs a row: more than one part
    found = tau_rows(x, y)
    assert len(found) == 1300
    for place_ in (0, 1183, 1184, 1185, 1299):
        assert found[place_] == pytest.approx(kendalltau(x[place_], y[place_]).statistic)


def test_what_ranks_nothing_has_no_correlation() -> None:
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2])):
        found = agreement(x, y, seed=0)
        assert found.to_dict() == {
            "n": 3,
            **dict.fromkeys(("tau", "tau_low", "tau_high")),
            **dict.fromkeys(("spearman", "spearman_low", "spearman_high")),
        }


def test_perfect_agreement_is_sure_of_itself() -> None:
    found = agreement([1, 2, 3, 4, 5], [10, 20, 30, 40, 50], seed=0)
    assert found.tau == pytest.approx(1.0)
    assert found.tau_interval == pytest.approx((1.0, 1.0))
    assert found.spearman_interval == pytest.approx((1.0, 1.0))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of a bivariate normal of correlation 0.6: tau = 2/pi asin(0.6), rho = 6/pi asin(0.3)."""
    tau, rho = 2 / math.pi * math.asin(0.6), 6 / math.pi * math.asin(0.3)
    rng = np.random.default_rng(2)
    held_tau = held_rho = 0
    studies = 60
    for seed in range(studies):
        x, noise = rng.normal(size=(2, 40))
        found = agreement(x.tolist(), (0.6 * x + 0.8 * noise).tolist(), seed=seed)
        assert found.tau_interval is not None
        assert found.spearman_interval is not None
        low, high = found.tau_interval
        assert low <= found.tau <= high  # type: ignore[operator]
        held_tau += low <= tau <= high
        held_rho += found.spearman_interval[0] <= rho <= found.spearman_interval[1]
    assert held_tau >= 0.85 * studies
    assert held_rho >= 0.85 * studies


def test_the_bootstrap_is_its_seeds() -> None:
    lists = drawn_lists(12, 30, 5)
    assert agreement(*lists, seed=1) == agreement(*lists, seed=1)
    assert agreement(*lists, seed=1).tau_interval != agreement(*lists, seed=2).tau_interval


def test_the_mean_of_pairs() -> None:
    first, second = drawn_lists(9, 20, 3), drawn_lists(9, 20, 4)
    constant = ([1.0] * 9, first[1])
    found = mean_agreement([first, second, constant], seed=0)
    wanted = (kendalltau(*first).statistic + kendalltau(*second).statistic) / 2
    assert found.tau == pytest.approx(wanted)
    assert found.tau_interval is not None
    assert found.tau_interval[0] < wanted < found.tau_interval[1]


def test_partial_tau_is_what_is_left_of_the_signs() -> None:
    """Against least squares: signs of all pairs of x and y, each without what z explains."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=15)
    x, y = z + rng.normal(size=15), z + rng.normal(size=15)
    first, second = np.triu_indices(15, 1)
    a, b, c = (np.sign(one[first] - one[second]) for one in (x, y, z))
    a, b = (one - c * (one @ c) / (c @ c) for one in (a, b))
    taus = [kendalltau(*pair).statistic for pair in ((x, y), (x, z), (y, z))]
    assert partial_tau(*taus) == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)))
    assert partial_tau(0.5, 1.0, 0.5) is None  # z is x
    assert partial_tau(None, 0.1, 0.2) is None


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [2, 1], "at least 3 networks, got 2"),
        ([1, 2, 3], [1, 2], "must be of the same networks, got 3, 3 and 2 values"),
    ],
)
def test_lists_that_rank_nothing_are_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        agreement(x, y, seed=0)


def test_networks_are_different_and_spread_over_the_macs() -> None:
    space = SearchSpace.load("efficientformer_tiny")
    drawn = draw_networks(space, 12, seed=0)
    assert len({one.digest for one in drawn}) == len({one.name for one in drawn}) == 12
    for one in drawn:
        space.select(one)  # raises outside the space
    sizes = sorted(math.log(cost(one).macs) for one in drawn)
    even = (sizes[-1] - sizes[0]) / 11
    gaps = [b - a for a, b in pairwise(sizes)]
    assert max(gaps) < 2.5 * even
    assert min(gaps) > 0.2 * even
    assert [one.name for one in draw_networks(space, 12, seed=0)] == [one.name for one in drawn]
    assert set(drawn[2:]) - set(draw_networks(space, 12, seed=1))


def test_more_networks_go_on_with_the_ones_there() -> None:
    space = SearchSpace.from_yaml(SPACE)
    assert draw_networks(space, 9, seed=3)[:5] == draw_networks(space, 5, seed=3)


def narrow_space(slots: int) -> SearchSpace:
    return SearchSpace.from_yaml(
        "schema: slimnas/search-space/1\nname: narrow\ninput: {resolution: 32}\n"
        f"stages:\n- {{width: {{min: 16, max: 16}}, slots: {slots}, choices: [mb4d, identity]}}\n"
        "head: {type: linear, classes: 10}\nsupernet: {resolution: 32}\n"
    )


def test_a_space_that_runs_out_is_refused() -> None:
    assert len(draw_networks(narrow_space(4), 4, seed=0)) == 4
    with pytest.raises(AnalysisError, match=r"gave 4 different networks, 5 are asked for"):
        draw_networks(narrow_space(4), 5, seed=0)
    with pytest.raises(AnalysisError, match=r"networks: must be at least 3, .*; got 2"):
        draw_networks(narrow_space(4), 2, seed=0)
    assert POOL > 12


class Trainer:
    """Accuracy by the networks' parameters and the seed; stops after a number of trainings."""

    def __init__(self, most: int = 1000) -> None:
        self.trained: list[tuple[str, int]] = []
        self._most = most

    def __call__(self, architecture: Architecture, *, seed: int) -> OwnAccuracy:
        if len(self.trained) == self._most:
            raise KeyboardInterrupt
        self.trained.append((architecture.digest, seed))
        found = math.log(cost(architecture).params) + 0.01 * seed
        return OwnAccuracy(found, -found)


def inherit(architecture: Architecture) -> Inherited:
    return Inherited(-float(cost(architecture).params), float(int(architecture.digest[:6], 16)))


def ranked(
    path: Path, trainer: Trainer, networks: int = 6, seeds: tuple[int, ...] = (0,)
) -> Ranking:
    drawn = draw_networks(SearchSpace.from_yaml(SPACE), networks, seed=0)
    return run_ranking(drawn, inherit, trainer, Finished(path, {}), seeds=seeds)


def test_a_study_correlates_what_it_was_told(tmp_path: Path) -> None:
    found = ranked(tmp_path / "a", Trainer(), seeds=(0, 1, 2))
    assert [one.macs for one in found.networks] == sorted(one.macs for one in found.networks)
    assert [one.predictor for one in found.correlations] == list(PREDICTORS)
    assert found.of("inherited").search.tau == pytest.approx(-1)
    assert found.of("inherited").test.tau == pytest.approx(1)
    assert found.of("params").search.tau == pytest.approx(1)
    assert found.splits.tau == pytest.approx(-1)
    assert found.ceiling is not None
    assert found.ceiling.tau == pytest.approx(1)
    own = [one.search_top1 for one in found.networks]
    importances = [one.inherited.importance for one in found.networks]
    assert found.of("importance").search.tau == pytest.approx(brute_tau(importances, own))
    assert found.of("importance").search.spearman == pytest.approx(
        spearmanr(importances, own).statistic
    )
    assert found.of("macs").tau_beyond_macs is None
    assert ranked(tmp_path / "b", Trainer()).ceiling is None


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole = Trainer()
    found = ranked(tmp_path / "a", whole, seeds=(0, 1))
    assert len(set(whole.trained)) == len(whole.trained) == 12
    assert {seed for _, seed in whole.trained[:6]} == {0}  # every network once, then again
    with pytest.raises(KeyboardInterrupt):
        ranked(tmp_path / "b", Trainer(5), seeds=(0, 1))
    rest = Trainer()
    assert ranked(tmp_path / "b", rest, seeds=(0, 1)) == found
    assert len(rest.trained) == 7
    more = Trainer()
    ranked(tmp_path / "b", more, networks=8, seeds=(0, 1, 2))
    assert len(more.trained) == 8 * 3 - 12


def test_a_damaged_result_is_one_line(tmp_path: Path) -> None:
    ranked(tmp_path / "a", Trainer())
    lines = (tmp_path / "a").read_text().splitlines()
    last = json.loads(lines[-1])
    lines[-1] = json.dumps({**last, "result": [1.0]})
    (tmp_path / "a").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError, match=r"own .* 0: damaged"):
        ranked(tmp_path / "a", Trainer())


def test_own_accuracy_is_of_search_and_of_test() -> None:
    data = open_data("digits", resolution=(32, 32), channels=3, seed=0, max_images=200)
    architecture = draw_networks(SearchSpace.from_yaml(SPACE), 3, seed=0)[1]
    network = build(architecture, seed=1).eval()
    asked = []

    def train(one: Architecture, *, seed: int) -> Any:
        asked.append((one.digest, seed))
        return network

    place_ = SimpleNamespace(device=torch.device("cpu"))
    budget = SimpleNamespace(data=data, accelerator=place_, train=train, clean_up=lambda: None)
    found = trained_alone(budget)(architecture, seed=4)  # type: ignore[arg-type]
    assert asked == [(architecture.digest, 4)]
    for top1, images in ((found.search_top1, data.search), (found.test_top1, data.test)):
        with torch.inference_mode():
            pairs = [
                (int(network(x[None]).argmax()), int(y))
                for xs, ys in images.eval_batches(7, device="cpu")
                for x, y in zip(xs, ys, strict=True)
            ]
        assert len(pairs) == len(images)
        assert top1 == pytest.approx(100 * sum(a == b for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("width_in", [9.0, 4.0])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_figures_say_the_correlation_of_each_predictor(
    tmp_path: Path, width_in: float, seeds: tuple[int, ...]
) -> None:
    found = ranked(tmp_path / "a", Trainer(), seeds=seeds)
    figure = ranking_figure(found, "small", width_in)
    assert len(figure.axes) == 4
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    wide = width_in > 5
    kendall, spearman = ("Kendall τ", "Spearman ρ") if wide else ("τ", "ρ")
    assert titles[0].startswith(f"inherited top-1: {kendall} -1.00 (-1.00 to -1.00), {spearman}")
    assert all(f": {kendall} " in title and f", {spearman} " in title for title in titles)
    assert [axes.get_xlabel()[-2:] for axes in figure.axes] == [" %", "es", " M", " G"]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0].startswith("6 random networks of small")
    assert any("one training and another" in word for word in words) == (len(seeds) > 1)
    for axes in figure.axes:
        points = axes.collections[-1].get_offsets()
        assert len(points) == 6
