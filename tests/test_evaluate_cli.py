"""`slimnas evaluate` from outside: numbers, the ONNX file beside PyTorch, files, refusals."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cli_world import slimnas
from PIL import Image
from prune_cases import ARCHITECTURES, random_network
from sklearn.metrics import accuracy_score, confusion_matrix
from zoo_cases import METRICS, TINY, save_run, trained

from slimnas.data.splits import DataOptions, DataSplits, open_data
from slimnas.data.whole import open_whole
from slimnas.nn.build import build
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.prune.config import BudgetSpec, PruneConfig
from slimnas.prune.finetune import evaluate as top1_as_pruning
from slimnas.report.evaluation import EvaluationReport, confusion_figure, reliability_figure
from slimnas.search.config import SearchConfig
from slimnas.train.config import TrainConfig
from slimnas.train.evaluate import evaluate
from slimnas.train.network_recipe import NetworkRecipe
from slimnas.zoo.create import create_model
from slimnas.zoo.entry import save_model
from slimnas.zoo.export import export_network

DIGITS = ("--data", "digits")
RUN = Path("run")


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one trained network: trained enough for wrong and right answers."""
    monkeypatch.chdir(tmp_path)
    save_run(RUN)
    return tmp_path


def held_out(seed: int = 0, resolution: int = 32) -> DataSplits:
    return open_data("digits", resolution=(resolution,) * 2, channels=3, seed=seed)


