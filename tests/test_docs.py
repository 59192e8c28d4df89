"""What is written down runs: every code block of the README and the docs.

`slimnas` commands run in a working directory like a reader's, except that `search` stops where
training would start, and `latency` commands where timing or its results would be needed. Shell
commands that set the project up are what CI runs from the README.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_world import save_table
from PIL import Image
from prune_cases import ARCHITECTURES, random_scores

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.cli.main import main
from slimnas.data.splits import open_data
from slimnas.nn.build import build
from slimnas.prune.costs import parse_budget
from slimnas.prune.ratios import RatioSet, channel_ratios
from slimnas.prune.select import select
from slimnas.search.config import SearchConfig
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import TrainedSupernet, save_supernet, weights_digest
from slimnas.train.network_recipe import NetworkRecipe
from slimnas.train.recipes import override_recipe
from slimnas.zoo.entry import save_model
from slimnas.zoo.metrics import Metric
from slimnas.zoo.registry import add, get

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = Path("runs/efficientformer_tiny-digits-iphone12-1.6ms")
PRUNED = Path("runs/prune-deit_tiny-train")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETUP = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e "
LONG_MEASURING = (
    "build.build_table",
    "build.build_shard",
    "shards.merge",
    "local.require_measured_here",
    "kit.kit_runtime",
    "imported.import_results",
)
LONG_ANALYSES = (
    "attention.run_study",
    "memory.profile_network",
    "heads.head_similarity",
    "spectrum.spectra",
    "share_run.run_share_study",
    "ablate.run_ablation",
    "kept.run_importance",
    "ranking.run_ranking",
)
ANALYSES = ("attention", "memory", "mhsa-share", "heads", "spectrum", "ablate", "ranking")
LONG_COMMANDS = [["space", "record"], *(["analyze", word] for word in ANALYSES)]
MEASURING = ("build", "merge", "validate", "kit", "import")
LAUNCHERS = ("accelerate launch ", "torchrun ")
NEEDS_OTHER_DATA = ("shards/", "uoft-cs/", "parquet", "cifar10")


class LongWorkError(Exception):
    """Raised where a documented command would train, slim or measure."""


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for found, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield page.name, text


def commands() -> list[tuple[str, str]]:
    lines = ((page, line) for page, text in blocks("bash") for line in text.splitlines())
    return [(page, line.strip()) for page, line in lines if line.strip()]


SLIMNAS = [(page, line) for page, line in commands() if line.startswith("slimnas ")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything the docs talk about."""
    monkeypatch.chdir(tmp_path)
    space = SearchSpace.load("efficientformer_tiny")
    smallest = space.architecture(space.smallest()[0]).with_head(classes=10)
    weights = build(smallest).state_dict()
    metrics = {"search_top1_percent": Metric(98.3, "a test")}
    save_model(RUN, architecture=smallest, weights=weights, metrics=metrics)
    for device in ("local", "pi5"):
        save_table(tmp_path / "lookup_tables" / device, space, space.with_classes(2))
    hybrid = SearchSpace.load("hybrid_tiny")
    save_table(tmp_path / "lookup_tables" / "hybrid", hybrid, hybrid.with_classes(2))
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(50):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    for _, text in blocks("csv"):
        (tmp_path / "points.csv").write_text(text)
    for page, text in blocks("yaml"):
        if page == "formats.md" and "search-space/1" in text:
            (tmp_path / "two_stages.yaml").write_text(text)
        if "slimnas/recipe/1" in text:
            (tmp_path / "recipe.yaml").write_text(text)

    def started(*_: Any, **__: Any) -> None:
        raise LongWorkError("all is well so far")

    monkeypatch.setattr("slimnas.search.run.train_supernet", started)
    monkeypatch.setattr("slimnas.search.run.open_evaluator", started)  # with --supernet
    monkeypatch.setattr("slimnas.search.record_run.run_from_record", started)  # from a record
    for long_work in LONG_MEASURING:
        monkeypatch.setattr(f"slimnas.measure.{long_work}", started)
    monkeypatch.setattr("slimnas.prune.pretrained.open_start", started)
    monkeypatch.setattr("slimnas.train.run.fit", started)
    for long_work in LONG_ANALYSES:
        monkeypatch.setattr(f"slimnas.analysis.{long_work}", started)
    save_pruned_run()
    return tmp_path


def save_pruned_run() -> None:
    """What `slimnas prune` leaves of a DeiT-T at one budget."""
    source = get("deit_tiny").architecture
    budget = parse_budget("macs", "0.9G", source)
    chosen = select(source, random_scores(source), budget, name="deit_small_enough")
    ratios = channel_ratios(source, chosen.architecture, chosen.plan, label="macs_0.9G")
    RatioSet(source, (ratios,)).save_json(PRUNED / "channel_ratios.json")
    small = ARCHITECTURES["vit"]  # found networks are exported: the smaller the faster
    weights = build(small).state_dict()
    save_model(PRUNED / "found" / "macs_0.9G", architecture=small, weights=weights, metrics={})


