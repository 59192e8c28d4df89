"""`slimnas search --supernet shipped`: answers without images, training or weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_world import SPACE as SMALL
from cli_world import lay_out, slimnas
from killed_searches import Moments
from micro import made_up_table, micro_space
from record_cases import micro_record, record_of

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace
from slimnas.errors import RunFolderError, WeightsError
from slimnas.latency.estimate import estimate
from slimnas.search.checks import pricer, space_digest, table_digest
from slimnas.search.config import SearchConfig, claim
from slimnas.search.record import RecordEvaluator, open_record
from slimnas.search.record_run import run_from_record
from slimnas.search.run import SearchResult
from slimnas.search.slimming import Slimmer, cheapest
from slimnas.search.trajectory import Trajectory
from slimnas.zoo.create import create_model
from slimnas.zoo.metrics import load_metrics

SPACE = micro_space()
TABLE = made_up_table(SPACE)
RUN = Path("runs/small-record-bench-0.2ms")


def targets(*shares: float) -> tuple[float, ...]:
    price = pricer(SPACE, TABLE)
    low, top = cheapest(SPACE, price)[1], price(SPACE.largest(0))
    return tuple(low + share * (top - low) for share in shares)


def search(folder: Path, targets_ms: tuple[float, ...], seed: int = 0) -> SearchResult:
    record = micro_record(seed)
    config = SearchConfig(
        space="micro",
        space_digest=space_digest(SPACE),
        data=record.data.source,
        device="made-up",
        table_digest=table_digest(TABLE),
        targets_ms=targets_ms,
        resolution=record.resolution,
        recipe=None,
        record_digest=record.digest,
    )
    claim(folder, config)
    return run_from_record(
        config, SPACE, TABLE, record, folder, listener=Moments(), meter="not asked for"
    )


def test_it_is_the_same_slimming_by_what_the_record_says(tmp_path: Path) -> None:
    wanted = targets(0.3, 0.6)
    result = search(tmp_path, wanted)
    record = micro_record()
    evaluator = RecordEvaluator(record, SPACE)
    slimmer = Slimmer(SPACE, result.importance, pricer(SPACE, TABLE), evaluator.top1, fill=0.97)
    trajectory, reached = slimmer.run(slimmer.begin({}), wanted)
    assert result.trajectory.steps == trajectory.steps
    assert [found.steps for found in result.found] == [reached[each] for each in wanted]
    assert result.trained is None
    assert result.record == record
    for target_ms, found in zip(wanted, result.found, strict=True):
        assert found.estimate.latency_ms <= target_ms
        assert found.search_top1 == evaluator.top1(found.selection)
        assert found.is_predicted is not evaluator.is_measured(found.selection)
        assert not found.has_weights


def test_what_it_leaves(tmp_path: Path) -> None:
    result = search(tmp_path, targets(0.5))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("config.yaml", "importance.json", "trajectory.jsonl"),
        *("architecture.yaml", "metrics.json"),
    }
    (found,) = result.found
    architecture = Architecture.load(tmp_path / "architecture.yaml")
    assert architecture == found.architecture == SPACE.architecture(found.selection)
    assert architecture.provenance["record_digest"] == micro_record().digest
    assert found.estimate == estimate(architecture, TABLE)
    assert found.cost == cost(architecture)
    top1 = load_metrics(tmp_path / "metrics.json")["search_top1_percent"]
    assert top1.value == found.search_top1
    assert "this network has no weights" in top1.provenance
    assert ("predicted from" in top1.provenance) is found.is_predicted
    assert create_model(tmp_path).architecture == architecture
    with pytest.raises(WeightsError, match="no weights beside the architecture"):
        create_model(tmp_path, pretrained=True)


def test_again_it_does_nothing_new_and_another_record_is_refused(tmp_path: Path) -> None:
    search(tmp_path, targets(0.5))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    search(tmp_path, targets(0.5))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(RunFolderError, match="record_digest was "):
        search(tmp_path, targets(0.5), seed=1)
    trajectory = Trajectory.load(tmp_path / "trajectory.jsonl")
    assert trajectory.provenance["record_digest"] == micro_record().digest


def test_every_target_of_the_micro_space_is_met(tmp_path: Path) -> None:
    wanted = targets(0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
    result = search(tmp_path, wanted)
    assert [found.target_ms for found in result.found] == list(wanted)
    for found in result.found:
        assert found.estimate.latency_ms <= found.target_ms
        assert (found.folder / "architecture.yaml").is_file()


# --- the command ---

COMMAND = ("search", "--device", "bench", "--space", "space.yaml", "--target-latency", "0.2ms")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`space.yaml`, its table, and a record of it."""
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    record_of(SearchSpace.from_yaml(SMALL)).save(tmp_path / "record.yaml")
    return tmp_path


