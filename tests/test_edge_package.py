"""The distribution without torch: its files are closed under imports, its dependencies what they ask for."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from edge_package import files

from tests.test_edge_imports import MODULES

ROOT = Path(__file__).parents[1]
#: Imported inside functions, on paths that a device never takes.
NEVER_TAKEN = {"hizoo_lite.device", "hizoo_lite.philox", "hizoo_lite.engine.residency"}
#: Of a distribution whose module is called otherwise.
MODULE_OF = {"pyyaml": "yaml", "tomli-w": "tomli_w"}


def described() -> dict:
    return tomllib.loads((ROOT / "tools" / "edge_package" / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    found = {requirement.partition(">")[0] for requirement in requirements}
    return {MODULE_OF.get(name, name.replace("-", "_")) for name in found}


def test_the_packed_files_are_closed_under_imports() -> None:
    packed, modules = files.packed(), files.python_files()
    missing = set()
    for path in packed.values():
        for name, at_once in files.imports(path, modules):
            if name in modules and name not in packed:
                assert not at_once, f"{path} imports {name}, which is not packed"
                missing.add(name)
    assert missing <= NEVER_TAKEN
    assert packed.keys() >= {name for name in MODULES if name in modules}
    assert packed.keys() >= {name for name in modules if name.startswith("hizoo_lite.edge")}


def test_nothing_that_is_packed_needs_torch_and_all_else_is_a_dependency() -> None:
    modules = files.python_files()
    at_once, later = set(), set()
    for path in files.packed().values():
        for name, now in files.imports(path, modules):
            top = name.partition(".")[0]
            if top != files.PACKAGE and top not in sys.stdlib_module_names:
                (at_once if now else later).add(top)
    assert at_once | files.ALLOWED == files.ALLOWED == names(described()["dependencies"])
    assert later - files.ALLOWED - files.OPTIONAL <= {"torch"}  # on paths of torch


def test_files_lie_where_the_package_has_them() -> None:
    for source, target in files.included().items():
        assert Path(source).is_file()
        assert Path(source) == ROOT / target
