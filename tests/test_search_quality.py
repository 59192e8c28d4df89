"""The comparison of found networks with others: its baselines, fronts, trainings and command."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from _quality_arms import FACTORS, random_at, scaled, shape_of, uniform_scaling
from _quality_report import Place, front_at, spread, table_lines, verdicts
from _quality_settings import QUICK_SPACE
from _quality_stages import Bench, Candidate
from _quality_training import Job, Trainer, duration, set_layer_scale, waiting_lock
from _quality_zoo import undefeated
from accelerate import Accelerator
from cli_world import save_table
from micro import micro_space
from scipy.stats import kendalltau
from search_quality import parse

from slimnas._lock import folder_lock
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace
from slimnas.data.splits import open_data
from slimnas.errors import SpecError, UnreachableTargetError
from slimnas.latency.estimate import latency_ms
from slimnas.latency.table import LatencyTable
from slimnas.measure.calibrate import NetworkTiming
from slimnas.measure.local import LocalDevice
from slimnas.measure.timing import Protocol
from slimnas.nn.build import build
from slimnas.runtimes.registry import get_runtime
from slimnas.search.evolution import Evolution, Scored
from slimnas.train.loop import StepReport
from slimnas.train.recipe import TrainRecipe
from slimnas.zoo.create import create_model
from slimnas.zoo.entry import load_entry
from slimnas.zoo.registry import get, list_entries

ROOT = Path(__file__).parents[1]
TINY = SearchSpace.load("efficientformer_tiny")
QUICK = SearchSpace.from_yaml(QUICK_SPACE)


def macs_price(architecture: Architecture) -> float:
    """A millisecond per 20 million MACs."""
    return cost(architecture).macs / 20e6


def test_factors_of_one_give_l1() -> None:
    l1 = get("efficientformer_l1").architecture.with_head(classes=1000, distilled=False)
    assert scaled(TINY, shape_of(TINY, 1.0, 1.0)) == l1


def test_a_scaling_stays_within_the_ranges() -> None:
    smallest, largest = (scaled(TINY, shape_of(TINY, f, f)) for f in (0.05, 3.0))
    assert smallest.widths == (16, 32, 64, 128)
    assert smallest.depths == (1, 1, 1, 1)
    assert largest.widths == (64, 128, 256, 512)
    assert largest.depths == (4, 3, 8, 5)
    assert (smallest.count("mb3d"), largest.count("mb3d")) == (1, 1)


@pytest.mark.parametrize("target_ms", [12.0, 45.0])
def test_a_uniform_scaling_is_the_largest_that_meets_the_target(target_ms: float) -> None:
    found = uniform_scaling(TINY, macs_price, target_ms)
    assert 0.93 * target_ms <= macs_price(found) <= target_ms
    shapes = dict.fromkeys(shape_of(TINY, f, f) for f in FACTORS)
    uniform = [scaled(TINY, shape) for shape in shapes]
    fitting = [one for one in uniform if macs_price(one) <= target_ms]
    assert found.depths == fitting[-1].depths
    assert all(w >= least for w, least in zip(found.widths, fitting[-1].widths, strict=True))
    l1 = get("efficientformer_l1").architecture
    for stage, width in zip(l1.stages, found.widths, strict=True):
        assert width / stage.width == pytest.approx(found.widths[3] / 448, abs=0.15)


def test_scalings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UnreachableTargetError, match="no scaling of efficientformer_l1 within"):
        uniform_scaling(TINY, macs_price, 0.01)
    with pytest.raises(SpecError, match=r"micro: must have 4 stages to scale .*, has 2"):
        shape_of(micro_space(), 1.0, 1.0)


def test_random_networks_use_the_target() -> None:
    space = micro_space()
    everything = {space.architecture(one).digest: one for one in space.selections()}
    prices = sorted(macs_price(space.architecture(one)) for one in everything.values())
    target_ms = prices[len(prices) // 2]
    found = random_at(space, macs_price, target_ms, 8, seed=0, draws=6000)
    assert len({one.digest for one in found}) == 8
    assert {one.digest for one in found} <= set(everything)
    fitting = [ms for ms in prices if ms <= target_ms]
    assert [macs_price(one) for one in found] == pytest.approx(fitting[::-1][:8])
    assert found == random_at(space, macs_price, target_ms, 8, seed=0, draws=6000)
    assert found != random_at(space, macs_price, 0.9 * target_ms, 8, seed=0, draws=6000)


FRONT = [Place(10.0, 50.0, 1.0), Place(20.0, 60.0, 2.0), Place(15.0, 40.0, 9.0)]


@pytest.mark.parametrize(
    ("latency_ms", "top1", "error"),
    [(10.0, 50.0, 1.0), (15.0, 55.0, math.hypot(0.5, 1.0)), (20.0, 60.0, 2.0), (30.0, 60.0, 2.0)],
)
def test_a_front_between_its_members(latency_ms: float, top1: float, error: float) -> None:
    found = front_at(FRONT, latency_ms)
    assert found is not None
    assert (found.top1, found.error) == pytest.approx((top1, error))


def test_a_front_begins_at_its_fastest_member() -> None:
    assert front_at(FRONT, 9.9) is None


def row(
    arm: str, target_ms: float, top1: list[float], measured_ms: float | None
) -> dict[str, object]:
    return {
        "arm": arm,
        "target_ms": target_ms,
        "predicted_ms": target_ms,
        "measured_ms": measured_ms,
        "measured_error_ms": None if measured_ms is None else 0.1,
        "inherited_top1": None,
        "search_top1": top1,
        "test_top1": top1,
        "params": 1_000_000,
        "macs": 10**9,
        "widths": [16],
        "depths": [1],
        "mb3d": 0,
    }


def test_verdicts_by_hand() -> None:
    rows = [
        row("found", 10.0, [60.0, 62.0], 9.0),
        row("uniform", 10.0, [70.0], None),
        row("found", 20.0, [80.0, 80.0], 19.5),
        row("uniform", 20.0, [80.1, 80.3], 19.0),
        row("random", 20.0, [79.0, 79.2], 19.5),
    ]
    found = {(one.target_ms, one.arm): one for one in verdicts(rows, 10_000)}
    assert len(found) == 4
    assert found[10.0, "uniform"].margin == math.inf
    assert found[10.0, "uniform"].holds
    slower = found[20.0, "uniform"]
    assert slower.margin == pytest.approx(-0.2)
    assert slower.error == pytest.approx(0.1)
    assert (slower.holds, slower.words) == (False, "level")
    assert found[20.0, "random"].words == "above"
    lines = table_lines(
        {
            "rows": rows,
            "verdicts": [
                {
                    "target_ms": one.target_ms,
                    "arm": one.arm,
                    "margin": None if one.margin == math.inf else one.margin,
                    "error": one.error,
                    "holds": one.holds,
                    "words": one.words,
                }
                for one in found.values()
            ],
            "ranking": {"networks": 5, "kendall_tau": 0.4, "spearman": 0.5},
        }
    )
    assert lines[-1].startswith("- The supernet's order of 5 networks")
    assert not any("One training per network" in line for line in lines)
    assert sum(line.startswith("| 20 |") for line in lines) == 3
    assert any("- 20 ms: not above every baseline's front" in line for line in lines)
    fast = next(line for line in lines if line.startswith("- 10 ms: on or above every baseline"))
    assert "EfficientFormer-L1 scaled: has nothing as fast" in fast
    assert "NSGA-II: met no target" in fast
    assert "best of the random: met no target" not in fast


def test_one_seed_has_the_error_of_its_images() -> None:
    (one,) = verdicts([row("found", 10.0, [50.0], 10.0), row("nsga2", 10.0, [50.0], 10.0)], 100)
    assert one.error == pytest.approx(math.sqrt(2) * 5.0)


def test_words_for_figures() -> None:
    assert spread([50.0]) == "50.00"
    assert spread([50.0, 52.0]) == "51.00 ± 1.41 (n = 2)"
    assert [duration(s) for s in (50, 720, 12_240)] == ["50 s", "12 min", "3.4 h"]


def test_layer_scale_starts_where_it_is_told() -> None:
    network = build(scaled(TINY, shape_of(TINY, 0.3, 0.3)).with_resolution(32))
    set_layer_scale(network, 0.1)
    scales = [p for name, p in network.named_parameters() if name.endswith(".gamma")]
    assert len(scales) >= 4
    assert all(bool((p == 0.1).all()) for p in scales)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    data = open_data("digits", resolution=(16, 16), channels=1, seed=0, max_images=200)
    recipe = TrainRecipe(epochs=2, batch_size=32)
    return Trainer(data, recipe, 16, 0.1, Accelerator(cpu=True), tmp_path / "trained")


@pytest.fixture
def job() -> Job:
    space = micro_space()
    architecture = space.architecture(space.random(random.Random(0)), name="one")
    return Job("one", architecture, seed=3)


def test_a_stopped_training_gives_the_same_result(
    trainer: Trainer, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer(
        trainer.data, trainer.recipe, 16, 0.1, trainer.accelerator, tmp_path / "whole"
    ).run([job])

    def stop(self: object, report: StepReport) -> None:
        if report.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("_quality_training.Pace.on_step", stop)
        patch.setattr("slimnas.train.loop.CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            trainer.run([job])
    assert trainer.result(job) is None
    (resumed,) = trainer.run([job])
    assert (resumed.search_top1, resumed.test_top1) == (whole[0].search_top1, whole[0].test_top1)
    folder = trainer.folder / trainer.key(job)
    entry = load_entry(folder)
    assert entry.architecture == job.architecture.with_resolution(16)
    assert entry.metrics["test_top1_percent"].value == resumed.test_top1
    assert not (folder / "training.safetensors").exists()
    again = load_entry(tmp_path / "whole" / trainer.key(job))
    assert entry.weights is not None
    assert again.weights is not None
    assert entry.weights.read_bytes() == again.weights.read_bytes()


def test_a_result_is_another_ones_where_anything_differs(trainer: Trainer, job: Job) -> None:
    others = [
        Trainer(trainer.data, trainer.recipe, 16, 0.2, trainer.accelerator, trainer.folder).key(
            job
        ),
        trainer.key(Job("one", job.architecture, seed=4)),
        Trainer(
            trainer.data, TrainRecipe(epochs=3), 16, 0.1, trainer.accelerator, trainer.folder
        ).key(job),
    ]
    assert trainer.key(Job("other title", job.architecture, seed=3, keep=False)) == trainer.key(job)
    assert len({trainer.key(job), *others}) == 4


def test_networks_that_others_train_are_waited_for(
    trainer: Trainer, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has the network, and stops without a result."""
    monkeypatch.setattr("_quality_training.POLL_S", 0.01)
    taken, release = threading.Event(), threading.Event()

    def other() -> None:
        with folder_lock(trainer.folder / trainer.key(job)):
            taken.set()
            release.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    taken.wait(10)
    monkeypatch.setattr("_quality_training.time.sleep", lambda seconds: release.set())
    (result,) = trainer.run([job])
    thread.join()
    assert release.is_set()
    assert 0 <= result.test_top1 <= 100