def answered(splits: DataSplits, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the network on TEST, and the labels."""
    network = trained(seed)
    batches = splits.test.eval_batches(50, device="cpu")
    with torch.inference_mode():
        logits = torch.cat([network(images) for images, _ in batches])
    return logits.numpy(), splits.test.labels.numpy()


def export(path: Path, *, seed: int = 0, dynamic_batch: bool = False) -> Path:
    export_network(trained(seed), path, dynamic_batch=dynamic_batch)
    return path


def test_the_numbers_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    body = slimnas(capsys, "evaluate", RUN, *DIGITS, "--json").json()
    splits = held_out()
    logits, labels = answered(splits)
    predicted = logits.argmax(axis=1)
    assert body["top1"] == pytest.approx(100 * accuracy_score(labels, predicted))
    top5 = (np.argsort(-logits, axis=1)[:, :5] == labels[:, None]).any(axis=1).mean()
    assert body["top5"] == pytest.approx(100 * top5)
    assert body["images"] == len(labels)
    assert body["top5_note"] is None
    matrix = confusion_matrix(labels, predicted, labels=range(10))
    found = np.zeros_like(matrix)
    for label, answer, images in body["confusion"]:
        found[label, answer] = images
    assert (found == matrix).all()
    for row in body["per_class"]:
        number = row["class"]
        assert row["images"] == matrix[number].sum()
        assert row["top1"] == pytest.approx(100 * matrix[number, number] / matrix[number].sum())
    one = body["confusions"][0]
    off = matrix - np.diag(np.diag(matrix))
    assert one["images"] == off.max()
    assert one["words"].startswith(f"{one['images']} of {one['of']} images of '{one['label']}' ")
    provenance = body["provenance"]
    assert provenance["weights"] == str(RUN / "weights.safetensors")
    assert provenance["weights_digest"] == tensors_digest(trained().state_dict())
    assert provenance["architecture"] == TINY.digest
    assert provenance["normalisation"]["mean"] == list(splits.mean)
    assert len(provenance["data_digest"]) == 64
    assert provenance["versions"]["torch"] == torch.__version__
    assert (body["evaluated"], body["disagreement"], body["files"]) == ("pytorch", None, {})


def test_what_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    answer = slimnas(capsys, "evaluate", RUN, *DIGITS, "--max-images", "100", "--seed", "1")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("tiny, run/weights.safetensors; digits, test held out: 100 images")
    assert lines[1].startswith("top-1")
    assert "95 % interval" in lines[1]
    assert "classes:" in lines
    assert (
        len([line for line in lines if re.fullmatch(r"  \d +[\d.]+ %  of \d+ images", line)]) == 10
    )
    assert "normalised by: mean and deviation of the data's TRAIN images" in answer.err
    assert "evaluating 100/100 images" in answer.err


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_an_exported_file_agrees(dynamic_batch: bool, capsys: pytest.CaptureFixture[str]) -> None:
    file = export(Path("tiny.onnx"), dynamic_batch=dynamic_batch)
    options = ("--onnx", file, "--batch-size", "47", "--fail-on-disagreement")
    answer = slimnas(capsys, "evaluate", RUN, *DIGITS, *options, "--json")
    assert answer.code == 0, answer.err
    body = answer.json()
    found = body["disagreement"]
    assert found["agree"]
    assert found["different"] == 0
    assert found["first"] == []
    splits = held_out()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    batches = splits.test.eval_batches(1, device="cpu")
    theirs = np.concatenate([session.run(None, {"image": x.numpy()})[0] for x, _ in batches])
    logits, labels = answered(splits)
    assert found["largest_logit_difference"] == pytest.approx(
        np.abs(theirs - logits).max(), abs=1e-4
    )
    assert found["largest_logit_difference"] < 1e-3
    assert body["onnx"]["top1"] == pytest.approx(100 * accuracy_score(labels, theirs.argmax(1)))
    assert body["onnx"]["images"] == len(labels)
    assert body["provenance"]["onnx_digest"] == hashlib.sha256(file.read_bytes()).hexdigest()
    said = slimnas(capsys, "evaluate", RUN, *DIGITS, *options, "--max-images", "20").out
    assert "ONNX file and PyTorch agree: the same top-1 for all 20 images" in said


def test_a_file_of_other_weights_disagrees(capsys: pytest.CaptureFixture[str]) -> None:
    file = export(Path("other.onnx"), seed=1)
    command = ("evaluate", RUN, *DIGITS, "--onnx", file)
    answer = slimnas(capsys, *command, "--json")
    assert answer.code == 0
    found = answer.json()["disagreement"]
    splits = held_out()
    mine, labels = answered(splits)
    theirs, _ = answered(splits, seed=1)
    different = np.flatnonzero(mine.argmax(1) != theirs.argmax(1))
    assert len(different) > 10
    assert (found["agree"], found["different"]) == (False, len(different))
    assert found["share_percent"] == pytest.approx(100 * len(different) / len(labels))
    assert found["largest_logit_difference"] == pytest.approx(np.abs(mine - theirs).max(), rel=1e-3)
    assert len(found["first"]) == 10
    first = found["first"][0]
    assert first["image"].startswith("digits image ")
    row = different[0]
    assert first["answers"] == [str(mine[row].argmax()), str(theirs[row].argmax())]
    assert first["label"] == str(labels[row])
    strict = slimnas(capsys, *command, "--fail-on-disagreement")
    assert strict.code == 1
    assert f"disagree: another top-1 for {len(different)} of {len(labels)}" in strict.out
    (error,) = strict.errors
    assert error.startswith("other.onnx: must give PyTorch's top-1, ")
    assert f"gives another for {len(different)} of {len(labels)} images" in error


def test_the_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    file = export(Path("other.onnx"), seed=1)
    TINY.save(Path("tiny.yaml"))
    command = ("evaluate", "tiny.yaml", *DIGITS, "--weights", "none", "--onnx", file, "--json")
    body = slimnas(capsys, *command).json()
    logits, labels = answered(held_out(), seed=1)
    assert body["top1"] == pytest.approx(100 * accuracy_score(labels, logits.argmax(axis=1)))
    assert (body["evaluated"], body["disagreement"]) == ("onnx", None)
    assert body["provenance"]["weights_digest"] is None
    assert body["provenance"]["weights"] == "ONNX file other.onnx"


def test_the_files_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("evaluate", RUN, *DIGITS, "--onnx", export(Path("o.onnx")), "--output", "out")
    body = slimnas(capsys, *command, "--json").json()
    names = ["confusion.csv", "confusion.png", "confusion.svg", "evaluation.json"]
    names += ["per_class.csv", "reliability.png", "reliability.svg"]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    assert sorted(Path(path).name for path in body.pop("files").values()) == names
    document = json.loads(Path("out/evaluation.json").read_text())
    assert document.pop("schema") == "slimnas/evaluation/1"
    assert document == body
    with Path("out/per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [str(digit) for digit in range(10)]
    assert sum(int(row["right"]) for row in rows) == body["right"]
    with Path("out/confusion.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert sum(int(cell["images"]) for cell in cells) == body["images"]
    for name in ("confusion", "reliability"):
        with Image.open(f"out/{name}.png") as image:
            assert min(image.size) > 400


def report_of(classes: int, images: int) -> EvaluationReport:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 2.0
    found = evaluate(lambda x: x, [(logits, labels)], classes)
    names = [f"class {number} of a name that is rather long" for number in range(classes)]
    return EvaluationReport({"pytorch": found}, None, names, str, {})


@pytest.mark.parametrize(("classes", "shown"), [(3, 3), (20, 20), (200, 24)])
def test_the_figures_hold_what_is_confused_most(classes: int, shown: int) -> None:
    report = report_of(classes, 500)
    matrix = confusion_figure(report).axes[0]
    assert matrix.images[0].get_array().shape[0] <= shown
    labels = [text.get_text() for text in matrix.get_xticklabels()]
    assert len(labels) > 0.8 * shown
    assert all(len(label) <= 20 for label in labels)
    if classes == 200:
        first = report.main.confusions(1)[0]
        assert " classes of 198, those confused most" in matrix.get_title(loc="left")
        assert any(label.startswith(f"class {first.label} ") for label in labels)
    upper, lower = reliability_figure(report.main).axes
    assert f"{report.main.ece:.1f} %" in upper.get_title(loc="left")
    heights = [patch.get_height() for patch in lower.patches]
    assert sum(heights) == pytest.approx(100.0)


def test_few_classes_say_that_top5_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (Path("photos") / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("photos") / name / f"{number}.png")
    network = build(TINY.with_head(classes=2)).eval()
    save_model("two", architecture=network.architecture, weights=network.state_dict(), metrics={})
    command = (
        "evaluate",
        "two",
        "--data",
        "photos",
        "--split",
        "all",
        "--normalisation",
        "imagenet",
    )
    body = slimnas(capsys, *command, "--json").json()
    assert (body["top5"], body["images"]) == (100.0, 10)
    assert body["top5_note"].startswith("there are only 2 classes")
    assert "there are only 2 classes" in slimnas(capsys, *command).out
    cropped = slimnas(capsys, *command, "--crop-pct", "0.9", "--json").json()
    assert cropped["provenance"]["transform"]["resize"] == [35, 35]
    assert cropped["provenance"]["data_digest"] != body["provenance"]["data_digest"]
    resized = slimnas(capsys, *command, "--resize", "35", "--interpolation", "bicubic", "--json")
    assert resized.json()["provenance"]["data_digest"] == cropped["provenance"]["data_digest"]


def run_config(**changes: Any) -> SearchConfig:
    given: dict[str, Any] = {"space": "s", "space_digest": "0", "device": "d", "table_digest": "0"}
    return SearchConfig(**{**given, "targets_ms": (1.0,), "resolution": 32, **changes})


def test_a_run_is_judged_on_what_it_held_out(capsys: pytest.CaptureFixture[str]) -> None:
    run_config(seed=7, max_images=300).save(RUN / "config.yaml")
    provenance = slimnas(capsys, "evaluate", RUN, "--json").json()["provenance"]
    assert (provenance["data"], provenance["seed"]) == ("digits", 7)
    splits = open_data("digits", resolution=(32, 32), channels=3, seed=7, max_images=300)
    assert provenance["normalisation"]["mean"] == list(splits.mean)
    assert f"{len(splits.test)} images" in provenance["data_description"]
    save_run(RUN / "found" / "1ms")
    (RUN / "weights.safetensors").unlink()
    (RUN / "architecture.yaml").unlink()
    again = slimnas(capsys, "evaluate", RUN / "found" / "1ms", "--json").json()["provenance"]
    assert again["data_digest"] == provenance["data_digest"]
    other = slimnas(capsys, "evaluate", RUN, "--seed", "8", "--json").json()["provenance"]
    assert other["data_digest"] != provenance["data_digest"]
    (RUN / "config.yaml").write_text("schema: slimnas/search-config/1\nspace: 3\n")
    assert "config.yaml: space: " in slimnas(capsys, "evaluate", RUN).errors[0]
    (RUN / "config.yaml").write_text("a: [")
    assert "config.yaml: not valid YAML" in slimnas(capsys, "evaluate", RUN).errors[0]
    (RUN / "config.yaml").write_text("[" * 3000)
    assert "config.yaml: not valid YAML" in slimnas(capsys, "evaluate", RUN).errors[0]


def test_the_resolution_is_that_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    network = trained()
    architecture = TINY.with_resolution(64).renamed("tiny", {"trained_at": 32, "seed": 2})
    from slimnas.nn.resolution import adapt_state_dict

    state = adapt_state_dict(network.state_dict(), source=TINY, target=architecture)
    save_model("found", architecture=architecture, weights=state, metrics=METRICS)
    answer = slimnas(capsys, "evaluate", "found", *DIGITS, "--max-images", "50", "--json")
    assert "resolution: 32 px, which its weights were trained at" in answer.err
    provenance = answer.json()["provenance"]
    assert (provenance["resolution"], provenance["seed"]) == ([32, 32], 2)
    bigger = slimnas(
        capsys, "evaluate", "found", *DIGITS, "--max-images", "50", "--resolution", "64", "--json"
    )
    assert bigger.json()["provenance"]["resolution"] == [64, 64]


def test_a_networks_own_normalisation(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    named = TINY.renamed("tiny", {"preprocessing": given})
    save_model("own", architecture=named, weights=trained().state_dict(), metrics=METRICS)
    command = ("evaluate", "own", *DIGITS, "--max-images", "50", "--json")
    used = slimnas(capsys, *command).json()["provenance"]["normalisation"]
    assert {key: used[key] for key in given} == given
    body = slimnas(capsys, *command, "--normalisation", "data").json()
    assert body["provenance"]["normalisation"]["mean"] == list(held_out().mean)
    imagenet = slimnas(capsys, *command, "--normalisation", "imagenet").json()["provenance"]
    assert imagenet["normalisation"]["std"] == [0.229, 0.224, 0.225]


def test_a_transformer_with_a_class_token(capsys: pytest.CaptureFixture[str]) -> None:
    architecture = ARCHITECTURES["vit"].with_head(classes=10)
    network = random_network(architecture).float().eval()
    save_model("vit", architecture=architecture, weights=network.state_dict(), metrics={})
    export_network(network, Path("vit.onnx"))
    command = ("evaluate", "vit", *DIGITS, "--max-images", "60", "--onnx", "vit.onnx", "--json")
    body = slimnas(capsys, *command).json()
    assert body["disagreement"]["different"] == 0
    assert create_model("vit").architecture == architecture


def more_classes(_: Path) -> None:
    export_network(build(TINY.with_head(classes=12)).eval(), "twelve.onnx")


def other_input(_: Path) -> None:
    export_network(build(TINY.with_resolution(64)).eval(), "big.onnx")


def grey_input(_: Path) -> None:
    grey = {**TINY.to_dict(), "input": {"channels": 1, "resolution": 32}}
    export_network(build(type(TINY).from_dict(grey)).eval(), "grey.onnx")


def seven_classes(_: Path) -> None:
    network = build(TINY.with_head(classes=7))
    save_model("seven", architecture=network.architecture, weights=network.state_dict(), metrics={})


def foreign_weights(_: Path) -> None:
    torch.save(build(TINY.with_head(classes=7)).state_dict(), "seven.pth")


def no_onnx(folder: Path) -> None:
    (folder / "bad.onnx").write_bytes(b"nothing")


def infinite_weights(_: Path) -> None:
    state = trained().state_dict()
    state |= {n: torch.full_like(t, 1e38) for n, t in state.items() if n.endswith("weight")}
    save_model("wild", architecture=TINY, weights=state, metrics={})


def nothing(_: Path) -> None:
    pass


def untrained(folder: Path) -> None:
    TINY.save(folder / "bare.yaml")


REFUSED = [
    ("run --data digits --onnx gone.onnx", nothing, r"gone\.onnx: cannot be read \(No such file"),
    ("run --data digits --onnx bad.onnx", no_onnx, r"bad\.onnx: ONNX Runtime cannot load"),
    (
        "run --data digits --onnx twelve.onnx",
        more_classes,
        r"twelve\.onnx: gives 12 classes, the network has 10; export the network",
    ),
    (
        "run --data digits --onnx big.onnx",
        other_input,
        r"big\.onnx: takes images 3x64x64, these are 3x32x32; use --resolution 64, or export",
    ),
    (
        "run --data digits --onnx grey.onnx",
        grey_input,
        r"grey\.onnx: takes images 1x32x32, these are 3x32x32; export the network",
    ),
    (
        "seven --data digits",
        seven_classes,
        r"--data digits: must have the 7 classes of the network, has 10; give data",
    ),
    (
        "run --data digits --weights seven.pth",
        foreign_weights,
        r"seven\.pth: does not fit tiny: head.*: tiny needs shape \(10, 6\), got \(7, 6\)",
    ),
    ("run --data digits --weights w.pth", nothing, r"w\.pth: no such file; expected weights"),
    ("bare.yaml --data digits", untrained, r"tiny: no weights beside the architecture"),
    ("net.onnx --data digits", nothing, r"net\.onnx: MODEL must be .* give the file with --onnx"),
    ("runn --data digits", nothing, r"no model, file or folder 'runn'"),
    ("run", nothing, r"run: names no data that it was made with; give some with --data"),
    ("run --data digitz", nothing, r"--data digitz: no such file or folder.*did you mean 'digits'"),
    ("run --data digits --resize 20", nothing, r"--resize: must be at least the resolution, 32"),
    ("wild --data digits", infinite_weights, r"pytorch: its logits must be finite, those of \d+"),
    ("run --data digits --output run/weights.safetensors", nothing, r"cannot be written"),
]


@pytest.mark.parametrize(("arguments", "prepare", "message"), REFUSED)
def test_what_is_refused_in_one_line(
    arguments: str, prepare: Any, message: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(world)
    answer = slimnas(capsys, "evaluate", *arguments.split())
    assert answer.code == 1, answer.err
    (error,) = answer.errors
    assert "Traceback" not in answer.err
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --weights none", "--weights none is for --onnx FILE alone"),
        ("run --weights a.pth --pretrained", "--pretrained and --weights exclude each other"),
        ("run --crop-pct 0.9 --resize 40", "--crop-pct and --resize exclude each other"),
        ("run --fail-on-disagreement", "--fail-on-disagreement needs weights and --onnx FILE"),
        ("run --crop-pct 1.5", "--crop-pct"),
        ("run --split search", "--split"),
        ("run --device tpu", "--device"),
    ],
)
def test_wrong_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = slimnas(capsys, "evaluate", *arguments.split())
    assert answer.code == 2
    assert message in " ".join(answer.err.replace("│", " ").split())


def test_a_trained_network_is_judged_on_its_test_data(capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for folder, count in (("photos", 6), ("judges", 4)):
        for name in ("cat", "dog"):
            (Path(folder) / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path(folder) / name / f"{number}.png")
    network = build(TINY.with_head(classes=2)).eval()
    save_model("two", architecture=network.architecture, weights=network.state_dict(), metrics={})
    TrainConfig(
        model="tiny",
        architecture_digest="0",
        resolution=(32, 32),
        data="photos",
        test_data="judges",
        recipe=NetworkRecipe(),
    ).save(Path("two/config.yaml"))
    command = ("evaluate", "two", "--normalisation", "imagenet", "--json")
    judged = slimnas(capsys, *command).json()
    assert (judged["images"], judged["provenance"]["data"]) == (8, "judges")
    named = slimnas(capsys, *command, "--data", "judges").json()
    assert named["provenance"]["data_digest"] == judged["provenance"]["data_digest"]
    seen = slimnas(capsys, *command, "--data", "photos").json()
    assert (seen["images"], seen["provenance"]["split"]) == (2, "test")


def save_pruned(data: str) -> Path:
    given = {"mean": [0.3] * 3, "std": [0.3] * 3}
    named = TINY.renamed("tiny", {"preprocessing": given, "seed": 4})
    place = Path("pruned/found/macs_80pct")
    save_model(place, architecture=named, weights=trained().state_dict(), metrics={})
    PruneConfig(
        model="tiny",
        architecture_digest="0",
        weights="auto",
        weights_digest="0",
        data=data,
        data_digest="0",
        test_digest="0",
        budgets=(BudgetSpec(kind="macs", limit=1.0, asked="80%"),),
        seed=4,
    ).save(Path("pruned/config.json"))
    return place


def test_a_network_pruned_on_the_stand_in_needs_images(capsys: pytest.CaptureFixture[str]) -> None:
    (error,) = slimnas(capsys, "evaluate", save_pruned("photos")).errors
    assert "was pruned on crops of two photographs, which have no labels" in error


def test_a_pruned_network_is_judged_as_pruning_judged_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = save_pruned("digits")
    body = slimnas(capsys, "evaluate", place, "--json").json()
    options = DataOptions(resolution=(32, 32), channels=3, seed=4)
    whole = open_whole("digits", options, normalisation=((0.3,) * 3, (0.3,) * 3), hold_out=True)
    assert whole.test is not None
    expected = top1_as_pruning(trained(), whole.test, "cpu")
    assert body["top1"] == pytest.approx(expected)
    assert body["images"] == len(whole.test)
