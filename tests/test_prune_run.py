"""A pruning run: its files and figures, many budgets from one scoring, and being stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import killed_prunes
import pytest
import torch
from ctrl_c import press_ctrl_c
from prune_cases import FAMILIES, random_network, random_plan
from prune_world import ARCHITECTURE, Events, budget, calibration, network, prune

from slimnas.arch.cost import cost
from slimnas.errors import PruneError, RunFolderError, SlimnasError, SpecError, ZooError
from slimnas.prune import scored as scored_module
from slimnas.prune.apply import apply_plan
from slimnas.prune.calibration import Batches, DataRequest, open_calibration
from slimnas.prune.compose import compose
from slimnas.prune.config import FILE, BudgetSpec, PruneConfig
from slimnas.prune.finetune import evaluate
from slimnas.prune.found import MACS, MEASURED_MACS, PARAMS, measured_macs
from slimnas.prune.run import BEFORE
from slimnas.prune.scored import SCORES, STATE, load_scored
from slimnas.prune.scores import Scores
from slimnas.prune.widths import WidthPlan
from slimnas.train import loop
from slimnas.zoo.create import create_model
from slimnas.zoo.metrics import TEST_TOP1, load_metrics
from slimnas.zoo.registry import builtin_names, get

MODEL = {"architecture.yaml", "weights.safetensors", "metrics.json", "plan.json"}
HALF, MOST = budget("50%", 0.5), budget("80%", 0.8)
TUNED = {"finetune": {"epochs": 2, "batch_size": 20}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, bytes]:
    """Every file that must be the same however a run went."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("metrics.json", BEFORE)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def figures(folder: Path) -> dict[str, float]:
    return {name: metric.value for name, metric in load_metrics(folder / "metrics.json").items()}


def test_found_networks_keep_their_budget_and_load_without_the_pruner(tmp_path: Path) -> None:
    result = prune(tmp_path, MOST, HALF)
    assert [found.budget for found in result.found] == [MOST, HALF]
    images = calibration(network())
    for found in result.found:
        assert {path.name for path in found.folder.iterdir()} == MODEL
        loaded = create_model(found.folder, pretrained=True).eval()
        counted = cost(loaded.architecture)
        assert found.budget.limit * 0.97 < counted.macs <= found.budget.limit
        assert found.value(MACS) == counted.macs == found.value(MEASURED_MACS)
        assert found.value(PARAMS) == counted.params == sum(p.numel() for p in loaded.parameters())
        assert found.value(TEST_TOP1) == evaluate(loaded, images.test, "cpu")
        assert all(metric.provenance for metric in found.metrics.values())
        preprocessing = loaded.architecture.provenance["preprocessing"]
        assert tuple(preprocessing["mean"]) == images.images.mean
        assert found.plan.architecture(ARCHITECTURE) == loaded.architecture
    unpruned = evaluate(network(), images.test, "cpu")
    assert result.before[TEST_TOP1].value == unpruned


