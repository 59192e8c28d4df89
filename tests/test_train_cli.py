"""`slimnas train` from the command line: what it prints, what it leaves, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_world import slimnas
from ctrl_c import press_ctrl_c
from PIL import Image
from train_world import ARCHITECTURE, EPOCHS, NETWORK, STEPS, TRAIN, lay_out

import slimnas as package
from slimnas.cli import train_progress
from slimnas.nn.build import build
from slimnas.zoo.weights import save_weights

RUN = Path("runs/train-mini-digits")
KEYS = {
    *("run", "model", "data", "recipe", "top1", "best_top1", "best_epoch", "epochs", "steps"),
    *("digest", "images", "params", "macs", "architecture", "weights", "provenance", "files"),
}


def shell(folder: Path, *arguments: object, launcher: tuple[str, ...] = ()) -> Any:
    """Run a command in processes of its own."""
    words = [sys.executable, *launcher, "-m", "slimnas", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run in another process, and the JSON it printed."""
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    done = shell(folder, *TRAIN, "--tracker", "tensorboard", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert f"epoch {EPOCHS} step {STEPS}" in done.stderr
    assert "% waiting for data" in done.stderr
    return folder, json.loads(done.stdout)


@pytest.fixture
def world(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(finished[0])
    return finished[1]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_has_the_stable_keys(world: dict[str, Any]) -> None:
    assert world.keys() >= KEYS
    assert world["run"] == str(RUN)
    assert (world["epochs"], world["steps"]) == (EPOCHS, STEPS)
    assert world["images"] == {"train": 160, "test": 40}
    assert 0 <= world["top1"] <= world["best_top1"] <= 100
    network = package.create_model(RUN, pretrained=True)
    assert sum(p.numel() for p in network.parameters()) == world["params"]


def test_the_files_it_names_are_all_there_is(world: dict[str, Any]) -> None:
    named = {Path(path) for path in world["files"]}
    assert named == set(RUN.iterdir())
    assert {path.name for path in named} == {
        *("architecture.yaml", "weights.safetensors", "best.safetensors", "metrics.json"),
        *("result.json", "config.yaml", "metrics.jsonl", "training.png", "training.safetensors"),
        "logs",
    }
    with Image.open(RUN / "training.png") as picture:
        assert picture.width > 1000
        colours = picture.convert("RGB").resize((90, 24)).getcolors(maxcolors=1 << 16)
        assert colours is not None
        assert len(colours) > 20
    modes = {path.stat().st_mode & 0o777 for path in RUN.iterdir() if path.is_file()}
    assert len(modes) == 1, "every file as readable as the others"


def test_tensorboard_can_read_the_run(world: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (RUN / "logs").rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"epoch/test_top1", "epoch/images_per_s", "step/loss", "step/lr"} <= set(scalars)
    last = events.Scalars("epoch/test_top1")[-1]
    assert last.step == STEPS
    assert last.value == pytest.approx(world["top1"], rel=1e-6)


def test_again_it_only_reports(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        pytest.fail("data opened")

    monkeypatch.setattr("slimnas.cli.train_run.open_images", opened)
    assert slimnas(capsys, *TRAIN, "--json").json() == world
    text = slimnas(capsys, *TRAIN).out
    assert f"top-1 {world['top1']:.2f} % on 40 TEST images" in text
    for line in text.splitlines():
        if line.startswith("runs/"):
            assert Path(line).exists(), line


@pytest.mark.parametrize("stop_at", [2, 7])
def test_ctrl_c_says_how_to_go_on_and_loses_nothing(
    stop_at: int,
    finished: tuple[Path, dict[str, Any]],
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = train_progress.TrainProgress.step

    def stopping(self: Any, report: Any) -> None:
        step(self, report)
        if report.step == stop_at:
            press_ctrl_c()

    with monkeypatch.context() as patch:
        patch.setattr(train_progress.TrainProgress, "step", stopping)
        answer = slimnas(capsys, *TRAIN)
    assert answer.code == 130
    assert "the same command goes on where it was" in answer.err
    assert not (RUN / "result.json").exists()
    assert (RUN / "training.png").exists() == (stop_at == 7)
    other = slimnas(capsys, *TRAIN, "--lr", "0.1")
    assert other.code == 1
    assert "recipe.lr was 0.002, now 0.1" in other.errors[0]
    again = slimnas(capsys, *TRAIN, "--json")
    assert again.json()["digest"] == finished[1]["digest"]


def test_the_next_commands(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "zoo"
    assert slimnas(capsys, "zoo", "add", RUN, "--name", "mine", "--zoo", zoo).code == 0
    shown = slimnas(capsys, "zoo", "show", "mine", "--zoo", zoo, "--json").json()
    assert shown["metrics"]["test_top1_percent"]["value"] == world["top1"]
    judged = slimnas(capsys, "evaluate", RUN, "--train-on", "cpu", "--json")
    assert judged.json()["top1"] == world["top1"]
    assert judged.json()["images"] == world["images"]["test"]
    given = ("--train-on", "cpu", "--max-images", "200", "--batch-size", "32", "--epochs", "1")
    tuned = slimnas(
        capsys, "train", RUN, "--recipe", "finetune", *given, "--output", tmp_path / "tuned"
    )
    assert tuned.code == 0, tuned.err
    assert f"weights: {RUN / 'weights.safetensors'}" in tuned.err
    assert "head:" not in tuned.err
    taught = slimnas(
        *(capsys, "train", "mini.yaml", "--teacher", RUN, *given, "--output", tmp_path / "taught")
    )
    assert taught.code == 0, taught.err
    assert "distillation: hard, since there is a teacher" in taught.err


def test_other_classes_get_a_fresh_head(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coloured = NETWORK.replace("channels: 1", "channels: 3").replace("name: mini", "name: rgb")
    (fresh / "rgb.yaml").write_text(coloured)
    architecture = package.Architecture.load("rgb.yaml")
    save_weights("rgb.safetensors", build(architecture).state_dict(), architecture)
    given = ("--data", "photos", "--batch-size", "8", "--epochs", "1", "--train-on", "cpu")
    answer = slimnas(capsys, "train", "rgb.yaml", *given, "--json")
    assert answer.code == 0, answer.err
    assert "head: fresh, for the 2 classes of the data in place of 10" in answer.err
    made = package.Architecture.load(answer.json()["architecture"])
    assert made.head.classes == 2
    assert made.provenance["trained_from"]["weights"] == "rgb.safetensors"
    assert answer.json()["run"] == "runs/train-rgb-photos"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "--data nowhere: no such file or folder"),
        ("--recipe quik", "no recipe or file 'quik' (did you mean 'quick'?)"),
        ("--set mixxup=0.2", "unknown key 'mixxup' (did you mean 'mixup'?)"),
        ("--set mixup", "--set 'mixup': must be KEY=VALUE"),
        ("--set mixup=[", "is no YAML value"),
        ("--set randaugment.magnitude=30", "randaugment.magnitude: must be at most 10"),
        ("--lr -1", "lr: must be above 0"),
        ("--set warmup_epochs=3", "the 3 of warm-up and 0 of cool-down, got 3; give more"),
        ("--batch-size 1000", "batch"),
        ("--set accumulation=3", "must be a multiple of 3"),
        ("--weights absent.safetensors", "absent.safetensors: no such file"),
        ("--weights other.safetensors", "saved for another architecture"),
        ("--pretrained --from-scratch", "exclude each other"),
        ("--pretrained", "no weights beside the architecture"),
        ("--teacher absent", "absent"),
        ("--teacher other.yaml", "knows 7 classes, the data have 10"),
        ("--distillation soft", "needs a teacher"),
        ("--train-on mps", "'mps' is not available here"),
        ("--tracker wandbb", "did you mean 'wandb'"),
        ("--images-per-epoch 5", "give --stream as well"),
        ("--stream", "stream"),
        ("--test-data digits", "must not be the images trained on"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: str, message: str, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ARCHITECTURE.with_head(classes=7).renamed("other")
    other.save(fresh / "other.yaml")
    save_weights(fresh / "other.safetensors", build(other).state_dict(), other)
    answer = slimnas(capsys, *TRAIN, *arguments.split())
    assert answer.code == 1, answer.err
    assert len(answer.errors) == 1, answer.err
    assert message in answer.errors[0]
    assert answer.out == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize("model", ["nosuch", "absent.yaml", "photos"])
def test_models_that_are_not_there(
    model: str, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, "train", model, *TRAIN[2:])
    assert answer.code == 1
    assert len(answer.errors) == 1
    assert model in answer.errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "model"),
        ("train mini --epochs 0", "--epochs"),
        ("train mini --precision fp17", "--precision"),
        ("train mini --distillation firm", "--distillation"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *arguments.split())
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""


def test_a_locked_folder_is_refused(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from slimnas._lock import folder_lock

    with folder_lock(RUN):
        answer = slimnas(capsys, *TRAIN)
    assert answer.code == 1
    assert "in use by another run" in answer.errors[0]


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_speak_with_one_voice(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    lay_out(tmp_path)
    done = shell(tmp_path, *TRAIN, "--json", "--set", "sync_bn=true", launcher=LAUNCHER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    body = json.loads(done.stdout)
    assert body["provenance"]["processes"] == 2
    assert (body["steps"], body["images"]) == (finished[1]["steps"], finished[1]["images"])
    assert done.stderr.count("training at 16x16 px") == 1
    again = shell(tmp_path, *TRAIN, "--json", "--set", "sync_bn=true", launcher=LAUNCHER)
    assert json.loads(again.stdout) == body


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--set accumulation=3", "--recipe quik"])
def test_two_processes_fail_with_one_line(arguments: str, tmp_path: Path) -> None:
    lay_out(tmp_path)
    done = shell(tmp_path, *TRAIN, *arguments.split(), launcher=LAUNCHER)
    assert done.returncode != 0
    assert len([x for x in done.stderr.splitlines() if x.startswith("error: ")]) == 1, done.stderr
    assert not (tmp_path / "runs").exists()
