"""What `slimnas search` refuses: one line, exit code 1, before training, nothing half-written."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import SEARCH, SPACE, lay_out, slimnas

from slimnas._lock import folder_lock
from slimnas.arch.space import SearchSpace
from slimnas.cli.main import main
from slimnas.errors import LatencyTableError
from slimnas.supernet.supernet import Supernet
from slimnas.supernet.train import TrainedSupernet, save_supernet, weights_digest

RUN = Path("runs/small-digits-bench-0.3ms")


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where a search would work, but training is a failure of the test."""
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("training started")

    monkeypatch.setattr("slimnas.search.run.train_supernet", started)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def supernet_file(path: Path, space: SearchSpace | None = None) -> Path:
    supernet = Supernet(space or SearchSpace.from_yaml(SPACE), resolution=32, seed=0).eval()
    save_supernet(path, TrainedSupernet(supernet, weights_digest(supernet), {"seed": 0}))
    return path


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def cut(name: str) -> Callable[[Path], None]:
    def halve(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return halve


def nothing(folder: Path) -> None:
    pass


def wider_space(folder: Path) -> None:
    (folder / "wide.yaml").write_text(SPACE.replace("max: 48", "max: 80"))


def empty_data(folder: Path) -> None:
    (folder / "photos" / "cat").mkdir(parents=True)


def one_class(folder: Path) -> None:
    empty_data(folder)
    (folder / "photos" / "cat" / "a.png").write_bytes(b"not looked at yet")


def supernet_of_another_space(folder: Path) -> None:
    other = SearchSpace.from_yaml(SPACE.replace("max: 32}", "max: 48}"))
    supernet_file(folder / "other.safetensors", other)


def supernet_of_more_classes(folder: Path) -> None:
    supernet_file(folder / "hundred.safetensors", SearchSpace.from_yaml(SPACE).with_classes(100))


def supernet_cut(folder: Path) -> None:
    supernet_file(folder / "cut.safetensors")
    cut("cut.safetensors")(folder)


CASES = [
    (
        "--target-latency 1.6",
        nothing,
        r"needs a unit, got '1\.6'; write 1\.6ms, 1600us",
    ),
    ("--target-latency 0ms", nothing, r"must be positive, got '0ms'"),
    ("--target-latency -1ms", nothing, r"must be positive, got '-1ms'"),
    ("--target-latency 5min", nothing, r"unknown unit 'min'"),
    ("--target-latency soon", nothing, r"must be a number with a unit, got 'soon'"),
    ("--device bensh", nothing, r"no latency table for device 'bensh' \(did you mean 'bench'\?\)"),
    ("--target-latency 0.1ms", nothing, r"0\.1 ms cannot be reached .*smallest network .* costs"),
    ("--space smal", nothing, r"search space 'smal' does not exist.*efficientformer_small"),
    ("--space broken.yaml", write("broken.yaml", "schema: [\n"), r"broken\.yaml: not valid YAML"),
    ("--space empty.yaml", write("empty.yaml", ""), r"empty\.yaml: "),
    (
        "--space typo.yaml",
        write("typo.yaml", SPACE.replace("supernet:", "supernets:")),
        r"typo\.yaml: .*unknown key 'supernets' \(did you mean 'supernet'\?\)",
    ),
    (
        "--space old.yaml",
        write("old.yaml", SPACE.replace("space/1", "space/9")),
        r"old\.yaml: schema: .*version 1 .*the file has version 9",
    ),
    (
        "--space wide.yaml",
        wider_space,
        r"'bench' has no price for .*nearest row.*slimnas latency build --device bench",
    ),
    ("", cut("lookup_tables/bench/table.csv"), r"bench.table\.csv"),
    ("", cut("lookup_tables/bench/device.yaml"), r"bench.device\.yaml"),
    ("--data nowhere", nothing, r"--data nowhere: no such file or folder"),
    ("--data photos", empty_data, r"photos"),
    ("--data photos", one_class, r"photos"),
    ("--data bad.parquet", write("bad.parquet", "PAR1"), r"bad\.parquet"),
    ("--output space.yaml", nothing, r"space\.yaml: cannot be written"),
    ("--output space.yaml/run", nothing, r"space\.yaml/run: cannot be written"),
    ("--lr -1", nothing, r"lr: must be above 0\.0, got -1\.0"),
    ("--supernet none.safetensors", nothing, r"none\.safetensors: no such file"),
    (
        "--supernet junk.safetensors",
        write("junk.safetensors", "junk"),
        r"junk\.safetensors: damaged or not safetensors",
    ),
    ("--supernet cut.safetensors", supernet_cut, r"cut\.safetensors: damaged"),
    ("--supernet other.safetensors", supernet_of_another_space, r"give the --space it was trained"),
    ("--supernet hundred.safetensors", supernet_of_more_classes, r"100 classes, the data has 10"),
]


@pytest.mark.parametrize(("given", "prepare", "message"), CASES, ids=[case[0] for case in CASES])
def test_refused_in_one_line_before_training(
    given: str,
    prepare: Callable[[Path], None],
    message: str,
    world: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(world)
    before = files(world)
    words = given.split()
    target = [] if "--target-latency" in words else ["--target-latency", "0.3ms"]
    answer = slimnas(capsys, *SEARCH, *target, *words)
    assert answer.code == 1
    assert answer.out == ""
    assert len(answer.errors) == 1, answer.err
    assert files(world) == before
    assert re.search(message, answer.errors[0]), answer.errors[0]


def test_a_training_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"
    answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms", "--train-on", absent)
    assert files(RUN) == []
    assert answer.code == 1
    assert len(answer.errors) == 1
    assert absent in answer.errors[0].lower()


def test_a_run_folder_in_use(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with folder_lock(RUN):
        answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms")
    assert answer.code == 1
    assert answer.errors[0].startswith(f"{RUN}: in use by another run")
    assert files(RUN) == []


def test_a_run_folder_with_other_settings(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimnas.search.run.train_supernet", interrupt)
    stopped = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms")
    assert stopped.code == 130
    assert "the same command goes on" in stopped.err
    assert stopped.err.endswith("interrupted\n")
    before = files(world)
    answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms", "--seed", "7")
    assert answer.code == 1
    assert "seed was 0, now 7" in answer.errors[0]
    assert files(world) == before


@pytest.mark.parametrize("damage", ["schema: slimnas/search-config/1\n", "}{", ""])
def test_a_run_folder_with_damaged_settings(
    damage: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RUN.mkdir(parents=True)
    (RUN / "config.yaml").write_text(damage)
    answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms")
    assert answer.code == 1
    assert answer.errors
    assert all("config.yaml" in line for line in answer.errors)
    assert (RUN / "config.yaml").read_text() == damage


def test_a_full_disk_leaves_nothing_half_written(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, data: bytes) -> int:
        self.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    before = files(world)
    monkeypatch.setattr(Path, "write_bytes", full)
    answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms")
    assert answer.code == 1
    assert "config.yaml: cannot be written (No space left on device)" in answer.errors[0]
    assert files(world) == before


def test_a_nearly_full_disk_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    answer = slimnas(capsys, *SEARCH, "--target-latency", "0.3ms")
    assert answer.code == 1
    assert "training needs" in answer.errors[0]


def test_debug_shows_where_it_came_from(world: Path) -> None:
    with pytest.raises(LatencyTableError, match="no latency table for device 'none'"):
        main(["--debug", *SEARCH, "--target-latency", "0.3ms", "--device", "none"])


def test_an_error_behind_stdout_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("slimnas.cli.space.print_json", full)
    answer = slimnas(capsys, "space", "list", "--json")
    assert answer.code == 1
    assert "No space left on device" in answer.errors[0]
