"""Which files of the package run without torch: what `hizoo_lite.edge` imports, and what that imports.

Imports inside functions count where what they lead to is free of torch itself; the others belong to paths
that a device never takes (tests/test_edge_imports.py runs the modules with torch blocked).
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGE = "hizoo_lite"
ROOT = Path(__file__).resolve().parents[2]
#: What a device has: the dependencies in pyproject.toml beside this file, as modules.
ALLOWED = {"filelock", "jinja2", "numpy", "onnxruntime", "psutil", "tokenizers", "tomli_w", "yaml"}
#: Asked for in one line where they are missing, or not on every system.
OPTIONAL = {"datasets", "dp_accounting", "pyarrow"}
#: The embedded task's rows: `--data embedded` and `--task embedded` work.
DATA = ("demo/task.toml", "demo/train.jsonl", "demo/test.jsonl", "py.typed")


def python_files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: dict[str, Path]) -> list[tuple[str, bool]]:
    """(module, whether it is imported when the file is), but for what only a type checker reads."""
    found = [(name if name in modules else outer, at_once) for name, outer, at_once in _imports(path)]
    return list(dict.fromkeys(found))


@cache
def _imports(path: Path) -> list[tuple[str, str, bool]]:
    """(module, or the name in it; the module; whether at once) of every import."""
    found = []
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), True)]
    while todo:
        node, at_once = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += [(child, at_once) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            found += [(f"{module}.{alias.name}", module, at_once) for alias in node.names]
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        todo += [(child, at_once and not inside) for child in ast.iter_child_nodes(node)]
    return found


def closure(start: set[str], modules: dict[str, Path]) -> set[str]:
    """All modules, ours and others', that are imported with those in `start`."""
    found: set[str] = set()
    todo = set(start)
    while todo:
        name = todo.pop()
        found.add(name)
        if not name.startswith(PACKAGE):
            continue
        needs = {parent for parent in [name.rpartition(".")[0]] if parent}
        if name in modules:
            needs |= {module for module, at_once in imports(modules[name], modules) if at_once}
        todo |= needs - found
    return found


def is_free(name: str, modules: dict[str, Path]) -> bool:
    """Whether a module of ours can be imported with what a device has."""
    known = ALLOWED | OPTIONAL | {PACKAGE} | sys.stdlib_module_names
    return all(module.partition(".")[0] in known for module in closure({name}, modules))


def packed(root: Path = ROOT) -> dict[str, Path]:
    """The modules that the distribution has, by name."""
    modules = python_files(root)
    found: set[str] = set()
    todo = {name for name in modules if name.startswith(f"{PACKAGE}.edge")}
    while todo:
        found |= closure(todo, modules)
        later = {
            module
            for name in found
            if name in modules
            for module, _ in imports(modules[name], modules)
            if module in modules and module not in found
        }
        todo = {module for module in later if is_free(module, modules)}
    return {name: modules[name] for name in sorted(found) if name in modules}


def included(root: Path = ROOT) -> dict[str, str]:
    """Where each file is -> where it goes in the wheel."""
    paths = [*packed(root).values(), *(root / PACKAGE / name for name in DATA)]
    return {str(path): path.relative_to(root).as_posix() for path in paths}
