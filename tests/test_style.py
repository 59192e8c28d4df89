"""House style: sizes, docstrings, and the habits no linter checks here."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "slimnas").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = sorted((ROOT / "tools").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 500, 80, 8
BROAD = {"Exception", "BaseException"}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"
Rule: TypeAlias = "Callable[[Path, ast.Module], Iterator[str]]"


def functions(tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no blanks, no comments, no docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def faults(rule: Rule, paths: list[Path]) -> list[str]:
    assert len(paths) > 1
    found = []
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(ROOT)}: {fault}" for fault in rule(path, tree)]
    return found


def is_command(function: Function) -> bool:
    """A command line function: its arguments are the options, its length their declaration."""
    return bool(re.search(r"typer\.Option|: \w+Option\b", ast.unparse(function.args)))


def test_it_looks_at_the_code() -> None:
    assert len(SOURCES) > 95
    assert len(TESTS) > 25
    assert len(OTHERS) >= 2
    assert sum(len(list(functions(ast.parse(p.read_text())))) for p in SOURCES) > 550


def test_files_are_short() -> None:
    def rule(path: Path, _: ast.Module) -> Iterator[str]:
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MAX_FILE_LINES:
            yield f"{count} lines; split it at {MAX_FILE_LINES}"

    assert faults(rule, SOURCES + TESTS + OTHERS) == []


def test_functions_are_short() -> None:
    def rule(path: Path, tree: ast.Module) -> Iterator[str]:
        lines = code_lines(path.read_text(encoding="utf-8"))
        for function in functions(tree):
            first = function.body[0].lineno if is_command(function) else function.lineno
            body = lines & set(range(first, (function.end_lineno or first) + 1))
            if len(body) > MAX_FUNCTION_LINES:
                yield f"{function.name}: {len(body)} lines of code"

    assert faults(rule, SOURCES + TESTS + OTHERS) == []


def test_functions_take_few_arguments() -> None:
    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        for function in functions(tree):
            given = function.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_ARGUMENTS and not is_command(function):
                yield f"{function.name}: {count} arguments; make a dataclass"

    assert faults(rule, SOURCES) == []


def test_public_things_have_docstrings() -> None:
    looked_at = 0

    def public(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if not node.name.startswith("_"):
                yield node
                yield from public(node.body if isinstance(node, ast.ClassDef) else [])

    def needs_none(node: Function | ast.ClassDef) -> bool:
        """A module's `forward`, and what a protocol's own docstring describes (`...`)."""
        return node.name == "forward" or ast.unparse(node.body[-1]) == "..."

    def rule(path: Path, tree: ast.Module) -> Iterator[str]:
        nonlocal looked_at
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            yield "no docstring"
        for node in public(tree.body):
            looked_at += 1
            if not ast.get_docstring(node) and not needs_none(node):
                yield f"{node.name}: no docstring"

    assert faults(rule, SOURCES) == []
    assert looked_at > 350


def test_no_print_outside_the_command_line() -> None:
    def rule(path: Path, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                yield f"line {node.lineno}: print"

    assert faults(rule, SOURCES) == []


def test_excepts_name_what_they_expect() -> None:
    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                named = set() if node.type is None else set(ast.unparse(node.type).split(", "))
                raises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
                broad = node.type is None or named & BROAD
                if broad and not raises:
                    yield f"line {node.lineno}: bare or broad except that ends the error"

    assert faults(rule, SOURCES + OTHERS) == []


def test_no_star_imports_and_no_mutable_defaults() -> None:
    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                yield f"line {node.lineno}: star import"
        for function in functions(tree):
            for default in (*function.args.defaults, *function.args.kw_defaults):
                if isinstance(default, MUTABLE):
                    yield f"{function.name}: mutable default"

    assert faults(rule, SOURCES + TESTS + OTHERS) == []


def test_every_raises_looks_at_the_message() -> None:
    looked_at = 0

    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        nonlocal looked_at
        for node in ast.walk(tree):
            for item in node.items if isinstance(node, ast.With) else []:
                call = item.context_expr
                if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises"):
                    continue
                looked_at += 1
                kept = item.optional_vars is not None  # `as caught`: the test reads it itself
                mute = ast.unparse(call.args[0]) == "KeyboardInterrupt"
                if not (kept or mute or "match" in [k.arg for k in call.keywords]):
                    yield f"line {node.lineno}: pytest.raises without match"

    assert faults(rule, TESTS) == []
    assert looked_at > 80


def test_asserts_only_state_the_impossible() -> None:
    """Input is refused by an error with a message, never by an assert with one."""

    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert) and node.msg is not None:
                yield f"line {node.lineno}: an assert that explains itself to users; raise"

    assert faults(rule, SOURCES) == []


def test_no_tabs_and_no_places_on_somebodys_machine() -> None:
    texts = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    texts += sorted((ROOT / "docs").glob("*.md"))
    texts += sorted((ROOT / "search_spaces").glob("*.yaml"))
    assert len(texts) >= 11
    homes = re.compile(r"/(home|Users|root|work)/\w")
    for path in texts + SOURCES + TESTS + OTHERS:
        text = path.read_text(encoding="utf-8")
        assert "\t" not in text, path
        assert not homes.search(text), path