def test_it_is_what_its_steps_by_hand_give(tmp_path: Path) -> None:
    """Without turning heads, the found weights are slices of the given ones."""
    result = prune(tmp_path, HALF, basis="channels")
    found = result.found[0]
    by_hand = apply_plan(found.plan, network())
    loaded = create_model(found.folder, pretrained=True)
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_one_scoring_serves_all_budgets_and_later_ones(tmp_path: Path) -> None:
    first = Events()
    prune(tmp_path, MOST, listener=first)
    assert first.of("importance")[-1] == 60
    before = files(tmp_path)
    second = Events()
    result = prune(tmp_path, MOST, HALF, listener=second)
    assert second.of("importance") == second.of("basis") == []
    assert len(result.found) == 2
    after = files(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {FILE}


def test_scores_of_another_run_are_taken_with_the_network_they_are_for(tmp_path: Path) -> None:
    prune(tmp_path, MOST)
    loaded = load_scored(tmp_path / SCORES, network())
    assert loaded.scores.images == 60
    with pytest.raises(
        PruneError, match=r"other weights .* keep the file beside the scored folder"
    ):
        load_scored(_copied(tmp_path / SCORES, tmp_path / "elsewhere"), network(2))
    other = network().architecture.with_head(classes=7)
    from slimnas.nn.build import build

    with pytest.raises(PruneError, match="got scores of architecture"):
        load_scored(tmp_path / SCORES, build(other))


def _copied(path: Path, folder: Path) -> Path:
    folder.mkdir()
    return (folder / path.name) if (folder / path.name).write_bytes(path.read_bytes()) else path


class Stops(Events):
    """Sends a signal, or raises, at the n-th event of a stage."""

    def __init__(self, name: str, number: int, *, gently: bool) -> None:
        super().__init__()
        self.name, self.number, self.gently = name, number, gently

    def at(self, name: str, done: int) -> None:
        if name == self.name and len(self.of(name)) == self.number:
            if self.gently:
                press_ctrl_c()
            else:
                raise KeyboardInterrupt


MOMENTS = [
    ("basis", 1, False),
    ("importance", 2, True),
    ("importance", 2, False),
    ("macs_80pct: planning", 2, False),
    ("macs_50pct: planning", 1, False),
    ("macs_50pct: fine-tuning", 2, True),
    ("macs_50pct: fine-tuning", 5, False),
    ("macs_50pct: done", 1, False),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    prune(folder, MOST, HALF, **TUNED)
    return folder


@pytest.mark.parametrize(("name", "number", "gently"), MOMENTS)
def test_stopped_at_any_moment_it_ends_the_same(
    name: str,
    number: int,
    gently: bool,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(scored_module, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, MOST, HALF, listener=Stops(name, number, gently=gently), **TUNED)
    rest = Events()
    prune(tmp_path, MOST, HALF, listener=rest, **TUNED)
    assert files(tmp_path) == files(whole)
    for label in ("macs_80pct", "macs_50pct"):
        place = Path("found") / label
        assert figures(tmp_path / place) == figures(whole / place)
    if name == "importance":  # three minibatches of twenty
        assert rest.of("importance") == ([60] if gently else [40, 60])
    if name == "macs_50pct: fine-tuning":
        assert rest.of(name) == list(range(rest.of(name)[0], 7))
        assert rest.of(name)[0] > 1
        assert rest.of("macs_80pct: planning") == []


def test_a_scoring_state_goes_with_the_end(whole: Path) -> None:
    assert not (whole / STATE).exists()
    assert Scores.load(whole / SCORES).images == 60
    left = {path.name for path in whole.rglob("*") if path.is_file()}
    assert left == {*MODEL, FILE, BEFORE, SCORES}


def test_iterations_go_down_geometrically_and_compose(tmp_path: Path) -> None:
    events = Events()
    result = prune(tmp_path, HALF, iterations=3, listener=events)
    found = result.found[0]
    whole_macs = cost(ARCHITECTURE).macs
    for step in (1, 2):
        place = found.folder / "steps" / str(step)
        share = figures(place)[MACS] / whole_macs
        assert 0.97 * 0.5 ** (step / 3) < share <= 0.5 ** (step / 3)
        assert create_model(place, pretrained=True)
    plans = [WidthPlan.load(found.folder / "steps" / str(n) / "plan.json") for n in (1, 2, 3)]
    middle = plans[0].architecture(ARCHITECTURE)
    together = compose(compose(plans[0], plans[1], ARCHITECTURE), plans[2], ARCHITECTURE)
    assert plans[1].source == middle.digest
    assert together == found.plan
    assert found.plan.architecture(ARCHITECTURE) == found.architecture
    assert events.of("macs_50pct step 3/3: importance")[-1] == 60
    one_shot = prune(tmp_path / "one", HALF).found[0]
    assert one_shot.plan != found.plan


def test_a_step_that_goes_past_the_limits_after_it_leaves_them_nothing_to_do(
    tmp_path: Path,
) -> None:
    result = prune(tmp_path, HALF, iterations=5, units=("layer",))
    found = result.found[0]
    places = [found.folder / "steps" / str(step) for step in range(1, 5)] + [found.folder]
    macs = [figures(place)[MACS] for place in places]
    limits = [0.5 ** (step / 5) * cost(ARCHITECTURE).macs for step in range(1, 6)]
    assert all(has <= limit for has, limit in zip(macs, limits, strict=True))
    assert any(after == before for before, after in pairwise(macs))
    assert found.plan.architecture(ARCHITECTURE) == found.architecture


def test_a_stopped_iteration_ends_the_same(tmp_path: Path) -> None:
    prune(tmp_path / "whole", HALF, iterations=2)
    stop = Stops("macs_50pct step 2/2: importance", 2, gently=True)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "cut", HALF, iterations=2, listener=stop)
    rest = Events()
    prune(tmp_path / "cut", HALF, iterations=2, listener=rest)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert rest.of("macs_50pct step 1/2: planning") == []


KILLS = [
    "2 basis",
    "2 importance",
    "5 importance",
    "1 planning",
    "4 correction",
    "2 fine-tuning",
    "1 before scores.safetensors",
    "1 after scoring.safetensors",
    "2 before architecture.yaml",
    "2 after weights.safetensors",
    "1 after plan.json",
    "every 2 importance",
]


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL, start again: the same bytes as a run never stopped, and nothing left over."""
    done = subprocess.run(
        [sys.executable, killed_prunes.__file__, tmp_path, "1 never", *KILLS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    starts = json.loads(done.stdout)
    assert starts.pop("1 never") == 1
    assert list(starts) == KILLS
    assert all(count >= 2 for count in starts.values())
    whole = files(tmp_path / "1_never")
    assert len(whole) > 10
    for moment in KILLS:
        assert files(tmp_path / moment.replace(" ", "_")) == whole, moment


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_two_plans_as_one_cut_the_same_network(family: str, seed: int) -> None:
    from prune_cases import ARCHITECTURES

    source = random_network(ARCHITECTURES[family], seed)
    first = random_plan(source.architecture, seed)
    middle = apply_plan(first, source)
    second = random_plan(middle.architecture, seed + 10)
    twice = apply_plan(second, middle)
    once = apply_plan(compose(first, second, source.architecture), source)
    assert once.architecture == twice.architecture
    shape = source.architecture.input.shape
    image = torch.randn(2, shape.channels, shape.height, shape.width, dtype=torch.float64)
    assert torch.allclose(once(image), twice(image), atol=1e-10, rtol=0)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    prune(tmp_path, HALF)
    with pytest.raises(RunFolderError, match=r"criterion was 'fisher', now 'taylor'"):
        prune(tmp_path, HALF, criterion="taylor")
    with pytest.raises(RunFolderError, match=r"iterations was 1, now 2.*another --output"):
        prune(tmp_path, HALF, iterations=2)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(SpecError, match="not valid JSON"):
        prune(tmp_path, HALF)


def test_settings_survive_the_file(tmp_path: Path) -> None:
    prune(tmp_path, HALF, **TUNED)
    loaded = PruneConfig.load(tmp_path / FILE)
    assert loaded.finetune is not None
    assert loaded.finetune.epochs == 2
    assert json.loads((tmp_path / FILE).read_text())["schema"] == "slimnas/prune-config/1"


@pytest.mark.parametrize("file", ["scores.safetensors", "scored/weights.safetensors"])
def test_damaged_files_are_refused(file: str, tmp_path: Path) -> None:
    prune(tmp_path, HALF)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SlimnasError, match="damaged"):
        prune(tmp_path, HALF, MOST)


@pytest.mark.parametrize(
    ("file", "remove"),
    [("before.json", "before.json"), ("found/macs_50pct/metrics.json", "found/macs_50pct")],
)
def test_files_without_a_figure_are_refused(file: str, remove: str, tmp_path: Path) -> None:
    prune(tmp_path, HALF)
    (tmp_path / file).write_text('{"macs": {"value": 1, "provenance": "nobody"}}')
    with pytest.raises(
        ZooError, match=rf"{file}: params, .*{TEST_TOP1}: missing; remove .*{remove} to"
    ):
        prune(tmp_path, HALF)


def test_overflowing_activations_name_layer_and_minibatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prune_world

    broken = network()
    with torch.no_grad():
        broken.stages[0].blocks[1].mlp.fc1.weight.fill_(3e38)
    monkeypatch.setattr(prune_world, "network", lambda seed=1: broken)
    with pytest.raises(PruneError, match=r"fc\d.*finite.*minibatch 1"):
        prune(tmp_path, HALF, basis="channels")
    assert not (tmp_path / SCORES).exists()


@pytest.mark.parametrize(
    ("asked", "kind", "label"),
    [
        ("0.9G", "macs", "macs_0.9G"),
        ("75%", "params", "params_75pct"),
        ("6ms", "latency_ms", "latency_6ms"),
        ("0.3", "units", "ratio_0.3"),
    ],
)
def test_budget_folders(asked: str, kind: str, label: str) -> None:
    spec = BudgetSpec.model_validate({"kind": kind, "limit": 1.0, "asked": asked})
    assert spec.label == label


def test_labels_of_other_classes_are_the_models_own() -> None:
    """Of photographs, and of digits for a network of seven classes; and agreement is whole."""
    from slimnas.nn.build import build

    seven = build(ARCHITECTURE.with_head(classes=7), seed=3).eval()
    for data in ("photos", "digits"):
        request = DataRequest(data, None, 30, "auto", ((0.5,), (0.5,)), False, 0)
        images = open_calibration(request, seven, "cpu")
        assert images.labels == images.test_labels == "model"
        assert images.is_stand_in == (data == "photos")
        assert images.images.mean == images.test.mean == (0.5,)
        assert evaluate(seven, images.test, "cpu") == 100.0
        batches = Batches(images.images, 7, "cpu")
        assert [len(labels) for _, labels in batches] == [7, 7, 7, 7, 2]
        assert [len(labels) for _, labels in Batches(images.images, 7, "cpu", start=4)] == [2]
        assert len(Batches(images.images, 7, "cpu", limit=10)) == 2
    asked = DataRequest("digits", None, 30, "data", None, False, 0)
    with pytest.raises(SlimnasError, match=r"must have the 7 classes .* has 10 classes"):
        open_calibration(asked, seven, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_are_counted_as_computed(family: str) -> None:
    from prune_cases import ARCHITECTURES

    assert measured_macs(random_network(ARCHITECTURES[family])) == cost(ARCHITECTURES[family]).macs


def test_preprocessing_is_that_of_the_published_weights() -> None:
    timm = pytest.importorskip("timm")
    looked_at = 0
    for name in builtin_names():
        provenance = get(name).architecture.provenance
        if "weights" not in provenance:
            continue
        repository = provenance["weights"]["repository"].removeprefix("timm/")
        published = timm.get_pretrained_cfg(repository)
        assert tuple(provenance["preprocessing"]["mean"]) == published.mean, name
        assert tuple(provenance["preprocessing"]["std"]) == published.std, name
        looked_at += 1
    assert looked_at == 28
