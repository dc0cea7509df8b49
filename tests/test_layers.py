"""The arrows of docs/architecture.md, read from the source: who may import whom, and what stays private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "forgeattention"
MAX_LINES = 400

# Each package may import itself and those named here. `util` is below all, `tools` above all.
MAY_IMPORT = {
    "util": set(),
    "codec": {"util"},
    "reference": {"codec", "util"},
    "ops": {"codec", "util"},
    "backends": {"codec", "ops", "reference", "util"},
    "models": {"codec", "ops", "util"},
    "cache": {"codec", "ops", "util"},
    "sparse": {"cache", "codec", "ops", "util"},
    "eviction": {"cache", "codec", "models", "ops", "util"},
    "integrations": {"cache", "codec", "eviction", "models", "ops", "sparse", "util"},
    "serving": {"cache", "codec", "eviction", "integrations", "models", "ops", "sparse", "util"},
    "tools": {
        "backends", "cache", "codec", "eviction", "integrations", "models", "ops", "reference", "serving", "sparse",
        "util",
    },
}  # fmt: skip


class Import(NamedTuple):
    source: str
    target: str
    line: int
    types_only: bool


def module_name(path: Path) -> str:
    """ "cache.layer" of src/forgeattention/cache/layer.py; "" of the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    return {module_name(path): (path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str, path: Path, tree: ast.Module, known: set[str]) -> Iterator[Import]:
    """Every import of our own modules in a file, also inside functions."""
    package = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
    package = [part for part in package if part]
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "forgeattention"]
            targets = [target.partition(".")[2] for target in targets]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                base += (node.module or "").split(".") if node.module else []
            elif (node.module or "").split(".")[0] == "forgeattention":
                base = (node.module or "").split(".")[1:]
            else:
                continue
            for alias in node.names:
                full = ".".join([*base, alias.name])
                targets.append(full if full in known else ".".join(base))
        for target in targets:
            yield Import(name, target, node.lineno, id(node) in for_types)


@cache
def imports() -> list[Import]:
    known = set(modules())
    return [each for name, (path, tree) in modules().items() for each in imports_of(name, path, tree, known)]


def package_of(module: str) -> str:
    return module.split(".")[0]


def circles(edges: list[tuple[str, str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by others (strongly connected components, Tarjan 1972)."""
    following: dict[str, list[str]] = {}
    for source, target in edges:
        following.setdefault(source, []).append(target)
        following.setdefault(target, [])
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in following[module]:
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in following:
        if module not in order:
            visit(module)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, classes, variables, attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if ast.unparse(node.value) in ("self", "cls") else "")
    return {name for name in found if is_private(name)}


def private_accesses(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Uses of private names that some other file of ours defines, inherited ones among them."""
    own = private_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr in ours - own:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (
                    is_private(alias.name)
                    and alias.name in ours
                    and (node.level or "forgeattention" in (node.module or ""))
                ):
                    yield node.lineno, f"import {alias.name}"


def test_every_package_has_its_arrows():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages <= set(MAY_IMPORT), "add a new package to MAY_IMPORT and to docs/architecture.md"
    assert packages | {"reference"} == set(MAY_IMPORT)


def test_imports_follow_the_arrows():
    wrong = []
    for each in imports():
        source, target = package_of(each.source), package_of(each.target)
        type_export = not source and each.types_only  # the package's public names, for type checkers
        if source == target or not target or type_export:
            continue
        if target not in MAY_IMPORT.get(source, set()):
            wrong.append(f"{each.source or '__init__'}:{each.line} imports {each.target}")
    assert not wrong


def test_the_arrows_themselves_have_no_circle():
    edges = [(source, target) for source, targets in MAY_IMPORT.items() for target in targets]
    assert circles(edges) == []
    assert all("tools" not in targets for targets in MAY_IMPORT.values())


def test_no_import_circles_lazy_or_not():
    edges = [(each.source, each.target) for each in imports() if not each.types_only and each.source != each.target]
    assert circles(edges) == []


def test_no_private_names_across_modules():
    ours = set().union(*(private_names(tree) for _, tree in modules().values()))
    found = [
        f"{name}:{line} {text}" for name, (_, tree) in modules().items() for line, text in private_accesses(tree, ours)
    ]
    assert found == []


def test_python_files_are_short():
    files = [path for folder in ("src", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > MAX_LINES}
    assert long == set()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("from ..tools import cli", "tools.cli"),
        ("def f():\n    from forgeattention.tools.cli import main", "tools.cli"),
        ("import forgeattention.tools.cli", "tools.cli"),
    ],
)
def test_a_planted_import_is_seen(source, target):
    found = list(imports_of("cache.layer", PACKAGE / "cache" / "layer.py", ast.parse(source), {"tools.cli", "tools"}))
    assert [each.target for each in found] == [target]


def test_a_planted_circle_and_private_use_are_seen():
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [["a", "b", "c"]]
    tree = ast.parse("from . import cuda\nfrom .cuda import _launch\ncuda._launch()\nself._launch\ntorch._C")
    assert [line for line, _ in sorted(private_accesses(tree, {"_launch"}))] == [2, 3, 4]
