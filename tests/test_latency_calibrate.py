"""`slimnas latency calibrate`: a user's own points become an estimated table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from slimnas._resources import data_dir
from slimnas.cli.latency import app
from slimnas.errors import LatencyTableError, SlimnasError
from slimnas.latency.calibrate import calibrate_device, flat_components
from slimnas.latency.device_model import MODELS, predict_ms
from slimnas.latency.features import Features, network_features
from slimnas.latency.fit import fit_points, refit
from slimnas.latency.points import POINTS_FILE, Point, load_points
from slimnas.latency.table import FitInfo, LatencyTable
from slimnas.zoo.registry import builtin_names, get

TABLES = data_dir("lookup_tables")
PROCESSOR = (0.5, 60.0, 50.0, 150.0, 60.0, 0.6, 0.4, 1.0, 14.0, 1.0, 0.01)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["calibrate", *arguments], catch_exceptions=True)
    if isinstance(result.exception, SlimnasError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def point(name: str, features: Features, latency_ms: float) -> Point:
    return Point(name, "", 224, features, latency_ms, 1.0, "U", "mine", used=True, why_not="")


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(("network,latency_ms,source", *lines)) + "\n")
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def zoo_points(here: Path) -> str:
    """Every built-in network as a made-up phone would run it, a per cent off."""
    terms = MODELS["processor"]
    lines = []
    for i, name in enumerate(builtin_names()):
        exact_ms = predict_ms(network_features(get(name).architecture), PROCESSOR, terms)
        lines.append(f"{name},{exact_ms * (1 + 0.01 * (-1) ** i):.6f},simulated")
    return written(here / "mine.csv", *lines)


def test_a_table_from_two_columns(zoo_points: str, here: Path) -> None:
    result = run("--points", zoo_points, "--device", "phone", "--model", "processor")
    assert "phone (estimated)" in result.stdout
    for name in builtin_names():
        assert name in result.stdout
    folder = here / "lookup_tables" / "phone"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["device.yaml", "leave_one_out.csv", "points.csv", "table.csv"]
    table = LatencyTable.load(folder)
    assert table.device.kind == "estimated"
    assert table.device.errors[0].networks == len(builtin_names())
    assert table.device.errors[0].mape_percent < 6
    assert table.device.sources == ("simulated",)
    assert refit(folder)[0].rows == table.rows  # from its own files, without the zoo
    with pytest.raises(
        LatencyTableError, match=r"phone: holds a finished estimated table .*--force"
    ):
        run("--points", zoo_points, "--device", "phone", "--model", "processor")
    run("--points", zoo_points, "--device", "phone", "--model", "processor", "--force")


def test_json_and_the_folder_agree(zoo_points: str, here: Path) -> None:
    result = run(
        *("--points", zoo_points, "--device", "phone", "--prior", "pixel4-cpu", "--json"),
        *("--output", "there", "--description", "a phone", "--runtime", "TFLite"),
    )
    answer = json.loads(result.stdout)
    assert answer["device"] == {"name": "phone", "kind": "estimated"}
    assert answer["path"] == "there"
    device = LatencyTable.load(here / "there").device
    assert (device.device, device.runtime.name) == ("a phone", "TFLite")
    assert device.fit is not None
    assert (device.fit.model, device.fit.prior, device.fit.strength) == (
        *("processor", "pixel4-cpu"),
        0.1,
    )
    with (here / "there" / "leave_one_out.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert len(answer["points"]) == len(rows) == len(builtin_names())
    for entry in answer["points"]:
        error = 100 * (entry["left_out_ms"] / entry["latency_ms"] - 1)
        assert float(rows[entry["network"]]["left_out_error_percent"]) == pytest.approx(
            error, abs=0.051
        )


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (["deit_tiny,5,a"] * 1, [], r"1 points are too few: the accelerator model has \d coeff"),
        (["deit_tiny,5,a", "swin_tiny,15,b"], ["--prior", "iphone12"], r"2 points are too few"),
        (["deit_tinny,5,a"], [], r"mine.csv:2: no model.*did you mean 'deit_tiny'"),
        (["deit_tiny,5,a"], ["--device", "../up"], r"the new table: name: .*'../up'"),
        (
            ["deit_tiny,5,a", "swin_tiny,15,b", "deit_small,9,c"],
            ["--prior", "iphone12", "--strength", "0"],
            r"3 points are too few",
        ),
        (["deit_tiny,5,a"], ["--prior", "nokia"], r"no latency table for device 'nokia'"),
        (
            ["deit_tiny,5,a"],
            ["--prior", "iphone12", "--model", "processor"],
            r"--prior iphone12: its model is accelerator, --model asks for processor",
        ),
    ],
)
def test_bad_input_leaves_nothing_behind(
    here: Path, lines: list[str], more: list[str], message: str
) -> None:
    with pytest.raises(LatencyTableError, match=message) as caught:
        run("--points", written(here / "mine.csv", *lines), "--device", "phone", *more)
    assert "\n" not in str(caught.value)
    assert [path.name for path in here.iterdir()] == ["mine.csv"]


def test_a_known_device_is_recovered_from_its_latencies() -> None:
    """Latencies made from coefficients give the coefficients back."""
    true, info = PROCESSOR, FitInfo(model="processor")
    terms = MODELS["processor"]
    points = [
        point(each.name, each.features, predict_ms(each.features, true, terms))
        for each in load_points(TABLES / "pixel4-cpu" / POINTS_FILE)
        if each.used and each.features
    ]
    fit = fit_points(points, info)
    assert fit.coefficients == pytest.approx(true, rel=2e-3)
    assert np.abs(fit.residuals()).max() < 1e-4


def test_leaving_a_point_out_never_sees_it() -> None:
    """A point moved far away changes every fit but the one without it."""
    points = [p for p in load_points(TABLES / "galaxy-s24" / POINTS_FILE) if p.used]
    info = FitInfo(model="accelerator")
    moved = [point("moved", p.features, 3 * p.latency_ms) if p is points[4] else p for p in points]  # type: ignore[arg-type]
    before, after = fit_points(points, info), fit_points(moved, info)
    assert before.left_out[4] == after.left_out[4]
    assert all(
        a != b
        for i, (a, b) in enumerate(zip(before.left_out, after.left_out, strict=True))
        if i != 4
    )


def test_a_prior_is_scaled_to_the_points() -> None:
    """A phone half as fast in everything is the prior, twice."""
    prior = LatencyTable.load(TABLES / "pixel4-cpu").device.model
    terms = MODELS["processor"]
    points = [
        point(name, counted, 2 * predict_ms(counted, prior.values(), terms))
        for name in ("efficientformer_l1", "deit_tiny", "swin_tiny")
        for counted in [network_features(get(name).architecture)]
    ]
    info = FitInfo(model="processor", prior="pixel4-cpu", strength=0.1, held_to=prior)
    fit = fit_points(points, info)
    assert fit.coefficients == pytest.approx([2 * value for value in prior.values()], rel=1e-5)
    assert np.abs(fit.residuals()).max() < 1e-5


def test_what_the_points_do_not_tell_is_said() -> None:
    """Latencies that are all overhead price no component: refused, not made up."""
    counted = [network_features(get(name).architecture) for name in builtin_names()]
    points = [point(f"n{i}", each, 5.0) for i, each in enumerate(counted)]
    with pytest.raises(LatencyTableError, match=r"the points do not tell what .* costs"):
        calibrate_device(points, "flat", FitInfo(model="processor"))


def test_a_price_without_width_is_flat() -> None:
    table = LatencyTable.load(TABLES / "galaxy-s24")
    assert flat_components(table.rows) == ()
    heads = [row for row in table.rows if row.key.component == "head" and row.key.width_out == 10]
    same = [type(row)(row.key, 0.1, 0.0, 21, "fitted") for row in heads]
    assert flat_components([*table.rows[:50], *same]) == ("head linear",)


def test_unknown_model_is_named() -> None:
    with pytest.raises(LatencyTableError, match=r"device model 'processer' \(did you mean 'proc"):
        fit_points([], FitInfo(model="processer"))


def test_a_block_without_a_rule_is_named(here: Path) -> None:
    folder = here / "model_zoo" / "mine"
    folder.mkdir(parents=True)
    (folder / "architecture.yaml").write_text(
        "schema: slimnas/architecture/1\nname: mine\ninput: {channels: 3, resolution: 32}\n"
        "stem: {type: conv_stem, width: 16, act: relu}\n"
        "stages: [{width: 16, blocks: [{type: lka}]}]\nhead: {type: linear, classes: 10}\n"
    )
    with pytest.raises(LatencyTableError, match=r"mine: .*leave its point out"):
        run("--points", written(here / "mine.csv", "mine,5,a"), "--device", "phone")
