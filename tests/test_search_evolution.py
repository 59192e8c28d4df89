"""NSGA-II against brute force: codes, fronts, what a stopped run goes on with."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
from micro import ARCHITECTURES, Additive, micro_space

from slimnas.arch.space import SearchSpace, Selection, shipped_spaces
from slimnas.errors import (
    RunFolderError,
    RuntimeUnavailableError,
    SpecError,
    UnreachableTargetError,
)
from slimnas.search.evolution import Evolution, Record, Scored, decode, encode, evolve

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


def place(latency_ms: float, top1: float) -> Scored:
    return Scored(Selection((16,), (("mb4d",),)), latency_ms, top1)


def test_genes_say_every_selection() -> None:
    space = micro_space()
    selections = list(space.selections())
    assert len(selections) == ARCHITECTURES
    assert all(decode(space, encode(space, one)) == one for one in selections)


@pytest.mark.parametrize("name", shipped_spaces())
def test_genes_say_selections_of_shipped_spaces(name: str) -> None:
    space, rng = SearchSpace.load(name), random.Random(0)
    for _ in range(50):
        selection = space.random(rng)
        assert decode(space, encode(space, selection)) == selection


@pytest.mark.parametrize("name", shipped_spaces())
def test_any_genes_mean_a_selection_of_the_space(name: str) -> None:
    """Mixed from two parents gene by gene, as crossover does."""
    space, rng = SearchSpace.load(name), random.Random(1)
    for _ in range(50):
        parents = [encode(space, space.random(rng)) for _ in range(2)]
        child = {key: rng.choice(parents)[key] for key in parents[0]}
        assert space.fault(decode(space, child)) is None


@pytest.mark.parametrize("seed", range(4))
def test_finds_nearly_the_best_there_is(seed: int) -> None:
    device = Additive.draw(seed)
    scored = [Scored(one, device.price(one), device.top1(one)) for one in device.space.selections()]
    everything = Evolution(tuple(scored))
    evolution = evolve(device.space, device.price, device.top1, evaluations=150, seed=seed)
    assert len({one.selection for one in evolution.scored}) == len(evolution.scored) == 150
    ends_ms = [pick(one.latency_ms for one in scored) for pick in (min, max)]
    range_points = max(one.top1 for one in scored) - min(one.top1 for one in scored)
    for share in SHARES:
        target_ms = ends_ms[0] + share * (ends_ms[1] - ends_ms[0])
        found, optimum = evolution.best(target_ms), everything.best(target_ms)
        assert found.latency_ms <= target_ms
        assert optimum.top1 - 0.1 * range_points <= found.top1 <= optimum.top1


def test_ends_where_a_space_is_exhausted() -> None:
    device = Additive.draw(0, SearchSpace.from_yaml(TINY))
    evolution = evolve(device.space, device.price, device.top1, evaluations=100, seed=0)
    assert {one.selection for one in evolution.scored} == set(device.space.selections())


def test_a_front_is_what_no_other_beats() -> None:
    rng = random.Random(5)
    drawn = [(rng.randint(1, 20), rng.randint(0, 20)) for _ in range(200)]
    scored = tuple(place(ms, 2 * ms + noise) for ms, noise in drawn)
    front = Evolution(scored).front()
    beaten = {
        (one.latency_ms, one.top1)
        for one in scored
        for other in scored
        if (other.latency_ms <= one.latency_ms and other.top1 > one.top1)
        or (other.latency_ms < one.latency_ms and other.top1 >= one.top1)
    }
    wanted = sorted({(one.latency_ms, one.top1) for one in scored} - beaten)
    assert [(one.latency_ms, one.top1) for one in front] == wanted
    assert len(front) > 4
    for target_ms in range(int(front[0].latency_ms), 21):
        best = max(one.top1 for one in scored if one.latency_ms <= target_ms)
        assert Evolution(scored).best(target_ms).top1 == best


def test_the_best_may_have_to_use_the_target() -> None:
    evolution = Evolution((place(1.0, 60.0), place(8.0, 50.0), place(9.0, 40.0), place(7.0, 55.0)))
    assert evolution.best(10.0).latency_ms == 1.0
    assert evolution.best(10.0, 8.0).latency_ms == 8.0
    assert evolution.best(10.0, 9.5).latency_ms == 1.0
    assert evolution.best(5.0, 4.0).latency_ms == 1.0


def test_a_target_below_everything_is_refused() -> None:
    with pytest.raises(UnreachableTargetError, match=r"2 ms was not reached by 1 evaluations .* 3"):
        Evolution((place(3.0, 50.0),)).best(2.0)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    device, path = Additive.draw(7), tmp_path / "record.jsonl"
    asked: list[Selection] = []

    def evaluate(selection: Selection) -> float:
        if len(asked) == 40:
            raise KeyboardInterrupt
        asked.append(selection)
        return device.top1(selection)

    def run(record: Record | None) -> Evolution:
        return evolve(device.space, device.price, evaluate, evaluations=60, seed=3, record=record)

    with pytest.raises(KeyboardInterrupt):
        run(Record(path, "one"))
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the last line
    before = list(asked)
    asked.clear()
    resumed = run(Record(path, "one"))
    assert asked[0] == before[-1]
    assert len(asked) == 60 - 39
    asked.clear()
    assert run(Record(path, "one")) == resumed
    assert asked == []
    whole = evolve(device.space, device.price, device.top1, evaluations=60, seed=3)
    assert whole == resumed
    assert evolve(device.space, device.price, device.top1, evaluations=60, seed=4) != whole


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Record(path, "one")
    with pytest.raises(RunFolderError, match="another supernet or other images; delete it"):
        Record(path, "other")
    path.write_bytes(path.read_bytes() + b'{"top1": 1}\n{}\n')
    with pytest.raises(RunFolderError, match=re.escape(f"{path}: not a record of evaluations")):
        Record(path, "one")


def test_too_few_evaluations_are_refused() -> None:
    device = Additive.draw(0)
    with pytest.raises(SpecError, match="must be at least 2 for NSGA-II, got 1"):
        evolve(device.space, device.price, device.top1, evaluations=1, seed=0)


def test_says_how_to_install_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    device = Additive.draw(0)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'slimnas\[bench\]'"):
        evolve(device.space, device.price, device.top1, evaluations=5, seed=0)


TINY = """schema: slimnas/search-space/1
name: smallest
input: {channels: 1, resolution: 32}
stem: {type: conv_stem}
stages:
- {width: {min: 16, max: 32, step: 16}, slots: 1, choices: [mb4d]}
- width: {min: 16, max: 32, step: 16}
  slots: 2
  choices: [mb4d, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 10}
blocks:
  mb4d: {ffn_ratio: 2}
  mb3d: {ffn_ratio: 2, heads: 2, qk_dim: 4, v_dim: 8}
supernet: {resolution: 16}
"""
