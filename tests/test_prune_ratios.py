"""Channel ratios against hand counts, and sensitivity against whole networks pruned by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from slimnas.arch.cost import cost
from slimnas.errors import PruneError, SpecError
from slimnas.nn.build import Network
from slimnas.prune.apply import apply_plan
from slimnas.prune.ratios import CSV_COLUMNS, KINDS, RatioSet, channel_ratios, table_rows
from slimnas.prune.scores import Scores
from slimnas.prune.sensitivity import SensitivityPoint, sensitivity, share_plan
from slimnas.prune.taylor import score
from slimnas.prune.widths import BlockPlan, WidthPlan
from slimnas.zoo.registry import get
from tests.prune_cases import (
    ARCHITECTURES,
    FAMILIES,
    images,
    random_network,
    random_plan,
    with_block,
)

VIT = ARCHITECTURES["vit"]
HALF = BlockPlan((0, 2), ((0, 1),) * 2, ((0, 1, 2),) * 2, (0, 3, 4))
GONE = BlockPlan((), (), (), ())


def ratio_set(family: str = "vit", seeds: tuple[int, ...] = (0, 1)) -> RatioSet:
    source = ARCHITECTURES[family]
    plans = [random_plan(source, seed) for seed in seeds]
    budgets = tuple(
        channel_ratios(source, plan.architecture(source), plan, label=f"macs-{i}G")
        for i, plan in enumerate(plans)
    )
    return RatioSet(source, budgets, {"criterion": "random", "seed": 0})


def test_published_widths_have_the_published_ratios() -> None:
    for name, blocks in (("deit_tiny", 12), ("swin_tiny", 12), ("deit_base", 12)):
        source = get(name).architecture
        whole = channel_ratios(source, source, WidthPlan.full(source))
        assert len(whole.blocks) == blocks
        for block in whole.blocks:
            assert [block.ratio(kind) for kind in KINDS] == [1, 1, 1, 4]
            assert [block.kept(kind) for kind in KINDS] == [1, 1, 1, 1]


def test_ratios_by_hand() -> None:
    plan = with_block(WidthPlan.full(VIT), "stages.0.blocks.0", HALF)
    plan = with_block(plan, "stages.0.blocks.1", GONE)
    pruned = plan.architecture(VIT)
    found = channel_ratios(VIT, pruned, plan, label="x")
    first, second, third = found.blocks
    assert [first.ratio(kind) for kind in KINDS] == [4 / 24, 4 / 24, 6 / 24, 3 / 24]
    assert [first.ratio(kind, pruned=False) for kind in KINDS] == [0.5, 0.5, 15 / 24, 8 / 24]
    assert [first.kept(kind) for kind in KINDS] == [1 / 3, 1 / 3, 0.4, 3 / 8]
    assert second.vanishes
    assert [second.ratio(kind) for kind in KINDS] == [0, 0, 0, 0]
    assert third.kept("ffn") is None  # it never had one
    assert found.mean_kept("ffn") == pytest.approx((3 / 8 + 0) / 2)
    assert (found.macs, found.params) == (cost(pruned).macs, cost(pruned).params)
    rows = table_rows(found)
    assert rows[1][1:3] == ("0.50 > 0.17", "0.50 > 0.17")
    assert (rows[2][-1], rows[3][4]) == ("removed", "")


def test_a_plan_must_leave_the_given_architecture() -> None:
    plan = with_block(WidthPlan.full(VIT), "stages.0.blocks.0", HALF)
    with pytest.raises(PruneError, match="the plan must leave tiny_vit of tiny_vit"):
        channel_ratios(VIT, VIT, plan)
    one = ratio_set().budgets[0]
    with pytest.raises(PruneError, match="budgets of different names"):
        RatioSet(VIT, (one, one))


@pytest.mark.parametrize("family", FAMILIES)
def test_json_and_csv_hold_everything(family: str, tmp_path: Path) -> None:
    ratios = ratio_set(family)
    ratios.save_json(tmp_path / "a.json")
    again = RatioSet.load(tmp_path / "a.json")
    assert again == ratios
    again.save_json(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    ratios.save_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    blocks = [(b.label, block) for b in ratios.budgets for block in b.blocks]
    assert len(rows) == len(blocks) == 2 * sum(ratios.source.depths)
    assert tuple(rows[0]) == CSV_COLUMNS
    for row, (label, block) in zip(rows, blocks, strict=True):
        assert (row["budget"], row["block"]) == (label, block.name)
        for kind in KINDS:
            assert float(row[f"{kind}_after"]) == pytest.approx(block.ratio(kind), rel=1e-5)
            before = block.ratio(kind, pruned=False)
            assert float(row[f"{kind}_before"]) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["budgets"][0]["blocks"].pop(), "its blocks must be those of tiny_vit"),
        (lambda d: d["budgets"][0]["blocks"][0].update(embedding=25), "its blocks must be those"),
        (lambda d: d["budgets"][0]["blocks"][0].update(stage="a"), "stage"),
        (lambda d: d.update(schema="slimnas/architecture/1"), "slimnas/channel-ratios/1"),
        (lambda d: d.update(more=1), "unknown key 'more'"),
    ],
)
def test_damaged_files_are_refused(change: object, message: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(ratio_set().to_dict()))
    change(data)  # type: ignore[operator]
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises((PruneError, SpecError), match=message):
        RatioSet.load(tmp_path / "x.json")


def scored(family: str = "vit") -> tuple[Network, Scores, list[tuple[torch.Tensor, torch.Tensor]]]:
    source = ARCHITECTURES[family]
    network = random_network(source)
    batches = [(images(source, seed), torch.tensor([1, 3])) for seed in (1, 2)]
    return network, score(network, batches, "fisher"), batches


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivity_is_that_of_whole_networks(family: str) -> None:
    network, scores, batches = scored(family)
    network.train()
    found = sensitivity(network, scores, batches, shares=(0.3, 0.9))
    assert network.training
    network.eval()
    pixels, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        logits = network(pixels)
    assert found.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-9)
    assert len(found.points) >= 8
    for point in found.points:
        plan = share_plan(network, scores, point.block, point.kind, point.share)
        with torch.no_grad():
            logits = apply_plan(plan, network)(pixels)
        assert point.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-9)
        assert point.top1 == 100 * float((logits.argmax(1) == labels).double().mean())
        assert 0 < point.removed < point.units


def test_the_least_important_go_and_one_stays() -> None:
    network, scores, _ = scored()
    name = "stages.0.blocks.0"
    plan = share_plan(network, scores, name, "ffn", 0.5).blocks[name]
    assert set(plan.ffn) == set(np.argsort(scores.blocks[name].ffn)[4:].tolist())
    plan = share_plan(network, scores, name, "v", 0.99).blocks[name]
    kept = scores.blocks[name].v.argmax(axis=1)
    assert [dims for (dims,) in plan.v] == kept.tolist()
    assert plan.qk == ((0, 1, 2, 3),) * 3


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    network, scores, batches = scored()
    path = tmp_path / "sensitivity.jsonl"
    seen: list[SensitivityPoint] = []

    def stop(done: int, total: int, point: SensitivityPoint) -> None:
        seen.append(point)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(network, scores, batches, shares=(0.5,), journal=path, on_point=stop)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    path.write_bytes(b"".join(lines) + b'{"block": "sta')  # a line that was never finished
    whole = sensitivity(network, scores, batches, shares=(0.5,), journal=path)
    assert whole == sensitivity(network, scores, batches, shares=(0.5,))
    assert list(whole.points[:5]) == seen
    assert len(path.read_bytes().splitlines()) == 1 + len(whole.points)
    whole.save_csv(tmp_path / "s.csv")
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + len(whole.points)

    other = [(pixels + 1, labels) for pixels, labels in batches]
    with pytest.raises(PruneError, match="belongs to another run: its data"):
        sensitivity(network, scores, other, shares=(0.5,), journal=path)
    path.write_bytes(lines[0] + b'{"block": 1}\n')
    with pytest.raises(PruneError, match=r"jsonl:2: damaged line"):
        sensitivity(network, scores, batches, shares=(0.5,), journal=path)
    path.write_bytes(b"{}\n")
    with pytest.raises(PruneError, match="must begin with"):
        sensitivity(network, scores, batches, shares=(0.5,), journal=path)


def test_sensitivity_refusals() -> None:
    network, scores, batches = scored()
    with pytest.raises(PruneError, match=r"shares must lie between 0 and 1, got \[0.5, 1\]"):
        sensitivity(network, scores, batches, shares=(0.5, 1))
    with pytest.raises(PruneError, match="at least one image"):
        sensitivity(network, scores, [])
    with pytest.raises(PruneError, match="must be for tiny_vit"):
        sensitivity(network, replace(scores, architecture="0" * 64), batches)
