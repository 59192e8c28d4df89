"""`slimnas prune` from outside: what it prints and leaves, weights from nowhere, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_world import slimnas
from PIL import Image
from prune_cases import ARCHITECTURES, FAMILIES, random_network
from prune_world import ARCHITECTURE, PRUNE, VIT, lay_out, network
from safetensors.torch import save_file
from test_latency_transformers import grid_table

from slimnas.arch.cost import cost
from slimnas.errors import RunFolderError
from slimnas.nn.build import build
from slimnas.nn.tensorfiles import load_tensors
from slimnas.prune import pretrained
from slimnas.prune.pretrained import cache_folder, proxy_architecture, proxy_recipe
from slimnas.train import loop
from slimnas.train.recipe import TrainRecipe
from slimnas.zoo import registry
from slimnas.zoo.create import create_model
from slimnas.zoo.registry import builtin_names, get
from slimnas.zoo.weights import save_weights

RUN = Path("runs/prune-mini-digits")
AFTER_KEYS = {"budget", "params", "macs", "top1", "blocks", "architecture", "weights"}
PUBLISHED = "provenance:\n  weights: {repository: nobody/nothing, file: model.safetensors}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run for two budgets, in another process, the JSON it printed and its other words."""
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    command = [sys.executable, "-m", "slimnas", *PRUNE, "--macs", "80%", "--macs", "50%", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return folder, json.loads(done.stdout), done.stderr


@pytest.fixture
def world(
    finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.chdir(finished[0])
    return finished[1]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run's working directory."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_has_the_stable_keys(world: dict[str, Any]) -> None:
    assert world.keys() >= {"model", "weights_source", "before", "after"}
    assert world["model"] == "mini"
    assert world["weights_source"] == "mini.safetensors"
    assert world["before"]["macs"] == cost(ARCHITECTURE).macs
    assert world["before"]["params"] == cost(ARCHITECTURE).params
    assert world["before"]["agreement"] is None
    assert [after["budget"] for after in world["after"]] == ["80%", "50%"]
    for after in world["after"]:
        assert after.keys() >= AFTER_KEYS
        assert after["macs"] == after["measured_macs"] <= after["budget_limit"]
        assert 0 <= after["top1"] <= 100
        loaded = create_model(Path(after["architecture"]).parent, pretrained=True)
        assert cost(loaded.architecture).params == after["params"]
        rows = after["blocks"]
        assert [row["name"] for row in rows] == ["stages.0.blocks.0", "stages.0.blocks.1"]
        blocks = [block for stage in loaded.architecture.stages for block in stage.blocks]
        for row, block in zip(rows, blocks, strict=True):
            for key in ("heads", "qk_dim", "v_dim", "ffn_dim"):
                assert row[key] == getattr(block, key)


def test_progress_and_data_are_told_on_stderr(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    said = finished[2]
    for line in ("importance 60/60 images", "digits (digits): 60 images of 10 classes, 359 others"):
        assert line in said
    assert "Traceback" not in said


def test_files_are_there(world: dict[str, Any]) -> None:
    for name in ("config.json", "scores.safetensors", "channel_ratios.csv", "channel_ratios.json"):
        assert (RUN / name).is_file(), name
    assert (RUN / "figures" / "channel_ratios.png").is_file()
    assert (RUN / "report.html").is_file()
    assert not (RUN / ".lock").exists()


def test_the_same_command_again_does_nothing_twice(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(world["after"][0]["weights"])
    before = weights.stat().st_mtime_ns
    answer = slimnas(capsys, *PRUNE, "--macs", "80%", "--macs", "50%", "--json")
    assert answer.code == 0, answer.err
    assert answer.json() == world
    assert "importance 60/60" not in answer.err
    assert weights.stat().st_mtime_ns == before


def test_ratios_are_shown_on_paper(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = ("--macs", "80%", "--macs", "50%")
    answer = slimnas(capsys, *PRUNE, *budgets, "--report", "channel_ratios")
    assert answer.code == 0, answer.err
    for text in ("stages.0.blocks.1", "unpruned", "macs_80pct", "1.00 >", "4.00 >"):
        assert text in answer.out


def test_scores_and_a_found_network_can_be_pruned_on(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    again = (*PRUNE, "--scores", RUN / "scores.safetensors", "--output", tmp_path / "a", "--json")
    answer = slimnas(capsys, *again, "--macs", "80%")
    assert answer.code == 0, answer.err
    assert "importance" not in answer.err
    assert answer.json()["after"][0]["blocks"] == world["after"][0]["blocks"]
    found = Path(world["after"][0]["architecture"]).parent
    further = ("prune", "--model", found, "--data", "digits", "--images", "40", "--prune-on", "cpu")
    answer = slimnas(capsys, *further, "--macs", "90%", "--output", tmp_path / "b", "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["before"]["macs"] == world["after"][0]["macs"]
    assert answer.json()["before"]["top1"] == world["after"][0]["top1"]


def test_photographs_stand_in_for_data(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = slimnas(
        capsys, "prune", "--model", "mini.yaml", "--images", "30", "--prune-on", "cpu", "--json"
    )
    assert answer.code == 0, answer.err
    body = answer.json()
    assert "--data with images like the model's own gives better results" in answer.err
    assert "agreement with the unpruned network" in answer.err
    assert body["labels"] == "model"
    assert body["before"]["top1"] is None
    assert body["before"]["agreement"] == 100.0
    assert body["after"][0]["top1"] is None
    assert 0 <= body["after"][0]["agreement"] <= 100


@pytest.fixture
def no_hub(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`mini` is a built-in model with weights on a hub that nothing reaches."""
    models = fresh / "models"
    models.mkdir()
    (models / "mini.yaml").write_text(VIT + PUBLISHED)
    monkeypatch.setattr(registry, "MODELS", models)
    monkeypatch.setattr(pretrained, "hub_in_reach", lambda: False)
    monkeypatch.setattr(
        pretrained,
        "proxy_recipe",
        lambda architecture, images: TrainRecipe(epochs=2, batch_size=64, lr=2e-3, augment=False),
    )
    monkeypatch.setenv("SLIMNAS_CACHE", str(fresh / "cache"))
    return fresh


BARE = ("prune", "--model", "mini", "--images", "40", "--prune-on", "cpu", "--json")


def test_without_the_hub_the_model_is_trained_once_and_this_is_said(
    no_hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *BARE)
    assert answer.code == 0, answer.err
    lines = answer.err.splitlines()
    assert "the Hugging Face hub cannot be reached; training mini briefly on digits" in lines[0]
    assert "since the hub could not be reached" in lines[-1]
    assert "training 44/44" in answer.err
    body = answer.json()
    assert "trained here on digits at 16 px" in body["weights_source"]
    assert "digits (digits)" in body["data"]
    assert body["labels"] == "data"
    assert body["before"]["top1"] > 15
    cached = list((no_hub / "cache" / "pretrained").glob("mini-*"))
    assert len(cached) == 1
    assert {path.name for path in cached[0].iterdir()} == {
        *("architecture.yaml", "weights.safetensors", "metrics.json")
    }
    second = slimnas(capsys, *BARE, "--output", "other")
    assert second.code == 0, second.err
    assert "training 44/44" not in second.err
    assert second.json()["before"] == body["before"]


def test_digits_training_goes_on_where_it_was(
    no_hub: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    original, steps = loop.train_step, []

    def counted(*arguments: Any) -> float:
        if len(steps) == 30:
            steps.append(0)
            raise KeyboardInterrupt
        steps.append(1)
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", counted)
    stopped = slimnas(capsys, *BARE)
    assert stopped.code == 130
    assert "the same command goes on" in stopped.err
    assert slimnas(capsys, *BARE).code == 0
    assert sum(steps) == 44


def test_own_data_with_a_model_trained_on_digits_has_other_classes(
    no_hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *BARE, "--data", "photos")
    assert answer.code == 0, answer.err
    assert answer.json()["labels"] == "model"


def test_an_unwritable_cache_is_no_obstacle(
    no_hub: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_hub / "file").write_text("")
    monkeypatch.setenv("SLIMNAS_CACHE", str(no_hub / "file" / "cache"))
    answer = slimnas(capsys, *BARE)
    assert answer.code == 0, answer.err
    assert (no_hub / "runs/prune-mini-default/pretrained/architecture.yaml").is_file()


def test_weights_none_refuses_instead(no_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = slimnas(capsys, *BARE, "--weights", "none")
    assert answer.code == 1
    assert answer.errors == [
        "--weights none: importance needs trained weights, mini without them has none; give a "
        "weights file, or leave --weights out to take published ones"
    ]
    assert list(Path("runs").glob("*")) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIMNAS_CACHE", "here")
    assert cache_folder() == Path("here")
    monkeypatch.delenv("SLIMNAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "there")
    assert cache_folder() == Path("there/slimnas")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "slimnas"


def test_every_model_without_weights_has_a_small_form() -> None:
    looked_at = 0
    for name in builtin_names():
        if get(name).weights is not None:
            continue
        whole = get(name).architecture
        small = proxy_architecture(whole, 10)
        assert small.head.classes == 10
        assert cost(small).macs * 2 < cost(whole).macs, name
        assert [s.blocks for s in small.stages] == [s.blocks for s in whole.stages]
        recipe = proxy_recipe(small, 1438)
        assert pretrained.FEWEST_EPOCHS <= recipe.epochs <= pretrained.MOST_EPOCHS
        looked_at += 1
    assert looked_at == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--macs 1%", "the smallest mini with units ffn,qk,v costs"),
        ("--macs 9G", "is more than mini costs unpruned"),
        ("--macs lots", "macs must be a number, with k, M or G"),
        ("--params 0", "above 0"),
        ("--ratio 1.5", "--ratio: must lie between 0 and 1, got 1.5"),
        ("--latency 6ms", "--latency 6ms: needs a latency table of the model; give --device"),
        ("--latency 6ms --device nosuch", "nosuch"),
        ("--criterion fischer", "did you mean 'fisher'?"),
        ("--units qk,vv", "units[1]: must be"),
        ("--units ,", "units: must have at least 1 item"),
        ("--method exact --units embedding", "--method exact: cannot weigh embedding"),
        ("--data nowhere", "--data nowhere: no such file or folder"),
        ("--labels data --data photos", "must have the 10 classes of mini"),
        ("--test-data nowhere", "--test-data nowhere: no such file or folder"),
        ("--labels data --test-data two", "--test-data two: must have the 10 classes of mini for"),
        ("--weights nosuch.safetensors", "nosuch.safetensors: no such file"),
        ("--weights none", "--weights none: importance needs trained weights"),
        ("--weights other.safetensors", "missing stem.cls_token"),
        ("--weights nan.safetensors", "holds values that are not finite"),
        ("--scores nosuch.safetensors", "nosuch.safetensors: no such file"),
        ("--scores mini.safetensors", "schema: must be"),
        ("--model nosuch", "no model, file or folder 'nosuch'"),
        ("--model bare.yaml", "no weights beside the architecture"),
        ("--finetune-epochs 1 --distillation 2", "distillation: must be at most 1"),
        ("--prune-on mps", "'mps' is not available here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: str, message: str, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "bare.yaml").write_text(VIT.replace("mini", "bare"))
    for name in ("two/a/1.png", "two/b/1.png"):
        (fresh / name).parent.mkdir(parents=True)
        Image.new("L", (8, 8)).save(fresh / name)
    state = network().state_dict()
    save_file({k: v for k, v in state.items() if "cls_token" not in k}, fresh / "other.safetensors")
    state["head.head.bias"][0] = float("nan")
    save_file(state, fresh / "nan.safetensors")
    answer = slimnas(capsys, *PRUNE, *arguments.split())
    assert answer.code == 1, answer.err
    assert len(answer.errors) == 1, answer.err
    assert message in answer.errors[0]
    assert answer.out == ""
    assert list(Path("runs").glob("*")) == []


def test_misfits_name_ten_keys_and_both_shapes(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = VIT.replace("ffn_dim: 96", "ffn_dim: 64").replace("mini", "narrow")
    (fresh / "narrow.yaml").write_text(wide)
    save_file(network().state_dict(), fresh / "wide.safetensors")
    answer = slimnas(capsys, "prune", "--model", "narrow.yaml", "--weights", "wide.safetensors")
    assert answer.code == 1
    assert "narrow needs shape (64, 24), got (96, 24)" in answer.errors[0]


def test_another_run_s_folder_is_refused(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *PRUNE, "--seed", "3", "--macs", "80%")
    assert answer.code == 1
    assert "holds a run with other settings" in answer.errors[0]
    assert RunFolderError.__name__ not in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prune", "--model"),
        ("prune --model mini --macs", "--macs"),
        ("prune --model mini --basis turned", "--basis"),
        ("prune --model mini --images 0", "--images"),
        ("prune --model mini --report everything", "--report"),
        ("prune --model mini --lr 0.1", "--lr: for fine-tuning; give --finetune-epochs as"),
        ("prune --model mini --temperature 3 --finetune-between", "--temperature, --finetune-"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *arguments.split())
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""


def test_scores_of_a_foreign_model_are_refused(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = ARCHITECTURE.with_head(classes=7).renamed("seven")
    other.save(tmp_path / "seven.yaml")
    save_weights(tmp_path / "seven.safetensors", build(other).state_dict(), other)
    given = ("prune", "--model", tmp_path / "seven.yaml", "--scores", RUN / "scores.safetensors")
    answer = slimnas(capsys, *given, "--data", "digits", "--output", tmp_path / "out")
    assert answer.code == 1
    assert "must be for seven" in answer.errors[0]
    assert not (tmp_path / "out").exists()
    assert load_tensors(RUN / "scores.safetensors", "scores")[0]


def test_a_latency_budget_is_kept_by_the_table(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid_table(ARCHITECTURE).save(fresh / "lookup_tables" / "bench")
    budgets = ("--latency", "80%", "--latency", "3ms", "--device", "bench")
    answer = slimnas(capsys, *PRUNE, *budgets, "--json")
    assert answer.code == 0, answer.err
    body = answer.json()
    unpruned_ms = body["before"]["latency_ms"]
    share, absolute = body["after"]
    assert share["budget_limit"] == pytest.approx(0.8 * unpruned_ms)
    assert absolute["budget_limit"] == 3.0
    for after in (share, absolute):
        assert 0.97 * after["budget_limit"] < after["latency_ms"] <= after["budget_limit"]
        again = slimnas(
            capsys, "latency", "estimate", after["architecture"], "--device", "bench", "--json"
        )
        assert again.json()["latency_ms"] == pytest.approx(after["latency_ms"])
    least = slimnas(capsys, *PRUNE, "--latency", "0.3ms", "--device", "bench", "--output", "x")
    assert least.code == 1
    assert "cannot be met, the smallest mini with units ffn,qk,v costs" in least.errors[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("units", "correction"),
    [
        ("qk,v,ffn", "least_squares"),
        ("qk,v,ffn,head,layer", "bias"),
        ("qk,v,ffn,head,layer,embedding", "least_squares"),
        ("embedding", "none"),
    ],
)
def test_every_family_goes_through(
    family: str, units: str, correction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Swin and EfficientFormer too, all kinds of unit, two steps, trained after each."""
    whole = random_network(ARCHITECTURES[family]).float()
    ARCHITECTURES[family].save(tmp_path / "model.yaml")
    save_weights(tmp_path / "model.safetensors", whole.state_dict(), ARCHITECTURES[family])
    answer = slimnas(
        capsys,
        *("prune", "--model", tmp_path / "model.yaml", "--images", "20", "--prune-on", "cpu"),
        *("--macs", "80%", "--units", units, "--iterations", "2", "--finetune-epochs", "1"),
        *("--finetune-between", "--correction", correction),
        *("--output", tmp_path / "run", "--json"),
    )
    assert answer.code == 0, answer.err
    after = answer.json()["after"][0]
    assert after["macs"] == after["measured_macs"] <= 0.8 * cost(ARCHITECTURES[family]).macs
    done = (
        ["2 steps", "corrected", "fine-tuned"]
        if correction != "none"
        else ["2 steps", "fine-tuned"]
    )
    assert list(after["accuracy_after"]) == done
    loaded = create_model(Path(after["architecture"]).parent, pretrained=True)
    assert cost(loaded.architecture).macs == after["macs"]
