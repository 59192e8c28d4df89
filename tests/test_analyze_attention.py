"""The attention study: its clockwork, its arithmetic, what it refuses, and what it writes."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import slimnas
from torch import nn

from slimnas.analysis import attention
from slimnas.analysis.attention import run_study
from slimnas.analysis.attention_study import AttentionStudy, LayerRow, StudyResult
from slimnas.analysis.interleaved import Rounds, time_interleaved
from slimnas.analysis.mechanisms import MECHANISMS
from slimnas.analysis.peak import peak_bytes
from slimnas.arch.shapes import FeatureShape
from slimnas.errors import AnalysisError
from slimnas.measure.machine import Machine
from slimnas.report.analysis_attention import attention_figure, resolutions_figure

QUICK = Rounds(rounds=3, sample_ms=0.1, warm_up_ms=1.0)
SMALL: dict[str, Any] = {"resolutions": (8,), "width": 24, "heads": 3, "batch": 2, "how": QUICK}
WORDS = ("--resolutions", "8", "--dim", "24", "--heads", "3", "--batch", "2", "--rounds", "2")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimnas.analysis.interleaved._warm_up", lambda *_: 1)


def made_up(rounds_ms: dict[str, tuple[float, ...]], **settings: Any) -> StudyResult:
    """A result with these times."""
    study = AttentionStudy(mechanisms=tuple(rounds_ms), **settings)
    shape = [FeatureShape(study.width, side, side) for side in study.resolutions]
    rows = []
    for one in shape:
        for name, samples in rounds_ms.items():
            cost = MECHANISMS[name].cost(one, study.heads)
            row = LayerRow(
                mechanism=MECHANISMS[name],
                side=one.height,
                params=cost.params,
                macs=cost.macs,
                rounds_ms=samples,
                difference=1e-7,
                test_bytes=10**6,
                train_bytes=3 * 10**6,
            )
            rows.append(row)
    return StudyResult(
        study=study,
        rows=tuple(rows),
        left_out=(),
        machine=Machine("a processor", "x86_64", 2, "Linux", None),
        runtime=("torch", "2"),
        compute_unit="cpu",
        date="2026-01-01T00:00:00Z",
    )


@pytest.mark.parametrize("layout", ["tokens", "own"])
@pytest.mark.parametrize("fused", [True, False])
def test_every_mechanism_is_checked_and_timed(layout: Any, fused: bool) -> None:
    result = run_study(AttentionStudy(**SMALL, layout=layout, fused=fused))
    assert [row.mechanism.name for row in result.rows] == list(MECHANISMS)
    assert len(result.rows) == 13
    assert result.left_out == ()
    for row in result.rows:
        assert len(row.rounds_ms) == 3
        assert min(row.rounds_ms) > 0
        assert row.difference < 1e-5
        assert row.test_bytes is not None
        assert row.train_bytes is not None
        weights_and_input = 4 * (row.params + 2 * 64 * 24)
        assert weights_and_input < row.test_bytes < row.train_bytes


def test_it_runs_with_onnx_runtime() -> None:
    study = AttentionStudy(
        **SMALL, runtime="onnxruntime", mechanisms=("hilo", "cga", "shifted_window")
    )
    result = run_study(study)
    assert [row.test_bytes for row in result.rows] == [None, None, None]
    assert max(row.difference for row in result.rows) < 1e-5
    assert len(attention_figure(result, 8).axes) == 2


def test_maps_a_mechanism_cannot_take_are_left_out() -> None:
    settings = {**SMALL, "resolutions": (7, 8), "memory": False}
    result = run_study(AttentionStudy(**settings, mechanisms=("mhsa", "strided")))
    assert [(row.mechanism.name, row.side) for row in result.rows] == [
        ("mhsa", 7),
        ("mhsa", 8),
        ("strided", 8),
    ]
    assert [(one.mechanism, one.side) for one in result.left_out] == [("strided", 7)]
    assert "sides are even" in result.left_out[0].reason
    with pytest.raises(AnalysisError, match=r"^strided on 7x7: .* even, got 7x7"):
        run_study(AttentionStudy(**{**settings, "resolutions": (7,)}, mechanisms=("strided",)))


def test_a_layer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "fold", lambda module: nn.Identity())
    with pytest.raises(
        AnalysisError,
        match=r"^mhsa: the layer must compute what it does in double precision, differs by .*; "
        "nothing was timed",
    ):
        run_study(AttentionStudy(**SMALL, mechanisms=("mhsa",)))


def test_every_round_visits_every_call_once_in_a_new_order() -> None:
    now, seen = 0.0, []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        seen.append(name)

    calls = [lambda: call("a", 0.050), lambda: call("b", 0.020), lambda: call("c", 0.001)]
    how = Rounds(rounds=20, sample_ms=10.0, warm_up_ms=1e6)
    samples = time_interleaved(calls, how, clock=lambda: now, rng=random.Random(0))
    assert [{round(ms, 6) for ms in own} for own in samples] == [{50.0}, {20.0}, {1.0}]
    assert {len(own) for own in samples} == {20}
    timed = seen[-20 * (1 + 1 + 11) :]  # c runs ten times in 10 ms, after once untimed
    assert {name: timed.count(name) for name in "abc"} == {"a": 20, "b": 20, "c": 220}
    rounds = ["".join(dict.fromkeys(timed[i * 13 : i * 13 + 13])) for i in range(20)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3


def test_peak_memory_of_known_allocations() -> None:
    def call() -> None:
        first = torch.empty(3000)
        second = torch.empty(5000)
        del first
        third = torch.empty(1000)
        del second, third

    torch.empty(10_000)  # what was there before does not count
    assert peak_bytes(call, torch.device("cpu")) == 4 * 8000


def test_ratios_are_taken_within_rounds() -> None:
    result = made_up({"hilo": (1.0, 2.0, 4.0), "sra": (2.0, 3.9, 8.4), "cga": (1.0, 1.0, 1.0)})
    ratio = result.ratio(result.rows[1])
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)
    assert ratio.iqr == pytest.approx((2.1 + 2.0) / 2 - (2.0 + 1.95) / 2)
    half = 1.959964 * 1.2533 * ratio.iqr / 1.349 / 3**0.5
    assert ratio.interval == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert result.ratio(result.rows[0]) is None
    unpublished = result.ratio(result.rows[2])
    assert unpublished is not None
    assert unpublished.verdict is None


def test_published_ratios_are_the_headlines() -> None:
    result = made_up(dict.fromkeys(MECHANISMS, (1.0, 1.0)))
    found = {row.mechanism.name: result.ratio(row) for row in result.rows}
    published = {
        name: round(ratio.published, 2)
        for name, ratio in found.items()
        if ratio is not None and ratio.published is not None
    }
    assert published == {
        "mhsa": 2.04,
        "window": 1.63,
        "shifted_window": 2.75,
        "sra": 1.45,
        "lka": 17.44,
    }
    elsewhere = made_up(dict.fromkeys(MECHANISMS, (1.0, 1.0)), resolutions=(28,))
    assert all(ratio.published is None for row in elsewhere.rows if (ratio := elsewhere.ratio(row)))


@pytest.mark.parametrize(
    ("sra_ms", "verdict"),
    [
        ((1.60, 1.61, 1.59, 1.60), "holds"),
        ((1.40, 1.41, 1.39, 1.40), "holds"),  # within what the study's own figures moved by
        ((1.20, 1.21, 1.19, 1.20), "smaller"),
        ((0.99, 1.01, 1.02, 0.98), "no difference"),
        ((0.80, 0.81, 0.79, 0.80), "reversed"),
    ],
)
def test_what_holds_here(sra_ms: tuple[float, ...], verdict: str) -> None:
    result = made_up({"hilo": (1.0, 1.0, 1.0, 1.0), "sra": sra_ms})
    ratio = result.ratio(result.rows[1])
    assert ratio is not None
    assert ratio.verdict == verdict


def test_costs_agree_with_the_published_ones() -> None:
    shape, compared = FeatureShape(768, 14, 14), 0
    for mechanism in MECHANISMS.values():
        if mechanism.published is None:
            continue
        cost = mechanism.cost(shape, 12)
        assert round(cost.params / 1e6, 2) == mechanism.published.params
        # theirs counts SRA's LayerNorm
        norm = 5 * 49 * 768 / 1e6 if mechanism.name == "sra" else 0
        assert cost.macs / 1e6 + norm == pytest.approx(mechanism.published.macs, abs=0.006)
        compared += 1
    assert compared == 6


def test_figures_show_every_mechanism() -> None:
    times = {name: (float(i + 1), i + 1.1, i + 1.2) for i, name in enumerate(MECHANISMS)}
    result = made_up({**times, "pool": (0.01, 0.01, 0.01)}, resolutions=(14, 28))
    figure = attention_figure(result, 14)
    speed, ratios, memory = figure.axes
    named = [label.get_text() for label in speed.get_yticklabels()]
    assert sorted(named) == sorted(one.title for one in MECHANISMS.values())
    assert named[0] == "pooling"
    assert len(speed.patches) == 13
    diamonds = [line for line in ratios.lines if line.get_marker() == "D"]
    assert len(diamonds) == 5
    assert len(memory.patches) == 26
    assert speed.get_xlim()[1] < 1e3 * 64 / 0.01  # pooling's bar is cut
    over_sizes = resolutions_figure(result)
    assert len(over_sizes.axes[0].lines) == 12
    assert over_sizes.texts[0].get_text().endswith("off the scale: pooling")


@pytest.mark.usefixtures("no_warm_up")
def test_the_command_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mechanisms", "hilo,mhsa,tmsa", "--output", "out", "--json")
    body = slimnas(capsys, "analyze", "attention", *WORDS, *words).json()
    assert body["schema"] == "slimnas/attention-study/1"
    assert [row["mechanism"] for row in body["rows"]] == ["hilo", "mhsa", "tmsa"]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["attention.csv", "attention.json", "attention.png", "attention.svg"]
    assert sorted(Path(name).name for name in body["files"]) == files
    written = json.loads((tmp_path / "out/attention.json").read_text())
    assert {**written, "files": body["files"]} == body
    rows = list(csv.DictReader((tmp_path / "out/attention.csv").read_text().splitlines()))
    assert [row["mechanism"] for row in rows] == ["hilo", "mhsa", "tmsa"]
    assert float(rows[1]["hilo_ratio"]) == pytest.approx(written["rows"][1]["hilo_ratio"], rel=1e-5)
    assert rows[0]["hilo_ratio"] == ""
    assert len(written["rows"][0]["rounds_ms"]) == 2


@pytest.mark.usefixtures("no_warm_up")
def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = slimnas(
        capsys,
        *("analyze", "attention", *WORDS, "--resolutions", "7,8", "--no-memory"),
        *("--mechanisms", "hilo,strided,lka", "--attention", "explicit", "--layout", "own"),
    )
    assert answer.code == 0, answer.err
    assert "left out: strided on 7x7" in answer.err
    assert "7x7 tokens" in answer.out
    assert "8x8 tokens" in answer.out
    assert "explicit" in answer.out
    files = {path.name for path in (tmp_path / "runs/analyze-attention").iterdir()}
    assert {"attention_7.png", "attention_8.png", "attention_resolutions.png"} < files


REFUSED = [
    (("--mechanisms", "hilo,xyz"), 1, r"unknown mechanism 'xyz'; known: hilo, mhsa"),
    (("--mechanisms", "windw"), 1, r"unknown mechanism 'windw' \(did you mean 'window'\?\)"),
    (("--mechanisms", "sra,sra"), 1, r"must name a mechanism, each once"),
    (("--mechanisms", ","), 1, r"must name a mechanism"),
    (("--heads", "5"), 1, r"heads must divide dim, 24, got 5; try 4"),
    (("--clock", "cpu", "--threads", "2"), 1, r"cpu clock counts one thread's time"),
    (("--device", "cuda", "--runtime", "onnxruntime"), 1, r"onnxruntime has no compute unit"),
    (("--resolutions", "14x14"), 2, r"sides in tokens"),
    (("--resolutions", "0"), 2, r"sides in tokens"),
    (("--attention", "explicit", "--runtime", "onnxruntime"), 2, r"one form of attention"),
    (("--output", "taken/out"), 1, r"taken/out: cannot be written"),
]


@pytest.mark.parametrize(("words", "code", "message"), REFUSED)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").write_text("a file")
    answer = slimnas(capsys, "analyze", "attention", *WORDS, *words)
    assert answer.code == code
    assert re.search(message, " ".join(answer.err.replace("│", " ").split()))
    assert code == 2 or len(answer.errors) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_the_docs_give_the_costs_of_the_studys_layer() -> None:
    page = (Path(__file__).parents[1] / "docs/analyses.md").read_text(encoding="utf-8")
    shape, compared = FeatureShape(768, 14, 14), 0
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[1]) if len(cells) == 6 else []
        if not set(names) & set(MECHANISMS):
            continue
        costs = [MECHANISMS[name].cost(shape, 12) for name in names]
        assert [float(macs) for macs in cells[3].split(",")] == [
            round(cost.macs / 1e6, 2) for cost in costs
        ]
        assert {int(cells[4].replace(",", ""))} == {cost.params for cost in costs}
        published = [MECHANISMS[name].published is not None for name in names]
        assert cells[5] == ("yes" if all(published) else "no")
        compared += len(names)
    assert compared == len(MECHANISMS)
