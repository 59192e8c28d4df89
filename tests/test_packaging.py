"""What ships: every package, every data file, found from a wheel, a checkout and an install."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {
    "search_spaces": ["*.yaml", "records/*.yaml"],
    "lookup_tables": ["*/*.yaml", "*/*.csv", "NOTICE.md"],
    "kit_runners": ["*.py", "*.md"],
}
INSIDE = {
    "slimnas/zoo/models": "*.yaml",
    "slimnas/zoo/trained": "*/*",
    "slimnas/report": "*.html.j2",
    "slimnas/prune": "*.yaml",
    "slimnas/train/recipes": "*.yaml",
    "slimnas": "py.typed",
}


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def words(text: str) -> list[str]:
    return text.split()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("slimnas", *DATA):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", checkout, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-index", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def shipped(root: Path) -> list[str]:
    """Data files of a checkout by the names they have in a wheel."""
    found = [
        f"slimnas/_data/{path.relative_to(root).as_posix()}"
        for name, patterns in DATA.items()
        for pattern in patterns
        for path in (root / name).glob(pattern)
    ]
    for folder, pattern in INSIDE.items():
        found += [path.relative_to(root).as_posix() for path in (root / folder).glob(pattern)]
    return sorted(found)


def answers(cwd: Path, python_path: Path | None) -> dict[str, list[str]]:
    """Names of the spaces, devices and models that the command line lists in `cwd`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLIMNAS", "PYTHONP"))}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    found = {}
    for command, key in (("space", "spaces"), ("latency", "devices"), ("zoo", "entries")):
        done = subprocess.run(
            [sys.executable, "-m", "slimnas", command, "list", "--json"],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[key] = [entry["name"] for entry in json.loads(done.stdout)[key]]
    code = "import slimnas, pathlib; print(pathlib.Path(slimnas.__file__).parents[1])"
    place = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {**found, "place": [place]}


def on_disk() -> dict[str, list[str]]:
    return {
        "spaces": sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml")),
        "devices": sorted(path.parent.name for path in ROOT.glob("lookup_tables/*/device.yaml")),
        "entries": sorted(
            [
                *(path.stem for path in (ROOT / "slimnas/zoo/models").glob("*.yaml")),
                *(path.name for path in (ROOT / "slimnas/zoo/trained").iterdir()),
            ]
        ),
    }


def test_every_package_is_listed(config: configparser.ConfigParser) -> None:
    packages = words(config["options"]["packages"])
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "slimnas").rglob("__init__.py")
    }
    assert len(there) > 12
    assert set(packages) == there | {f"slimnas._data.{name}" for name in DATA}
    assert len(packages) == len(set(packages))


def test_constraints_pin_every_requirement(config: configparser.ConfigParser) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(
        re.split("==", line.split(";")[0].strip()) for line in lines if not line.startswith("#")
    )
    assert pinned["torch"] == "2.13.0"
    names = {_name(name) for name in pinned}
    extras = config["options.extras_require"]
    needed = [*words(config["options"]["install_requires"])]
    needed += [word for extra in extras for word in words(extras[extra])]
    assert len(needed) > 20
    missing = [need for need in needed if _name(re.split("[<>=]", need)[0]) not in names]
    assert missing == []


def test_the_installed_metadata_is_the_projects() -> None:
    try:
        installed = version("slimnas")
    except PackageNotFoundError:
        pytest.skip("runs from a bare checkout")
    import slimnas

    assert installed == slimnas.__version__
    assert [need for need in requires("slimnas") or [] if need.startswith("torch")]


def test_data_is_found_where_the_tests_run(tmp_path: Path) -> None:
    here = answers(tmp_path, ROOT)
    assert {key: here[key] for key in on_disk()} == on_disk()


def test_a_bare_checkout_finds_its_data(checkout: Path, tmp_path: Path) -> None:
    found = answers(tmp_path, checkout)
    assert found.pop("place") == [str(checkout)]
    assert found == on_disk()


@pytest.mark.slow
def test_a_wheel_holds_what_the_checkout_holds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = [n for n in names if re.search(r"/_data/|/trained/|\.(yaml|j2|typed)$", n)]
    assert sorted(data) == shipped(ROOT)
    assert len(data) > 12
    code = {name for name in names if name.endswith(".py") and name not in data}
    on_disk_code = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "slimnas").rglob("*.py")
        if (path.parent / "__init__.py").is_file()
    }
    assert code == on_disk_code
    assert len(code) > 95
    with zipfile.ZipFile(wheel) as archive:
        for name in data:
            source = ROOT / name.removeprefix("slimnas/_data/")
            assert archive.read(name) == (source if source.is_file() else ROOT / name).read_bytes()
        (metadata,) = [n for n in names if n.endswith("/METADATA")]
        text = archive.read(metadata).decode()
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", text, re.MULTILINE)
    assert "Requires-Python: >=3.10" in text
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_an_installed_wheel_finds_its_data(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip("install", wheel, "--no-deps", "--target", target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = answers(elsewhere, target)
    assert found.pop("place") == [str(target)]
    assert found == on_disk()


def _name(requirement: str) -> str:
    return re.sub("[-_.]+", "-", requirement).lower()
