"""The pruning report: what its figures draw, what its page says, what its files hold."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from slimnas.arch.architecture import Architecture
from slimnas.errors import PruneError, RunFolderError
from slimnas.prune.ratios import RatioSet, channel_ratios
from slimnas.prune.sensitivity import sensitivity
from slimnas.prune.taylor import score
from slimnas.prune.widths import BlockPlan, WidthPlan, attention_dims, block_components
from slimnas.report.figures import HEAT, HEAT_STEPS, svg_bytes
from slimnas.report.pruning import FIGURE_NAMES, PrunedNetwork, PruneReport, write_report
from slimnas.report.pruning_curves import DROP_EDGES, importance_figure, sensitivity_figure
from slimnas.report.pruning_figures import ParetoPoint, channel_ratios_figure, pareto_figure
from slimnas.zoo.registry import get
from tests.prune_cases import ARCHITECTURES, FAMILIES, images, random_network, random_plan

HOSTILE = 'run <script>alert("x")</script> & $\\frac{1}{0}$ ü'


def plan_of(architecture: Architecture, share: float, gone: int | None = None) -> WidthPlan:
    """Keeps `share` of everything; the attention of block `gone` goes."""
    blocks = {}
    for place, (part, block) in enumerate(block_components(architecture)):
        heads, qk, v = attention_dims(block)
        left = 0 if place == gone else heads
        blocks[part.name] = BlockPlan(
            tuple(range(left)),
            (tuple(range(max(1, round(share * qk)))),) * left,
            (tuple(range(max(1, round(share * v)))),) * left,
            tuple(range(max(1, round(share * block.hidden(part.input.channels))))),
        )
    return WidthPlan(architecture.digest, blocks)


def ratios_of(
    name: str, shares: tuple[float, ...] = (0.75, 0.5), gone: int | None = None
) -> RatioSet:
    source = get(name).architecture
    plans = {f"macs-{share:g}": plan_of(source, share, gone) for share in shares}
    return RatioSet(
        source,
        tuple(
            channel_ratios(source, plan.architecture(source), plan, label=label)
            for label, plan in plans.items()
        ),
    )


def bars(figure: Figure) -> dict[str, list[float]]:
    """Heights by `axes/label`."""
    found = {}
    for axes in figure.axes:
        for container in axes.containers:
            assert isinstance(container, BarContainer)
            heights = [patch.get_height() for patch in container.patches]
            found[f"{axes.get_label()}/{container.get_label()}"] = heights
    return found


@pytest.mark.parametrize("width_in", [9.0, 4.0])
@pytest.mark.parametrize(
    ("model", "blocks", "with_attention"),
    [("deit_tiny", 12, 12), ("swin_tiny", 12, 12), ("efficientformer_l1", 15, 1)],
)
def test_bars_of_channel_ratios(
    model: str, blocks: int, with_attention: int, width_in: float
) -> None:
    ratios = ratios_of(model)
    figure = channel_ratios_figure(ratios, width_in)
    found = bars(figure)
    assert len(found) == 2 * 4 * 2  # budgets, kinds, pruned and unpruned
    for budget in ratios.budgets:
        for panel, kinds in (("Q, K, V", ("q", "k", "v")), ("FFN", ("ffn",))):
            for kind in kinds:
                key = f"{budget.label} {panel}/{kind}"
                own = [b for b in budget.blocks if b.kept(kind) is not None]
                assert len(own) == (blocks if kind == "ffn" else with_attention)
                assert found[key] == pytest.approx([b.ratio(kind) for b in own])
                before = [b.ratio(kind, pruned=False) for b in own]
                assert found[f"{key} unpruned"] == pytest.approx(before)
    heights = [axes.get_position().height for axes in figure.axes]
    assert min(heights) > 0.02


@pytest.mark.parametrize("width_in", [9.0, 4.0])
def test_parts_that_are_gone_are_crossed_and_stages_are_parted(width_in: float) -> None:
    figure = channel_ratios_figure(ratios_of("swin_tiny", (0.5,), gone=11), width_in)
    attention, ffn = figure.axes
    crosses = [line for line in attention.lines if line.get_marker() == "x"]
    assert sum(len(line.get_xdata()) for line in crosses) == 3  # type: ignore[arg-type]
    dashed = [line.get_xdata()[0] for line in ffn.lines if len(line.get_xdata()) == 2]  # type: ignore
    assert dashed == [1.5, 3.5, 9.5]
    assert [text.get_text() for text in attention.texts] == [
        "stage 1",
        "stage 2",
        "stage 3",
        "stage 4",
    ]
    words = [text.get_text() for text in figure.texts]
    assert any(word.startswith("kept on average: Q, K 46 %, V 46 %, FFN 50 %") for word in words)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width_in", [9.0, 4.0])
def test_importance_and_sensitivity_of_every_family(family: str, width_in: float) -> None:
    report = sample_report(family)
    assert report.scores is not None
    assert report.sensitivity is not None
    for plan in (None, report.networks[0].plan):
        figure = importance_figure(report.scores, report.source, plan, width_in)
        assert [axes.get_label() for axes in figure.axes] == ["qk", "v", "ffn"]
        assert all(axes.get_yscale() == "log" and axes.collections for axes in figure.axes)
    figure = sensitivity_figure(report.sensitivity, report.source, width_in)
    heats = [axes for axes in figure.axes if axes.get_label().endswith("heat")]
    cells = [p for axes in heats for p in axes.patches if isinstance(p, Rectangle)]
    assert len(cells) == len(report.sensitivity.points) > 10
    curves = [axes for axes in figure.axes if axes.get_label().endswith(("top1", "loss"))]
    assert len(curves) == 2 * len(heats) == 6
    points = sum(len(line.get_xdata()) - 1 for axes in curves for line in axes.lines)  # type: ignore
    assert points == 2 * len(cells)


def test_colours_of_the_heat_map() -> None:
    report = sample_report("vit")
    found = report.sensitivity
    assert found is not None
    drops = [0.0, 0.6, 1.5, 3.0, 7.0, 15.0, 60.0]
    assert len(drops) == len(DROP_EDGES) + 1 == HEAT_STEPS
    points = [
        dataclasses.replace(found.points[0], share=(i + 1) / 10, top1=found.top1 - drop)
        for i, drop in enumerate(drops)
    ]
    figure = sensitivity_figure(dataclasses.replace(found, points=tuple(points)), report.source)
    cells = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    given = [tuple(round(255 * c) for c in cell.get_facecolor()[:3]) for cell in cells]
    assert given == [tuple(bytes.fromhex(light[1:])) for light, _ in HEAT]


@pytest.mark.parametrize(("scale", "unit"), [(10**6, "GMACs"), (10**4, "MMACs")])
def test_pareto(scale: int, unit: str) -> None:
    points = [ParetoPoint(name, 900 * scale, top1) for name, top1 in (("a", 60.0), ("b", 70.0))]
    star = ParetoPoint("m, unpruned", 1200 * scale, 80.0)
    figure = pareto_figure(points, star, error_points=1.5)
    (axes,) = figure.axes
    assert axes.get_xlabel() == f"{unit} for one image"
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["a", "b", "m, unpruned"]
    assert {t.get_text() for t in axes.texts} == {"60.0", "70.0", "80.0"}


def sample_report(family: str = "vit", **changes: object) -> PruneReport:
    source = ARCHITECTURES[family]
    network = random_network(source)
    batches = [(images(source), torch.tensor([1, 3]))]
    scores = score(network, batches, "fisher")
    plans = [random_plan(source, seed) for seed in (0, 3)]
    networks = tuple(
        PrunedNetwork(
            label=f"macs-{number}",
            budget=f"{number} MACs",
            architecture=plan.architecture(source),
            plan=plan,
            top1={"one shot": 60.0 + number, "corrected": 65.5 + number},
            latency_ms={"by table": 1.5 + number},
            gap=0.0123,
        )
        for number, plan in enumerate(plans)
    )
    report = PruneReport(
        name="prune-sample",
        source=source,
        networks=networks,
        top1=81.7,
        images=650,
        scores=scores,
        sensitivity=sensitivity(network, scores, batches, shares=(0.3, 0.6)),
        latency_ms={"by table": 4.5},
        provenance={"weights": "made up", "criterion": "fisher", "nested": {"seed": 17}},
        versions={"slimnas": "0"},
        command="slimnas prune --model x",
        warning="Weights: none of yours.",
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def test_report(tmp_path: Path) -> None:
    report = sample_report()
    written = write_report(report, tmp_path)
    figures = {f"{name}.{kind}" for name in FIGURE_NAMES for kind in ("png", "svg")}
    data = {"report.html", "channel_ratios.json", "channel_ratios.csv", "sensitivity.csv"}
    assert set(written) == figures | data
    assert next(iter(written)) == "report.html"
    assert all(path.stat().st_size > 300 for path in written.values())
    for name in FIGURE_NAMES:
        assert written[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        ElementTree.fromstring(written[f"{name}.svg"].read_text())
    assert RatioSet.load(written["channel_ratios.json"]).budgets == report.ratios.budgets
    with written["sensitivity.csv"].open() as file:
        assert report.sensitivity is not None
        assert len(list(csv.DictReader(file))) == len(report.sensitivity.points)

    page = written["report.html"].read_text()
    assert not re.search(r'(src|href)="(https?:|//)', page)  # self-contained
    assert page.count("<svg ") == 2 * len(FIGURE_NAMES)
    for words in ("Weights: none of yours.", "81.7 %", "66.5", "made up", "nested.seed", "17",
                  "slimnas prune --model x", "1.23 %", report.source.digest):  # fmt: skip
        assert words in page
    for block in report.ratios.budgets[0].blocks:
        assert page.count(f"<code>{block.name}</code>") == 2
    assert not list(tmp_path.rglob(".*"))
    first = written["report.html"].read_bytes()
    assert write_report(report, tmp_path)["report.html"].read_bytes() == first


def test_kinds_and_what_they_need(tmp_path: Path) -> None:
    bare = sample_report(scores=None, sensitivity=None, top1=None)
    written = write_report(bare, tmp_path, ["channel_ratios"])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "channel_ratios.png",
        "channel_ratios.svg",
    }
    assert "importance" not in written["report.html"].read_text().lower().split("<body>")[1]
    with pytest.raises(PruneError, match="importance was not estimated in this run"):
        write_report(bare, tmp_path / "a", ["importance"])
    with pytest.raises(PruneError, match=r"got 'importanc' \(did you mean 'importance'\?\)"):
        write_report(bare, tmp_path / "a", ["importanc"])  # type: ignore[list-item]
    assert not (tmp_path / "a").exists()


def test_hostile_text_is_text(tmp_path: Path) -> None:
    report = sample_report()
    networks = (dataclasses.replace(report.networks[0], budget=HOSTILE, label=HOSTILE),)
    report = dataclasses.replace(
        report, name=HOSTILE, warning=HOSTILE, command=HOSTILE, networks=networks
    )
    page = write_report(report, tmp_path)["report.html"].read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_report(sample_report(), tmp_path / "file" / "below")


def test_a_figure_drawn_again_has_the_same_bytes_and_whole_references() -> None:
    report = sample_report()
    found = report.sensitivity
    assert found is not None
    drawn = {svg_bytes(sensitivity_figure(found, report.source, 4.0)) for _ in range(4)}
    (text,) = (svg.decode() for svg in drawn)
    ids = re.findall(r'\bid="([^"]*)"', text)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]*)', text))
    assert len(set(ids)) == len(ids)
    assert used
    assert used <= set(ids)
