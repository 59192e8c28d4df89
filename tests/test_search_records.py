"""What a search writes down: importance, trajectory, settings; and what it refuses to read."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from micro import Additive, micro_space

from slimnas.arch.space import SearchSpace
from slimnas.errors import RunFolderError, SlimnasError, SpecError, WeightsError
from slimnas.search.config import FILE, SearchConfig, claim
from slimnas.search.importance import ImportanceRecord
from slimnas.search.trajectory import Trajectory
from slimnas.supernet.train import SupernetRecipe


def drawn(seed: int, space: SearchSpace) -> ImportanceRecord:
    rng = random.Random(seed)
    return ImportanceRecord(
        tuple(
            tuple({c: rng.gauss(0, 2) for c in stage.choices} for _ in range(stage.slots))
            for stage in space.stages
        ),
        {"seed": seed, "supernet_digest": "ab"},
    )


@pytest.mark.parametrize("seed", range(5))
def test_importance_is_a_ratio_of_probabilities(seed: int) -> None:
    space = SearchSpace.load("efficientformer_tiny")
    record = drawn(seed, space)
    checked = 0
    for i, stage in enumerate(space.stages):
        total = 0.0
        for j in range(stage.slots):
            alphas = record.alphas[i][j]
            mass = sum(math.exp(a) for a in alphas.values())
            p = {choice: math.exp(a) / mass for choice, a in alphas.items()}
            assert record.probabilities(i, j) == pytest.approx(p)
            expected = sum(p[c] for c in stage.blocks) / p["identity"]
            assert record.path_importance(i, j) == pytest.approx(expected)
            total += expected
            checked += 1
        assert record.stage_importance(i) == pytest.approx(total)
    assert checked == 4 + 3 + 8 + 5


def test_importance_is_positive_where_raw_alphas_are_not() -> None:
    """The paper's ratio of alphas would be negative or infinite here."""
    record = ImportanceRecord(
        (({"mb4d": 1.0, "identity": -1.0}, {"mb4d": 0.5, "identity": 0.0}),), {}
    )
    assert record.path_importance(0, 0) == pytest.approx(math.e**2)
    assert record.path_importance(0, 1) == pytest.approx(math.e**0.5)
    fixed = ImportanceRecord((({"mb4d": 3.0},),), {})
    assert fixed.path_importance(0, 0) == 1.0  # a slot that must be a block


@pytest.mark.parametrize("name", ["efficientformer_tiny", "micro"])
@pytest.mark.parametrize("seed", range(8))
def test_start_maximises_the_likelihood(name: str, seed: int) -> None:
    space = micro_space() if name == "micro" else SearchSpace.load(name)
    record = drawn(seed, space)
    slots = [(i, j) for i, stage in enumerate(space.stages) for j in range(stage.slots)]
    allowed = sum(stage.slots for stage in space.stages if "mb3d" in stage.choices)

    def likelihood(count: int) -> float:
        convolutions = len(slots) - count
        total = 0.0
        for number, (i, j) in enumerate(slots):
            alphas = record.alphas[i][j]
            choice = "mb4d" if number < convolutions else "mb3d"
            total += alphas[choice] - math.log(sum(math.exp(a) for a in alphas.values()))
        return total

    best = max(range(allowed + 1), key=likelihood)
    start = record.start(space)
    assert start == space.largest(best)
    assert sum(choice == "mb3d" for *_, choice in start.active()) == best
    assert len(start.active()) == len(slots)


def test_start_sees_both_ends() -> None:
    space = micro_space()
    for sign, expected in ((1.0, 3), (-1.0, 0)):
        alphas = tuple(
            tuple({c: sign * (c == "mb3d") for c in stage.choices} for _ in range(stage.slots))
            for stage in space.stages
        )
        start = ImportanceRecord(alphas, {}).start(space)
        assert sum(choice == "mb3d" for *_, choice in start.active()) == expected


def test_importance_round_trip(tmp_path: Path) -> None:
    record = drawn(1, micro_space())
    path = tmp_path / "importance.json"
    record.save(path)
    assert ImportanceRecord.load(path) == record
    text = path.read_text(encoding="utf-8")
    ImportanceRecord.load(path).save(path)
    assert path.read_text(encoding="utf-8") == text
    data = json.loads(text)
    assert data["schema"] == "slimnas/importance/1"
    assert [len(stage["slots"]) for stage in data["stages"]] == [2, 3]
    assert data["stages"][1]["slots"][0]["importance"] == record.path_importance(1, 0)


def cut_everywhere(path: Path, load: Any, error_type: type[SlimnasError]) -> int:
    """Load every truncation at line ends and a few inside lines; count those refused."""
    text = path.read_text(encoding="utf-8")
    refused = 0
    for length in range(0, len(text) - 2, 37):
        path.write_text(text[:length], encoding="utf-8")
        if text[:length].endswith("\n") and path.suffix == ".jsonl":
            continue  # whole lines are a run that was stopped there
        with pytest.raises(error_type) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        refused += 1
    path.write_text(text, encoding="utf-8")
    return refused