def test_the_command_to_its_end(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = slimnas(capsys, *COMMAND, "--supernet", "record.yaml", "--json")
    assert answer.code == 0, answer.err
    body = answer.json()
    assert body["run"] == str(RUN)
    (found,) = body["found"]
    assert found["weights"] is None
    assert found["search_top1_kind"] in ("predicted", "measured")
    assert found["latency_ms"] <= 0.2
    assert Architecture.load(found["architecture"]).head.classes == 10
    record = open_record("record.yaml", SearchSpace.load("space.yaml"))
    assert body["supernet_digest"] == record.supernet_digest
    assert body["evidence"]["kind"] == "record"
    assert body["evidence"]["record_digest"] == record.digest
    stated = [(error.what, error.spearman) for error in record.errors]
    assert [(e["what"], e["spearman"]) for e in body["evidence"]["held_out"]] == stated
    assert "record of small: a supernet trained on made-up (100 images of 10 classes" in answer.err
    assert not (RUN / "weights.safetensors").exists()
    page = (RUN / "report.html").read_text(encoding="utf-8")
    assert "These networks have no weights." in page
    assert "slimnas train " in page
    assert "slimnas zoo add" not in page
    assert "weights.safetensors" not in page
    for line in body["evidence"]["said"]:
        assert line[1:] in page

    said = slimnas(capsys, *COMMAND, "--supernet", "record.yaml")
    assert said.code == 0
    assert "evidence: record of small" in said.out
    assert f"train it: slimnas train {RUN}" in said.out
    settings = json.dumps(SearchConfig.load(RUN / "config.yaml").model_dump(mode="json"))
    assert record.digest in settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--supernet", "shipped"), "search space small: no record ships with it (with a record: "),
        (("--supernet", "missing.yaml"), "missing.yaml: no such file; expected a search record"),
        (("--supernet", "space.yaml"), "space.yaml: schema: must be 'slimnas/search-record/1'"),
    ],
)
def test_refused_in_one_line(
    arguments: tuple[str, ...], message: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *COMMAND, *arguments)
    assert answer.code == 1
    (line,) = answer.errors
    assert message in line
    assert not Path("runs").exists()


def test_a_record_of_another_space(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.yaml").write_text(SMALL.replace("max: 48", "max: 64"))
    command = [word if word != "space.yaml" else "other.yaml" for word in COMMAND]
    answer = slimnas(capsys, *command, "--supernet", "record.yaml")
    assert answer.code == 1
    (line,) = answer.errors
    assert line.startswith("record.yaml: space_digest: was made for another content of search sp")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--epochs", "3", "--lr", "0.1"), "--epochs, --lr"),
        (("--data", "photos"), "--data"),
        (("--search-images", "20", "--resolution", "32"), "--search-images, --resolution"),
    ],
)
def test_options_that_a_record_has_decided(
    arguments: tuple[str, ...], named: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *COMMAND, "--supernet", "record.yaml", *arguments)
    assert answer.code == 2
    said = " ".join(answer.err.replace("│", " ").split())
    assert f"a record reads no images and trains nothing; leave out {named}" in said
    assert not Path("runs").exists()


def test_a_record_of_a_search_run(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a search that trains to a record, and from the record to an answer."""
    training = ("--epochs", "1", "--max-images", "240", "--search-images", "20", "--no-measure")
    trained = slimnas(capsys, *COMMAND, *training, "--train-on", "cpu", "--json")
    assert trained.code == 0, trained.err
    assert trained.json()["evidence"]["kind"] == "trained"
    run = trained.json()["run"]
    recording = (
        *("space", "record", run, "--output", "mine.yaml", "--selections", "20"),
        *("--walks", "1", "--search-images", "30", "--evaluate-on", "cpu", "--json"),
    )
    made = slimnas(capsys, *recording)
    assert made.code == 0, made.err
    body = made.json()
    assert body["supernet_digest"] == trained.json()["supernet_digest"]
    assert body["search_images"] == 30
    record = open_record("mine.yaml", SearchSpace.load("space.yaml"))
    assert record.data.source == "digits"
    assert record.data.images["search"] == 30 or record.search_images == 30
    assert record.recipe["epochs"] == 1
    assert len(record.rows) == body["measured"] > 12
    journal = (Path(run) / "record.jsonl").read_bytes()
    again = slimnas(capsys, *recording)
    assert again.json()["digest"] == body["digest"]
    assert (Path(run) / "record.jsonl").read_bytes() == journal

    answer = slimnas(capsys, *COMMAND, "--supernet", "mine.yaml", "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["evidence"]["record_digest"] == record.digest

    no_run = slimnas(capsys, "space", "record", "lookup_tables", "--output", "a.yaml")
    assert no_run.code == 1
    assert len(no_run.errors) == 1
    wrong = slimnas(capsys, "space", "record", run, "--output", "a.json")
    assert wrong.errors == ["a.json: a record must be a .yaml file; give such an --output"]
    only_record = slimnas(capsys, "space", "record", str(RUN), "--output", "a.yaml")
    assert "has no supernet.safetensors" in only_record.errors[0]