def test_the_readme_begins_with_two_commands() -> None:
    first, second, *_ = [text for page, text in blocks("bash") if page == "README.md"]
    assert (
        first == f"{SETUP}. && .venv/bin/slimnas search --target-latency 1.6ms --device iphone12\n"
    )
    assert second == f"{SETUP}'.[test]' && .venv/bin/python -m pytest -n 2 --dist loadfile\n"
    ci = (ROOT / ".ci" / "run").read_text()
    assert "readme_command 1" in ci
    assert "readme_command 2" in ci


def test_it_looks_at_every_block() -> None:
    assert len(SLIMNAS) == 92
    assert len(list(blocks("python"))) == 2
    assert len(list(blocks("yaml"))) == 3
    others = [line for _, line in commands() if not line.startswith("slimnas ")]
    known = (SETUP, ".venv/bin/", "python tools/fit_device_model.py", *LAUNCHERS)
    assert [line for line in others if not line.startswith(known)] == []


@pytest.mark.parametrize(("page", "line"), SLIMNAS, ids=[f"{p}: {x}" for p, x in SLIMNAS])
def test_commands(page: str, line: str, world: Path) -> None:
    words = shlex.split(line, comments=True)[1:]
    if any(word.startswith(NEEDS_OTHER_DATA) for word in words):
        words[words.index("--data") + 1] = "photos"
    if "--supernet" in words:
        supernet = Path(words[words.index("--supernet") + 1])
        if supernet.suffix == ".yaml":
            shutil.copy(ROOT / "search_spaces/records/efficientformer_tiny.yaml", supernet)
        elif supernet.name != "shipped":
            supernet_of_the_run(supernet)
    if words[:2] in (["analyze", "ranking"], ["space", "record"]):
        searched_run(Path(words[2]))
    if words[:2] in (["zoo", "show"], ["zoo", "export"]) and words[2] == "fast":
        add(RUN, name="fast")
    if words[:2] == ["evaluate", "fast"]:
        add(RUN, name="fast")
        assert main(["zoo", "export", "fast", "--output", words[words.index("--onnx") + 1]]) == 0
    if words[:2] == ["zoo", "export"] and words[2] == "deit_small_enough":
        add(PRUNED / "found" / "macs_0.9G", name="deit_small_enough")
    pruning = words[0] == "prune" and words[1] != "rules"
    if pruning and "local-deit" in words:
        save_table(Path("lookup_tables/local-deit"), SearchSpace.load("efficientformer_tiny"))
    measuring = words[0] == "latency" and words[1] in MEASURING
    timing = words[:2] in LONG_COMMANDS or words[0] in ("evaluate", "train")
    if pruning or words[0] == "search" or measuring or timing:
        with pytest.raises(LongWorkError, match="all is well"):
            main(words)
    else:
        assert main(words) == 0


def supernet_of_the_run(path: Path) -> None:
    space = SearchSpace.load("efficientformer_tiny").with_classes(10)
    supernet = Supernet(space, resolution=32, seed=0).eval()
    data = open_data("digits", resolution=(32, 32), channels=3, seed=0)
    provenance = {"seed": 0, "data": data.digest}
    save_supernet(path, TrainedSupernet(supernet, weights_digest(supernet), provenance))


def searched_run(folder: Path) -> None:
    supernet_of_the_run(folder / "supernet.safetensors")
    SearchConfig(
        space="efficientformer_tiny",
        space_digest="",
        device="iphone12",
        table_digest="",
        targets_ms=(1.6,),
        resolution=32,
    ).save(folder / "config.yaml")


@pytest.mark.parametrize(("page", "text"), list(blocks("python")))
def test_python(page: str, text: str, world: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(text, page, "exec"), names)
    images = torch.zeros(2, 3, 64, 64)
    assert names["model"].eval()(images).shape == (2, 10)
    maps = names["backbone"].eval()(images)
    assert [64 // m.shape[-1] for m in maps] == [4, 8, 16, 32]


@pytest.mark.parametrize(("page", "text"), list(blocks("yaml")))
def test_yaml(page: str, text: str) -> None:
    if "search-space/1" in text:
        assert len(SearchSpace.from_yaml(text).stages) == 2
    elif "slimnas/recipe/1" in text:
        given = yaml.safe_load(text.partition("\n")[2])
        assert override_recipe(NetworkRecipe(), given).mixup == 0.2
    else:
        assert Architecture.from_yaml(text) == Architecture.load(
            ROOT / "slimnas/zoo/models/efficientformer_l1.yaml"
        ).renamed("efficientformer_l1", {"source": "EfficientFormer, NeurIPS 2022"})


def test_links_lead_somewhere() -> None:
    looked_at = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                looked_at += 1
                assert (page.parent / target).is_file(), f"{page.name}: {target}"
    assert looked_at > 12


def test_files_the_docs_name_exist() -> None:
    looked_at = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:slimnas|tests|tools|arch|nn|runtimes)/[\w/]+\.py)`", text):
            looked_at += 1
            assert (ROOT / name).is_file() or (ROOT / "slimnas" / name).is_file(), name
    assert looked_at > 8
