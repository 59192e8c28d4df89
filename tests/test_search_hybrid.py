"""Searches of spaces of any blocks: what may be done in a step, where they begin and end."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hybrid_cases import hybrid_space
from killed_searches import RECIPE, Moments, digits
from micro import Additive, made_up_table, micro_space
from test_search_slimming import with_slot

from slimnas._lock import folder_lock
from slimnas.arch.space import SearchSpace, Selection
from slimnas.latency.estimate import estimate
from slimnas.latency.regime import regimes
from slimnas.report import DataSummary, FoundNetwork, RunReport, write_report
from slimnas.search.actions import Action, Frontier, growing_actions, open_actions
from slimnas.search.checks import pricer, space_digest, table_digest
from slimnas.search.config import SearchConfig, claim
from slimnas.search.importance import ImportanceRecord
from slimnas.search.run import RunOptions, SearchResult, run_search
from slimnas.search.slimming import cheapest
from slimnas.search.trajectory import Trajectory

FRONTIERS: tuple[Frontier, ...] = ("per_stage", "paper")
LAST = (False, True)
ATTENTION = {"mb3d", "hilo", "cga"}


def target_of(model: Additive, share: float) -> float:
    top = model.price(model.importance().start(model.space))
    low = cheapest(model.space, model.price)[1]
    return low + share * (top - low)


def weight(model: Additive, stage: int, slot: int) -> float:
    row = model.importance().alphas[stage][slot]
    return sum(math.exp(a) for c, a in row.items() if c != "identity") / math.exp(row["identity"])


def swapped(
    model: Additive, selection: Selection
) -> list[tuple[tuple[int, str], float, Selection]]:
    """((stage, block to become), how much the alphas like it, state after) of every legal swap."""
    alphas = model.importance().alphas
    found = []
    for i, path in enumerate(selection.paths):
        for j, was in enumerate(path):
            for becomes in model.space.stages[i].blocks:
                if "identity" != was != becomes:
                    after = with_slot(selection, i, j, becomes)
                    if model.space.fault(after) is None:
                        liking = alphas[i][j][becomes] - alphas[i][j][was]
                        found.append(((i, becomes), liking, after))
    return found


def expected_moves(model: Additive, selection: Selection, frontier: Frontier) -> set[Selection]:
    """Every state one action away, by the rules of the documentation."""
    now = model.price(selection)
    drops, narrows, swaps = [], [], {}
    for i, path in enumerate(selection.paths):
        options = [
            (weight(model, i, j), after)
            for j, choice in enumerate(path)
            if choice != "identity"
            and model.space.fault(after := with_slot(selection, i, j, "identity")) is None
        ]
        drops += [min(options, key=lambda o: o[0])] if options else []
        for width in range(selection.widths[i] - 16, 0, -16):
            widths = list(selection.widths)
            widths[i] = width
            after = Selection(tuple(widths), selection.paths)
            if widths == sorted(widths) and model.price(after) < now - 1e-9:
                narrows.append((sum(weight(model, i, j) for j in range(len(path))), after))
                break
    for key, liking, after in swapped(model, selection):
        if model.price(after) < now - 1e-9 and liking > swaps.get(key, (-math.inf, None))[0]:
            swaps[key] = liking, after
    best = list(swaps.values())
    if frontier == "paper":
        drops = [min(drops, key=lambda d: d[0])] if drops else []
        narrows = [min(narrows, key=lambda n: n[0])] if narrows else []
        best = [max(best, key=lambda s: s[0])] if best else []
    moves = {after for _, after in drops + narrows + best}
    return {m for m in moves if model.price(m) < now - 1e-9}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("frontier", FRONTIERS)
def test_every_step_takes_the_smallest_drop_per_ms(frontier: Frontier, last: bool) -> None:
    steps = replaced = 0
    for seed in range(20):
        model = Additive.draw(seed, hybrid_space(last=last))
        target_ms = target_of(model, (0.1, 0.3, 0.6)[seed % 3])
        slimmer = model.slimmer(frontier)
        trajectory, _ = slimmer.run(slimmer.begin({}), [target_ms])
        before, before_ms, before_top1 = trajectory.states[0]
        for number, step in enumerate(trajectory.steps, start=1):
            moves = expected_moves(model, before, frontier)
            assert {c.action.apply(before) for c in step.candidates} == moves
            assert len(step.candidates) == len(moves)
            ratios = {}
            for move in moves:
                saved_ms = before_ms - model.price(move)
                ratios[move] = max(0.0, before_top1 - model.top1(move)) / saved_ms
            if number < len(trajectory.steps):
                assert ratios[step.selection] == min(ratios.values())
            assert step.selection == step.taken.apply(before)
            assert model.space.fault(step.selection) is None
            if step.taken.kind == "replace_block":
                assert before.paths[step.taken.stage][step.taken.slot] == step.taken.was
                replaced += 1
            before, before_ms, before_top1 = step.selection, step.latency_ms, step.top1
            steps += 1
        assert trajectory.replay() == before
        assert before_ms <= target_ms
    assert steps > 40
    assert replaced >= 3


@pytest.mark.parametrize("last", LAST)
def test_the_cheapest_is_the_cheapest_and_greedy_gets_there(last: bool) -> None:
    kinds = set()
    for seed in range(12):
        model = Additive.draw(seed, hybrid_space(last=last))
        selection, fastest_ms = cheapest(model.space, model.price)
        assert fastest_ms == pytest.approx(min(map(model.price, model.space.selections())))
        assert model.price(selection) == fastest_ms
        slimmer = model.slimmer()
        trajectory, _ = slimmer.run(slimmer.begin({}), [fastest_ms + 1e-9])
        assert trajectory.states[-1][1] == pytest.approx(fastest_ms)
        kinds |= {choice for *_, choice in selection.active()}
    assert len(kinds) >= 4  # not always what the stages offer first


@pytest.mark.parametrize("last", LAST)
def test_start_is_the_likeliest_of_all_full_networks(last: bool) -> None:
    space, starts = hybrid_space(last=last), set()
    stages = [itertools.product(s.blocks, repeat=s.slots) for s in space.stages]
    every = [space.full(paths) for paths in itertools.product(*stages)]
    legal = [selection for selection in every if space.fault(selection) is None]
    assert len(every) == 4 * 16
    assert len(legal) == (4 * 13 if last else len(every))
    for seed in range(30):
        rng = random.Random(seed)
        record = ImportanceRecord(
            tuple(
                tuple({c: rng.gauss(0, 2) for c in stage.choices} for _ in range(stage.slots))
                for stage in space.stages
            ),
            {},
        )

        def likelihood(selection: Selection, record: ImportanceRecord = record) -> float:
            return sum(
                math.log(record.probabilities(i, j)[choice]) for i, j, choice in selection.active()
            )

        start = record.start(space)
        assert start in legal
        assert likelihood(start) == pytest.approx(max(map(likelihood, legal)))
        starts.add(start)
    assert len(starts) > 15


def test_log_odds() -> None:
    record = ImportanceRecord((({"mb4d": 1.0, "hilo": -0.5, "identity": 0.0},),), {})
    p = record.probabilities(0, 0)
    assert record.log_odds(0, 0, "hilo", "mb4d") == pytest.approx(math.log(p["hilo"] / p["mb4d"]))


@pytest.mark.parametrize("last", LAST)
def test_filling_up_undoes_and_stays_below_what_slots_began_with(last: bool) -> None:
    upgraded = restored = 0
    for seed in range(15):
        model = Additive.draw(seed, hybrid_space(last=last))
        target_ms = target_of(model, (0.2, 0.5, 0.8)[seed % 3])
        slimmer = replace(model.slimmer(), fill=0.97)
        trajectory, _ = slimmer.run(slimmer.begin({}), [target_ms])
        assert trajectory.states[-1][1] <= target_ms
        start, *_ = trajectory.states[0]
        for number, step in enumerate(trajectory.steps):
            before = trajectory.states[number][0]
            for candidate in step.candidates:
                action = candidate.action
                if action.kind == "upgrade_block":
                    first = start.paths[action.stage][action.slot]
                    most = model.slot_ms[action.stage, action.slot, first]
                    now = model.slot_ms[action.stage, action.slot, action.becomes]
                    assert model.slot_ms[action.stage, action.slot, action.was] < now <= most
                    assert before.paths[action.stage][action.slot] == action.was
                    upgraded += 1
                if action.kind == "restore_block":
                    assert before.paths[action.stage][action.slot] == "identity"
                    restored += 1
                assert model.space.fault(action.apply(before)) is None
    assert upgraded > 3
    assert restored > 3


def test_everything_that_may_grow() -> None:
    """From the cheapest network: every block into the best empty slot, every costlier block."""
    model = Additive.draw(4, hybrid_space())
    start = model.importance().start(model.space)
    low, _ = cheapest(model.space, model.price)
    actions = growing_actions(model.space, low, start, model.importance(), model.price)
    restored = {(a.stage, a.becomes) for a in actions if a.kind == "restore_block"}
    assert restored == {(0, "mb4d"), (0, "pool"), (1, "mb4d"), (1, "hilo"), (1, "cga"), (1, "mb3d")}
    upgrades = {a.apply(low) for a in actions if a.kind == "upgrade_block"}
    allowed = {
        after
        for (i, becomes), _, after in swapped(model, low)
        for j, choice in enumerate(low.paths[i])
        if choice != "identity"
        and model.slot_ms[i, j, becomes] <= model.slot_ms[i, j, start.paths[i][j]]
        and model.price(after) > model.price(low)
    }
    assert upgrades == allowed


def test_action_as_data_and_in_words() -> None:
    actions = [
        Action("replace_block", 2, 1, "mb4d", was="hilo"),
        Action("upgrade_block", 2, 1, "shifted_window", was="conv_ffn"),
        Action("restore_block", 3, 0, "cga", was="identity"),
    ]
    assert [action.label for action in actions] == [
        "HiLo to MB4D in 3.2",
        "ConvFFN to shifted window in 3.2",
        "CGA back in 4.1",
    ]
    assert [Action.from_dict(action.to_dict()) for action in actions] == actions
    assert "was" not in Action("drop_block", 0, 1, "identity").to_dict()
    selection = hybrid_space().largest()
    assert Action("replace_block", 1, 0, "cga", was="mb4d").apply(selection).paths[1][0] == "cga"


def test_no_replacing_where_a_number_says_all() -> None:
    model = Additive.draw(0, micro_space())
    start = model.space.largest(2)
    kinds = {a.kind for a in open_actions(model.space, start, model.importance(), model.price)}
    assert kinds == {"drop_block", "remove_attention", "narrow_stage"}


def report_of(
    space: SearchSpace, trajectory: Trajectory, model: Additive, target_ms: float
) -> RunReport:
    table = made_up_table(space)
    selection, _, top1 = trajectory.states[-1]
    architecture = space.architecture(selection, name="found")
    found = FoundNetwork(
        architecture=architecture,
        estimate=estimate(architecture, table),
        target_ms=target_ms,
        selection=selection,
        search_top1=top1,
        steps=len(trajectory.steps),
        folder="runs/hybrid",
    )
    return RunReport(
        name="hybrid",
        space=space,
        device=table.device,
        trajectory=trajectory,
        importance=model.importance(),
        found=(found,),
        reference=None,
        data=DataSummary("digits", 10, {"train": 10, "search": 5, "test": 5}, 16, 5),
        settings={"seed": 0},
        training=(),
        command="slimnas search",
        versions={},
        regimes=tuple(one.sentence for one in regimes(table, space)),
    )


@pytest.mark.parametrize("name", ["micro", "hybrid_tiny"])
def test_report_names_blocks(name: str, tmp_path: Path) -> None:
    space = hybrid_space() if name == "micro" else SearchSpace.load(name).with_classes(10)
    model = Additive.draw(3, space)
    target_ms = target_of(model, 0.3)
    slimmer = replace(model.slimmer(), fill=0.99)
    trajectory, _ = slimmer.run(slimmer.begin({}), [target_ms])
    kinds = {step.taken.kind for step in trajectory.steps}
    assert "replace_block" in kinds
    page = write_report(report_of(space, trajectory, model, target_ms), tmp_path)[0]
    text = page.read_text("utf-8")
    final = trajectory.states[-1][0]
    titles = {"mb4d": "MB4D", "hilo": "HiLo", "cga": "CGA", "mb3d": "MB3D", "pool": "pooling"}
    for *_, choice in final.active():
        assert f"{titles[choice]} blocks</text>" in text  # the legend of latencies
    for choice in ("mb4d", "hilo", "cga", "mb3d"):
        assert f"p({titles[choice]})" in text
    for step in trajectory.steps:
        assert step.taken.label in text
    assert "kind, stage" in text
    assert "a cheaper block" in text
    assert text.count(": launch-bound") + text.count(": mixed") + text.count(": compute-bound")


def search(folder: Path, space: SearchSpace, share: float) -> SearchResult:
    table = made_up_table(space)
    price = pricer(space, table)
    low, top = cheapest(space, price)[1], max(map(price, space.every_block()))
    config = SearchConfig.model_validate(
        {
            "space": space.name,
            "space_digest": space_digest(space),
            "device": "made-up",
            "table_digest": table_digest(table),
            "targets_ms": (low + share * (top - low),),
            "resolution": 16,
            "recipe": RECIPE,
            "calibration_images": 32,
        }
    )
    folder.mkdir(exist_ok=True)
    with folder_lock(folder):
        claim(folder, config)
        options = RunOptions("cpu", None)
        return run_search(
            config, space, table, digits(), folder, listener=Moments(), options=options
        )


@pytest.mark.parametrize("last", LAST)
def test_a_whole_search(last: bool, tmp_path: Path) -> None:
    """Trained, slimmed, written; the same command again finds the same."""
    space = hybrid_space(last=last)
    result = search(tmp_path / "run", space, 0.3)
    (found,) = result.found
    assert found.estimate.latency_ms <= found.target_ms
    assert found.architecture == space.architecture(found.selection)
    assert len(found.architecture.stages[1].blocks) >= 1
    trajectory = Trajectory.load(tmp_path / "run" / "trajectory.jsonl")
    assert trajectory == result.trajectory
    assert trajectory.replay() == found.selection
    record = json.loads((tmp_path / "run" / "importance.json").read_text())
    assert set(record["stages"][1]["slots"][0]["alpha"]) == {*ATTENTION, "mb4d", "identity"}
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    again = search(tmp_path / "run", space, 0.3)
    assert again.trajectory == result.trajectory
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before
