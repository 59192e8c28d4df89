"""The command line from outside: which commands and options there are, and what help costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import typer
from cli_world import slimnas

import slimnas as package
from slimnas.cli.main import app
from slimnas.cli.seeds import HIGHEST_SEED

COMMANDS = {
    "slimnas": "--debug --version",
    "slimnas search": (
        "--alpha-gradient --alpha-lr --alpha-warmup --batch-size --data --device --epochs --fill "
        "--frontier --json --lr --max-images --measure --mixing --noise --output --resolution "
        "--sandwich --search-images --seed --skip-bad-images --space --supernet --target-latency "
        "--tau-end --tau-start --train-on"
    ),
    "slimnas evaluate": (
        "--batch-size --crop-pct --data --device --fail-on-disagreement --interpolation --json "
        "--max-images --normalisation --onnx --output --pretrained --resize --resolution --seed "
        "--skip-bad-images --split --train-on --weights MODEL"
    ),
    "slimnas train": (
        "--batch-size --data --distillation --drop-path --epochs --from-scratch --images-per-epoch "
        "--json --lr --max-images --output --precision --pretrained --recipe --resolution --seed "
        "--set --skip-bad-images --stream --teacher --test-data --tracker --train-on "
        "--weight-decay --weights MODEL"
    ),
    "slimnas prune": (
        "--basis --batch-size --clock --correction --criterion --data --device --distillation "
        "--finetune-between --finetune-epochs --images --iterations --json --labels --latency "
        "--lr --macs --measure --method --model --output --params --prune-on --ratio --report "
        "--round-to --scores --seed --skip-bad-images --temperature --test-data --threads "
        "--units --weights"
    ),
    "slimnas prune rules": (
        "--depth-dependent --device --json --latency --macs --name --output --params --round-to "
        "--seed --use --width RUN"
    ),
    "slimnas space": "",
    "slimnas space list": "--json",
    "slimnas space record": (
        "--data --evaluate-on --json --output --search-images --selections --walks RUN"
    ),
    "slimnas space show": "--json SPACE",
    "slimnas space validate": "--json FILES",
    "slimnas latency": "",
    "slimnas latency build": (
        "--backend --batch --clock --device --dtype --force --held-out --json --model "
        "--networks --output --precision --rounds --runtime-option --seed --shard --space "
        "--threads --unit"
    ),
    "slimnas latency calibrate": (
        "--description --device --force --json --model --output --points --prior --protocol "
        "--runtime --strength"
    ),
    "slimnas latency devices": "--json",
    "slimnas latency list": "--json",
    "slimnas latency show": "--json --rows DEVICE",
    "slimnas latency estimate": "--device --extrapolate --json ARCHITECTURE",
    "slimnas latency validate": (
        "--clock --device --force --json --model --networks --output --seed --space --update"
    ),
    "slimnas latency merge": "--device --force --json --output SHARDS",
    "slimnas latency recompute": "--json TABLE",
    "slimnas latency kit": (
        "--batch --device --dtype --format --held-out --json --model --networks --output "
        "--own-weights --seed --space"
    ),
    "slimnas latency import": (
        "--compute-unit --describe --device --force --json --kit --mapping --os --output "
        "--runtime --runtime-version --soc --threads RESULTS"
    ),
    "slimnas analyze": "",
    "slimnas analyze attention": (
        "--attention --batch --clock --device --dim --heads --json --layout --mechanisms --memory "
        "--output --resolutions --rounds --runtime --seed --threads"
    ),
    "slimnas analyze memory": (
        "--attention --batch --device --dtype --fold --iterations --json --output --resolution "
        "--runtime --seed --threads MODELS"
    ),
    "slimnas analyze heads": (
        "--batch-size --control --data --device --images --json --output --resolution --seed "
        "--skip-bad-images --weights MODEL"
    ),
    "slimnas analyze spectrum": (
        "--batch-size --control --data --device --images --json --output --part --resolution "
        "--seed --skip-bad-images --weights MODEL"
    ),
    "slimnas analyze mhsa-share": (
        "--backend --batch --batch-size --clock --data --device --json --lr --max-images --memory "
        "--output --resolution --rounds --seed --seeds --shares --skip-bad-images --speedups "
        "--step --threads --tolerance --train --train-on --train-resolution --trials MODEL"
    ),
    "slimnas analyze ablate": (
        "--batch-size --data --epochs --importance --json --lr --max-images --output --qk-dims "
        "--resolution --seed --seeds --skip-bad-images --train-on --v-ratios --weights MODEL"
    ),
    "slimnas analyze ranking": (
        "--batch-size --data --epochs --json --lr --networks --output --seed --seeds --train-on RUN"
    ),
    "slimnas zoo": "",
    "slimnas zoo list": "--family --json --zoo PATTERN",
    "slimnas zoo show": "--json --zoo MODEL",
    "slimnas zoo add": "--json --name --zoo RUN",
    "slimnas zoo export": (
        "--dtype --dynamic-batch --format --json --output --seed --untrained --weights --zoo MODEL"
    ),
}
HEAVY = ("torch", "numpy", "scipy", "yaml", "datasets", "matplotlib", "accelerate")


def surface(command: Any, name: str) -> Iterator[tuple[str, str]]:
    options = (o if o.startswith("-") else o.upper() for p in command.params for o in p.opts)
    yield name, " ".join(sorted(options))
    for word, child in getattr(command, "commands", {}).items():
        yield from surface(child, f"{name} {word}")


def test_commands_and_options_are_the_known_ones() -> None:
    found = dict(surface(typer.main.get_command(app), "slimnas"))
    assert found == COMMANDS, (
        "the command line changed: if that is meant, change COMMANDS here, the docs that show the "
        "command, and CHANGELOG.md; removing or renaming an option breaks people's scripts"
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["search", "--help"], ["prune", "-h"], ["zoo", "add", "-h"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from slimnas.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        f"print('imported', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported []"


def test_no_seed_is_beyond_what_generators_take(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [name for name, options in COMMANDS.items() if "--seed" in options.split()]
    assert len(asked) == 16
    torch.Generator().manual_seed(HIGHEST_SEED)
    for name in asked:
        for seed, message in (-1, "equal to 0"), (HIGHEST_SEED + 1, f"equal to {HIGHEST_SEED}"):
            answer = slimnas(capsys, *name.split()[1:], "--seed", str(seed))
            assert answer.code == 2, name
            assert message in " ".join(answer.err.replace("│", " ").split()), name


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        answer = slimnas(capsys, *name.split()[1:], "--help")
        assert answer.code == 0, name
        assert f"Usage: {name}" in answer.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert slimnas(capsys, "--version").out == f"slimnas {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serach", "No such command 'serach'. Did you mean 'search'?"),
        ("search --device iphone12", "Missing option '--target-latency'"),
        ("search --target-latency 1ms", "Missing option '--device'"),
        ("search --target-latency 1ms --device iphone12 --epochs 0", "greater than or equal to 1"),
        ("search --target-latency 1ms --device iphone12 --mixing hard", "--mixing"),
        ("zoo export efficientformer_l1 --format tflite", "--format"),
        ("latency build --backend abacus", "--backend"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *arguments.split())
    assert answer.code == 2
    assert answer.out == ""
    assert message in " ".join(answer.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ("space list", {"spaces"}),
        ("space show efficientformer_tiny", {"name", "macs", "params", "space"}),
        ("latency devices", {"devices"}),
        ("latency show iphone12", {"name", "kind", "errors", "counts"}),
        (
            "latency estimate efficientformer_l1 --device iphone12",
            {"latency_ms", "interval_ms", "rows", "exact", "interpolated", "extrapolated"},
        ),
        ("zoo list", {"entries"}),
        ("zoo show efficientformer_l1", {"name", "params", "macs", "source", "architecture"}),
    ],
)
def test_json_is_one_object_and_all_there_is_on_stdout(
    arguments: str, keys: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = slimnas(capsys, *arguments.split(), "--json")
    assert answer.code == 0
    assert answer.out.count("\n") == 1
    assert answer.json().keys() >= keys


def test_a_broken_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m slimnas latency show iphone12 --rows | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("iphone12 (estimated)")
