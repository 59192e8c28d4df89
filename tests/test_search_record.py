"""Search records: what is measured for one, its file, and what a damaged one is told."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from micro import Additive, micro_space
from record_cases import Making, bent_top1, micro_record, subject

from slimnas.arch.space import SearchSpace, Selection
from slimnas.errors import RunFolderError, SpecError
from slimnas.search.importance import ImportanceRecord
from slimnas.search.record import (
    RecordEvaluator,
    SearchRecord,
    content_digest,
    open_record,
    shipped_record,
    shipped_records,
)
from slimnas.search.record_making import (
    PER_WALK,
    JournaledEvaluator,
    Plan,
    Walker,
    made_up_price,
    make_record,
    recorded_errors,
    single_changes,
    slimmed_at_random,
)

SPACE = micro_space()
HYBRID = SearchSpace.load("hybrid_tiny")
PLAN = Plan(selections=60, walks=3, seed=0)


def apart(one: Selection, other: Selection) -> int:
    """In how many widths and slots two selections differ."""
    widths = sum(a != b for a, b in zip(one.widths, other.widths, strict=True))
    pairs = zip(one.paths, other.paths, strict=True)
    return widths + sum(a != b for p, q in pairs for a, b in zip(p, q, strict=True))


def even_importance(space: SearchSpace, seed: int = 0) -> ImportanceRecord:
    rng = random.Random(seed)
    return ImportanceRecord(
        tuple(
            tuple({c: rng.gauss(0, 1) for c in s.choices} for _ in range(s.slots))
            for s in space.stages
        ),
        {},
    )


def test_single_changes_are_all_of_them() -> None:
    importance = Additive.draw(0).importance()
    start = importance.start(SPACE)
    found = single_changes(SPACE, importance)
    expected = {s for s in SPACE.selections() if apart(s, start) <= 1}
    expected |= {SPACE.largest(count) for count in SPACE.attention_counts()}
    assert set(found) == expected
    assert len(found) == len(expected) > 6
    assert found[0] == start


@pytest.mark.parametrize("space", [SPACE, SearchSpace.load("efficientformer_tiny"), HYBRID])
def test_what_is_drawn_is_in_the_space_and_all_over_it(space: SearchSpace) -> None:
    importance = even_importance(space)
    rng = random.Random(1)
    drawn = [slimmed_at_random(space, importance, rng) for _ in range(40)]
    assert [space.fault(selection) for selection in drawn] == [None] * 40
    most = len(importance.start(space).active())
    depths = sorted(len(selection.active()) for selection in drawn)
    assert depths[0] < 0.7 * most < 0.85 * most < depths[-1]
    for i, stage in enumerate(space.stages):
        widths = {selection.widths[i] for selection in drawn}
        assert len(widths) >= min(3, len(stage.width.values))


@pytest.mark.parametrize("space", [SPACE, HYBRID])
def test_made_up_devices_are_faster_the_smaller_the_network(space: SearchSpace) -> None:
    rng = random.Random(2)
    looked_at = 0
    for _ in range(5):
        price = made_up_price(space, rng)
        selection = slimmed_at_random(space, even_importance(space), rng)
        for i, j, _ in selection.active():
            smaller = selection.with_path(i, j, "identity")
            assert price(smaller) < price(selection)
            looked_at += 1
        for i, width in enumerate(selection.widths):
            assert price(selection.with_width(i, width - 2)) < price(selection)
    assert looked_at > 10


def test_walks_are_searches_for_made_up_devices() -> None:
    model = Additive.draw(3)
    walker = Walker(SPACE, model.importance(), model.top1)
    walks = [walker.walk(random.Random(seed)) for seed in range(4)]
    assert all(SPACE.fault(selection) is None for walk in walks for selection in walk)
    assert all(3 <= len(walk) <= PER_WALK for walk in walks)
    assert len({tuple(walk) for walk in walks}) > 1
    assert walker.walk(random.Random(0)) == walks[0]


def test_a_record_holds_what_was_measured() -> None:
    record, model = micro_record(), Additive.draw(0)
    assert record.rows[0].selection == model.importance().start(SPACE)
    for row in record.rows:
        assert SPACE.fault(row.selection) is None
        assert row.top1 == bent_top1(model, row.selection)
    kinds = [row.kind for row in record.rows]
    singles = kinds.count("single")
    assert singles == len(single_changes(SPACE, model.importance()))
    assert 30 <= kinds.count("random") + kinds.count("slimmed") <= 60
    assert kinds.count("walk") > 3
    assert [row.group for row in record.rows[:singles]] == [""] * singles
    assert all(row.group for row in record.rows[singles:])
    assert record.alphas == tuple(tuple(map(dict, s)) for s in model.importance().alphas)
    assert record.errors == recorded_errors(SPACE, record.rows)
    assert {error.what for error in record.errors} >= {"random", "slimmed"}


def test_it_ranks_networks_it_has_not_seen() -> None:
    record, model = micro_record(), Additive.draw(0)
    evaluator = RecordEvaluator(record, SPACE)
    known = {row.selection for row in record.rows}
    others = [s for s in SPACE.selections() if s not in known]
    assert len(others) > 150
    off = [abs(evaluator.top1(s) - bent_top1(model, s)) for s in others]
    assert sum(off) / len(off) < 2.0
    for row in record.rows:
        assert evaluator.is_measured(row.selection)
        assert evaluator.top1(row.selection) == row.top1
    assert not any(evaluator.is_measured(s) for s in others)


def test_the_same_subject_gives_the_same_record() -> None:
    listener = Making()
    again = make_record(subject(), PLAN, listener)
    assert again.digest == micro_record().digest
    assert listener.fits == 1
    numbers = [number for number, _ in listener.numbers]
    assert numbers == list(range(1, len(again.rows) + 1))
    assert all(number <= total for number, total in listener.numbers)


def test_saved_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "micro.yaml"
    record = micro_record()
    record.save(path)
    read = open_record(str(path), SPACE)
    assert read == record
    assert read.rows == record.rows
    assert read.digest == record.digest
    text = path.read_text()
    assert text.startswith("schema: slimnas/search-record/1\n")
    assert re.search(r"^- 48-48 aa/aa[ab] [0-9.]+ single$", text, re.MULTILINE)


def test_classes_image_sizes_and_recipes_do_not_matter() -> None:
    same = SPACE.with_classes(1000)
    bigger = SPACE.model_copy(update={"input": SPACE.input.model_copy(update={"resolution": 64})})
    assert content_digest(same) == content_digest(bigger) == content_digest(SPACE)
    text = SPACE.to_yaml().replace("max: 48", "max: 64", 1)
    assert content_digest(SearchSpace.from_yaml(text.replace("max: 48", "max: 64", 1))) != (
        content_digest(SPACE)
    )


# --- stopped and started again ---

IDENTITY = {"supernet_digest": "5" * 64, "search_images": 50}


def journaled(path: Path, calls: list[Selection]) -> JournaledEvaluator:
    evaluate = subject().evaluate

    def counted(selection: Selection) -> float:
        calls.append(selection)
        return evaluate(selection)

    return JournaledEvaluator(path, IDENTITY, SPACE, counted)


@pytest.mark.parametrize("torn", [b"", b'{"selection": "48-4', b'{"selection": "16-16 a-/a--"}'])
def test_nothing_is_measured_twice(torn: bytes, tmp_path: Path) -> None:
    path, calls = tmp_path / "record.jsonl", list[Selection]()
    half = 20
    one = subject()
    first = type(one)(**{**vars(one), "evaluate": journaled(path, calls).top1})
    with pytest.raises(KeyboardInterrupt):
        make_record(first, PLAN, Making(stop_at=half))
    assert len(calls) == half
    with path.open("ab") as journal:
        journal.write(torn)
    second = type(one)(**{**vars(one), "evaluate": journaled(path, calls).top1})
    assert make_record(second, PLAN, Making()).digest == micro_record().digest
    assert len(calls) == len(set(calls)) == len(micro_record().rows)
    third: list[Selection] = []
    last = type(one)(**{**vars(one), "evaluate": journaled(path, third).top1})
    assert make_record(last, PLAN, Making()).digest == micro_record().digest
    assert third == []


def test_a_journal_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    JournaledEvaluator(path, IDENTITY, SPACE, lambda selection: 1.0)
    other = {**IDENTITY, "search_images": 51}
    with pytest.raises(RunFolderError, match="begun with another supernet, data or number of im"):
        JournaledEvaluator(path, other, SPACE, lambda selection: 1.0)
    with path.open("ab") as journal:
        journal.write(b'{"selection": "48-48 aa/aaa"}\n')
    with pytest.raises(RunFolderError, match=r"damaged .*; delete it"):
        JournaledEvaluator(path, IDENTITY, SPACE, lambda selection: 1.0)


# --- bad records ---


TWO = ["48-48 aa/aaa 60.0 single", "48-48 aa/aa- 58.0 single"]
SCALES = {
    **dict.fromkeys(("constant", "slots", "linear", "smooth", "noise"), 1.0),
    "lengths": [1.0],
}


def changed(record: SearchRecord, **changes: Any) -> str:
    body = {"schema": "slimnas/search-record/1", **record.model_dump(mode="json")}
    if isinstance(changes.get("measured"), list):
        changes = {"networks": len(changes["measured"]), **changes}
    for key, value in changes.items():
        if value is None:
            del body[key]
        else:
            body[key] = value
    return yaml.safe_dump(json.loads(json.dumps(body)), sort_keys=False)


Change = dict[str, Any]
BAD: dict[str, tuple[str | Change | None, str]] = {
    "no file": (None, "no such file; expected a search record"),
    "not YAML": ("a: [", "not valid YAML"),
    "a table": ("schema: slimnas/latency-table/1\n", "schema: must be 'slimnas/search-record/1'"),
    "no alphas": ({"alphas": None}, "alphas: missing"),
    "other alphas": (
        {"alphas": [[{"mb4d": 0.0}]]},
        "alphas: must be of every choice of every slot",
    ),
    "a scale": (
        {"scales": {**SCALES, "noise": -1.0}},
        r"scales\.noise: must be above 0",
    ),
    "lengths": (
        {"scales": {**SCALES, "lengths": [1.0, 2.0]}},
        r"scales\.lengths: must be 5 for search space micro, got 2",
    ),
    "no rows": ({"measured": [], "networks": 1}, "measured: must have at least 1 item"),
    "cut": (
        {"measured": TWO, "networks": 60},
        "measured: must have 60 lines, has 2; the file was cut or changed",
    ),
    "a torn row": ({"measured": [*TWO, "48-48 aa/aa"]}, r"measured\[2\]: must be WIDTHS PATHS"),
    "a letter": ({"measured": ["48-48 az/aaa 3.0 single"]}, r"measured\[0\]: must be WIDTHS PATHS"),
    "101 %": ({"measured": ["48-48 aa/aaa 101.0 single"]}, r"measured\[0\]: must be WIDTHS PATHS"),
    "nan": ({"measured": ["48-48 aa/aaa nan single"]}, r"measured\[0\]: must be WIDTHS PATHS"),
    "a kind": ({"measured": ["48-48 aa/aaa 3.0 guess"]}, r"measured\[0\]: must be WIDTHS PATHS"),
    "twice": ({"measured": [*TWO, TWO[1]]}, r"measured\[2\]: is measured\[1\] once more"),
    "outside": (
        {"measured": ["48-32 aa/aaa 3.0 single"]},
        r"measured\[0\]: widths \[48, 32\] must not fall",
    ),
    "letters": (
        {"letters": {"mb4d": "a", "mb3d": "a", "identity": "-"}},
        "letters: each choice needs one letter of its own",
    ),
    "another space": ({"space_digest": "0" * 64}, "was made for another content of search space"),
    "an error": (
        {"errors": [{"what": "random", "networks": 9, "spearman": 1.5, "mean_error_points": 1.0}]},
        r"errors\[0\]\.spearman: must be at most 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.yaml"
    if content is not None:
        text = content if isinstance(content, str) else changed(micro_record(), **content)
        path.write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        open_record(str(path), SPACE)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_space_without_a_record() -> None:
    with pytest.raises(SpecError, match="search space micro: no record ships with it") as caught:
        open_record("shipped", SPACE)
    assert "efficientformer_tiny" in str(caught.value)
    assert "slimnas space record" in str(caught.value)
    assert shipped_record(SPACE) is None


# --- the shipped ones ---


@pytest.mark.parametrize("name", shipped_records())
def test_shipped_records_fit_their_space_and_say_where_they_are_from(name: str) -> None:
    space = SearchSpace.load(name)
    record = open_record("shipped", space)
    assert shipped_record(space) == record
    assert record.space == name
    path = Path(__file__).parents[1] / "search_spaces" / "records" / f"{name}.yaml"
    assert path.stat().st_size < 200_000
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(work|tmp|home|root)\b", text)
    assert len(record.rows) > 200
    assert record.recipe["epochs"] >= 1
    assert {"date", "slimnas", "torch", "judged_on"} <= record.made.keys()
    assert len(record.data.description) > 20
    step = 100 / record.search_images
    for row in record.rows:
        assert row.top1 / step == pytest.approx(round(row.top1 / step), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_records())
def test_errors_that_shipped_records_state_are_theirs(name: str) -> None:
    space = SearchSpace.load(name)
    record = open_record("shipped", space)
    again = recorded_errors(space, record.rows)
    assert [error.what for error in again] == [error.what for error in record.errors]
    for stated, found in zip(record.errors, again, strict=True):
        assert found.networks == stated.networks
        assert found.spearman == pytest.approx(stated.spearman, abs=0.01)
        assert found.mean_error_points == pytest.approx(stated.mean_error_points, rel=0.05)


def test_efficientformer_tiny_has_one() -> None:
    assert "efficientformer_tiny" in shipped_records()
