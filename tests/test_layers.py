"""A file imports only from lower layers, and no file but its own says what a member of an axis is called."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import hizoo_lite
from hizoo_lite.config import AXES
from hizoo_lite.registry import OBJECTIVES, OPTIMIZERS, Registry

PACKAGE = Path(hizoo_lite.__file__).parent
#: From the ground up. What is in one line does not know of each other; a folder's files may.
LAYERS = (
    "errors",
    "units arrays synonyms extras",
    "process files locks branches batch",
    "base",
    "registry",
    "config device",
    "tensors philox",
    "noise",
    "memory checkpoints tasks curvature estimators report",
    "quant optimizers objectives",
    "model",
    "engine",
    "spaces",
    "plan",
    "train",
    "edge",
    "export",
    "result",
    "run",
    "integrations",
    "cli __init__",
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names.split()}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    """Dotted name inside the package, without `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path) for path in FILES}


def imported(source: str) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name.partition(".")[2] in MODULES else str(node.module) for name in names}
    return {name.partition(".")[2] or "__init__" for name in found if name.split(".")[0] == "hizoo_lite"}


def in_the_way(graph: dict[str, set[str]]) -> set[str]:
    """What is left of imports, by module, once what needs nothing that is left is out, again and again."""
    left = dict(graph)
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    return set(left)


#: Of strings that are a member's name and mean something else, by file: why.
OTHERWISE = {
    ("edge/folder.py", "lora"): "an entry of export.json",
    ("edge/graph.py", "lora"): "an entry of train.json",
    ("export/gguf/export.py", "lora"): "of a key of GGUF files",
    ("export/onnx/export.py", "lora"): "an entry of export.json",
    ("export/onnx_train/export.py", "lora"): "an entry of train.json",
    ("export/onnx/linear.py", "scales"): "an operand of a product",
}


def texts(source: str) -> set[str]:
    """The string constants of a file."""
    nodes = ast.walk(ast.parse(source))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


GRAPH = {module(path): imported(path.read_text(encoding="utf-8")) - {module(path)} for path in FILES}


def test_every_file_is_in_a_layer() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_a_file_imports_from_lower_layers_only(name: str) -> None:
    own = name.split(".")[0]
    tops = {needed.split(".")[0] for needed in GRAPH[name]} - {own}
    assert {top for top in tops if HEIGHT[top] >= HEIGHT[own]} == set()


def test_no_files_import_each_other() -> None:
    assert in_the_way(GRAPH) == set()


#: An objective is called what is measured, and that is named wherever it is measured.
NAMED_ALONE = [axis for axis in (*AXES, OPTIMIZERS) if axis is not OBJECTIVES]


def compared(source: str) -> set[str]:
    """The string constants of a file that anything called an objective is compared with."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        sides = (
            [ast.unparse(n) for n in (node.left, *node.comparators)] if isinstance(node, ast.Compare) else []
        )
        if any(side.endswith(("objective", "['objective']", ".name")) for side in sides):
            found |= set().union(*map(texts, sides))
    return found


@pytest.mark.parametrize("axis", NAMED_ALONE, ids=lambda axis: axis.axis)
def test_no_member_is_named_outside_its_folder(axis: Registry[Any]) -> None:
    folder = PACKAGE / axis.folder.partition(".")[2]
    names = set(axis) - {"none"}  # of a curvature; everywhere else it is the word for nothing
    named = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in FILES
        if folder not in path.parents
        for name in texts(path.read_text(encoding="utf-8")) & names
    }
    assert named <= OTHERWISE.keys()
    assert {name for name in OTHERWISE if name[1] in names} <= named


@pytest.mark.parametrize("axis", [*AXES, OPTIMIZERS], ids=lambda axis: axis.axis)
def test_no_members_file_is_imported_outside_its_folder(axis: Registry[Any]) -> None:
    folder = axis.folder.partition(".")[2]
    files = {f"{folder}.{name}" for name in axis}
    assert {name for name, needs in GRAPH.items() if name.split(".")[0] != folder and needs & files} == set()


def test_no_objective_is_asked_for_by_its_name() -> None:
    assert compared("if config.objective == 'f1': pass") == {"f1"}
    others = (path for path in FILES if path.parent.name != "objectives")
    assert [path for path in others if compared(path.read_text(encoding="utf-8")) & set(OBJECTIVES)] == []


def test_circles_and_imports_inside_of_functions_are_found() -> None:
    assert in_the_way({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == {"a", "b", "c", "d"}
    source = "def f():\n    from hizoo_lite.cli import main\n    from hizoo_lite import run\n    import os\n"
    assert imported(source) == {"cli", "run"}
