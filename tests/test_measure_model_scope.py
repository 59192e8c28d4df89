"""Tables of one model: every pruned form of it is priced, exactly where costs add up."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from measure_fakes import (
    CALL_MS,
    SMALL_MODELS,
    FakeMachine,
    FakeRuntime,
    cost_ms,
    part_ms,
    small_model,
    small_space,
)
from typer.testing import CliRunner

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import walk
from slimnas.cli.latency import app
from slimnas.errors import LatencyTableError, MissingLatencyError
from slimnas.latency import LatencyTable, estimate, latency_ms, missing_components, price_parts
from slimnas.measure.build import JOURNAL_FILE, BuildJob, BuiltTable, build_table
from slimnas.measure.model_scope import ModelScope
from slimnas.measure.networks import Chain, network_and_input
from slimnas.measure.plan import make_plan
from slimnas.measure.schedule import Networks
from slimnas.measure.scope import SpaceScope
from slimnas.measure.timing import Protocol
from slimnas.nn.build import build
from slimnas.nn.seeding import seeded

QUICK = Protocol(rounds=2, passes=2, visit_ms=0.5, sample_ms=0.1)
FAMILIES = tuple(SMALL_MODELS)
WHOLLY_NARROWED = ("vit", "swin", "mb3d")


def job(folder: Path, family: str = "vit") -> BuildJob:
    return BuildJob(folder, ModelScope(small_model(family)), QUICK, networks=Networks(4, 4))


def measure(wanted: BuildJob, machine: FakeMachine) -> BuiltTable:
    return build_table(wanted, FakeRuntime(), loader=machine.loader, clocks=machine.clocks)


def pruned(model: Architecture, rng: random.Random) -> Architecture:
    """Any widths from 1 to the model's; a transformer's sub-layers come and go."""

    def less(block: dict[str, Any]) -> dict[str, Any]:
        narrowed = ("heads", "qk_dim", "v_dim") if block["type"] in WHOLLY_NARROWED else ()
        names = [*narrowed, "ffn_dim"]
        kept = {name: rng.randint(1, block[name]) for name in names}
        parts = rng.choice(["attention", "ffn", "both"])
        if block["type"] in ("vit", "swin") and parts == "ffn":
            kept |= {"heads": 0, "qk_dim": 0, "v_dim": 0}
        elif block["type"] in ("vit", "swin") and parts == "attention":
            kept |= {"ffn_dim": 0}
        return block | kept

    data = model.model_dump()
    for stage in data["stages"]:
        left = rng.sample(stage["blocks"], rng.randint(1, len(stage["blocks"])))
        stage["blocks"] = [less(block) for block in left]
    return Architecture.model_validate(data)


@pytest.mark.parametrize("family", FAMILIES)
def test_table_of_an_additive_machine_prices_every_pruned_form(tmp_path: Path, family: str) -> None:
    built = measure(job(tmp_path / "fake", family), FakeMachine())
    table, model = LatencyTable.load(built.path), small_model(family)
    rng = random.Random(3)
    networks = [model, model.with_head(classes=100), *(pruned(model, rng) for _ in range(60))]
    for network in networks:
        truth = CALL_MS + sum(part_ms(part) for part in walk(network))
        assert latency_ms(network, table) == pytest.approx(truth, abs=3e-5)
        assert estimate(network, table).latency_ms == pytest.approx(truth, abs=3e-5)
        assert missing_components(walk(network), table) == ()
    assert len({network.digest for network in networks}) > 50
    figure, _ = table.device.errors
    assert figure.what.startswith(f"randomly pruned forms of {model.name}")
    assert (figure.networks, figure.max_percent) == (4, pytest.approx(0, abs=0.05))
    assert table.device.notes[0].startswith(f"model {model.name} and what can be pruned from it: ")


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        # attention: heads {1, 3}, qk {1, 8}, v {1, 8}; ffn 1, 12, 24, 48, 72, 96
        ("vit", {"stem": 1, "block": 8 + 6, "head": 3}),
        # 8x8 maps with and without shift, 4x4 without; 6 FFN widths each
        ("swin", {"stem": 1, "block": 3 * 8 + 2 * 6, "downsample": 1, "head": 3}),
        # FFN of each MB4D; MB3D: heads {1, 2}, qk {1, 8}, v {1, 8, 16}, ffn {1, 64, 128}
        ("efficientformer", {"stem": 1, "block": 2 * 6 + 36, "downsample": 1, "head": 3}),
        # 6 FFN widths for each kind of block of a stage
        ("efficientvit", {"stem": 1, "block": 2 * 6, "downsample": 1, "head": 3}),
        ("efficientformerv2", {"stem": 1, "block": 5 * 6, "downsample": 2, "head": 3}),
        ("litv2", {"stem": 1, "block": 2 * 6, "downsample": 1, "head": 3}),
    ],
)
def test_plan_times_each_place_at_a_grid_of_widths(family: str, counts: dict[str, int]) -> None:
    plan = make_plan(ModelScope(small_model(family)))
    assert Counter(entry.key.component for entry in plan.components if entry.key) == counts
    for entry in plan.components:
        for term in entry.terms:
            for one, following in pairwise(term.parts):
                assert one.output == following.input


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_add_up_to_the_component(family: str) -> None:
    for entry in make_plan(ModelScope(small_model(family)), chains=(2, 5)).components:
        ends = {"stem": 0, "block": 0, "downsample": 1, "head": -1}
        own = entry.terms[0].parts[ends[entry.name.split()[0]]]
        total = sum(term.share * cost_ms(term.parts) for term in entry.terms)
        assert total == pytest.approx(part_ms(own), rel=1e-9)
        assert price_parts(own) == (own,) or own.kind == "block"


def test_a_pruned_model_is_covered_up_to_its_widest_blocks() -> None:
    model = small_model("vit").model_dump()
    (block, _) = model["stages"][0]["blocks"]
    no_ffn = block | {"heads": 1, "qk_dim": 8, "ffn_dim": 0}
    no_attention = {"type": "vit", "heads": 0, "qk_dim": 0, "v_dim": 0, "ffn_dim": 40}
    model["stages"][0]["blocks"] = [no_attention, block | {"qk_dim": 3, "ffn_dim": 8}, no_ffn]
    scope = ModelScope(Architecture.model_validate(model))
    keys = [entry.key for entry in make_plan(scope).components if entry.key]
    blocks = [dict(key.fields) for key in keys if key.component == "block"]
    assert {name: max(b.get(name, 0) for b in blocks) for name in ("heads", "qk_dim", "v_dim")} == {
        "heads": 3,
        "qk_dim": 8,
        "v_dim": 8,
    }
    assert max(int(b.get("ffn_dim", 0)) for b in blocks) == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_random_networks_are_pruned_forms(family: str) -> None:
    model, rng = small_model(family), random.Random(0)
    drawn = [ModelScope(model).network(rng) for _ in range(40)]
    for network in drawn:
        assert (network.widths, network.depths) == (model.widths, model.depths)
        for part, whole in zip(walk(network), walk(model), strict=True):
            for name in ("heads", "qk_dim", "v_dim", "ffn_dim"):
                assert getattr(part.spec, name, 0) <= getattr(whole.spec, name, 0)
    blocks = [block for one in drawn for stage in one.stages for block in stage.blocks]
    if family in ("vit", "swin"):
        assert 0 < sum(block.heads == 0 for block in blocks) < len(blocks) / 4
        assert 0 < sum(block.ffn_dim == 0 for block in blocks) < len(blocks) / 4
    again = random.Random(0)
    assert [ModelScope(model).network(again).digest for _ in range(40)] == [
        one.digest for one in drawn
    ]


def test_wider_than_the_model_is_refused(tmp_path: Path) -> None:
    table = measure(job(tmp_path / "fake"), FakeMachine()).table
    wide = small_model("vit").to_dict()
    (block,) = wide["stages"][0]["blocks"]
    wide["stages"][0]["blocks"] = [block | {"repeat": 1}, block | {"repeat": 1, "ffn_dim": 200}]
    network = Architecture.from_dict(wide)
    with pytest.raises(MissingLatencyError) as caught:
        latency_ms(network, table)
    line = str(caught.value)
    assert line.startswith(
        "stages.0.blocks.1: the latency table 'fake' has no price for block vit ffn_dim=200 24->24 "
        "@ 4x4+1 (nearest row: block vit ffn_dim=96 24->24 @ 4x4+1)"
    )
    assert "slimnas latency build --model MODEL --device NAME" in line
    assert "\n" not in line
    assert estimate(network, table, allow_extrapolation=True).extrapolated == 1


@pytest.mark.parametrize("loads", [1, 9, 33])
def test_interrupted_build_goes_on(tmp_path: Path, loads: int) -> None:
    whole = measure(job(tmp_path / "whole"), FakeMachine())
    with pytest.raises(KeyboardInterrupt):
        measure(job(tmp_path / "part"), FakeMachine(fail_after=loads))
    again = measure(job(tmp_path / "part"), FakeMachine())
    assert (again.resumed > 0) == (loads > 1)
    for one, other in zip(again.table.rows, whole.table.rows, strict=True):
        assert (one.key, one.n) == (other.key, other.n)
        assert one.latency_ms == pytest.approx(other.latency_ms, abs=2e-6)


def test_journal_of_another_scope_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(job(tmp_path / "fake"), FakeMachine(fail_after=9))
    before = (tmp_path / "fake" / JOURNAL_FILE).read_bytes()
    with pytest.raises(
        LatencyTableError, match="belongs to another build: its covers is 'model small_vit"
    ):
        measure(job(tmp_path / "fake", "swin"), FakeMachine())
    of_a_space = replace(job(tmp_path / "fake"), scope=SpaceScope(small_space()))
    with pytest.raises(
        LatencyTableError, match="belongs to another build: its covers is 'model small_vit"
    ):
        measure(of_a_space, FakeMachine())
    assert (tmp_path / "fake" / JOURNAL_FILE).read_bytes() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_compute_what_the_network_does(family: str) -> None:
    model = pruned(small_model(family), random.Random(4))
    network = build(model, seed=7).eval()
    with seeded(7):
        chain = Chain(tuple(walk(model))).eval()
    image = model.input.shape
    x = torch.randn(2, 3, image.height, image.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network(x), chain(x))
        checked = 0
        for part in ModelScope(small_model(family)).components():
            folded, given = network_and_input((part,) * (2 if part.kind == "block" else 1), 2)
            out = folded(given)
            assert out.numel() == 2 * part.output.channels * part.output.positions
            checked += 1
    assert checked >= 17


def test_space_and_model_exclude_each_other(tmp_path: Path) -> None:
    both = ["build", "--space", "efficientformer_tiny", "--model", "x.yaml"]
    result = CliRunner().invoke(app, [*both, "--output", str(tmp_path / "here")])
    assert result.exit_code == 2
    assert "give --space or --model, and not both" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_build_prices_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(SMALL_MODELS["vit"])
    arguments = ["build", "--model", "model.yaml", "--rounds", "1", "--clock", "cpu"]
    arguments += ["--networks", "4", "--held-out", "6", "--precision", "100"]
    result = CliRunner().invoke(app, [*arguments, "--device", "here", "--json"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    table = LatencyTable.load(tmp_path / "lookup_tables" / "here")
    assert body["rows"] == len(table.rows)
    assert body["held_out"]["networks"] == 6
    pruned(small_model("vit"), random.Random(0)).save(Path("pruned.yaml"))
    result = CliRunner().invoke(app, ["estimate", "pruned.yaml", "--device", "here", "--json"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["latency_ms"] == pytest.approx(sum(row["latency_ms"] for row in body["rows"]))
    assert body["extrapolated"] == 0