def test_a_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_lock(tmp_path) as _:
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                raise TimeoutError("waited twice")

        monkeypatch.setattr("_quality_training.time.sleep", sleep)
        with pytest.raises(TimeoutError, match="waited twice"), waiting_lock(tmp_path):
            pass
    with waiting_lock(tmp_path):
        assert len(waited) == 2


def made_up_result(*found: tuple[float, float, float], below: float = 0.0) -> dict[str, object]:
    """Found networks as (target, latency, top-1); the one for `below` lost to a baseline."""
    rows = [
        {"arm": "found", "target_ms": target, "measured_ms": ms, "test_top1": [top1]}
        for target, ms, top1 in found
    ]
    rows.append({"arm": "uniform", "target_ms": 1.0, "measured_ms": 0.1, "test_top1": [99.0]})
    lost = [{"target_ms": t, "words": "below" if t == below else "level"} for t, _, _ in found]
    return {"rows": rows, "verdicts": lost, "data": {"test_images": 100}}


@pytest.mark.parametrize(
    ("found", "below", "kept"),
    [
        (((3.0, 2.9, 80.0), (2.0, 1.9, 70.0)), 0.0, [3.0, 2.0]),
        (((3.0, 2.9, 80.0), (2.0, 1.9, 70.0)), 2.0, [3.0]),
        (((3.0, 2.9, 80.0), (2.0, 1.9, 81.0)), 0.0, [2.0]),  # slower and worse than its sibling
        (((3.0, 2.9, 80.0), (2.0, 1.9, 80.0)), 0.0, [2.0]),
        (((3.0, 2.9, 80.0),), 3.0, []),
    ],
)
def test_what_is_worth_a_place_in_the_zoo(
    found: tuple[tuple[float, float, float], ...], below: float, kept: list[float]
) -> None:
    rows = undefeated(made_up_result(*found, below=below))
    assert [row["target_ms"] for row in rows] == kept


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    save_table(tmp_path / "bench", QUICK, QUICK.with_classes(10))
    settings, _ = parse(["--quick"])
    return Bench(settings, tmp_path / "cache", tmp_path / "bench")