def test_damaged_importance(tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    drawn(1, micro_space()).save(path)
    assert cut_everywhere(path, ImportanceRecord.load, WeightsError) > 20
    for text, reason in [
        ('{"schema": "slimnas/importance/9"}', "schema: must be 'slimnas/importance/1', got"),
        ("[]", "not an importance record"),
        ("{}", "not an importance record"),
        ('{"schema": "slimnas/importance/1", "stages": 3, "provenance": {}}', "not an importance"),
        ('{"schema": "slimnas/importance/1", "stages": [{"slots": [1]}]}', "not an importance"),
    ]:
        path.write_text(text)
        with pytest.raises(WeightsError, match=f"importance.json: {reason}"):
            ImportanceRecord.load(path)
    with pytest.raises(WeightsError, match="no such file; expected an importance record"):
        ImportanceRecord.load(tmp_path / "none.json")


def test_damaged_trajectory(tmp_path: Path) -> None:
    slimmer = Additive.draw(2).slimmer()
    whole, _ = slimmer.run(slimmer.begin({"seed": 2}), [1.5])
    path = tmp_path / "trajectory.jsonl"
    whole.save(path)
    assert cut_everywhere(path, Trajectory.load, RunFolderError) > 20
    text = path.read_text(encoding="utf-8")
    for old, new, reason in [
        ("slimnas/trajectory/1", "slimnas/trajectory/2", "schema: must be 'slimnas/trajectory/1'"),
        ('"widths": [48', '"widths": [48, [', "not a trajectory"),
        ('"kind"', '"king"', "not a trajectory"),
        ('"candidates"', '"candidate"', "not a trajectory"),
        ('"drop_per_ms"', '"ratio"', "not a trajectory"),
    ]:
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(RunFolderError, match=f"trajectory.jsonl: {reason}"):
            Trajectory.load(path)


def config(**changes: Any) -> SearchConfig:
    fields = {
        "space": "micro",
        "space_digest": "0" * 64,
        "device": "made-up",
        "table_digest": "1" * 64,
        "targets_ms": (1.6, 3.0),
        "resolution": 16,
    }
    return SearchConfig.model_validate({**fields, **changes})


def test_config_round_trip(tmp_path: Path) -> None:
    for number, made in enumerate(
        [config(), config(recipe=None, supernet_digest="2" * 64), config(max_images=7, seed=3)]
    ):
        path = tmp_path / f"{number}.yaml"
        made.save(path)
        assert SearchConfig.load(path) == made


def test_a_folder_belongs_to_its_settings(tmp_path: Path) -> None:
    claim(tmp_path, config())
    before = (tmp_path / FILE).read_bytes()
    claim(tmp_path, config())
    assert (tmp_path / FILE).read_bytes() == before
    for changed, named in [
        (config(seed=1), "seed was 0, now 1"),
        (config(targets_ms=(1.6,)), r"targets_ms was \(1\.6, 3\.0\), now \(1\.6,\)"),
        (config(table_digest="f" * 64), r"table_digest was 1{12}\.\.\., now f{12}\.\.\."),
        (config(recipe=SupernetRecipe(epochs=3)), "recipe.epochs was 10, now 3"),
        (config(max_images=5), "max_images was None, now 5"),
        (
            config(seed=1, resolution=8, data="x", frontier="paper", search_images=3),
            "data was 'digits', now 'x', resolution was 16, now 8, .* and 2 more",
        ),
        (config(recipe=None), r"recipe\.epochs was 10, now None, .* more"),
    ]:
        with pytest.raises(RunFolderError, match=f"other settings .*{named}") as caught:
            claim(tmp_path, changed)
        assert "give the same ones to go on with it, or another --output" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert (tmp_path / FILE).read_bytes() == before


def test_damaged_settings(tmp_path: Path) -> None:
    claim(tmp_path, config())
    path = tmp_path / FILE
    good = yaml.safe_load(path.read_text(encoding="utf-8"))
    for change, fault in [
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        ({"seed": True}, "seed: must be a whole number, got True"),
        ({"targets_ms": []}, r"targets_ms: must have at least 1 item\(s\), has 0"),
        ({"targets_ms": [0.0]}, r"targets_ms\[0\]: must be above 0"),
        ({"targets_ms": [math.inf]}, r"targets_ms\[0\]: must be finite, got inf"),
        ({"targets_ms": [math.nan]}, r"targets_ms\[0\]: must be"),
        ({"resolutoin": 16}, r"unknown key 'resolutoin' \(did you mean 'resolution'\?\)"),
        ({"frontier": "papr"}, r"frontier: must be .*'papr' \(did you mean 'paper'\?\)"),
        ({"recipe": {"epoch": 3}}, r"recipe: unknown key 'epoch' \(did you mean 'epochs'\?\)"),
        ({"recipe": {"lr": 0}}, "recipe.lr: must be above 0"),
        ({"schema": "slimnas/search-config/7"}, "the file has version 7"),
    ]:
        path.write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(SpecError, match=f"config.yaml: .*{fault}|config.yaml: {fault}"):
            claim(tmp_path, config())
    text = yaml.safe_dump(good, sort_keys=False)
    refused = 0
    for length in range(0, text.index("resolution"), 9):  # from there on, what is cut has defaults
        path.write_text(text[:length])
        with pytest.raises(SpecError, match=r"config\.yaml: "):
            claim(tmp_path, config())
        refused += 1
    assert refused > 20


def test_records_are_frozen() -> None:
    slimmer = Additive.draw(0).slimmer()
    begin = slimmer.begin({})
    longer = begin.with_step(slimmer.step(begin, 1.0))
    assert begin.steps == ()
    assert len(longer.steps) == 1
    with pytest.raises(AttributeError, match="cannot assign"):
        longer.top1 = 3.0  # type: ignore[misc]
    with pytest.raises(AttributeError, match="cannot assign"):
        longer.steps[0].candidates[0].drop = 0.0  # type: ignore[misc]
    assert replace(longer, steps=()) == begin
