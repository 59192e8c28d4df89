"""The run report, built from a real slimming run over a made-up table and accuracy."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from slimnas.arch.space import SearchSpace, Selection
from slimnas.arch.walk import component_cost
from slimnas.errors import RunFolderError
from slimnas.latency import OVERHEAD, DeviceInfo, LatencyTable, PriceRow, estimate, price_key
from slimnas.latency.spaces import space_components
from slimnas.report import DataSummary, FoundNetwork, ReferenceNetwork, RunReport, write_report
from slimnas.report.figures import HEAT_STEPS, PALETTE, _variables, heat
from slimnas.report.pictures import PART_TYPES, dropped_at, latency_parts
from slimnas.report.plots import training_figure
from slimnas.report.tables import compact, fixed, standard_error_points
from slimnas.search.importance import ImportanceRecord
from slimnas.search.measurements import Measurement
from slimnas.search.slimming import Slimmer

SPACE = SearchSpace.load("efficientformer_tiny").with_classes(10)
HOSTILE = 'run <script>alert("x")</script> & $\\frac{1}{0}$ ü'


def device(**changes: object) -> DeviceInfo:
    fields = {
        "name": "madeup",
        "device": "Made-up phone",
        "soc": "none",
        "os": "none 1",
        "runtime": {"name": "torch", "version": "2.13.0"},
        "compute_unit": "cpu",
        "dtype": "fp32",
        "threads": 2,
        "protocol": "closed form: 0.004 ms per component plus 1 ms per 1.2 GMACs and 9 M params",
        "date": "2025-01-01",
        "tool_version": "slimnas 0",
        "kind": "estimated",
        "errors": [
            {
                "what": "leave one out over published networks",
                "networks": 14,
                "mape_percent": 4.1,
                "bias_percent": -0.6,
                "max_percent": 11.8,
                "spearman": 0.97,
            }
        ],
        "interval": {
            "level": 0.9,
            "low_percent": 7.5,
            "high_percent": 9.2,
            "basis": "leave-one-out residuals",
        },
        "sources": ["EfficientFormer, table 1"],
    }
    return DeviceInfo.model_validate({**fields, **changes})


def made_up_table(space: SearchSpace) -> LatencyTable:
    rows = {}
    for component in space_components(space):
        part = component_cost(component)
        ms = 0.004 + part.macs / 1.2e9 + part.params / 9e7
        key = price_key(component)
        rows[key] = PriceRow(key, ms, 0.04 * ms, 14, "fitted")
    rows[OVERHEAD] = PriceRow(OVERHEAD, 0.21, 0.02, 14, "fitted")
    return LatencyTable(device(), tuple(rows.values()))


def made_up_importance(space: SearchSpace) -> ImportanceRecord:
    stages = []
    for i, stage in enumerate(space.stages):
        slots = []
        for j in range(stage.slots):
            base = 0.9 * math.sin(1.7 * i + 2.3 * j)
            slots.append({c: base * (c != "identity") + 0.2 * (c == "mb3d") for c in stage.choices})
        stages.append(tuple(slots))
    return ImportanceRecord(tuple(stages), {"supernet": "0f" * 32, "step": 1200})


def made_up_top1(space: SearchSpace, selection: Selection) -> float:
    full = space.largest(0)
    share = sum(w / m for w, m in zip(selection.widths, full.widths, strict=True)) / 4
    depth = len(selection.active()) / len(full.active())
    noise = zlib.crc32(repr(selection).encode()) % 1000 / 1000 - 0.5
    bonus = 0.4 * sum(choice == "mb3d" for *_, choice in selection.active())
    return 91 - 14 * (1 - share) ** 2 - 11 * (1 - depth) ** 1.5 + bonus + 1.1 * noise


def sample_report(
    targets_ms: tuple[float, ...] = (2.0, 1.6),
    name: str = "tiny-1.6ms",
    space: SearchSpace = SPACE,
    table: LatencyTable | None = None,
    fill: float = 0.0,
) -> RunReport:
    table = table or made_up_table(space)
    importance = made_up_importance(space)

    def price(selection: Selection) -> float:
        return estimate(space.architecture(selection), table).latency_ms

    slimmer = Slimmer(space, importance, price, lambda s: made_up_top1(space, s), fill=fill)
    provenance = {"seed": 0, "table": "ab" * 32, "images_per_evaluation": 256}
    trajectory, reached = slimmer.run(slimmer.begin(provenance), targets_ms)
    found = []
    for target_ms in targets_ms:
        selection, _, top1 = trajectory.states[reached[target_ms]]
        architecture = space.architecture(selection, name=f"tiny_{target_ms:g}ms")
        found.append(
            FoundNetwork(
                architecture=architecture,
                estimate=estimate(architecture, table),
                target_ms=target_ms,
                selection=selection,
                search_top1=top1,
                steps=reached[target_ms],
                folder=f"runs/tiny-1.6ms/{target_ms:g}ms",
            )
        )
    blocks = (["mb4d"] * 3, ["mb4d"] * 2, ["mb4d"] * 6, ["mb4d"] * 3 + ["mb3d"])
    padded = (
        (*path, *["identity"] * (stage.slots - len(path)))
        for path, stage in zip(blocks, space.stages, strict=True)
    )
    l1 = Selection((48, 96, 224, 448), tuple(padded))
    reference = space.architecture(l1, name="efficientformer_l1")
    training = tuple(
        {
            "step": step,
            "loss": 0.6 + 1.8 * math.exp(-step / 300),
            "search_top1": 90 - 70 * math.exp(-step / 200),
            "tau": 5 * 0.2 ** (step / 1200),
            "images_per_s": 410.0,
        }
        for step in range(100, 1201, 100)
    )
    return RunReport(
        name=name,
        space=space,
        device=table.device,
        trajectory=trajectory,
        importance=importance,
        found=tuple(found),
        reference=ReferenceNetwork(reference, estimate(reference, table), search_top1=71.9),
        data=DataSummary("digits", 10, {"train": 1203, "search": 297, "test": 297}, 64, 256),
        settings={"seed": 0, "mixing": "sampled", "optimizer": {"lr": 5e-4, "betas": [0.9, 0.999]}},
        training=training,
        command="slimnas search --target-latency 2ms --target-latency 1.6ms --device madeup",
        versions={"slimnas": "0.1.0", "torch": "2.13.0", "python": "3.11.0"},
        files={"runs/tiny-1.6ms/1.6ms/architecture.yaml": "the network found for 1.6 ms"},
        next_commands={"Keep it": "slimnas zoo add runs/tiny-1.6ms"},
    )


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text outside style elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.words.append(data)

    def values(self, attribute: str) -> list[str]:
        return [v for _, attrs in self.tags if (v := attrs.get(attribute)) is not None]


@pytest.fixture(scope="module")
def report() -> RunReport:
    return sample_report()


@pytest.fixture(scope="module")
def folder(report: RunReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_report(report, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text("utf-8"))


def inline_figures(text: str) -> Iterator[str]:
    yield from re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)


def test_page_needs_nothing_but_itself(folder: Path, page: Page) -> None:
    text = (folder / "report.html").read_text("utf-8")
    assert not {"script", "link", "img", "iframe", "object", "base"} & {t for t, _ in page.tags}
    assert not page.values("src")
    assert "@import" not in text
    local = [v for v in page.values("href") + page.values("xlink:href") if not v.startswith("#")]
    assert local == [f"figures/{path}" for path in expected_figures()]
    assert all((folder / path).is_file() for path in local)
    addresses = set(re.findall(r'https?://[^"\s<)]+', text))
    assert addresses == {"http://www.w3.org/1999/xlink"}  # a namespace, nothing is fetched


def expected_figures() -> list[str]:
    names = ["trajectory", "importance"]
    for target in ("2ms", "1.6ms"):
        names += [f"architecture-{target}", f"latency-{target}"]
    return [f"{name}.{kind}" for name in (*names, "training") for kind in ("svg", "png")]


def test_every_step_and_candidate_is_there(report: RunReport, page: Page) -> None:
    steps = report.trajectory.steps
    assert page.values("data-step") == [str(n) for n in range(1, len(steps) + 1)]
    expected = [f"{n}.{c}" for n, s in enumerate(steps, 1) for c in range(1, len(s.candidates) + 1)]
    assert len(expected) > 150
    assert page.values("data-candidate") == expected
    assert page.values("class").count("taken") == len(steps)
    text = " ".join(page.words)
    assert all(step.taken.label in text for step in steps)


def test_result_names_every_figure(report: RunReport, page: Page) -> None:
    text = " ".join(" ".join(page.words).split())
    for network in report.found:
        assert " · ".join(map(str, network.architecture.widths)) in text
        assert " · ".join(map(str, network.architecture.depths)) in text
        assert f"{network.estimate.latency_ms:.3f}" in text
        assert f"{network.cost.params:,}" in page.values("title")
        assert f"{network.cost.macs:,}" in page.values("title")
        assert network.architecture.digest in text
    for words in (
        "efficientformer_l1",
        "published, same table",
        "71.9",
        "estimated, not measured",
        "mean error 4.1 %",
        "trained and judged at 64 px, deployed at 224 × 224: a proxy",
        "optimizer.lr 0.0005",
        report.command,
        "slimnas zoo add runs/tiny-1.6ms",
        "ab" * 32,
    ):
        assert words in text


@pytest.mark.parametrize("word", ["nan", "NaN", "inf", "None", "-0.00", "undefined"])
def test_no_number_is_missing(page: Page, word: str) -> None:
    text = " ".join(page.words)
    assert not re.search(rf"(?<![\w.]){re.escape(word)}(?![\w])", text)


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) > 50
    assert len(set(ids)) == len(ids)
    wanted = [v[1:] for v in page.values("href") + page.values("xlink:href") if v[0] == "#"]
    wanted += re.findall(r"url\(#([^)]*)\)", " ".join(page.values("clip-path")))
    assert len(wanted) > 50
    assert set(wanted) <= set(ids)


def test_figures_parse_and_follow_the_theme(folder: Path) -> None:
    files = sorted((folder / "figures").glob("*.svg"))
    assert len(files) == 7
    for path in files:
        ElementTree.fromstring(path.read_text("utf-8"))
    inline = list(inline_figures((folder / "report.html").read_text("utf-8")))
    assert len(inline) == 2 * len(files)  # one layout for a desktop, one for a phone
    for text in inline:
        ElementTree.fromstring(text)
        assert "var(--c-ink)" in text
        assert not set(re.findall(r": (#[0-9a-f]{6})", text)), "a colour that has no dark twin"
    assert len(list((folder / "figures").glob("*.png"))) == 7


def test_same_run_gives_the_same_bytes(report: RunReport, folder: Path, tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 23.0, "lines.linewidth": 9.0}):  # somebody's matplotlibrc
        written = write_report(sample_report(), tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in written] == [
        "report.html",
        *(f"figures/{name}" for name in expected_figures()),
    ]
    for path in written:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path.name


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    table = dataclasses.replace(made_up_table(SPACE), device=device(device=HOSTILE))
    report = dataclasses.replace(
        sample_report((3.9,), name=HOSTILE, table=table),
        settings={"note": HOSTILE},
        command=HOSTILE,
        files={HOSTILE: HOSTILE},
        next_commands={HOSTILE: HOSTILE},
    )
    write_report(report, tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert " ".join(page.words).count(HOSTILE) == 10  # name, device and command among them


def test_a_target_the_largest_network_meets(tmp_path: Path) -> None:
    """No steps, no training metrics, no reference, no known error: everything still reads."""
    measured = device(kind="measured", errors=[], interval=None, threads=None, sources=[])
    table = dataclasses.replace(made_up_table(SPACE), device=measured)
    report = dataclasses.replace(
        sample_report((50.0,), table=table), training=(), reference=None, versions={}
    )
    assert not report.trajectory.steps
    written = write_report(report, tmp_path)
    assert len(written) == 1 + 2 * 4
    text = " ".join(" ".join(Page((tmp_path / "report.html").read_text("utf-8")).words).split())
    assert "no step was needed" in text
    assert "Not known: nobody has compared this table" in text
    assert "estimated" not in text


def test_measured_latency_is_shown(report: RunReport, tmp_path: Path) -> None:
    one = report.found[0]
    first = Measurement(
        target_ms=one.target_ms,
        number=1,
        steps=one.steps,
        architecture="ab" * 32,
        predicted_ms=1.97,
        interval_ms=(1.9, 2.01),
        measured_ms=2.034,
        error_ms=0.004,
        reference_ms=0.3,
        date="2026-01-01",
    )
    last = dataclasses.replace(first, number=2, measured_ms=1.984, architecture="cd" * 32)
    found = dataclasses.replace(one, measurement=last, rounds=(first, last))
    changes = {"found": (found,), "regimes": ("stage 3 at 14x14, mb4d: launch-bound",)}
    write_report(dataclasses.replace(report, **changes), tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text("utf-8")).words)
    text = " ".join(text.split())
    for words in (
        "1.98 ms, measured",
        "99.2 %, standard error 0.2 %",
        "2.034 ± 0.004 +3.2 outside the interval 101.7 above the target, slimmed on",
        "1.984 ± 0.004 +0.7 99.2 answers the target",
        "stage 3 at 14x14, mb4d: launch-bound",
    ):
        assert words in text
    assert "Not measured" not in text


def test_why_nothing_was_measured_is_shown(report: RunReport, tmp_path: Path) -> None:
    reason = "madeup: must be a table measured on this machine"
    write_report(dataclasses.replace(report, unmeasured=reason), tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text("utf-8")).words)
    assert f"Not measured: {reason}." in text
    assert "Measured on the device" not in text


def test_filling_up_is_told_apart(tmp_path: Path) -> None:
    """Steps that grow the network say so, and what came back is not shown as dropped."""
    report = sample_report(fill=0.99)
    grown = [step for step in report.trajectory.steps if step.phase != "slim"]
    assert grown
    write_report(report, tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text("utf-8")).words)
    assert text.count("fills up") + text.count("one of a pair that fits better") == len(grown)
    final = report.trajectory.states[-1][0]
    dropped = dropped_at(report)
    for i, path in enumerate(final.paths):
        for j, choice in enumerate(path):
            assert ((i, j) in dropped) == (choice == "identity")


def test_folder_that_cannot_be_made_is_one_line(report: RunReport, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunFolderError, match=r"figures.*cannot be written.*--output"):
        write_report(report, tmp_path / "taken")


def test_latency_parts_add_up(report: RunReport) -> None:
    for network in report.found:
        parts = latency_parts(network.estimate)
        assert list(parts)[:2] == ["stem", "stage 1"]
        assert set(list(parts)[-2:]) == {"head", "overhead"}
        assert {kind for kinds in parts.values() for kind in kinds} <= set(PART_TYPES)
        total_ms = sum(sum(kinds.values()) for kinds in parts.values())
        assert total_ms == pytest.approx(network.estimate.latency_ms, rel=1e-12)
        pooling = sum(r.latency_ms for r in network.estimate.rows if r.key.type == "mb4d")
        assert sum(kinds.get("mb4d", 0) for kinds in parts.values()) == pytest.approx(pooling)


def test_dropped_slots_are_the_identity_slots(report: RunReport) -> None:
    last = report.trajectory.states[-1][0]
    empty = {
        (i, j)
        for i, slots in enumerate(last.paths)
        for j, choice in enumerate(slots)
        if choice == "identity"
    }
    assert len(empty) >= 3
    assert set(dropped_at(report)) == empty


def test_palette_colours_are_told_apart() -> None:
    light = [pair[0] for pair in _variables().values()]
    assert len(light) == len(PALETTE) + HEAT_STEPS + 2
    assert len(set(light)) == len(light)  # inlining maps a colour back to its variable


@pytest.mark.parametrize("dark", [False, True])
def test_text_on_colour_has_contrast(dark: bool) -> None:
    """WCAG contrast of at least 4.5 for text on blocks and heat cells, 3 for chart colours."""
    named = {pair[0]: pair[dark] for pair in _variables().values()}
    colour = {name: pair[dark] for name, pair in PALETTE.items()}
    texts = [(colour[f"on_{name}"], colour[name]) for name in ("mb4d", "mb3d", "other")]
    texts += [(colour[name], colour["paper"]) for name in ("ink", "muted", "target")]
    texts.append((colour["ink"], colour["down"]))
    for step in range(HEAT_STEPS):
        fill, text = heat(step)
        texts.append((named[text], named[fill]))
    assert len(texts) == 14
    for text, fill in texts:
        assert contrast(text, fill) >= 4.5, (text, fill)
    for name in ("mb4d", "mb3d", "width", "target"):
        assert contrast(colour[name], colour["paper"]) >= 3, name


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two `#rrggbb` colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_training_without_a_metric() -> None:
    assert training_figure(()) is None
    assert training_figure(({"step": 1.0, "loss": math.nan},)) is None
    figure = training_figure(({"step": 1.0, "loss": 2.0}, {"step": 2.0, "tau": 1.0}))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "training loss",
        "Gumbel temperature",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (123.4, "123"),
        (math.inf, "–"),
        (None, "–"),
    ],
)
def test_compact(value: float | None, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-0.0001, "0.00"), (-0.1, "-0.10"), (2.0, "2.00"), (math.nan, "–")]
)
def test_fixed(value: float, text: str) -> None:
    assert fixed(value, 2) == text


def test_standard_error() -> None:
    assert standard_error_points(50.0, 100) == pytest.approx(5.0)
    assert standard_error_points(100.0, 100) == 0.0
    assert standard_error_points(50.0, 0) is None