def test_networks_are_measured_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network of the comparison, all side by side; what was measured is kept."""
    price = partial(latency_ms, table=bench.table)
    largest, second = random_at(bench.bare_space, price, 99.0, 2, seed=0, draws=50)
    both = [Candidate("found", 9.0, 8.0, None, largest), Candidate("random", 9.0, 7.0, 0, second)]
    bench.__dict__["chosen"] = [(one, []) for one in (*both, both[0])]
    timed: list[str] = []

    def time(networks: Sequence[Architecture], *_: object, **__: object) -> object:
        timed.extend(one.digest for one in networks)
        return [NetworkTiming(one, 2 * price(one), 0.1) for one in networks], 1.0

    monkeypatch.setattr("_quality_stages.time_networks", time)
    assert bench.measured() == {}  # the table is of another machine
    device = LocalDevice(get_runtime("onnxruntime"), Protocol(), largest)
    monkeypatch.setattr("_quality_stages.open_local", lambda *_: device)
    for _ in range(2):
        assert bench.measured() == {
            one.digest: {"latency_ms": 2 * price(one), "error_ms": 0.1} for one in (largest, second)
        }
    assert timed == [largest.digest, second.digest]


def test_a_baseline_that_is_too_slow_stops_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = bench.space
    price = partial(latency_ms, table=bench.table)
    fastest = min(space.smallest(), key=lambda one: price(space.architecture(one)))
    target_ms = 1.1 * price(space.architecture(fastest))
    found = {
        "target_ms": target_ms,
        "search_top1": 50.0,
        "architecture": space.architecture(fastest, name="found").to_dict(),
    }
    run = bench.cache / "search"
    run.mkdir(parents=True)
    (run / "search.json").write_text(json.dumps({"found": [found]}))
    bench.__dict__.update(
        run=run, supernet=run, evaluations=1, targets_ms=(target_ms,), corrected=bench.table
    )
    evolution = Evolution((Scored(space.largest(), 99.0, 80.0),))
    monkeypatch.setattr("_quality_stages.evolved", lambda *_, **__: evolution)
    assert {one.arm for one in bench.candidates} == {"found", "uniform", "random"}
    said = capsys.readouterr().err
    assert f"no network of nsga2 at {target_ms:g} ms: target latency" in said


@pytest.mark.slow
def test_the_command_runs_and_goes_on(tmp_path: Path) -> None:
    """Builds a table; then with another, whose prices no busy machine changes, all the rest."""
    save_table(tmp_path / "bench", QUICK, QUICK.with_classes(10))
    command = [sys.executable, str(ROOT / "benchmarks/search_quality.py"), "--quick"]
    command += ["--clock", "cpu", "--cache", str(tmp_path / "cache")]

    def run(*more: str) -> str:
        done = subprocess.run(
            [*command, "--output", str(tmp_path), *more],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--until", "table") == ""
    (built,) = (tmp_path / "cache").glob("table-*/local")
    assert LatencyTable.load(built).device.runtime.name == "onnxruntime"
    command += ["--table", str(tmp_path / "bench")]
    assert run("--until", "supernet") == ""
    table = run("--zoo", str(tmp_path / "zoo"))
    folder = tmp_path / "results"
    result = json.loads((folder / "search_quality_quick.json").read_text())
    places = [(one["arm"], one["target_ms"]) for one in result["rows"]]
    assert len(places) == len(set(places))
    assert {one for one in places if one[0] != "nsga2"} == {
        (arm, target) for arm in ("found", "uniform", "random") for target in result["targets_ms"]
    }
    assert len(result["targets_ms"]) == 3
    assert ("nsga2", result["targets_ms"][0]) in places  # so few evaluations miss the fastest
    assert len(result["random_trials"]) == 6
    assert len(result["verdicts"]) == 9
    ranking = result["ranking"]
    assert 6 < ranking["networks"] <= 12  # different ones, without the scaled
    trained = {one["test_top1"] for one in result["random_trials"]}
    assert trained <= set(ranking["trained_test_top1"])
    tau = kendalltau(ranking["inherited_search_top1"], ranking["trained_test_top1"]).statistic
    assert ranking["kendall_tau"] == pytest.approx(tau)
    assert f"Kendall tau {tau:.2f}" in table
    assert "- One training per network" in table
    assert all(one["predicted_ms"] <= one["target_ms"] for one in result["rows"])
    assert all(one["measured_ms"] is None for one in result["rows"])  # not that machine
    assert (folder / "search_quality_quick.png").stat().st_size > 10_000
    assert (folder / "search_quality_quick.svg").read_text().count("target") >= 1
    beaten = {one["target_ms"] for one in result["verdicts"] if one["words"] == "below"}
    entries = list_entries(tmp_path / "zoo", pattern="found_*").entries
    shipped = [one for one in entries if one.source == "zoo"]
    names = {f"found_quick_digits_{row['target_ms']:g}ms" for row in undefeated(result)}
    assert {one.name for one in shipped} == names
    assert len(names) <= 3 - len(beaten)
    for entry in shipped:
        network = create_model(entry.name, pretrained=True, zoo=tmp_path / "zoo")
        assert {value.dtype for value in network.parameters()} == {torch.float32}
        row = next(
            one
            for one in result["rows"]
            if one["arm"] == "found" and f"{one['target_ms']:g}ms" in entry.name
        )
        assert network.architecture.stages == Architecture.from_dict(row["architecture"]).stages
        assert entry.metrics["latency_ms"].value == row["predicted_ms"]
        assert "by the latency table" in entry.metrics["latency_ms"].provenance
        assert abs(entry.metrics["test_top1_percent"].value - row["test_top1"][0]) < 3
    assert run("--zoo", str(tmp_path / "zoo")) == table  # entries that are there stay
    assert (tmp_path / "RESULTS.md").read_text().count("| search_quality |") == 2
