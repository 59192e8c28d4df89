"""Which module may import which: the direction that docs/design.md draws."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "slimnas"
LEVELS = (
    {"", "errors"},
    {"_files", "_jsonlines", "_lock", "_resources", "_settings", "_versions"},
    {"arch"},
    {"latency"},
    {"nn"},
    {"data", "runtimes"},
    {"measure", "zoo"},
    {"convert", "integrations", "train"},
    {"supernet", "prune", "analysis"},
    {"search"},
    {"report"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
TORCH_FREE = ("slimnas", "slimnas.arch", "slimnas.latency", "slimnas.data", "slimnas.cli.main")
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in the tree, those for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module or ""


def unit(module: str) -> str:
    """The part of slimnas that a module belongs to: `slimnas.nn.build` -> `nn`."""
    return [*module.split("."), ""][1]


def unit_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def test_modules_import_only_to_the_left() -> None:
    looked_at = 0
    for path in MODULES:
        own = unit_of(path)
        if own == "":
            continue  # the public names are resolved when used; test_docs.py uses them
        for name in imported(ast.parse(path.read_text())):
            if name.split(".")[0] != "slimnas":
                continue
            looked_at += 1
            other = unit(name)
            same = other == own
            assert same or LEVEL[other] < LEVEL[own], f"{path.relative_to(PACKAGE)} imports {name}"
    assert looked_at > 350


def test_every_module_has_a_level() -> None:
    assert {unit_of(path) for path in MODULES} == set(LEVEL)
    assert len(MODULES) > 90


@pytest.mark.parametrize("package", ["arch", "latency"])
def test_no_torch_in_the_source(package: str) -> None:
    paths = sorted((PACKAGE / package).glob("*.py"))
    assert len(paths) > 7
    for path in paths:
        heavy = [n for n in imported(ast.parse(path.read_text())) if n.split(".")[0] == "torch"]
        assert not heavy, path


@pytest.mark.parametrize("package", TORCH_FREE)
def test_importing_it_imports_no_torch(package: str) -> None:
    folder = PACKAGE.parent.joinpath(*package.split("."))
    modules = [package]
    if package in ("slimnas.arch", "slimnas.latency"):
        modules = [f"{package}.{path.stem}" for path in folder.glob("[!_]*.py")]
        assert len(modules) > 6
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_pricing_a_network_imports_no_torch() -> None:
    code = (
        "import sys, slimnas\n"
        "space = slimnas.SearchSpace.load('efficientformer_tiny')\n"
        "network = space.architecture(space.largest())\n"
        "assert slimnas.cost(network).macs > 1e9\n"
        "assert slimnas.estimate(network, slimnas.find_device('iphone12')).latency_ms > 1\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_are_what_they_say() -> None:
    import slimnas

    assert len(slimnas.__all__) == 16
    assert slimnas.__all__ == sorted(slimnas.__all__)
    for name in slimnas.__all__:
        assert getattr(slimnas, name).__name__.removeprefix("slimnas.") == name
        assert name in dir(slimnas)
    with pytest.raises(AttributeError, match="no attribute 'current_architecture'"):
        _ = slimnas.current_architecture
