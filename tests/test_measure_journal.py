"""The journal: what was written stays, whatever happens to the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimnas.errors import LatencyTableError, RunFolderError
from slimnas.measure.journal import SCHEMA, Journal, Visit
from slimnas.measure.timing import Round

HEADER = {"space": {"name": "small", "sha256": "ab"}, "batch": 1, "protocol": {"rounds": 2}}


def visit(number: int) -> Visit:
    rounds = (
        Round((1.0, 1.25), ((0.5, 0.25), (0.125,)), True),
        Round((2.0, 2.0), (), False),
    )
    return Visit(f"entry {number}", number, rounds)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal.jsonl", HEADER)
    for number in range(3):
        journal.append(visit(number))
    return journal


def test_visits_come_back(journal: Journal) -> None:
    again = Journal(journal.path, HEADER)
    assert again.visits == journal.visits == [visit(0), visit(1), visit(2)]
    assert json.loads(journal.path.read_text().splitlines()[0])["schema"] == SCHEMA


def test_cut_anywhere_in_the_last_line_loses_that_line_only(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    cuts = range(start, len(whole))
    for cut in cuts:
        journal.path.write_bytes(whole[:cut])
        again = Journal(journal.path, HEADER)
        assert again.visits == [visit(0), visit(1)], cut
        again.append(visit(2))
        assert journal.path.read_bytes() == whole, cut
    assert len(cuts) == len(whole) - start > 100


def test_cut_header_starts_anew(journal: Journal) -> None:
    line = journal.path.read_bytes().split(b"\n")[0]
    for cut in range(len(line) + 1):
        journal.path.write_bytes(line[:cut])
        again = Journal(journal.path, HEADER)
        assert again.visits == []
        assert journal.path.read_bytes() == line + b"\n"


def test_last_line_of_zeros_is_dropped(journal: Journal) -> None:
    with journal.path.open("ab") as file:
        file.write(b"\0" * 50 + b"\n")
    assert len(Journal(journal.path, HEADER).visits) == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch", 4, "its batch is 1, not 4"),
        ("protocol", {"rounds": 6}, "its protocol is rounds 2, not 6"),
        ("space", {"name": "large", "sha256": "ab"}, "its space is name 'small', not 'large'"),
        ("runtime", "torch", "its runtime is None, not 'torch'"),
    ],
)
def test_journal_of_another_build_is_refused(
    journal: Journal, key: str, value: object, message: str
) -> None:
    before = journal.path.read_bytes()
    with pytest.raises(LatencyTableError, match=message) as caught:
        Journal(journal.path, {**HEADER, key: value})
    assert "\n" not in str(caught.value)
    assert journal.path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"{}", b"x", b'{"entry":"a","pass":0,"rounds":[{}]}', b"[]"])
def test_damaged_line_inside_is_named(journal: Journal, damage: bytes) -> None:
    lines = journal.path.read_bytes().split(b"\n")
    lines[2] = damage
    journal.path.write_bytes(b"\n".join(lines))
    with pytest.raises(LatencyTableError, match=r"journal\.jsonl:3: damaged line"):
        Journal(journal.path, HEADER)


@pytest.mark.parametrize("first", [b'{"schema":"other"}\n', b"5\n{}\n"])
def test_other_file_is_not_taken_for_a_journal(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(first)
    with pytest.raises(LatencyTableError, match="must begin with a slimnas/latency-journal/1"):
        Journal(path, HEADER)
    assert path.read_bytes() == first


def test_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LatencyTableError, match=r"cannot be read"):
        Journal(tmp_path / "file" / "journal.jsonl", HEADER)
    journal = Journal(tmp_path / "journal.jsonl", HEADER)
    journal.path.unlink()
    journal.path.mkdir()
    with pytest.raises(RunFolderError, match=r"cannot be written .*the same command"):
        journal.append(visit(0))
