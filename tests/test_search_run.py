"""A whole search on a micro space: its files, one supernet for many targets, and being killed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import killed_searches
import numpy as np
import pytest
import torch
from killed_searches import RECIPE, SIDE, digits, search
from micro import made_up_table, micro_space
from safetensors.torch import load_file

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.errors import (
    MissingLatencyError,
    RunFolderError,
    SpecError,
    UnreachableTargetError,
    WeightsError,
)
from slimnas.latency.estimate import estimate
from slimnas.latency.table import LatencyTable
from slimnas.search.checks import check_search, pricer
from slimnas.search.config import SearchConfig
from slimnas.search.run import SearchResult
from slimnas.search.slimming import cheapest
from slimnas.search.trajectory import Trajectory
from slimnas.supernet.train import load_supernet
from slimnas.zoo.create import create_model
from slimnas.zoo.preprocessing import normalisation_of
from slimnas.zoo.registry import get

SPACE = micro_space()
TABLE = made_up_table(SPACE)


def targets(*shares: float) -> tuple[float, ...]:
    price = pricer(SPACE, TABLE)
    low, top = cheapest(SPACE, price)[1], price(SPACE.largest(0))
    return tuple(low + share * (top - low) for share in shares)


ONE = targets(0.4)
SEVERAL = targets(0.1, 0.4, 0.7)
KEPT = ("supernet.safetensors", "importance.json", "trajectory.jsonl")
MODEL = ("architecture.yaml", "weights.safetensors", "metrics.json")
LOG = {"config.yaml", "metrics.jsonl"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the killed searches: sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def result(folder: Path) -> SearchResult:
    return search(folder, ONE)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_it_leaves(result: SearchResult, folder: Path) -> None:
    assert files(folder) == {*KEPT, *MODEL, *LOG}
    (found,) = result.found
    architecture = Architecture.load(folder / "architecture.yaml")
    assert architecture == found.architecture
    assert architecture == SPACE.architecture(found.selection)
    assert architecture.name == f"micro_made-up_{ONE[0]!r}ms"
    assert found.estimate == estimate(architecture, TABLE)
    assert found.estimate.latency_ms <= ONE[0]
    assert found.cost == cost(architecture)
    trajectory = Trajectory.load(folder / "trajectory.jsonl")
    assert trajectory == result.trajectory
    assert trajectory.replay() == found.selection
    assert len(trajectory.steps) == found.steps > 2
    assert found.search_top1 == trajectory.states[-1][2]
    assert trajectory.provenance["supernet_digest"] == result.trained.digest
    assert load_supernet(folder / "supernet.safetensors").digest == result.trained.digest
    metrics = json.loads((folder / "metrics.json").read_text())
    assert str(found.search_top1) in json.dumps(metrics)
    log = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert tuple(map(json.loads, log)) == result.training
    per_epoch = result.training[0]["step"]
    assert [row["step"] for row in result.training] == [per_epoch, 2 * per_epoch]
    assert RECIPE.epochs == 2


def test_the_found_network_says_what_its_weights_need(result: SearchResult, folder: Path) -> None:
    train = digits().train
    pixels = train.store.take(np.arange(len(train))).numpy() / 255.0
    mean, std = normalisation_of(get(folder).architecture) or ((), ())
    assert mean == pytest.approx(pixels.mean(axis=(0, 2, 3)))
    assert std == pytest.approx(pixels.std(axis=(0, 2, 3)))
    again = create_model(folder, pretrained=True, resolution=SIDE).architecture
    assert normalisation_of(again) == (mean, std)
    bare = result.found[0].architecture.renamed("bare", {})
    assert result.found[0].architecture.digest == bare.digest


def test_the_same_command_again_does_nothing_new(result: SearchResult, folder: Path) -> None:
    names = [*KEPT, *MODEL]
    before = {name: (folder / name).read_bytes() for name in names}
    again = search(folder, ONE)
    assert again.trained.digest == result.trained.digest
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_a_trained_supernet_gives_the_same(
    result: SearchResult, folder: Path, tmp_path: Path
) -> None:
    trained = load_supernet(folder / "supernet.safetensors")
    reused = search(tmp_path / "one", ONE, supernet=trained)
    several = search(tmp_path / "several", SEVERAL, supernet=trained)
    assert files(tmp_path / "one") == {*KEPT[1:], *MODEL, "config.yaml"}
    assert reused.trajectory == result.trajectory
    for name in ("architecture.yaml", "weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (folder / name).read_bytes()
    labels = [f"found/{target!r}ms" for target in SEVERAL]
    assert files(tmp_path / "several") == {
        *KEPT[1:],
        "config.yaml",
        *(f"{label}/{name}" for label in labels for name in MODEL),
    }
    for target_ms, label, found in zip(SEVERAL, labels, several.found, strict=True):
        assert found.target_ms == target_ms
        assert found.folder == tmp_path / "several" / label
        architecture = Architecture.load(found.folder / "architecture.yaml")
        assert architecture == found.architecture
        assert found.estimate.latency_ms <= target_ms
        weights = load_file(found.folder / "weights.safetensors")
        assert weights["head.head.weight"].shape == (10, architecture.widths[-1])
    assert [len(f.architecture.stages) for f in several.found] == [2, 2, 2]
    assert len({f.architecture.digest for f in several.found}) == 3


def test_a_supernet_of_something_else(result: SearchResult, tmp_path: Path) -> None:
    trained = result.trained
    with pytest.raises(SpecError, match="trained at 16 px, the data are at 8 px; leave out --res"):
        search(tmp_path / "a", ONE, supernet=trained, resolution=8)
    elsewhere = dataclasses.replace(trained, provenance={**trained.provenance, "data": "0" * 64})
    with pytest.raises(SpecError, match="another split of them, so SEARCH may hold images it has"):
        search(tmp_path / "d", ONE, supernet=elsewhere)
    other = dataclasses.replace(trained)
    space = trained.supernet.space
    try:
        trained.supernet.space = space.with_classes(7)
        with pytest.raises(SpecError, match="trained for 7 classes, the data has 10"):
            search(tmp_path / "b", ONE, supernet=other)
        trained.supernet.space = space.model_copy(update={"name": "other"})
        with pytest.raises(SpecError, match="trained for another content of space other, not"):
            search(tmp_path / "c", ONE, supernet=other)
    finally:
        trained.supernet.space = space
    for name in "abcd":
        assert files(tmp_path / name) == {"config.yaml"}


@pytest.mark.parametrize(
    ("name", "old", "new", "error", "reason"),
    [
        ("supernet.safetensors", None, b"\x00" * 90, WeightsError, "supernet.safetensors: "),
        ("trajectory.jsonl", b'"seed": 0', b'"seed": 1', RunFolderError, "was made from another"),
        ("trajectory.jsonl", b'"mb4d"', b'"mb4', RunFolderError, "not a trajectory"),
        ("metrics.jsonl", b"{", b"[", RunFolderError, "line 1 is no epoch of a run"),
        ("metrics.jsonl", None, b"[]\n", RunFolderError, "line 1 is no epoch of a run"),
    ],
)
def test_a_damaged_run_folder(
    result: SearchResult,
    folder: Path,
    tmp_path: Path,
    name: str,
    old: bytes | None,
    new: bytes,
    error: type[Exception],
    reason: str,
) -> None:
    for kept in (*KEPT, *LOG):
        (tmp_path / kept).write_bytes((folder / kept).read_bytes())
    good = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(new if old is None else good.replace(old, new, 1))
    with pytest.raises(error, match=reason) as caught:
        search(tmp_path, ONE)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_supernet_left_by_other_settings(
    result: SearchResult, folder: Path, tmp_path: Path
) -> None:
    """Whoever deletes config.yaml does not get yesterday's supernet for today's settings."""
    (tmp_path / "supernet.safetensors").write_bytes((folder / "supernet.safetensors").read_bytes())
    with pytest.raises(RunFolderError, match="was trained with another recipe, seed; restore"):
        search(tmp_path, ONE, seed=3, recipe=RECIPE.model_copy(update={"epochs": 1}))


def test_refused_before_anything_is_trained() -> None:
    config = SearchConfig(
        space="micro",
        space_digest="",
        device="made-up",
        table_digest="",
        targets_ms=(targets(-0.01)[0],),
        resolution=16,
    )
    with pytest.raises(UnreachableTargetError, match="in space micro: its smallest network"):
        check_search(SPACE, TABLE, config)
    rows = tuple(row for row in TABLE.rows if row.key.type != "mb3d")
    with pytest.raises(MissingLatencyError, match="mb3d"):
        check_search(SPACE, LatencyTable(TABLE.device, rows), config)


MOMENTS = [
    "3 step",
    "1 epoch",
    "1 before metrics.jsonl",
    "1 before training.safetensors",
    "1 before supernet.safetensors",
    "1 after supernet.safetensors",
    "1 before trajectory.jsonl",
    "1 after trajectory.jsonl",
    "5 evaluated",
    "2 slimmed",
    "3 before trajectory.jsonl",
    "1 before weights.safetensors",
    "1 after weights.safetensors",
    "1 before architecture.yaml",
    "every 4 step",
    "every 7 evaluated",
]


@pytest.mark.slow
def test_killed_at_any_moment(result: SearchResult, folder: Path, tmp_path: Path) -> None:
    """SIGKILL, start again: the same bytes as a run never stopped, and nothing left over."""
    done = subprocess.run(
        [sys.executable, killed_searches.__file__, tmp_path, str(ONE[0]), *MOMENTS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    starts = json.loads(done.stdout)
    assert list(starts) == MOMENTS
    assert all(count == 2 for moment, count in starts.items() if not moment.startswith("every"))
    assert all(count > 2 for moment, count in starts.items() if moment.startswith("every"))
    for moment in MOMENTS:
        run = tmp_path / moment.replace(" ", "_")
        assert files(run) - LOG == {*KEPT, *MODEL}
        for name in (*KEPT, "architecture.yaml", "weights.safetensors"):
            assert (run / name).read_bytes() == (folder / name).read_bytes(), f"{moment}: {name}"
