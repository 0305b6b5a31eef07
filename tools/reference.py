"""The site's pages that nobody writes: the reference, from the package's public names; README, results, log.

    pip install -e '.[docs]' && mkdocs build --strict -f .github/mkdocs.yml

mkdocs calls `on_files` and `on_page_markdown`. The guides link as the forge shows them; here a link out of
the guides leads to the page that the site has of that file, and otherwise to the file in the repository.
"""

from __future__ import annotations

import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hizoo_lite
from hizoo_lite import config, registry

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
GUIDES = "hizoo_lite/docs"
#: Files beside the guides that are pages or pictures of the site, by where they are there.
BESIDE = {
    "index.md": "README.md",
    "contributing.md": ".github/CONTRIBUTING.md",
    "results.md": "tools/RESULTS.md",
    "log.md": "tools/LOG.md",
    "quality.png": "tools/quality.png",
    "trajectories.png": "tools/trajectories.png",
}
PLACES = {file: page for page, file in BESIDE.items()}
AXES = {
    "estimators": registry.ESTIMATORS,
    "spaces": registry.SPACES,
    "curvature": registry.CURVATURES,
    "optimizers": registry.OPTIMIZERS,
    "objectives": registry.OBJECTIVES,
}
#: The modules whose classes are the interfaces of the axes and what travels between them.
INTERFACES = ("base", "branches", "batch")
INTEGRATIONS = ("integrations.HiZOOTrainer", "integrations.HiZOOSFTTrainer")
CALLBACKS = ("train.callbacks.Arguments", "train.callbacks.State", "train.callbacks.Control")


def members(axis: registry.Registry[Any]) -> list[str]:
    """The paths of the classes of an axis."""
    classes = [line.path.replace(":", ".") for line in axis.lines.values()]
    return [
        path if "." in path else f"{axis.folder}.{name}.{path}"
        for path, name in zip(classes, axis, strict=True)
    ]


def classes(module: Any) -> list[str]:
    """The paths of a module's own public classes."""
    own = [each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__]
    names = [each.__name__ for each in own if isinstance(each, type)]
    return [f"{module.__name__}.{name}" for name in names if not name.startswith("_")]


def pages() -> dict[str, list[str]]:
    """What each page of the reference documents, as paths to import."""
    tasks: Any = import_module("hizoo_lite.tasks")
    interfaces = [path for name in INTERFACES for path in classes(import_module(f"hizoo_lite.{name}"))]
    return {
        "hizoo_lite": [f"hizoo_lite.{n}" for n in hizoo_lite.__all__ if n not in {*AXES, "tasks"}],
        **{folder: members(axis) for folder, axis in AXES.items()},
        "tasks": [f"hizoo_lite.tasks.{name}" for name in tasks.__all__],
        "integrations": [f"hizoo_lite.{path}" for path in (*INTEGRATIONS, *CALLBACKS)],
        "interfaces": interfaces,
    }


def head(page: str) -> str:
    """What stands above the documentation of a page's names: tables that are made of the registry."""
    if page in AXES:
        lines = AXES[page].lines.items()
        cells = [[f"`{name}`", f"{line.help}{paper(line.source)}", line.holds] for name, line in lines]
        return table(["name", "what it is", "keeps in memory"], cells)
    if page == "tasks":
        return "Built in: " + ", ".join(f"`{name}`" for name in import_module("hizoo_lite.tasks").names())
    if page == "hizoo_lite":
        fields = [[f"`{n}`", f"`{config.default(n)!r}`", config.help_of(n)] for n in config.settings()]
        return "The fields of `TrainConfig`:\n\n" + table(["name", "default", "what it is"], fields)
    return ""


def paper(source: str) -> str:
    """A source behind what it is of; numbers of arXiv lead there."""
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    return f" ({linked})" if source else ""


def table(titles: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def on_files(files: Files, config: Any) -> Files:
    """Add what is made and what lies beside the guides."""
    from mkdocs.structure.files import File

    for name, paths in pages().items():
        content = "\n".join([f"# {name}\n\n{head(name)}\n", *(f"::: {path}\n" for path in paths)])
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    for page, file in BESIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links between files of the repository as links between pages of the site."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    folder = posixpath.dirname(BESIDE.get(here, f"{GUIDES}/{here}"))

    def moved(found: re.Match[str]) -> str:
        target, mark, section = found[1].partition("#")
        file = posixpath.normpath(posixpath.join(folder, target))
        place = PLACES.get(file, posixpath.relpath(file, GUIDES) if file.startswith(GUIDES) else "")
        address = place or f"{config.repo_url}/blob/main/{file}"
        return f"]({address}{mark}{section})"

    return re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", moved, markdown)
